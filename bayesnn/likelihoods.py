r"""What a function value says of an observation, p(y | f).

A likelihood is a frozen description; its free parameters (a learned noise, say) live beside the weights, so that they
are sampled or learned together. Every free parameter is unconstrained with a Gaussian prior, has shape (1, m), and when
stacked over draws (S, 1, m), so that it broadcasts over points. Everything here is in the model's own units: outcomes of
the real-valued likelihoods are standardised before, and reported back after.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from botorch.posteriors import Posterior
from torch import Tensor
from torch.distributions import (
    Bernoulli as _Bernoulli,
    Categorical as _Categorical,
    Distribution,
    NegativeBinomial as _NegativeBinomial,
    Normal as _Normal,
    Poisson as _Poisson,
    StudentT as _StudentT,
)

from bayesnn.configured import Configured
from bayesnn.data import check_counts, check_labels, check_targets
from bayesnn.histogram import Histogram as _Histogram
from bayesnn.posteriors import Gaussian as GaussianPosterior, function_draws
from bayesnn.predictive import ClassPredictive, Predictive

Parameters = Mapping[str, Tensor]


class ParameterPrior(NamedTuple):
    """A free parameter's Gaussian prior, and where chains and optimisers start."""

    loc: float
    scale: float
    initial: float


# Standardised noise: median 0.3 and a factor of 4.5 either way within one standard deviation. Weak: our choice. Methods
# start from a noise as large as the data's spread, so that networks don't chase noise before they have learned its size.
LOG_NOISE_PRIOR = ParameterPrior(math.log(0.3), 1.5, 0.0)


class Likelihood(Configured):
    """Base class: a distribution of y for every function value."""

    standardises: ClassVar[bool] = True
    """Whether outcomes are real-valued and standardised."""
    predictive_class: ClassVar[type[Predictive]] = Predictive

    def latent_size(self, num_outputs: int) -> int:
        """How many function values p the network must give for m outputs."""
        return num_outputs

    def check(self, Y: object, num_rows: int, like: Tensor) -> Tensor:
        """Check targets and bring them to shape (n, m). Raises TypeError or ValueError naming what was found."""
        return check_targets(Y, num_rows, like=like)

    def parameter_priors(self) -> dict[str, ParameterPrior]:
        """The Gaussian prior of each free (unconstrained) parameter."""
        return {}

    def fixed_parameters(self, outcome_scale: Tensor) -> dict[str, Tensor]:
        """Parameters the user fixed in the units of y, converted to standardised units; outcome_scale is (1, m)."""
        return {}

    def __call__(self, f: Tensor, parameters: Parameters) -> Distribution:
        """p(y | f): f (*batch, q, p) and parameters (1, m) or (S, 1, m) -> a distribution of batch shape (*batch, q, m)."""
        raise TypeError(f"{type(self).__name__} doesn't define p(y | f)")

    def log_prob(self, f: Tensor, y: Tensor, parameters: Parameters) -> Tensor:
        """log p(y | f) of each point, summed over outputs: f (*batch, q, p), y (q, m) -> (*batch, q)."""
        return self(f, parameters).log_prob(y).sum(-1)

    def function_values(self, f: Tensor) -> Tensor:
        """The m functions of interest among the p latent ones, in the units of (standardised) y where it has any."""
        return f

    def predictive(self, posterior: Posterior, parameters: Parameters) -> Predictive:
        """p(y) under a posterior of f: a mixture over its draws (256 fixed ones if it isn't made of draws)."""
        draws = function_draws(posterior, 256)
        return self.predictive_class(self(draws.values, parameters), draws.log_weights)


