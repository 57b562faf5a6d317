"""Joint Gaussians: BoTorch's own posterior with the few operations that models need."""

from __future__ import annotations

from typing import Any

import torch
from botorch.posteriors import GPyTorchPosterior, Posterior
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from linear_operator.operators import BlockDiagLinearOperator, DiagLinearOperator, to_linear_operator
from torch import Tensor


class Gaussian(GPyTorchPosterior):
    """A joint Gaussian over the q points, and over m independent outputs: BoTorch's GPyTorchPosterior."""

    @classmethod
    def from_moments(cls, mean: Tensor, covariance: Any) -> Gaussian:
        """From means (*batch, q, m) and a covariance for each output (*batch, m, q, q), tensor or lazy."""
        covariance = to_linear_operator(covariance)
        if mean.shape[-1] == 1:
            return cls(MultivariateNormal(mean.squeeze(-1), covariance[..., 0, :, :]))
        blocks = BlockDiagLinearOperator(covariance, block_dim=-3)
        return cls(MultitaskMultivariateNormal(mean, blocks, interleaved=False))

    @property
    def variance(self) -> Tensor:
        """(*batch, q, m), as small as it is: GPyTorch would raise it to 1e-10 (1e-6 in single precision) in any units."""
        diagonal = self.distribution.lazy_covariance_matrix.diagonal(dim1=-1, dim2=-2).clamp_min(0)
        if not isinstance(self.distribution, MultitaskMultivariateNormal):
            return diagonal.unsqueeze(-1)
        q, m = self.distribution.event_shape
        if self.distribution._interleaved:
            return diagonal.unflatten(-1, (q, m))
        return diagonal.unflatten(-1, (m, q)).mT

    @property
    def output_covariance(self) -> Any:
        """The covariance over points of each output, (*batch, m, q, q), lazy."""
        return output_covariance(self.distribution)

    def affine(self, loc: Tensor, scale: Tensor) -> Gaussian:
        """The posterior of ``loc + scale * f``; loc and scale are (1, m)."""
        squared = scale.square().squeeze(-2)[..., None, None]
        mean = loc + scale * self.mean
        if mean.shape[-1] == 1:
            return Gaussian(MultivariateNormal(mean.squeeze(-1), self.distribution.lazy_covariance_matrix * squared[0]))
        return Gaussian.from_moments(mean, self.output_covariance * squared)

    def outputs(self, indices: list[int]) -> Gaussian:
        """The posterior of some of the outputs."""
        return Gaussian.from_moments(self.mean[..., indices], self.output_covariance.to_dense()[..., indices, :, :])

    def of_dtype(self, dtype: torch.dtype) -> Gaussian:
        """The same in another precision."""
        if self.mean.dtype == dtype:
            return self
        return Gaussian.from_moments(self.mean.to(dtype), self.output_covariance.to(dtype))

    def with_noise(self, noise_var: Tensor) -> Gaussian:
        """The posterior of the observations: noise variances (*batch, q, m) on the diagonal."""
        noise = DiagLinearOperator(noise_var.transpose(-1, -2).expand(*self.mean.shape[:-2], *noise_var.mT.shape[-2:]))
        return Gaussian.from_moments(self.mean, self.output_covariance + noise)

    def transformed(self, transform: Any, X: Tensor) -> Posterior:
        """The posterior of a BoTorch ``PosteriorTransform``'s value."""
        return transform(self, X=X)


def output_covariance(distribution: MultivariateNormal) -> Any:
    """Covariance over points of each output of a (multi-task) Gaussian with independent outputs, (*batch, m, q, q)."""
    covariance = distribution.lazy_covariance_matrix
    if not isinstance(distribution, MultitaskMultivariateNormal):
        return covariance.unsqueeze(-3)
    if isinstance(covariance, BlockDiagLinearOperator) and not distribution._interleaved:
        return to_linear_operator(covariance.base_linear_op.to_dense())  # without the zeros between outputs
    q, m = distribution.event_shape
    dense = covariance.to_dense().reshape(
        *covariance.batch_shape, *((q, m, q, m) if distribution._interleaved else (m, q, m, q))
    )
    equation = "...qmrm->...mqr" if distribution._interleaved else "...mqmr->...mqr"
    return to_linear_operator(torch.einsum(equation, dense))
