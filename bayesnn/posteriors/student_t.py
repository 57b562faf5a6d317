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
        df: degrees of freedom, a positive number, or one for each output, (m,).
        shared: one :math:`\chi^2` for all outputs of a function: outputs are uncorrelated then, but large together.

    Raises:
        ValueError: if df isn't positive, or not one number where the outputs share their :math:`\chi^2`.
    """

    def __init__(self, mean: Tensor, scale: Tensor, df: float | Tensor, shared: bool = False) -> None:
        several = isinstance(df, Tensor) and df.numel() > 1
        if not bool((torch.as_tensor(df) > 0).all()):
            raise ValueError(f"df must be positive, found {df}")
        if several and shared:
            raise ValueError(f"df must be one number for outputs that share their chi-squared variable, found {df}")
        self.loc, self.scale, self.shared = mean, scale, shared
        self.df: float | Tensor = df if several else float(df)
        self._mean_like = mean

    @property
    def base_sample_shape(self) -> torch.Size:
        # Row 0 becomes the chi-squared variable. It comes first so that a cached baseline keeps it when points follow.
        *batch, q, m = self.loc.shape
        return torch.Size([*batch, q + 1, m])

    @property
    def mean(self) -> Tensor:
        """Raises ValueError if df <= 1, where there is none."""
        if bool((torch.as_tensor(self.df) <= 1).any()):
            raise ValueError(f"a Student-t posterior with df={self.df} has no mean")
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Raises ValueError if df <= 2, where it is infinite or undefined."""
        if bool((torch.as_tensor(self.df) <= 2).any()):
            raise ValueError(f"a Student-t posterior with df={self.df} has no finite variance")
        return self.scale.diagonal(dim1=-2, dim2=-1).mT * (self.df / (self.df - 2))

    def rsample_from_base_samples(self, sample_shape: torch.Size, base_samples: Tensor) -> Tensor:
        """Functions from normals of shape (*sample_shape, *batch, 1 + q, m): (*sample_shape, *batch, q, m)."""
        first = base_samples[..., :1, :1] if self.shared else base_samples[..., :1, :]
        uniforms = scipy.stats.norm.cdf(first.detach().double().cpu().numpy())
        chi2 = torch.from_numpy(scipy.stats.chi2.ppf(uniforms, torch.as_tensor(self.df).cpu().numpy())).to(self.loc)
        root = psd_safe_cholesky(self.scale)
        normals = (root @ base_samples[..., 1:, :].mT.unsqueeze(-1)).squeeze(-1).mT
        return self.loc + normals * (self.df / chi2).sqrt()

    def affine(self, loc: Tensor, scale: Tensor) -> StudentT:
        """The posterior of ``loc + scale * f``; loc and scale are (1, m)."""
        squared = scale.square().squeeze(-2)[..., None, None]
        return StudentT(loc + scale * self.loc, squared * self.scale, self.df, self.shared)

    def outputs(self, indices: list[int]) -> StudentT:
        """The posterior of some of the outputs."""
        df = self.df[indices] if isinstance(self.df, Tensor) else self.df
        return StudentT(self.loc[..., indices], self.scale[..., indices, :, :], df, self.shared)

    def transformed(self, transform: Any, X: Tensor) -> FunctionDraws:
        """The posterior of a BoTorch ``PosteriorTransform``'s value, through draws."""
        return transformed_draws(self, transform, X)
