r"""Priors over a network's weights, p(w).

Scales follow fan-in: a weight matrix with fan-in :math:`n` has scale ``scale / sqrt(n)``, so that a layer's output keeps
its size whatever the width (Neal, Bayesian Learning for Neural Networks, 1996); biases have scale ``bias_scale``. A
normalisation layer's gains (one-dimensional tensors named ``weight``) are centred at one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch

import scipy.special
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bayesnn.configured import Configured


@dataclass(frozen=True)
class Prior(Configured):
    """Base class: independent weights with one density, scaled by fan-in.

    Args:
        scale: of the weights, before fan-in scaling; sqrt(2) (default) keeps the variance of a ReLU network (He et al. 2015).
        bias_scale: of the biases; 1 by default (inputs are standardised).
        fan_in: divide a weight's scale by sqrt(fan-in).

    Raises:
        ValueError: if a scale isn't positive.
    """

    scale: float = math.sqrt(2)
    bias_scale: float = 1.0
    fan_in: bool = True

    def __post_init__(self) -> None:
        for name in ("scale", "bias_scale"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be positive and finite, found {getattr(self, name)}")

    def scale_of(self, name: str, shape: torch.Size) -> float:
        """The scale of one parameter tensor."""
        if len(shape) < 2:
            return self.bias_scale
        return self.scale / math.sqrt(math.prod(shape[1:])) if self.fan_in else self.scale

    def gaussian_scale(self, name: str, shape: torch.Size) -> float | None:
        """The standard deviation of this tensor's prior if it is Gaussian, else None."""
        return None

    def log_prob(self, name: str, values: Tensor) -> Tensor:
        """log p of one parameter tensor stacked over chains: (C, *shape) -> (C,)."""
        centred, scale = self._centred(name, values)
        return self._log_density(centred / scale).sum(-1) - centred.shape[-1] * math.log(scale)

    def _centred(self, name: str, values: Tensor) -> tuple[Tensor, float]:
        loc = location(name, values.shape[1:])
        flat = values.reshape(values.shape[0], -1)
        return (flat - loc if loc else flat), self.scale_of(name, values.shape[1:])

    def sample(
        self, name: str, shape: torch.Size, count: int, generator: torch.Generator, dtype: torch.dtype
    ) -> Tensor:
        """Independent draws of one parameter tensor, (count, *shape)."""
        standardised = self._standard(torch.Size([count, *shape]), generator).to(dtype)
        return location(name, shape) + self.scale_of(name, shape) * standardised

    def _log_density(self, standardised: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} has no density")

    def _standard(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        raise TypeError(f"{type(self).__name__} can't be drawn from")


def location(name: str, shape: torch.Size) -> float:
    """Where a parameter's prior is centred: 1 for a normalisation layer's gains, else 0."""
    return 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0


@dataclass(frozen=True)
class Normal(Prior):
    """w ~ Normal(0, scale^2 / fan-in)."""

    def gaussian_scale(self, name: str, shape: torch.Size) -> float | None:
        """The standard deviation."""
        return self.scale_of(name, shape)

    def log_prob(self, name: str, values: Tensor) -> Tensor:
        """log p of one parameter tensor stacked over chains: (C, *shape) -> (C,). With few operations, for samplers."""
        centred, scale = self._centred(name, values)
        constant = centred.shape[-1] * (math.log(scale) + 0.5 * math.log(2 * math.pi))
        return -0.5 / scale**2 * centred.square().sum(-1) - constant

    def _standard(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Laplace(Prior):
    """w ~ Laplace(0, scale / sqrt(fan-in)): a sharp peak, exponential tails."""

    def _log_density(self, standardised: Tensor) -> Tensor:
        return -standardised.abs() - math.log(2)

    def _standard(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        uniform = torch.rand(2, *shape, generator=generator, dtype=torch.float64)
        return torch.log1p(-uniform[0]) - torch.log1p(-uniform[1])  # a difference of two exponential variables


@dataclass(frozen=True)
class StudentT(Prior, saved_as="StudentTPrior"):
    """w ~ Student-t with ``df`` degrees of freedom (4 by default): heavier tails than the Gaussian."""

    df: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.df) and self.df > 0):
            raise ValueError(f"df must be positive and finite, found {self.df}")

    def _log_density(self, standardised: Tensor) -> Tensor:
        half = self.df / 2
        constant = math.lgamma(half + 0.5) - math.lgamma(half) - 0.5 * math.log(self.df * math.pi)
        return constant - (half + 0.5) * torch.log1p(standardised.square() / self.df)

    def _standard(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        normal = torch.randn(shape, generator=generator, dtype=torch.float64)
        gamma = torch._standard_gamma(torch.full(shape, self.df / 2, dtype=torch.float64), generator=generator)
        return normal * (self.df / (2 * gamma)).sqrt()


@dataclass(frozen=True)
class Cauchy(Prior):
    """w ~ Cauchy(0, scale / sqrt(fan-in)): Student-t with one degree of freedom."""

    def _log_density(self, standardised: Tensor) -> Tensor:
        return -torch.log1p(standardised.square()) - math.log(math.pi)

    def _standard(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        return (math.pi * (torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5)).tan()


@dataclass(frozen=True)
class Horseshoe(Prior):
    r"""The horseshoe with its local scales integrated out: infinite peak at zero, Cauchy-like tails.

    :math:`w = \tau \lambda z`, :math:`\lambda \sim C^+(0, 1)`, :math:`z \sim N(0, 1)`, :math:`\tau` = scale / sqrt(fan-in), so

    .. math:: p(w) = \frac{e^{x} E_1(x)}{\tau \sqrt{2 \pi^3}}, \quad x = \frac{w^2}{2 \tau^2}

    (Carvalho, Polson, Scott 2010; E_1 is the exponential integral). The density is singular at exactly zero: samplers
    follow it, but a MAP estimate has no meaning.
    """

    def _log_density(self, standardised: Tensor) -> Tensor:
        return _LogScaledExponentialIntegral.apply(0.5 * standardised.square()) - 0.5 * math.log(2 * math.pi**3)

    def _standard(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        local = (0.5 * math.pi * torch.rand(shape, generator=generator, dtype=torch.float64)).tan()
        return local * torch.randn(shape, generator=generator, dtype=torch.float64)


class _LogScaledExponentialIntegral(torch.autograd.Function):
    """log(e^x E_1(x)) for x > 0, with derivative 1 - 1 / (x e^x E_1(x))."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        x64 = x.detach().double().clamp_min(torch.finfo(x.dtype).tiny)
        small = x64.clamp_max(50.0)
        exact = torch.from_numpy(scipy.special.exp1(small.cpu().numpy())).to(small) * small.exp()
        # Beyond 50 the asymptotic series sum_k (-1)^k k! / x^(k+1) is exact to 1e-13 with ten terms.
        series = torch.zeros_like(x64)
        for k in range(10, -1, -1):
            series = (1 - (k + 1) / x64 * series) if k < 10 else torch.ones_like(x64)
        value = torch.where(x64 < 50.0, exact, series / x64)
        ctx.save_for_backward(x64, value)
        return value.log().to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        x64, value = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad * (1 - 1 / (x64 * value)).to(grad.dtype)


@dataclass(frozen=True)
class PerLayer(Configured):
    """Different priors for different parameters, chosen by name.

    Args:
        layers: pattern (as in a shell: ``"0.*"``, ``"*.bias"``) to prior; the first that matches is used.
        default: the prior of every other parameter.
    """

    layers: Mapping[str, Prior]
    default: Prior = field(default_factory=Normal)

    def of(self, name: str) -> Prior:
        """The prior of one parameter."""
        return next((prior for pattern, prior in self.layers.items() if fnmatch(name, pattern)), self.default)

    def gaussian_scale(self, name: str, shape: torch.Size) -> float | None:
        """The standard deviation of this tensor's prior if it is Gaussian, else None."""
        return self.of(name).gaussian_scale(name, shape)

    def log_prob(self, name: str, values: Tensor) -> Tensor:
        """log p of one parameter tensor stacked over chains: (C, *shape) -> (C,)."""
        return self.of(name).log_prob(name, values)

    def sample(
        self, name: str, shape: torch.Size, count: int, generator: torch.Generator, dtype: torch.dtype
    ) -> Tensor:
        """Independent draws of one parameter tensor, (count, *shape)."""
        return self.of(name).sample(name, shape, count, generator, dtype)
