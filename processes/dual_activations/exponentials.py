"""Duals of sinusoids and exponentials."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesnn.processes.dual_activations.base import DualActivation, DualMoments, at_least_zero, check_finite


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
        one = torch.where(var.isnan(), var, 1)
        return DualMoments(one, 2 * self.gamma * one)


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
