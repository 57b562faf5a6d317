"""Marginals of any shape, tied together by a Gaussian copula."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal

from bayesnn.distributions import affine, from_normals
from bayesnn.histogram import Histogram
from bayesnn.posteriors.draws import FunctionDraws, transformed_draws
from bayesnn.posteriors.shared_normals import SharedNormalPosterior


class Copula(SharedNormalPosterior):
    r"""Marginals of any shape tied together by a Gaussian copula: :math:`f_j = F_j^{-1}(\Phi((L\epsilon)_j))`.

    The draws are differentiable in the marginals' parameters and in L. Rows of L must have unit norm. Since L is lower
    triangular, points that follow never change the draws at the points before them. Outputs are independent.

    Args:
        marginals: a Histogram or Normal of batch shape (*batch, q, m).
        root: L for each output, (*batch, m, q, q), or what finds it when the first draw needs it.
    """

    def __init__(self, marginals: Distribution, root: Tensor | Callable[[], Tensor]) -> None:
        self.marginals, self._root = marginals, root

    @cached_property
    def _mean_like(self) -> Tensor:  # type: ignore[override]
        return self.marginals.mean

    @cached_property
    def root(self) -> Tensor:
        """L for each output, (*batch, m, q, q)."""
        return self._root if isinstance(self._root, Tensor) else self._root()

    @property
    def mean(self) -> Tensor:
        return self.marginals.mean

    @property
    def variance(self) -> Tensor:
        return self.marginals.variance

    def rsample_from_base_samples(self, sample_shape: torch.Size, base_samples: Tensor) -> Tensor:
        """Functions from normals of shape (*sample_shape, *batch, q, m)."""
        normals = (self.root @ base_samples.to(self.root).mT.unsqueeze(-1)).squeeze(-1).mT
        return from_normals(self.marginals, normals)

    def affine(self, loc: Tensor, scale: Tensor) -> Copula:
        """The posterior of ``loc + scale * f``; loc and scale are (1, m)."""
        return Copula(affine(self.marginals, loc, scale), lambda: self.root)

    def outputs(self, indices: list[int]) -> Copula:
        """The posterior of some of the outputs."""
        return Copula(of_outputs(self.marginals, indices), lambda: self.root[..., indices, :, :])

    def transformed(self, transform: Any, X: Tensor) -> FunctionDraws:
        """The posterior of a BoTorch ``PosteriorTransform``'s value, through draws."""
        return transformed_draws(self, transform, X)


def of_outputs(marginals: Distribution, indices: list[int]) -> Histogram | Normal:
    """Those of a Histogram or Normal of batch shape (*batch, q, m) that belong to some of the outputs."""
    if isinstance(marginals, Normal):
        return Normal(marginals.loc[..., indices], marginals.scale[..., indices])
    own: Any = marginals
    borders = own.borders if own.borders.dim() == 1 else own.borders[..., indices, :]
    tails = own.tail_scale if own.tail_scale.dim() == 1 else own.tail_scale[..., indices, :]
    return Histogram.of_log_probs(borders, own.logits[..., indices, :], tails)


def correlation_root(correlation: Tensor) -> Tensor:
    """A lower-triangular L with unit rows and L L^T close to a correlation matrix that needn't be positive definite.

    Cholesky's algorithm, where a pivot that rounding or an inconsistent matrix has made non-positive counts as zero.
    Row j depends on the first j rows and columns only: points that follow never change the points before them. Only the
    lower triangle is read.

    Args:
        correlation: (*batch, q, q), ones on the diagonal.
    """
    rest, columns = correlation.tril(), []
    tolerance = 1e-6
    for k in range(correlation.shape[-1]):
        pivot = rest[..., k, k]
        alive = (pivot > tolerance)[..., None]
        safe = torch.where(alive, pivot[..., None], torch.ones_like(pivot[..., None]))
        column = torch.where(alive, rest[..., :, k] / safe.sqrt(), torch.zeros_like(rest[..., :, k]))
        column = torch.where(
            torch.arange(column.shape[-1], device=column.device) >= k, column, torch.zeros_like(column)
        )
        columns.append(column)
        rest = rest - column[..., :, None] * column[..., None, :]
    root = torch.stack(columns, -1)
    norm = root.square().sum(-1, keepdim=True)
    return root / torch.where(norm > tolerance, norm, torch.ones_like(norm)).sqrt()
