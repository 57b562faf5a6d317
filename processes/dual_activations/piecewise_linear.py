r"""Duals of functions made of two straight lines or steps: the angle between u and v is all that they depend on.

Gradients are written down: the angle has an infinite derivative at coincident points, where kappa does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bayesnn.processes.dual_activations.base import DualActivation, DualMoments, check_finite

_KINK = 32  # sin^2(angle), in units of the rounding error, below which points coincide


@dataclass(frozen=True)
class Identity(DualActivation):
    """phi(x) = x: kappa = c, kappa_dot = 1."""

    name = "identity"
    critical_weight_var = 1.0

    def function(self, x: Tensor) -> Tensor:
        return x

    def kappa(self, var1: Tensor, var2: Tensor, cov: Tensor) -> Tensor:
        return cov.clone()

    def moments(self, var1: Tensor, var2: Tensor, cov: Tensor) -> DualMoments:
        return DualMoments(cov.clone(), torch.ones_like(cov))

    def diagonal(self, var: Tensor) -> DualMoments:
        return DualMoments(var.clone(), torch.ones_like(var))


class _Rectifier(DualActivation):
    """phi(x) = x above 0 and negative_slope * x below: a mixture of ReLU and the identity."""

    @property
    def _negative_slope(self) -> float:
        raise NotImplementedError

    @property
    def critical_weight_var(self) -> float:
        """2 / (1 + slope^2), whatever the bias variance."""
        return 2 / (1 + self._negative_slope**2)

    def function(self, x: Tensor) -> Tensor:
        return torch.nn.functional.leaky_relu(x, self._negative_slope)

    def kappa(self, var1: Tensor, var2: Tensor, cov: Tensor) -> Tensor:
        slope = self._negative_slope
        kappa = _ReLUMoments.apply(var1, var2, cov, False)[0]
        return kappa if slope == 0 else torch.add(slope * cov, kappa, alpha=(1 - slope) ** 2)

    def moments(self, var1: Tensor, var2: Tensor, cov: Tensor) -> DualMoments:
        slope = self._negative_slope
        kappa, kappa_dot = _ReLUMoments.apply(var1, var2, cov, True)
        if slope == 0:
            return DualMoments(kappa, kappa_dot)
        weight = (1 - slope) ** 2
        return DualMoments(torch.add(slope * cov, kappa, alpha=weight), weight * kappa_dot + slope)

    def diagonal(self, var: Tensor) -> DualMoments:
        half = (1 + self._negative_slope**2) / 2
        return DualMoments(half * var, torch.full_like(var, half))


@dataclass(frozen=True)
class ReLU(_Rectifier):
    r"""phi(x) = max(x, 0): the arc-cosine kernel of order one (Cho & Saul 2009, eq. 1 and 6).

    With :math:`\cos\theta = c / \sqrt{ab}`,

    .. math::
        \kappa = \frac{\sqrt{ab}}{2\pi} \left(\sin\theta + (\pi - \theta) \cos\theta\right), \qquad
        \dot\kappa = \frac{\pi - \theta}{2\pi}.

    At zero variance the gradient with respect to that variance is 0, and the angle counts as a right one.
    """

    name = "relu"

    @property
    def _negative_slope(self) -> float:
        return 0.0


@dataclass(frozen=True)
class LeakyReLU(_Rectifier):
    """phi(x) = max(x, 0) + slope min(x, 0): (1 - slope)^2 of ReLU's dual and slope of the identity's.

    Args:
        slope: below zero; default 0.01, as in PyTorch.
    """

    slope: float = 0.01
    name = "leaky_relu"

    def __post_init__(self) -> None:
        check_finite(slope=self.slope)

    @property
    def _negative_slope(self) -> float:
        return float(self.slope)


@dataclass(frozen=True)
class Abs(_Rectifier):
    """phi(x) = abs(x): 4 times ReLU's dual less the identity's."""

    name = "abs"

    @property
    def _negative_slope(self) -> float:
        return -1.0

    def function(self, x: Tensor) -> Tensor:
        return x.abs()


@dataclass(frozen=True)
class Sign(DualActivation):
    r"""phi(x) = sign(x): :math:`\kappa = (2 / \pi) \arcsin(c / \sqrt{ab})`, 0 where a variance is.

    kappa_dot is 0, what gradients of a finite network see: the function is flat wherever it has a derivative, and
    Price's theorem does not hold across the jump. For the same reason there is no edge of chaos;
    ``critical_weight_var`` is 1.
    """

    name = "sign"
    critical_weight_var = 1.0

    def function(self, x: Tensor) -> Tensor:
        return x.sign()

    def kappa(self, var1: Tensor, var2: Tensor, cov: Tensor) -> Tensor:
        return _SignKappa.apply(var1, var2, cov)

    def moments(self, var1: Tensor, var2: Tensor, cov: Tensor) -> DualMoments:
        return DualMoments(self.kappa(var1, var2, cov), torch.zeros_like(cov))

    def diagonal(self, var: Tensor) -> DualMoments:
        return DualMoments(torch.where(var.isnan(), var, var.sign()), torch.zeros_like(var))


def arc_cosine_moments(var1: Tensor, var2: Tensor, cov: Tensor) -> DualMoments:
    """The arc-cosine kernels of order one (ReLU's kappa) and zero (its kappa_dot), with their gradients."""
    return DualMoments(*_ReLUMoments.apply(var1, var2, cov, True))


class _ReLUMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, var1: Tensor, var2: Tensor, cov: Tensor, both: bool) -> tuple[Tensor, Tensor | None]:
        std1, std2 = var1.sqrt(), var2.sqrt()
        # One standard deviation at a time: the product of two variances can overflow where kappa does not.
        minus_cos = (cov * -_one_where_zero(std1).reciprocal()).mul_(_one_where_zero(std2).reciprocal())
        sin = _cosine_of(minus_cos)
        supplement = torch.atan2(sin, minus_cos)  # pi - theta
        coincident = _coincident(sin) if both else None
        ctx.set_materialize_grads(False)
        if any(ctx.needs_input_grad):
            # Another sine in the gradient would cost as much as the angle.
            ctx.save_for_backward(var1, var2, supplement, sin, minus_cos if both else None)
            kappa = torch.addcmul(sin, minus_cos, supplement, value=-1)
        else:
            kappa = sin.addcmul_(minus_cos, supplement, value=-1)
        kappa = kappa.mul_(std1 / (2 * math.pi)).mul_(std2)
        if coincident is None:
            return kappa, None
        # Where points coincide or are opposite, rounding leaves the angle half of its digits.
        exact = torch.where(minus_cos < 0, 0.5, 0.0)
        return kappa, torch.where(coincident, exact, supplement / (2 * math.pi))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_dot: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None and grad_dot is None:
            return None, None, None, None
        var1, var2, supplement, sin, minus_cos = ctx.saved_tensors
        pull = None if grad_dot is None else _over_sine(grad_dot, sin)
        grad_log_var = torch.zeros_like(var1)
        if any(ctx.needs_input_grad[:2]):
            if grad is not None:  # a dkappa/da = b dkappa/db = sqrt(ab) sin(theta) / (4 pi)
                grad_log_var = (sin * grad).mul_(var1.sqrt() / (4 * math.pi)).mul_(var2.sqrt())
            if pull is not None:  # a dkappa_dot/da = b dkappa_dot/db = -cot(theta) / (4 pi)
                grad_log_var = torch.addcmul(grad_log_var, pull, minus_cos, value=1 / (4 * math.pi))
        if pull is None:
            grad_cov = (grad * supplement).mul_(1 / (2 * math.pi))
        else:
            grad_cov = pull.mul_(_inverse_std(var1) / (2 * math.pi)).mul_(_inverse_std(var2))
            if grad is not None:
                grad_cov.addcmul_(grad, supplement, value=1 / (2 * math.pi))
        return *_to_inputs(ctx, grad_log_var, grad_cov, var1, var2), None


