"""Multi-layer perceptrons, one by one or many at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bayesnn.configured import Configured

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "identity": nn.Identity,
}


class MLP(Configured, nn.Module):
    """Linear layers with an activation between them; see :func:`mlp`."""

    def __init__(
        self, in_features: int, out_features: int, hidden: Sequence[int] = (50, 50), activation: str = "tanh"
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, found {activation!r}")
        widths = [in_features, *hidden, out_features]
        if any(not isinstance(width, int) or width < 1 for width in widths):
            raise ValueError(f"in_features, out_features and hidden must be whole numbers from 1, found {widths}")
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), ACTIVATIONS[activation]()]
        self.layers = nn.Sequential(*layers[:-1])
        self.activation = activation

    def forward(self, X: Tensor) -> Tensor:
        """(*batch, in_features) -> (*batch, out_features)."""
        return self.layers(X)

    def forward_members(self, parameters: Mapping[str, Tensor], X: Tensor) -> Tensor:
        """The outputs of S networks at the same rows: parameters stacked to (S, …), X (q, d) -> (S, q, out_features).

        What ``torch.func.vmap`` of ``forward`` gives, with gradients of first order, in under half of the time: samplers
        spend their lives here.
        """
        names = [f"layers.{index}" for index, layer in enumerate(self.layers) if isinstance(layer, nn.Linear)]
        tensors = [parameters[f"{name}.{kind}"] for name in names for kind in ("weight", "bias")]
        if torch.compiler.is_compiling():  # a compiler writes the backward itself, and fuses it
            return _plain_members(X, self.activation, tensors)
        return _Members.apply(X, self.activation, *tensors)


def _plain_members(X: Tensor, activation: str, tensors: Sequence[Tensor]) -> Tensor:
    value = X.mT  # shared by all members, so that their first layers are one product
    for weight, bias in zip(tensors[:-2:2], tensors[1:-2:2], strict=True):
        value = weight @ value + bias.unsqueeze(-1)
        # torch's tanh is slow on a CPU, compiled or not.
        value = 2 * torch.sigmoid(2 * value) - 1 if activation == "tanh" else ACTIVATIONS[activation]()(value)
    return (tensors[-2] @ value + tensors[-1].unsqueeze(-1)).mT


class _Members(torch.autograd.Function):
    """Many perceptrons as batched matrix products, rows last: hidden values are (S, width, q)."""

    @staticmethod
    def forward(ctx: Any, X: Tensor, activation: str, *tensors: Tensor) -> Tensor:
        weights, biases = tensors[::2], tensors[1::2]
        num_members, q = weights[0].shape[0], X.shape[0]
        # All members see the same rows, so that their first layers are one product.
        stacked = weights[0].reshape(-1, X.shape[1])
        value = torch.addmm(biases[0].reshape(-1, 1), stacked, X.T).view(num_members, -1, q)
        before, after = [], []
        for weight, bias in zip(weights[1:], biases[1:], strict=True):
            before.append(value)
            after.append(_activate(activation, value))
            value = torch.baddbmm(bias.unsqueeze(-1), weight, after[-1])
        ctx.activation, ctx.num_hidden = activation, len(after)
        # tanh and ReLU work in place, and their derivatives need the result alone.
        ctx.save_for_backward(X, *weights, *after, *([] if activation in ("tanh", "relu") else before))
        return value.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        count = ctx.num_hidden
        X, *saved = ctx.saved_tensors
        weights, after, before = saved[: count + 1], saved[count + 1 : 2 * count + 1], saved[2 * count + 1 :]
        value, gradients = gradient.mT, []
        for layer in range(count, 0, -1):
            gradients += [value.sum(-1), value @ after[layer - 1].mT]
            value = weights[layer].mT @ value
            value = _backward(ctx.activation, value, after[layer - 1], before[layer - 1] if before else None)
        gradients += [value.sum(-1), (value.reshape(-1, X.shape[0]) @ X).view_as(weights[0])]
        wanted = ctx.needs_input_grad[0]
        return (weights[0].mT @ value).sum(0).T if wanted else None, None, *reversed(gradients)


def _activate(activation: str, value: Tensor) -> Tensor:
    if activation == "tanh":
        # torch's tanh takes four times as long as its sigmoid on a CPU; 2 sigmoid(2x) - 1 differs by rounding only.
        return value.mul_(2).sigmoid_().mul_(2).sub_(1)
    if activation == "relu":
        return value.relu_()
    return ACTIVATIONS[activation]()(value)


def _backward(activation: str, gradient: Tensor, after: Tensor, before: Tensor | None) -> Tensor:
    if activation == "tanh":
        return torch.ops.aten.tanh_backward(gradient, after)
    if activation == "relu":
        return gradient * (after > 0)
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(gradient, before)
    return torch.ops.aten.silu_backward(gradient, before) if activation == "silu" else gradient


def mlp(in_features: int, out_features: int, hidden: Sequence[int] = (50, 50), activation: str = "tanh") -> MLP:
    """A multi-layer perceptron.

    Args:
        in_features: columns of X.
        out_features: function values per point: the likelihood's ``latent_size`` (one per output for most).
        hidden: widths of the hidden layers; () gives a linear model.
        activation: "tanh" (default: smooth, so that gradients of acquisition functions and of the posterior are too),
            "relu", "gelu", "silu" or "identity".

    Raises:
        ValueError: for an unknown activation or a width below 1.
    """
    return MLP(in_features, out_features, hidden, activation)
