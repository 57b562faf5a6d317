r"""Scale mixtures of Gaussian vectors: y | s ~ N(0, s C) with a positive random s, in closed form or by importance sampling.

The last layer's weight variance :math:`s = \sigma^2` of an infinitely wide network with a prior H is such an s (Lee, Yun,
Yang and Lee 2022). For an inverse gamma :math:`H = IG(a, b)` everything is Student-t:

.. math::
    p(y) = MVT_{2a}\!\left(y; 0, \tfrac{b}{a} C\right), \qquad
    s \mid y \sim IG\!\left(a + \tfrac n2, b + \tfrac12 y^\top C^{-1} y\right).

For any other H that inverse gamma, with a and b of our choosing, is a proposal q, and draws :math:`s_k` from it have weights:

.. math:: p(y) \approx \frac1S \sum_k w_k, \qquad w_k = H(s_k)\, N(y; 0, s_k C) / q(s_k).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import scipy.special
import torch
from torch import Tensor

from bayesnn.checks import check_fields, positive
from bayesnn.configured import Configured

SERIES_FROM = 16.0  # arguments from which four terms of Stirling's series are exact to rounding


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
    return (
        _log_gamma_ratio(df / 2, size / 2)
        - 0.5 * size * math.log(2 * math.pi)
        - 0.5 * log_det
        - 0.5 * (df + size) * torch.log1p(squared_distance / df)
    )


def _log_gamma_ratio(start: Tensor, step: float) -> Tensor:
    """log(Gamma(z + h) / (Gamma(z) z^h)), which tends to 0 for large z: there by Stirling's series, without large terms."""
    plain = torch.lgamma(start + step) - torch.lgamma(start) - step * start.log()
    z = start.clamp_min(SERIES_FROM)
    series = (z + step - 0.5) * torch.log1p(step / z) - step + _stirling(z + step) - _stirling(z)
    return torch.where(start < SERIES_FROM, plain, series)


def _stirling(z: Tensor) -> Tensor:
    square = z.reciprocal().square()
    return (1 / 12 - square * (1 / 360 - square * (1 / 1260 - square / 1680))) / z


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

    @property
    @abstractmethod
    def head_index(self) -> float:
        """The t of H(s) ~ s^(-t-1) for small s, a negative number."""


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
        check_fields(self, positive, "shape", "scale")

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

    @property
    def head_index(self) -> float:
        """Minus infinity: the density vanishes faster than any power."""
        return -math.inf


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
        check_fields(self, positive, "scale")

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

    @property
    def head_index(self) -> float:
        """-1/2."""
        return -0.5


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
        check_fields(self, positive, "c", "k", "scale")

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

    @property
    def head_index(self) -> float:
        """-c."""
        return -self.c


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

    For a law that is an inverse gamma the result is exact: equal weights and the closed-form evidence. For others the
    proposal is a mixture with equal shares (weights against the whole mixture: Veach and Guibas 1995) of the law itself,
    which is near the posterior where data say little, and of the posteriors that power laws like H's two tails would give,
    :math:`IG(t + n/2, d^2/2)` for :math:`H(s) \sim s^{-t-1}`; the one for large s has :math:`b = d^2/4` more at most. The
    uniforms behind the draws are stratified, and one set serves the whole batch.

    Everything is differentiable in ``squared_distance`` and ``log_det`` at fixed uniforms.

    Args:
        law: H.
        squared_distance: :math:`d^2 = y^\top C^{-1} y`, (*batch).
        log_det: log determinant of C, (*batch).
        size: n, the length of y; without data all draws come from the law.
        num_draws: S.
        generator: where randomness comes from.
        proposal: an a and b before data for all draws instead.

    Raises:
        ValueError: if num_draws isn't positive.
    """
    if num_draws < 1:
        raise ValueError(f"num_draws must be positive, found {num_draws}")
    if size == 0:
        equal = squared_distance.new_full((*squared_distance.shape, num_draws), -math.log(num_draws))
        effective = torch.full_like(squared_distance, num_draws)
        unseen = law.icdf(_strata(squared_distance, num_draws, generator)).expand_as(equal)
        return WeightedVariances(unseen, equal, torch.zeros_like(squared_distance), effective)
    # Zero outcomes have no evidence under a law that doesn't vanish at 0; they get a large one.
    distance = squared_distance.clamp_min(torch.finfo(squared_distance.dtype).tiny)
    before = law if proposal is None and isinstance(law, InverseGamma) else proposal
    components: list[tuple[Tensor, Tensor]]  # a and b after the data
    if before is not None:
        components = [(distance.new_tensor(before.shape + size / 2), (before.scale + distance / 2).unsqueeze(-1))]
    else:
        b = torch.minimum(0.5 * law.icdf(distance.new_tensor(0.5)), 0.25 * distance)
        components = [(distance.new_tensor(law.tail_index + size / 2), (b + distance / 2).unsqueeze(-1))]
        if law.head_index + size / 2 > 0:
            components.append((distance.new_tensor(law.head_index + size / 2), (distance / 2).unsqueeze(-1)))
    parts = len(components) + (before is None)
    counts = [(num_draws + part) // parts for part in range(parts)][::-1]
    pairs = zip(components, counts, strict=False)
    draws = [scale / _gamma_icdf(_strata(distance, count, generator), shape) for (shape, scale), count in pairs]
    if before is None:
        own = law.icdf(_strata(distance, counts[-1], generator))
        draws.append(own.expand(*distance.shape, counts[-1]))
    variances = torch.cat(draws, -1)
    log_law = law.log_prob(variances)
    densities = [_log_inverse_gamma(variances, shape, scale) for shape, scale in components]
    densities += [log_law] if before is None else []
    shares = torch.tensor(counts).to(variances).log() - math.log(num_draws)
    log_proposal = torch.logsumexp(torch.stack(densities, -1) + shares, -1)
    log_gaussian = -0.5 * (
        size * (2 * math.pi * variances).log() + log_det.unsqueeze(-1) + squared_distance.unsqueeze(-1) / variances
    )
    log_ratio = log_law + log_gaussian - log_proposal
    log_weights = torch.log_softmax(log_ratio, -1)
    log_evidence = torch.logsumexp(log_ratio, -1) - math.log(num_draws)
    return WeightedVariances(variances, log_weights, log_evidence, (-torch.logsumexp(2 * log_weights, -1)).exp())


def _strata(like: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """One uniform in each of ``count`` equal parts of (0, 1), in random order, (count,): the same for all of a batch."""
    order = torch.randperm(count, generator=generator)
    within = torch.rand(count, generator=generator, dtype=torch.float64)
    return ((order + within) / count).clamp(1e-15, 1 - 1e-15).to(like)


def _log_inverse_gamma(variance: Tensor, shape: Tensor, scale: Tensor) -> Tensor:
    return shape * scale.log() - torch.lgamma(shape) - (shape + 1) * variance.log() - scale / variance


def _gamma_icdf(uniform: Tensor, shape: Tensor) -> Tensor:
    values = scipy.special.gammaincinv(shape.double().cpu().numpy(), uniform.double().cpu().numpy())
    return torch.from_numpy(values).to(uniform)
