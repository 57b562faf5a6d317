"""The modules that finite networks are made of, on (n, channels, *positions)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class OnGraphs(nn.Module):
    """A module whose forward takes each input's adjacency matrix as well."""


def call(module: nn.Module, x: Tensor, adjacency: Tensor | None) -> Tensor:
    """What a module makes of inputs, and of their adjacency matrices (n, v, v) if it takes them."""
    return module(x, adjacency) if isinstance(module, OnGraphs) else module(x)


class Chain(OnGraphs):
    """Modules one after the other."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(modules)

    def forward(self, x: Tensor, adjacency: Tensor | None) -> Tensor:
        for layer in self.layers:
            x = call(layer, x, adjacency)
        return x


class Branches(OnGraphs):
    """Modules that share their input: their sum, or their channels side by side."""

    def __init__(self, modules: Sequence[nn.Module], combine: Literal["sum", "concatenation"]) -> None:
        super().__init__()
        self.branches, self.combine = nn.ModuleList(modules), combine

    def forward(self, x: Tensor, adjacency: Tensor | None) -> Tensor:
        outputs = [call(branch, x, adjacency) for branch in self.branches]
        return torch.cat(outputs, 1) if self.combine == "concatenation" else torch.stack(outputs).sum(0)


class Aggregation(OnGraphs):
    """Sums over nodes, by a fixed adjacency matrix or by each input's own."""

    fixed: Tensor | None

    def __init__(self, fixed: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("fixed", fixed)

    def forward(self, x: Tensor, adjacency: Tensor | None) -> Tensor:
        weights = adjacency if self.fixed is None else self.fixed
        assert weights is not None
        return x @ weights.mT


class Scaled(nn.Module):
    """A linear map of parameters N(0, 1) times their scales."""

    def __init__(
        self,
        operation: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        weight: Tensor,
        bias: Tensor | None,
        weight_scale: float,
        bias_scale: float,
    ) -> None:
        super().__init__()
        self.operation, self.weight_scale, self.bias_scale = operation, weight_scale, bias_scale
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(
            x, self.weight_scale * self.weight, None if self.bias is None else self.bias_scale * self.bias
        )


class AtPositions(nn.Module):
    """The same map of channels at every position."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.movedim(1, -1)).movedim(-1, 1)


class Elementwise(nn.Module):
    """A function of each number."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Normalise(nn.Module):
    """Divide by the root mean square over channels."""

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(1, keepdim=True) + self.epsilon).rsqrt()


class Pad(nn.Module):
    """Add positions around."""

    def __init__(self, pads: Sequence[tuple[int, int]], padding: str) -> None:
        super().__init__()
        self.pads = [side for pair in reversed(pads) for side in pair]  # the last dimension comes first
        self.mode = "circular" if padding == "circular" else "constant"

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.pads, self.mode) if any(self.pads) else x


class Pool(nn.Module):
    """Means or sums over windows, each of a size and a stride."""

    def __init__(self, windows: Sequence[tuple[int, int]], mean: bool) -> None:
        super().__init__()
        self.windows, self.mean = windows, mean

    def forward(self, x: Tensor) -> Tensor:
        for index, (size, stride) in enumerate(self.windows):
            x = x.movedim(2 + index, 0)
            num = (len(x) - size) // stride + 1
            total = torch.stack([x[offset : offset + stride * (num - 1) + 1 : stride] for offset in range(size)]).sum(0)
            x = (total / size if self.mean else total).movedim(0, 2 + index)
        return x


class GlobalPool(nn.Module):
    """The mean or the sum over all positions."""

    def __init__(self, mean: bool) -> None:
        super().__init__()
        self.mean = mean

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        return flat.mean(-1) if self.mean else flat.sum(-1)


class Attention(nn.Module):
    """One head whose keys are its queries, and whose products are divided by their number."""

    def __init__(self, keys: nn.Module, values: nn.Module, outputs: nn.Module) -> None:
        super().__init__()
        self.keys, self.values, self.outputs = keys, values, outputs

    def forward(self, x: Tensor) -> Tensor:
        places = x.flatten(2).mT
        keys = self.keys(places)
        weights = torch.softmax(keys @ keys.mT / keys.shape[-1], -1)
        return self.outputs(weights @ self.values(places)).mT.unflatten(-1, x.shape[2:])


class Encoding(nn.Module):
    """Adds vectors of each position; ``root`` makes correlated ones of independent parameters."""

    root: Tensor | None

    def __init__(self, vectors: Tensor, root: Tensor | None) -> None:
        super().__init__()
        self.vectors = nn.Parameter(vectors)
        self.register_buffer("root", root)

    def forward(self, x: Tensor) -> Tensor:
        vectors = self.vectors if self.root is None else self.vectors @ self.root.mT
        return x + vectors.unflatten(-1, x.shape[2:])