@dataclass(frozen=True)
class Gaussian(Likelihood):
    r"""y = f + noise, :math:`\mathcal N(y; f, \sigma^2)`.

    Args:
        noise_std: the noise's standard deviation in the units of y, one number or one for each output; None (default): it is
            sampled or learned with the weights, with log(noise_std) ~ Normal(log 0.3, 1.5) in standardised units.

    Raises:
        ValueError: if noise_std isn't positive.
    """

    noise_std: float | Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.noise_std is not None:
            _check_positive("noise_std", *_as_list(self.noise_std))

    def parameter_priors(self) -> dict[str, ParameterPrior]:
        """log_noise_std, if learned."""
        return {"log_noise_std": LOG_NOISE_PRIOR} if self.noise_std is None else {}

    def fixed_parameters(self, outcome_scale: Tensor) -> dict[str, Tensor]:
        """log_noise_std, if fixed."""
        if self.noise_std is None:
            return {}
        noise = outcome_scale.new_tensor(_as_list(self.noise_std))
        if len(noise) not in (1, outcome_scale.shape[-1]):
            raise ValueError(
                f"noise_std must be one number or one for each of the {outcome_scale.shape[-1]} outputs, found {len(noise)}"
            )
        noise = noise.expand_as(outcome_scale)
        return {"log_noise_std": (noise / outcome_scale).log()}

    def __call__(self, f: Tensor, parameters: Parameters) -> Distribution:
        """Normal(f, noise_std)."""
        return _Normal(f, parameters["log_noise_std"].exp().expand_as(f), validate_args=False)

    def log_prob(self, f: Tensor, y: Tensor, parameters: Parameters) -> Tensor:
        """log N(y; f, noise_std^2) summed over outputs, written out: samplers evaluate it thousands of times."""
        log_std = parameters["log_noise_std"]
        standardised = (y - f) * (-log_std).exp()
        return -(0.5 * standardised.square() + (log_std + 0.5 * math.log(2 * math.pi))).sum(-1)

    def predictive(self, posterior: Posterior, parameters: Parameters) -> Predictive:
        """In closed form for a Gaussian posterior: N(mean, var + noise_std^2)."""
        if not isinstance(posterior, GaussianPosterior):
            return super().predictive(posterior, parameters)
        function_var = posterior.variance.unsqueeze(-3)
        std = (function_var + (2 * parameters["log_noise_std"]).exp()).sqrt()
        return Predictive(_Normal(posterior.mean.unsqueeze(-3), std), function_var=function_var)


