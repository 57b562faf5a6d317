r"""What the layers of an infinitely wide network act on: covariances between inputs, and the tangent kernel beside them.

For two sets of inputs, the covariance of every pair, and of every input with itself: an activation's dual needs all three,

.. math:: K_{12} = E[f(x_1) f(x_2)], \qquad K_{11} = E[f(x_1)^2], \qquad K_{22} = E[f(x_2)^2].

Where inputs have positions (pixels, nodes of a graph), there is a covariance for each position, or for each pair of
positions: those of different positions matter only if a later layer mixes positions after a nonlinearity (pooling other than
strided, attention, graphs), and cost memory with the square of their number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Covariance:
    """Covariances of n and m inputs at one layer; all tensors broadcast against (*batch, n, m, *positions).

    Args:
        between: K_12, (*batch, n, m, *positions). Positions are () for vectors, (h, w) for images whose positions are
            independent of each other for all that follows, (h, h', w, w') for pairs of positions.
        first: K_11, (*batch, n, 1, *positions).
        second: K_22, (*batch, 1, m, *positions).
        tangent: the tangent kernel between the inputs, like ``between``; None where it isn't wanted.
        num_positions: how many dimensions of positions an input has: 0 for vectors, 1 for sequences and graphs, 2 for images.
        pairs: whether covariances are of pairs of positions.
        itself: whether every pair is an input with itself, so that ``between``, ``first`` and ``second`` are the same. Duals
            are exact there.
        gaussian: whether channels are Gaussian with these covariances, as after a layer with weights: what duals of
            activations assume.
        graphs: adjacency matrices of both sets, (*batch, n, 1, v, v) and (*batch, 1, m, v, v), where inputs are graphs.
    """

    between: Tensor
    first: Tensor
    second: Tensor
    tangent: Tensor | None = None
    num_positions: int = 0
    pairs: bool = False
    itself: bool = False
    gaussian: bool = False
    graphs: tuple[Tensor, Tensor] | None = None

    def replace(self, **changes: object) -> Covariance:
        """The same with other fields."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    @property
    def num_trailing(self) -> int:
        """How many dimensions of a tensor are positions."""
        return self.num_positions * (2 if self.pairs else 1)

    def map(self, linear: Callable[[Tensor], Tensor], **changes: object) -> Covariance:
        """Apply what is linear in covariances to all of them, the tangent kernel included."""
        if self.itself:
            first = linear(self.first)
            tangent = None if self.tangent is None else linear(self.tangent)
            return self.replace(between=first, first=first, second=first, tangent=tangent, **changes)
        return self.replace(
            between=linear(self.between),
            first=linear(self.first),
            second=linear(self.second),
            tangent=None if self.tangent is None else linear(self.tangent),
            **changes,
        )

    def broadcast(self, parameter: Tensor) -> Tensor:
        """A parameter (*batch) such that it broadcasts against the covariances."""
        return parameter.reshape(*parameter.shape, *([1] * (2 + self.num_trailing)))


def at_equal_positions(values: Tensor, num_positions: int) -> Tensor:
    """Covariances of pairs of positions (…, h, h', w, w') where both are the same, (…, h, w): a view."""
    for done in range(num_positions):  # each diagonal's dimension goes to the end
        pair = -2 * (num_positions - done) - done
        values = values.diagonal(dim1=pair, dim2=pair + 1)
    return values


def spread(values: Tensor, num_positions: int, place: int) -> Tensor:
    """Values at positions (…, h, w) so that they broadcast over pairs: (…, h, 1, w, 1), or (…, 1, h, 1, w) for place 1."""
    if num_positions == 0:
        return values
    sizes = [(size, 1) if place == 0 else (1, size) for size in values.shape[-num_positions:]]
    return values.reshape(*values.shape[:-num_positions], *(size for pair in sizes for size in pair))


def of_inputs(x1: Tensor, x2: Tensor, num_positions: int = 0, pairs: bool = False, tangent: bool = False) -> Covariance:
    r"""Of inputs before the first layer: :math:`\frac1C \sum_c x_{1,c}\, x_{2,c}` over their channels.

    Args:
        x1: (*batch, n, C, *positions); vectors have channels only.
        x2: (*batch, m, C, *positions).
        num_positions: how many dimensions of positions.
        pairs: whether pairs of positions are wanted.
        tangent: whether a tangent kernel is wanted; it is zero before the first layer.
    """
    between = _products(x1, x2, "nm", num_positions, pairs)
    num_trailing = num_positions * (2 if pairs else 1)
    first = _products(x1, x1, "nn", num_positions, pairs).unsqueeze(-1 - num_trailing)
    second = _products(x2, x2, "mm", num_positions, pairs).unsqueeze(-2 - num_trailing)
    return Covariance(between, first, second, torch.zeros_like(between) if tangent else None, num_positions, pairs)


def of_each_with_itself(
    x1: Tensor, x2: Tensor | None = None, num_positions: int = 0, pairs: bool = False, tangent: bool = False
) -> Covariance:
    """The same for n inputs, each with itself only: all is (*batch, n, 1, *positions).

    Equal inputs may come as two tensors, which then share the gradient.
    """
    num_trailing = num_positions * (2 if pairs else 1)
    own = _products(x1, x1 if x2 is None else x2, "nn", num_positions, pairs).unsqueeze(-1 - num_trailing)
    return Covariance(own, own, own, torch.zeros_like(own) if tangent else None, num_positions, pairs, itself=True)


def _products(x1: Tensor, x2: Tensor, rows: str, num_positions: int, pairs: bool) -> Tensor:
    here = "uvw"[:num_positions]
    there = "xyz"[:num_positions] if pairs else here
    positions = "".join(a + b if pairs else a for a, b in zip(here, there, strict=True))
    left, right = rows[0], rows[1]
    out = left if left == right else rows
    equation = f"...{left}c{here},...{right}c{there}->...{out}{positions}"
    return torch.einsum(equation, x1, x2) / x1.shape[-1 - num_positions]