class _SignKappa(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, var1: Tensor, var2: Tensor, cov: Tensor) -> Tensor:
        cos = (cov * _one_where_zero(var1).rsqrt()).mul_(_one_where_zero(var2).rsqrt())
        sin = _cosine_of(cos)
        angle = torch.atan2(cos, sin.masked_fill_(_coincident(sin), 0))
        ctx.save_for_backward(var1, var2, angle)
        return angle * (2 / math.pi)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        var1, var2, angle = ctx.saved_tensors
        pull = _over_sine(grad * (2 / math.pi), angle.cos())
        grad_log_var = (pull * angle.sin()).mul_(-0.5)
        return _to_inputs(ctx, grad_log_var, pull.mul_(_inverse_std(var1)).mul_(_inverse_std(var2)), var1, var2)


def _over_sine(grad: Tensor, sin: Tensor) -> Tensor:
    """grad / sin, but 0 at coincident and at opposite points, which are kinks."""
    return sin.reciprocal().masked_fill_(_coincident(sin), 0).mul_(grad)


def _coincident(sin: Tensor) -> Tensor:
    return sin <= math.sqrt(_KINK * torch.finfo(sin.dtype).eps)


def _to_inputs(
    ctx: Any, grad_log_var: Tensor, grad_cov: Tensor, var1: Tensor, var2: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    needs_var1, needs_var2, needs_cov = ctx.needs_input_grad[:3]
    return (
        grad_log_var.sum_to_size(var1.shape) / _one_where_zero(var1) if needs_var1 else None,
        grad_log_var.sum_to_size(var2.shape) / _one_where_zero(var2) if needs_var2 else None,
        grad_cov if needs_cov else None,
    )


def _cosine_of(sine: Tensor) -> Tensor:
    square = torch.addcmul(sine.new_ones(()), sine, sine, value=-1).clamp_min_(torch.finfo(sine.dtype).tiny)
    return square.rsqrt().mul_(square)  # on processors twice as fast as the square root


def _inverse_std(var: Tensor) -> Tensor:
    """1 / sqrt(var), but 0 for a variance of 0 (whose cosines are 0 too)."""
    return torch.where(var > 0, _one_where_zero(var).rsqrt(), 0)


def _one_where_zero(value: Tensor) -> Tensor:
    return torch.where(value > 0, value, 1)
