"""Gaussian posteriors of random width."""

from __future__ import annotations

from typing import Any

import torch
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Tensor

from bayesnn.posteriors.draws import FunctionDraws, transformed_draws
from bayesnn.posteriors.shared_normals import SharedNormalPosterior


class ScaleMixture(SharedNormalPosterior):
    r"""A Gaussian whose covariance has a random factor, :math:`f = \mu + \sqrt s L z`, one s per function and output.

    The law of s is that of weighted draws, with a quantile function that is piecewise linear in log s, so that draws are
    continuous in it.

    Args:
        mean: (*batch, q, m).
        scale: covariances at s = 1, (*batch, m, q, q).
        variances: draws of s, (*batch, m, S).
        log_weights: theirs, (*batch, m, S).
        has_variance: whether E[s] exists under the law that the draws stand for.
    """

    def __init__(
        self, mean: Tensor, scale: Tensor, variances: Tensor, log_weights: Tensor, has_variance: bool = True
    ) -> None:
        self.loc, self.scale, self.has_variance = mean, scale, has_variance
        self.variances, order = variances.sort(-1)
        self.weights = log_weights.softmax(-1).gather(-1, order)
        self._mean_like = mean

    @property
    def base_sample_shape(self) -> torch.Size:
        # Row 0 becomes the scale, first for the same reason as a Student-t's.
        *batch, q, m = self.loc.shape
        return torch.Size([*batch, q + 1, m])

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Raises ValueError where the scale has no mean."""
        if not self.has_variance:
            raise ValueError("this posterior's tails are so heavy that it has no finite variance")
        factor = (self.weights * self.variances).sum(-1)
        return self.scale.diagonal(dim1=-2, dim2=-1).mT * factor.unsqueeze(-2)

    def quantile_of_scale(self, uniforms: Tensor) -> Tensor:
        """Of s: uniforms (*batch, m, K) -> (*batch, m, K)."""
        middles = (self.weights.cumsum(-1) - 0.5 * self.weights).contiguous()
        last = middles.shape[-1] - 1
        right = torch.searchsorted(middles, uniforms.contiguous()).clamp(min(1, last), last)
        left = (right - 1).clamp_min(0)
        low, high = middles.gather(-1, left), middles.gather(-1, right)
        tiny = torch.finfo(middles.dtype).tiny
        share = ((uniforms - low) / (high - low).clamp_min(tiny)).clamp(0, 1)
        logs = self.variances.log()
        return torch.lerp(logs.gather(-1, left), logs.gather(-1, right), share).exp()

    def rsample_from_base_samples(self, sample_shape: torch.Size, base_samples: Tensor) -> Tensor:
        """Functions from normals of shape (*sample_shape, *batch, 1 + q, m): (*sample_shape, *batch, q, m)."""
        shape = torch.Size(sample_shape)
        # A large first normal is a narrow function, as it is a large chi-squared variable for a Student-t.
        first = torch.special.ndtr(-base_samples[..., 0, :]).to(self.loc)
        first = first.expand(*shape, *self.loc.shape[:-2], self.loc.shape[-1])
        uniforms = first.reshape(-1, *first.shape[len(shape) :]).movedim(0, -1)
        scales = self.quantile_of_scale(uniforms).movedim(-1, 0).reshape(first.shape).unsqueeze(-2)
        root = psd_safe_cholesky(self.scale)
        normals = (root @ base_samples[..., 1:, :].to(root).mT.unsqueeze(-1)).squeeze(-1).mT
        return self.loc + normals * scales.sqrt()

    def affine(self, loc: Tensor, scale: Tensor) -> ScaleMixture:
        """The posterior of ``loc + scale * f``; loc and scale are (1, m)."""
        squared = scale.square().squeeze(-2)[..., None, None]
        return self._with(loc + scale * self.loc, squared * self.scale, self.variances, self.weights)

    def outputs(self, indices: list[int]) -> ScaleMixture:
        """The posterior of some of the outputs."""
        variances, weights = (values[..., indices, :] for values in (self.variances, self.weights))
        return self._with(self.loc[..., indices], self.scale[..., indices, :, :], variances, weights)

    def transformed(self, transform: Any, X: Tensor) -> FunctionDraws:
        """The posterior of a BoTorch ``PosteriorTransform``'s value, through draws."""
        return transformed_draws(self, transform, X)

    def _with(self, loc: Tensor, scale: Tensor, variances: Tensor, weights: Tensor) -> ScaleMixture:
        return ScaleMixture(loc, scale, variances, weights.log(), self.has_variance)
