"""Linear maps of positions: what attention and graphs do to covariances."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from bayesnn.processes.architectures.covariance import Covariance


def as_matrices(values: Tensor, num_positions: int) -> Tensor:
    """Covariances of pairs (…, h, h', w, w') as matrices (…, h w, h' w')."""
    if num_positions == 1:
        return values
    leading, sizes = values.shape[: -2 * num_positions], values.shape[-2 * num_positions :]
    order = [*range(-2 * num_positions, 0, 2), *range(-2 * num_positions + 1, 0, 2)]
    values = values.permute(*range(len(leading)), *(values.dim() + dim for dim in order))
    return values.reshape(*leading, prod(sizes[::2]), prod(sizes[1::2]))


def as_pairs(matrices: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Matrices (…, h w, h' w') as covariances of pairs of positions of an input with these sizes, (…, h, h', w, w')."""
    if len(sizes) == 1:
        return matrices
    leading, num = matrices.shape[:-2], len(sizes)
    values = matrices.reshape(*leading, *sizes, *sizes)
    order = [len(leading) + index + place for index in range(num) for place in (0, num)]
    return values.permute(*range(len(leading)), *order)


def mixed(covariance: Covariance, left: Tensor, right: Tensor) -> Covariance:
    r"""Of outputs that are combinations of positions, :math:`L_1 K L_2^T`.

    Args:
        covariance: of pairs of positions.
        left: of the first inputs, (*batch, n, 1, p, p), over all dimensions of positions together.
        right: of the second ones, (*batch, 1, m, p, p).
    """
    num = covariance.num_positions
    sizes = tuple(covariance.first.shape[-2 * num :: 2])

    def with_itself(values: Tensor, weights: Tensor) -> Tensor:
        return as_pairs(weights @ as_matrices(values, num) @ weights.mT, sizes)

    def between(values: Tensor) -> Tensor:
        # Contracted one after the other, so that no weights are repeated for every pair of inputs.
        half = torch.einsum("...nij,...nmjk->...nmik", left.squeeze(-3), as_matrices(values, num))
        return as_pairs(torch.einsum("...mlk,...nmik->...nmil", right.squeeze(-4), half), sizes)

    first = with_itself(covariance.first, left)
    tangent = covariance.tangent
    if covariance.itself:
        tangent = None if tangent is None else with_itself(tangent, left)
        return covariance.replace(between=first, first=first, second=first, tangent=tangent)
    return covariance.replace(
        between=between(covariance.between),
        first=first,
        second=with_itself(covariance.second, right),
        tangent=None if tangent is None else between(tangent),
    )
