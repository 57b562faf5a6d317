r"""Scale mixtures of Gaussian vectors: y | s ~ N(0, s C) with a positive random s, in closed form or by importance sampling.

The last layer's weight variance :math:`s = \sigma^2` of an infinitely wide network with a prior H is such an s (Lee, Yun,
Yang and Lee 2022). For an inverse gamma :math:`H = IG(a, b)` everything is Student-t:

.. math::
    p(y) = MVT_{2a}\!\left(y; 0, \tfrac{b}{a} C\right), \qquad
    s \mid y \sim IG\!\left(a + \tfrac n2, b + \tfrac12 y^\top C^{-1} y\right).

For any other H, draws :math:`s_k` from that inverse gamma, with a and b of our choosing, get the weights
:math:`w_k = H(s_k) / IG(s_k; a, b)`, since the Gaussian factors of target and proposal are the same:

.. math:: p(y) \approx MVT_{2a}\!\left(y; 0, \tfrac{b}{a} C\right) \frac1S \sum_k w_k.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import scipy.special
import torch
from torch import Tensor

from bayesnn.configured import Configured


def log_multivariate_t(squared_distance: Tensor, log_det: Tensor, df: Tensor, size: int) -> Tensor:
    r"""log density of a multivariate t of ``size`` dimensions.

    .. math:: \ln\Gamma\tfrac{\nu+n}2 - \ln\Gamma\tfrac\nu2 - \tfrac n2 \ln(\nu\pi) - \tfrac12\ln|\Sigma|
              - \tfrac{\nu+n}2 \ln\!\left(1 + \tfrac{d^2}\nu\right)

    Args:
        squared_distance: :math:`d^2 = (y-\mu)^\top \Sigma^{-1} (y-\mu)`.
        log_det: log determinant of the scale matrix.
        df: degrees of freedom.
        size: n; with 0 the density is 1.
    """
    gammas = torch.lgamma((df + size) / 2) - torch.lgamma(df / 2)
    return (
        gammas
        - 0.5 * size * (df * math.pi).log()
        - 0.5 * log_det
        - 0.5 * (df + size) * torch.log1p(squared_distance / df)
    )


@dataclass(frozen=True)
class MixingLaw(Configured):
    """The law H of a last layer's weight variance s > 0."""

    @abstractmethod
    def log_prob(self, variance: Tensor) -> Tensor:
        """log H(s), the density of the variance (not of the standard deviation), elementwise."""

    @abstractmethod
    def icdf(self, uniform: Tensor) -> Tensor:
        """The quantile function of s."""

    @property
    @abstractmethod
    def tail_index(self) -> float:
        """The t of H(s) ~ s^(-t-1) for large s; moments of f exist below 2t."""


@dataclass(frozen=True)
class InverseGamma(MixingLaw):
    r"""IG(a, b): :math:`H(s) = b^a / \Gamma(a)\, s^{-a-1} e^{-b/s}`; the mixture is a Student-t process with 2a degrees.

    Args:
        shape: a.
        scale: b.

    Raises:
        ValueError: if one isn't positive.
    """

    shape: float = 2.0
    scale: float = 2.0

    def __post_init__(self) -> None:
        _check_positive(shape=self.shape, scale=self.scale)

    def log_prob(self, variance: Tensor) -> Tensor:
        """log IG(s; a, b)."""
        return _log_inverse_gamma(variance, variance.new_tensor(self.shape), variance.new_tensor(self.scale))

    def icdf(self, uniform: Tensor) -> Tensor:
        """b over the upper quantile of a gamma."""
        return self.scale / _gamma_icdf(1 - uniform, uniform.new_tensor(self.shape))

    @property
    def tail_index(self) -> float:
        """a."""
        return self.shape


@dataclass(frozen=True)
class HalfCauchy(MixingLaw):
    r"""A half-Cauchy standard deviation: :math:`H(s) = 1 / (\pi \gamma \sqrt s (1 + s/\gamma^2))`.

    Heavier than any Student-t with a variance: functions have no mean under the prior.

    Args:
        scale: :math:`\gamma`, the median of the standard deviation.

    Raises:
        ValueError: if it isn't positive.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_positive(scale=self.scale)

    def log_prob(self, variance: Tensor) -> Tensor:
        """log H(s)."""
        return -math.log(math.pi * self.scale) - 0.5 * variance.log() - torch.log1p(variance / self.scale**2)

    def icdf(self, uniform: Tensor) -> Tensor:
        """The square of the half-Cauchy's quantile."""
        return (self.scale * torch.tan(0.5 * math.pi * uniform)).square()

    @property
    def tail_index(self) -> float:
        """1/2."""
        return 0.5


