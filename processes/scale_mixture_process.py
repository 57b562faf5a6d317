"""Regression with an infinitely wide network whose last layer's variance has any law."""

from __future__ import annotations

import math
from typing import Any

import torch
from botorch.posteriors import Posterior
from torch import Tensor
from torch.distributions import Normal

from bayesnn.checks import count
from bayesnn.likelihoods import Gaussian
from bayesnn.posteriors import ScaleMixture
from bayesnn.predictive import Predictive
from bayesnn.processes.evidence import Quadratic
from bayesnn.processes.kernels import KernelFactory
from bayesnn.processes.scale_mixtures import HalfCauchy, MixingLaw, WeightedVariances, importance_sample
from bayesnn.processes.shared_scale import Conditioned, MixturePrior, gaussian_marginals
from bayesnn.processes.student_t import StudentTProcess


class InfinitePredictive(Predictive):
    """A prediction whose variance doesn't exist."""

    @property
    def aleatoric(self) -> Tensor:
        """Infinite."""
        return torch.full_like(super().aleatoric, math.inf)

    @property
    def epistemic(self) -> Tensor:
        """Infinite."""
        return torch.full_like(super().epistemic, math.inf)


class ScaleMixtureProcess(StudentTProcess):
    r"""A :class:`StudentTProcess` with any law H in place of the inverse gamma, by importance sampling.

    .. math:: y \mid s \sim N(c, s \Sigma), \quad s \sim H, \quad \Sigma = r K + \eta^2 I, \qquad
              p(f_* \mid y) \approx \sum_k w_k N(\mu_*, s_k S_*).

    The mean is the Gaussian process's again. log p(y), the hyperparameters' objective, and the weights come from
    :func:`bayesnn.processes.scale_mixtures.importance_sample` with fixed uniforms: no randomness from call to call. With
    several outputs a prediction pairs equally weighted draws of their scales at random.

    Args:
        depth, activation, likelihood, optimise, kernel, restart: as for :class:`StudentTProcess`.
        mixing: H, of the variance in units of r; the half-Cauchy standard deviation by default.
        num_draws: S.

    Raises:
        ValueError: for an unknown activation, or a depth or number of draws below 1.
        TypeError: if the likelihood isn't Gaussian, ``mixing`` no law, or the number of draws no integer.
    """

    def __init__(
        self,
        depth: int = 3,
        activation: str = "relu",
        likelihood: Gaussian | None = None,
        optimise: bool = True,
        kernel: KernelFactory | None = None,
        mixing: MixingLaw | None = None,
        num_draws: int = 512,
        restart: bool = True,
    ) -> None:
        # The shape counts for nothing here but has to be there.
        super().__init__(depth, activation, likelihood, optimise, kernel, shape=1.0, restart=restart)
        if mixing is not None and not isinstance(mixing, MixingLaw):
            raise TypeError(f"mixing must be a mixing law, HalfCauchy() say, found {mixing!r}")
        self.mixing = HalfCauchy() if mixing is None else mixing
        self.num_draws = count("num_draws", num_draws)

    def _weighted(self, known: Conditioned | Quadratic) -> WeightedVariances:
        generator = torch.Generator().manual_seed(0)
        distance, log_det = torch.broadcast_tensors(known.squared_distance, known.log_det)
        return importance_sample(self.mixing, distance, log_det, known.size, self.num_draws, generator)

    def _log_evidence(self, prior: MixturePrior, known: Conditioned | Quadratic) -> Tensor:
        return self._weighted(known).log_evidence

    @property
    def _has_variance(self) -> bool:
        return self.mixing.tail_index + self._known.size / 2 > 1

    def _mixed(self, loc: Tensor, covariance: Tensor, dtype: torch.dtype) -> Posterior:
        loc, covariance = loc.to(dtype), covariance.to(dtype)
        found = self._weighted(self._known)
        shape = (*loc.shape[:-2], loc.shape[-1], self.num_draws)
        draws, log_weights = (values.to(loc).expand(shape) for values in (found.variances, found.log_weights))
        return ScaleMixture(loc, covariance, draws, log_weights, self._has_variance)

    def _observations(self, latent: Posterior, X: Tensor) -> Any:
        assert isinstance(latent, ScaleMixture)
        noise = torch.diag_embed(self._prior.noise_var.unsqueeze(-1).expand(latent.scale.shape[-3:-1])).to(latent.scale)
        return ScaleMixture(
            latent.loc, latent.scale + noise, latent.variances, latent.weights.log(), latent.has_variance
        )

    def _predictive(self, X: Tensor) -> Predictive:
        loc, var = (values.unsqueeze(-3) for values in gaussian_marginals(self._prior, self._known, X.double()))
        found, log_weights = self._weighted(self._known), None
        if loc.shape[-1] == 1:
            scales, log_weights = found.variances, found.log_weights.squeeze(-2).to(X)
        else:
            shape = (*loc.shape[:-3], loc.shape[-1], self.num_draws)
            generator = torch.Generator().manual_seed(1)
            order = torch.rand(shape[-2:], generator=generator).argsort(-1).expand(shape)
            draws, log_draws = found.variances.expand(shape), found.log_weights.expand(shape)
            mixture = ScaleMixture(loc.squeeze(-3), loc.new_zeros(()), draws, log_draws)
            scales = mixture.quantile_of_scale((order.double() + 0.5) / self.num_draws)
        factor = scales.mT.unsqueeze(-2)  # (*batch, S, 1, m)
        std = (factor * (var + self._prior.noise_var)).sqrt()
        components = Normal(loc.expand_as(std).to(X), std.to(X), validate_args=False)
        kind = Predictive if self._has_variance else InfinitePredictive
        return kind(components, log_weights, function_var=(factor * var).to(X))
