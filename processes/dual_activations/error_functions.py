r"""Duals of erf, GELU and the Gaussian bell, which depend on :math:`\det(I + t \Sigma)`.

:math:`\Sigma` is the covariance matrix of (u, v). With :math:`\sin\psi = tc / \sqrt{(1 + ta)(1 + tb)}`, the determinant
is :math:`(1 + ta)(1 + tb) \cos^2\psi`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bayesnn.processes.dual_activations.base import DualActivation, DualMoments, check_finite


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


def _ratio(rate: float, var1: Tensor, var2: Tensor, cov: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """((1 + ta)^{1/2}, (1 + tb)^{1/2}), tc over their product: a sine, and the cosine of the same angle."""
    sin, cos = _Angle.apply(rate, var1, var2, cov)
    return ((1 + rate * var1).sqrt(), (1 + rate * var2).sqrt()), sin, cos


class _Angle(torch.autograd.Function):
    r"""The squared cosine is :math:`\det(I + t \Sigma) / ((1 + ta)(1 + tb))`.

    As a sum of that without :math:`\det \Sigma` and of :math:`ab - c^2 = (a - |c|) b + |c| (b - |c|)`, with the larger
    variance for a, it is exact at coincident points, however large the variance; each factor is divided first, so that
    nothing overflows.
    """

    @staticmethod
    def forward(ctx: Any, rate: float, var1: Tensor, var2: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
        precision1, precision2 = 1 / (1 + rate * var1), 1 / (1 + rate * var2)
        inverse1, inverse2 = 1 / (var1 + 1 / rate), 1 / (var2 + 1 / rate)
        share1, share2 = var1 * inverse1, var2 * inverse2
        size = cov.abs()
        gap1, gap2 = (var1 - size).mul_(inverse1), (var2 - size).mul_(inverse2)
        first = torch.addcmul(gap1 * share2, gap2, size * inverse1)
        second = torch.addcmul(gap2 * share1, gap1, size.mul_(inverse2))
        cos = torch.where(var1 >= var2, first, second).clamp_min_(0)
        cos.add_(precision1).addcmul_(share1, precision2).sqrt_()
        scale1, scale2 = rate * precision1.sqrt(), precision2.sqrt()
        sin = (cov * scale1).mul_(scale2)
        ctx.save_for_backward(precision1, precision2, sin, cos)
        ctx.rate = rate
        return sin, cos

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sin: Tensor, grad_cos: Tensor) -> tuple[Tensor | None, ...]:
        precision1, precision2, sin, cos = ctx.saved_tensors
        _, needs_var1, needs_var2, needs_cov = ctx.needs_input_grad
        grad = grad_sin - grad_cos * (sin / cos)  # the cosine's derivative is -tan times the sine's
        pull = grad * sin * (-ctx.rate / 2) if needs_var1 or needs_var2 else grad
        return (
            None,
            pull.sum_to_size(precision1.shape) * precision1 if needs_var1 else None,
            pull.sum_to_size(precision2.shape) * precision2 if needs_var2 else None,
            grad.mul_(ctx.rate * precision1.sqrt()).mul_(precision2.sqrt()) if needs_cov else None,
        )