@dataclass(frozen=True)
class BurrXII(MixingLaw):
    r"""Burr's law XII of s: :math:`H(s) = c k s^{c-1} (1 + s^c)^{-k-1}` in units of ``scale`` (Burr 1942).

    Args:
        c: the exponent near 0; 2 by default (our choice, a density that vanishes at 0).
        k: with c it gives the tail, :math:`s^{-ck-1}`; 1 by default.
        scale: the unit of s.

    Raises:
        ValueError: if one isn't positive.
    """

    c: float = 2.0
    k: float = 1.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_positive(c=self.c, k=self.k, scale=self.scale)

    def log_prob(self, variance: Tensor) -> Tensor:
        """log H(s)."""
        log_s = (variance / self.scale).log()
        log_density = math.log(self.c * self.k) + (self.c - 1) * log_s
        return log_density - (self.k + 1) * torch.nn.functional.softplus(self.c * log_s) - math.log(self.scale)

    def icdf(self, uniform: Tensor) -> Tensor:
        """The quantile function of s."""
        return self.scale * torch.expm1(-torch.log1p(-uniform) / self.k) ** (1 / self.c)

    @property
    def tail_index(self) -> float:
        """c k."""
        return self.c * self.k


class WeightedVariances(NamedTuple):
    """Draws of the variance given data, and what they say of the data.

    ``variances`` and normalised ``log_weights`` are (*batch, S), ``log_evidence`` is (*batch), and so is
    ``effective_sample_size``, :math:`1 / \\sum_k w_k^2`, at most S.
    """

    variances: Tensor
    log_weights: Tensor
    log_evidence: Tensor
    effective_sample_size: Tensor


def importance_sample(
    law: MixingLaw,
    squared_distance: Tensor,
    log_det: Tensor,
    size: int,
    num_draws: int,
    generator: torch.Generator,
    proposal: InverseGamma | None = None,
) -> WeightedVariances:
    r"""Draws from p(s | y) of y | s ~ N(0, s C) under a law of s, and log p(y): the equations above.

    The uniforms behind the draws are stratified. For a law that is an inverse gamma the result is exact: equal weights and
    the closed-form evidence. For others the proposal's a is at most the law's tail index, so that weights stay bounded for
    large s, and its b at most :math:`d^2/4`, so that their variance is finite for small s. Without data the draws come
    from the law itself. Everything is differentiable in ``squared_distance`` and ``log_det`` at fixed uniforms.

    Args:
        law: H.
        squared_distance: :math:`d^2 = y^\top C^{-1} y`, (*batch).
        log_det: log determinant of C, (*batch).
        size: n, the length of y.
        num_draws: S.
        generator: where randomness comes from.
        proposal: its a and b before data; the default is above.

    Raises:
        ValueError: if num_draws isn't positive.
    """
    if num_draws < 1:
        raise ValueError(f"num_draws must be positive, found {num_draws}")
    shape = (*squared_distance.shape, num_draws)
    order = torch.rand(shape, generator=generator, dtype=torch.float64).argsort(-1)
    jitter = torch.rand(shape, generator=generator, dtype=torch.float64)
    uniforms = ((order + jitter) / num_draws).clamp(1e-15, 1 - 1e-15).to(squared_distance)
    if size == 0:
        equal = torch.full_like(uniforms, -math.log(num_draws))
        effective = torch.full_like(squared_distance, num_draws)
        return WeightedVariances(law.icdf(uniforms), equal, torch.zeros_like(squared_distance), effective)
    distance = squared_distance.clamp_min(torch.finfo(squared_distance.dtype).tiny)
    if proposal is None and not isinstance(law, InverseGamma):
        # The median of the law sets the scale of b; half of it is about the mode of 1/s (our choice).
        median = law.icdf(uniforms.new_tensor(0.5))
        a, b = uniforms.new_tensor(law.tail_index), torch.minimum(0.5 * median, 0.25 * distance)
    else:
        before = proposal if proposal is not None else law
        assert isinstance(before, InverseGamma)
        a, b = uniforms.new_tensor(before.shape), torch.full_like(distance, before.scale)
    posterior_shape, posterior_scale = (a + size / 2).expand_as(distance).unsqueeze(-1), b + distance / 2
    variances = posterior_scale.unsqueeze(-1) / _gamma_icdf(uniforms, posterior_shape)
    log_gaussian = (
        -0.5 * size * (2 * math.pi * variances).log()
        - 0.5 * log_det.unsqueeze(-1)
        - 0.5 * squared_distance.unsqueeze(-1) / variances
    )
    log_proposal = _log_inverse_gamma(variances, posterior_shape, posterior_scale.unsqueeze(-1))
    log_ratio = law.log_prob(variances) + log_gaussian - log_proposal
    log_weights = torch.log_softmax(log_ratio, -1)
    log_evidence = torch.logsumexp(log_ratio, -1) - math.log(num_draws)
    effective = (-torch.logsumexp(2 * log_weights, -1)).exp()
    return WeightedVariances(variances, log_weights, log_evidence, effective)


def _log_inverse_gamma(variance: Tensor, shape: Tensor, scale: Tensor) -> Tensor:
    return shape * scale.log() - torch.lgamma(shape) - (shape + 1) * variance.log() - scale / variance


def _gamma_icdf(uniform: Tensor, shape: Tensor) -> Tensor:
    values = scipy.special.gammaincinv(shape.double().cpu().numpy(), uniform.double().cpu().numpy())
    return torch.from_numpy(values).to(uniform)


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive and finite, found {value}")
