"""Multivariate Student-t posteriors."""

from __future__ import annotations

from typing import Any

import scipy.stats
import torch
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Tensor

from bayesnn.posteriors.draws import FunctionDraws, transformed_draws
from bayesnn.posteriors.shared_normals import SharedNormalPosterior


class StudentT(SharedNormalPosterior):
    r"""A joint multivariate t, :math:`f = \mu + L z \sqrt{\nu / \chi^2_\nu}`, one :math:`\chi^2` per function and output.

    Args:
        mean: (*batch, q, m).
        scale: scale matrices (*batch, m, q, q): the covariance is ``scale * df / (df - 2)``.
        df: degrees of freedom, a positive number.

    Raises:
        ValueError: if df isn't positive.
    """

    def __init__(self, mean: Tensor, scale: Tensor, df: float) -> None:
        if not df > 0:
            raise ValueError(f"df must be positive, found {df}")
        self.loc, self.scale, self.df = mean, scale, float(df)
        self._mean_like = mean

    @property
    def base_sample_shape(self) -> torch.Size:
        # Row 0 becomes the chi-squared variable. It comes first so that a cached baseline keeps it when points follow.
        *batch, q, m = self.loc.shape
        return torch.Size([*batch, q + 1, m])

    @property
    def mean(self) -> Tensor:
        """Raises ValueError if df <= 1, where there is none."""
        if self.df <= 1:
            raise ValueError(f"a Student-t posterior with df={self.df} has no mean")
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Raises ValueError if df <= 2, where it is infinite or undefined."""
        if self.df <= 2:
            raise ValueError(f"a Student-t posterior with df={self.df} has no finite variance")
        return self.scale.diagonal(dim1=-2, dim2=-1).mT * (self.df / (self.df - 2))

    def rsample_from_base_samples(self, sample_shape: torch.Size, base_samples: Tensor) -> Tensor:
        """Functions from normals of shape (*sample_shape, *batch, 1 + q, m): (*sample_shape, *batch, q, m)."""
        uniforms = scipy.stats.norm.cdf(base_samples[..., :1, :].double().cpu().numpy())
        chi2 = torch.from_numpy(scipy.stats.chi2.ppf(uniforms, self.df)).to(self.loc)
        root = psd_safe_cholesky(self.scale)
        normals = (root @ base_samples[..., 1:, :].mT.unsqueeze(-1)).squeeze(-1).mT
        return self.loc + normals * (self.df / chi2).sqrt()

    def affine(self, loc: Tensor, scale: Tensor) -> StudentT:
        """The posterior of ``loc + scale * f``; loc and scale are (1, m)."""
        squared = scale.square().squeeze(-2)[..., None, None]
        return StudentT(loc + scale * self.loc, squared * self.scale, self.df)

    def outputs(self, indices: list[int]) -> StudentT:
        """The posterior of some of the outputs."""
        return StudentT(self.loc[..., indices], self.scale[..., indices, :, :], self.df)

    def transformed(self, transform: Any, X: Tensor) -> FunctionDraws:
        """The posterior of a BoTorch ``PosteriorTransform``'s value, through draws."""
        return transformed_draws(self, transform, X)