@dataclass(frozen=True)
class HeteroscedasticGaussian(Likelihood):
    r"""y = f_1 + noise whose size depends on x: :math:`\mathcal N(y; f_1, \sigma(f_2)^2)`.

    :math:`\sigma(f_2) = \sigma_{min} + \mathrm{softplus}(f_2 - 1)`: a network that says nothing means a noise of 0.31.

    Args:
        min_noise_std: the floor, in standardised units: keeps the density bounded where a network fits a point exactly.
    """

    min_noise_std: float = 1e-3

    def __post_init__(self) -> None:
        _check_positive("min_noise_std", self.min_noise_std)

    def latent_size(self, num_outputs: int) -> int:
        """2m: means, then raw noise."""
        return 2 * num_outputs

    def __call__(self, f: Tensor, parameters: Parameters) -> Distribution:
        """Normal(f_1, sigma(f_2))."""
        mean, raw = f.chunk(2, -1)
        return _Normal(mean, self.min_noise_std + F.softplus(raw - 1), validate_args=False)

    def function_values(self, f: Tensor) -> Tensor:
        """The means."""
        return f[..., : f.shape[-1] // 2]


@dataclass(frozen=True)
class StudentT(Likelihood):
    """y = f + heavy-tailed noise: outliers cost log(residual), not its square.

    Args:
        df: degrees of freedom; 4 (default) is the value Gelman et al., Bayesian Data Analysis, use for robust regression.
        scale: of the noise in the units of y; None (default): sampled or learned, log(scale) ~ Normal(log 0.3, 1.5).

    Raises:
        ValueError: if df or scale isn't positive.
    """

    df: float = 4.0
    scale: float | None = None

    def __post_init__(self) -> None:
        _check_positive("df", self.df)
        if self.scale is not None:
            _check_positive("scale", self.scale)

    def parameter_priors(self) -> dict[str, ParameterPrior]:
        """log_scale, if learned."""
        return {"log_scale": LOG_NOISE_PRIOR} if self.scale is None else {}

    def fixed_parameters(self, outcome_scale: Tensor) -> dict[str, Tensor]:
        """log_scale, if fixed."""
        return {} if self.scale is None else {"log_scale": (self.scale / outcome_scale).log()}

    def __call__(self, f: Tensor, parameters: Parameters) -> Distribution:
        """StudentT(df, f, scale)."""
        return _StudentT(
            torch.full_like(f, self.df), f, parameters["log_scale"].exp().expand_as(f), validate_args=False
        )


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Yes or no, for each of m outputs: P(y = 1) = sigmoid(f)."""

    standardises = False
    predictive_class = ClassPredictive

    def check(self, Y: object, num_rows: int, like: Tensor) -> Tensor:
        """0 or 1 in every entry."""
        Y = check_targets(Y, num_rows, like=like)
        wrong = (Y != 0) & (Y != 1)
        if bool(wrong.any()):
            raise ValueError(f"Y must hold 0 and 1 only, found {float(Y[wrong][0])}")
        return Y

    def __call__(self, f: Tensor, parameters: Parameters) -> Distribution:
        """Bernoulli(logits=f)."""
        return _Bernoulli(logits=f, validate_args=False)


@dataclass(frozen=True)
class Categorical(Likelihood):
    """One of K classes: P(y = k) = softmax(f)_k.

    Args:
        num_classes: K, at least 2; labels are 0 … K-1.

    Raises:
        ValueError: if num_classes is less than 2.
    """

    num_classes: int
    standardises = False
    predictive_class = ClassPredictive

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, found {self.num_classes}")

    def latent_size(self, num_outputs: int) -> int:
        """K logits."""
        return self.num_classes

    def check(self, Y: object, num_rows: int, like: Tensor) -> Tensor:
        """Labels 0 … K-1."""
        return check_labels(Y, num_rows, self.num_classes)

    def __call__(self, f: Tensor, parameters: Parameters) -> Distribution:
        """Categorical(logits=f), batch shape (*batch, q, 1)."""
        return _Categorical(logits=f.unsqueeze(-2), validate_args=False)


@dataclass(frozen=True)
class Poisson(Likelihood):
    """Counts with E[y] = exp(f)."""

    standardises = False

    def check(self, Y: object, num_rows: int, like: Tensor) -> Tensor:
        """0, 1, 2, …"""
        return check_counts(Y, num_rows, like=like)

    def __call__(self, f: Tensor, parameters: Parameters) -> Distribution:
        """Poisson(exp(f))."""
        return _Poisson(f.exp(), validate_args=False)


@dataclass(frozen=True)
class NegativeBinomial(Likelihood):
    """Overdispersed counts with E[y] = exp(f) and Var[y] = E[y] + E[y]^2 / r.

    Args:
        total_count: r; None (default): sampled or learned, log(r) ~ Normal(1, 1.5) (our choice, weak).

    Raises:
        ValueError: if total_count isn't positive.
    """

    total_count: float | None = None
    standardises = False

    def __post_init__(self) -> None:
        if self.total_count is not None:
            _check_positive("total_count", self.total_count)

    def check(self, Y: object, num_rows: int, like: Tensor) -> Tensor:
        """0, 1, 2, …"""
        return check_counts(Y, num_rows, like=like)

    def parameter_priors(self) -> dict[str, ParameterPrior]:
        """log_total_count, if learned."""
        return {"log_total_count": ParameterPrior(1.0, 1.5, 1.0)} if self.total_count is None else {}

    def fixed_parameters(self, outcome_scale: Tensor) -> dict[str, Tensor]:
        """log_total_count, if fixed."""
        if self.total_count is None:
            return {}
        return {"log_total_count": torch.full_like(outcome_scale, math.log(self.total_count))}

    def __call__(self, f: Tensor, parameters: Parameters) -> Distribution:
        """NegativeBinomial with mean exp(f) and total_count r."""
        log_count = parameters["log_total_count"]
        return _NegativeBinomial(log_count.exp().expand_as(f), logits=f - log_count, validate_args=False)


@dataclass(frozen=True)
class Histogram(Likelihood):
    """A density of any shape: f gives the logits of K buckets, the outermost with half-normal tails.

    The buckets' borders are quantiles of Normal(0, 1.5^2) in standardised units: finest where data are.

    Args:
        num_buckets: K, at least 3.

    Raises:
        ValueError: if num_buckets is less than 3.
    """

    num_buckets: int = 50

    def __post_init__(self) -> None:
        if self.num_buckets < 3:
            raise ValueError(f"num_buckets must be at least 3, found {self.num_buckets}")

    def latent_size(self, num_outputs: int) -> int:
        """K logits for each output."""
        return self.num_buckets * num_outputs

    def borders(self, like: Tensor) -> Tensor:
        """The K + 1 borders in standardised units."""
        levels = torch.linspace(0.003, 0.997, self.num_buckets + 1, dtype=torch.float64)
        return (1.5 * torch.special.ndtri(levels)).to(like)

    def __call__(self, f: Tensor, parameters: Parameters) -> Distribution:
        """Histogram(logits=f), batch shape (*batch, q, m)."""
        return _Histogram(self.borders(f), f.unflatten(-1, (-1, self.num_buckets)), validate_args=False)

    def function_values(self, f: Tensor) -> Tensor:
        """E[y | f]."""
        return self(f, {}).mean


def _as_list(value: float | Sequence[float]) -> list[float]:
    return [float(item) for item in value] if isinstance(value, Sequence) else [float(value)]


def _check_positive(name: str, *values: float) -> None:
    for value in values:
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive and finite, found {value}")
