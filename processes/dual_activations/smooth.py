r"""Duals of smooth functions in closed form: erf, GELU, Gaussians, sinusoids, exponentials.

The first three depend on the determinant of :math:`I + t \Sigma` for the covariance matrix :math:`\Sigma` of (u, v).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesnn.processes.dual_activations.base import DualActivation, DualMoments, at_least_zero, check_finite


@dataclass(frozen=True)
class Erf(DualActivation):
    r"""phi(x) = erf(x): the arc-sine kernel (Williams 1997, eq. 11).

    .. math::
        \kappa = \frac{2}{\pi} \arcsin \frac{2c}{\sqrt{(1 + 2a)(1 + 2b)}}, \qquad
        \dot\kappa = \frac{4}{\pi \sqrt{(1 + 2a)(1 + 2b) - 4c^2}}.
    """

    name = "erf"

    def function(self, x: Tensor) -> Tensor:
        return torch.erf(x)

    def kappa(self, var1: Tensor, var2: Tensor, cov: Tensor) -> Tensor:
        _, sin, cos = _ratio(2, var1, var2, cov)
        return torch.atan2(sin, cos) * (2 / math.pi)

    def moments(self, var1: Tensor, var2: Tensor, cov: Tensor) -> DualMoments:
        (root1, root2), sin, cos = _ratio(2, var1, var2, cov)
        return DualMoments(torch.atan2(sin, cos) * (2 / math.pi), 4 / math.pi / root1 / (root2 * cos))

    def diagonal(self, var: Tensor) -> DualMoments:
        root = (1 + 4 * var).sqrt()
        return DualMoments(torch.atan2(2 * var, root) * (2 / math.pi), 4 / (math.pi * root))


@dataclass(frozen=True)
class GELU(DualActivation):
    r"""phi(x) = x times the standard normal distribution function of x (Hendrycks & Gimpel 2016), the exact one.

    With :math:`D = (1 + a)(1 + b)` and :math:`\delta = \sqrt{D - c^2}` (Tsuchida et al. 2021),

    .. math::
        \kappa = \frac{1}{2\pi} \left(\frac{c^2 + ab\, \delta^2}{D \delta} + c\, \mathrm{atan2}(\delta, -c)\right),
        \qquad
        \dot\kappa = \frac{1}{2\pi} \left(\frac{c}{\delta} \left(\frac{1}{\delta^2} + \frac{1}{1 + a}
        + \frac{1}{1 + b}\right) + \mathrm{atan2}(\delta, -c)\right).
    """

    name = "gelu"

    def function(self, x: Tensor) -> Tensor:
        return torch.nn.functional.gelu(x)

    def kappa(self, var1: Tensor, var2: Tensor, cov: Tensor) -> Tensor:
        return self._kappa(var1, var2, cov, *_ratio(1, var1, var2, cov))

    def moments(self, var1: Tensor, var2: Tensor, cov: Tensor) -> DualMoments:
        roots, sin, cos = _ratio(1, var1, var2, cov)
        root1, root2 = roots
        bracket = (1 / root1 / (root2 * cos)).square() + (1 / root1.square() + 1 / root2.square())
        kappa_dot = (sin / cos * bracket + torch.atan2(cos, -sin)) / (2 * math.pi)
        return DualMoments(self._kappa(var1, var2, cov, roots, sin, cos), kappa_dot)

    @staticmethod
    def _kappa(
        var1: Tensor, var2: Tensor, cov: Tensor, roots: tuple[Tensor, Tensor], sin: Tensor, cos: Tensor
    ) -> Tensor:
        root1, root2 = roots
        total = sin.square() / root1 / (root2 * cos) + (var1 / root1) * (var2 / root2) * cos
        return (total + cov * torch.atan2(cos, -sin)) / (2 * math.pi)

    def diagonal(self, var: Tensor) -> DualMoments:
        root, whole = (1 + 2 * var).sqrt(), 1 + var
        angle = torch.atan2(root / whole, -var / whole)
        kappa = var * (2 * (var / whole) / root + angle) / (2 * math.pi)
        return DualMoments(kappa, (var / root * (1 / (1 + 2 * var) + 2 / whole) + angle) / (2 * math.pi))


@dataclass(frozen=True)
class Gaussian(DualActivation):
    r"""phi(x) = exp(k x^2), a bell.

    .. math::
        \kappa = \frac{1}{\sqrt\Delta}, \qquad \dot\kappa = \frac{4 k^2 c}{\Delta^{3/2}}, \qquad
        \Delta = (1 - 2ka)(1 - 2kb) - 4 k^2 c^2.

    Args:
        exponent: k, negative; default -1.
    """

    exponent: float = -1.0
    name = "gaussian"

    def __post_init__(self) -> None:
        check_finite(exponent=self.exponent)
        if self.exponent >= 0:
            raise ValueError(f"exponent: found {self.exponent}, want a negative number.")

    def function(self, x: Tensor) -> Tensor:
        return torch.exp(self.exponent * x.square())

    def kappa(self, var1: Tensor, var2: Tensor, cov: Tensor) -> Tensor:
        (root1, root2), _, cos = _ratio(-2 * self.exponent, var1, var2, cov)
        return 1 / root1 / (root2 * cos)

    def moments(self, var1: Tensor, var2: Tensor, cov: Tensor) -> DualMoments:
        rate = -2 * self.exponent
        (root1, root2), sin, cos = _ratio(rate, var1, var2, cov)
        kappa = 1 / root1 / (root2 * cos)
        return DualMoments(kappa, rate * (sin / cos) * kappa.square())

    def diagonal(self, var: Tensor) -> DualMoments:
        rate = -2 * self.exponent
        kappa = (1 + 2 * rate * var).rsqrt()
        return DualMoments(kappa, rate * (rate * var / (1 + 2 * rate * var)) * kappa)


class _Sinusoid(DualActivation):
    r"""amplitude sin(frequency x + phase): with cosh and sinh of :math:`B^2 c` damped by the variances,

    .. math::
        \kappa = A^2 e^{-B^2 (a + b) / 2} \left(\cos^2 C \sinh B^2 c + \sin^2 C \cosh B^2 c\right).
    """

    amplitude: float
    frequency: float

    @property
    def _sine_phase(self) -> float:
        raise NotImplementedError

    def kappa(self, var1: Tensor, var2: Tensor, cov: Tensor) -> Tensor:
        even, tanh = self._damped(var1, var2, cov)
        return even * self._mix(tanh, 0)

    def moments(self, var1: Tensor, var2: Tensor, cov: Tensor) -> DualMoments:
        even, tanh = self._damped(var1, var2, cov)
        return DualMoments(even * self._mix(tanh, 0), self.frequency**2 * even * self._mix(tanh, math.pi / 2))

    def diagonal(self, var: Tensor) -> DualMoments:
        rate = self.frequency**2
        even = self.amplitude**2 / 2 * (1 + torch.exp(-2 * rate * var))
        tanh = torch.tanh(rate * var)
        return DualMoments(even * self._mix(tanh, 0), rate * even * self._mix(tanh, math.pi / 2))

    def _damped(self, var1: Tensor, var2: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
        """The cosh part; the sinh part is tanh times it, exact for small covariances and finite for large ones."""
        rate = self.frequency**2
        near = torch.exp(at_least_zero((var1 - cov) + (var2 - cov)) * (-rate / 2))
        far = torch.exp(at_least_zero((var1 + cov) + (var2 + cov)) * (-rate / 2))
        return self.amplitude**2 / 2 * (near + far), torch.tanh(rate * cov)

    def _mix(self, tanh: Tensor, shift: float) -> Tensor:
        phase = self._sine_phase + shift
        return math.cos(phase) ** 2 * tanh + math.sin(phase) ** 2


@dataclass(frozen=True)
class Sin(_Sinusoid):
    """phi(x) = amplitude sin(frequency x + phase).

    Args:
        amplitude: default 1.
        frequency: in radians per unit; default 1.
        phase: in radians; default 0.
    """

    amplitude: float = 1.0
    frequency: float = 1.0
    phase: float = 0.0
    name = "sin"

    def __post_init__(self) -> None:
        check_finite(amplitude=self.amplitude, frequency=self.frequency, phase=self.phase)

    @property
    def _sine_phase(self) -> float:
        return self.phase

    def function(self, x: Tensor) -> Tensor:
        return self.amplitude * torch.sin(self.frequency * x + self.phase)


@dataclass(frozen=True)
class Cos(_Sinusoid):
    """phi(x) = amplitude cos(frequency x + phase); arguments as for :class:`Sin`."""

    amplitude: float = 1.0
    frequency: float = 1.0
    phase: float = 0.0
    name = "cos"

    def __post_init__(self) -> None:
        check_finite(amplitude=self.amplitude, frequency=self.frequency, phase=self.phase)

    @property
    def _sine_phase(self) -> float:
        return self.phase + math.pi / 2

    def function(self, x: Tensor) -> Tensor:
        return self.amplitude * torch.cos(self.frequency * x + self.phase)


@dataclass(frozen=True)
class RBF(DualActivation):
    r"""phi(x) = sqrt(2) sin(sqrt(2 gamma) x + pi / 4), the random feature of the squared exponential kernel.

    .. math::
        \kappa = e^{-\gamma (a + b - 2c)}, \qquad \dot\kappa = 2 \gamma \kappa.

    Args:
        gamma: positive; default 1.
    """

    gamma: float = 1.0
    name = "rbf"

    def __post_init__(self) -> None:
        check_finite(gamma=self.gamma)
        if self.gamma <= 0:
            raise ValueError(f"gamma: found {self.gamma}, want a positive number.")

    @property
    def critical_weight_var(self) -> float:
        """1 / (2 gamma), whatever the bias variance."""
        return 1 / (2 * self.gamma)

    def function(self, x: Tensor) -> Tensor:
        return math.sqrt(2) * torch.sin(math.sqrt(2 * self.gamma) * x + math.pi / 4)

    def kappa(self, var1: Tensor, var2: Tensor, cov: Tensor) -> Tensor:
        return torch.exp(at_least_zero((var1 - cov) + (var2 - cov)) * -self.gamma)

    def moments(self, var1: Tensor, var2: Tensor, cov: Tensor) -> DualMoments:
        kappa = self.kappa(var1, var2, cov)
        return DualMoments(kappa, 2 * self.gamma * kappa)

    def diagonal(self, var: Tensor) -> DualMoments:
        return DualMoments(torch.ones_like(var), torch.full_like(var, 2 * self.gamma))


@dataclass(frozen=True)
class Exp(DualActivation):
    """phi(x) = exp(x): kappa = kappa_dot = exp((a + b) / 2 + c), infinite where that overflows."""

    name = "exp"

    def function(self, x: Tensor) -> Tensor:
        return torch.exp(x)

    def kappa(self, var1: Tensor, var2: Tensor, cov: Tensor) -> Tensor:
        return torch.exp(var1 / 2 + var2 / 2 + cov)

    def moments(self, var1: Tensor, var2: Tensor, cov: Tensor) -> DualMoments:
        kappa = self.kappa(var1, var2, cov)
        return DualMoments(kappa, kappa.clone())

    def diagonal(self, var: Tensor) -> DualMoments:
        kappa = torch.exp(2 * var)
        return DualMoments(kappa, kappa.clone())


def _ratio(rate: float, var1: Tensor, var2: Tensor, cov: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    r"""((1 + ta)^{1/2}, (1 + tb)^{1/2}), tc over their product: a sine, and the cosine of the same angle.

    The squared cosine is :math:`\det(I + t \Sigma) / ((1 + ta)(1 + tb))`. As a sum of that without :math:`\det \Sigma`
    and of :math:`ab - c^2 = (a - |c|) b + |c| (b - |c|)` it is exact at coincident points, however large the variance.
    Quotients are of like sizes, so that nothing overflows on the way back either.
    """
    whole1, whole2 = var1 + 1 / rate, var2 + 1 / rate
    root1, root2 = (1 + rate * var1).sqrt(), (1 + rate * var2).sqrt()
    share1, share2 = var1 / whole1, var2 / whole2
    size = cov.abs()
    determinant = (var1 - size) / whole1 * share2 + (var2 - size) / whole2 * (size / whole1)
    square = 1 / (1 + rate * var1) + share1 / (1 + rate * var2) + at_least_zero(determinant)
    return (root1, root2), rate * cov / root1 / root2, square.sqrt()
