r"""Dual activations: what an elementwise function does to a Gaussian covariance.

For :math:`(u, v)` Gaussian with zero mean, variances :math:`a, b` and covariance :math:`c`,

.. math::
    \kappa(a, b, c) = E[\phi(u)\, \phi(v)], \qquad \dot\kappa(a, b, c) = E[\phi'(u)\, \phi'(v)].

:math:`\partial\kappa / \partial c = \dot\kappa` for every :math:`\phi` (Price's theorem). The gradients here are
written down from it rather than left to automatic differentiation: :math:`\dot\kappa` is finite where the angle
between ``u`` and ``v`` has an infinite derivative, that is, at coincident points.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class DualMoments(NamedTuple):
    """``kappa`` = E[phi(u) phi(v)] and ``kappa_dot`` = E[phi'(u) phi'(v)]; no gradient flows through ``kappa_dot``."""

    kappa: Tensor
    kappa_dot: Tensor


@dataclass(frozen=True)
class DualActivation:
    """The dual of one activation function.

    Attributes:
        name: the activation's name.
        moments: ``moments(var1, var2, cov)`` gives :class:`DualMoments`.
        diagonal: ``diagonal(var)`` gives kappa(var, var, var), that is E[phi(u)^2].
        critical_weight_var: the weight variance at the edge of chaos, where correlations between inputs neither vanish
            nor saturate exponentially fast in the depth, for a bias variance of 0.1.
    """

    name: str
    moments: Callable[[Tensor, Tensor, Tensor], DualMoments]
    diagonal: Callable[[Tensor], Tensor]
    critical_weight_var: float


def relu_moments(var1: Tensor, var2: Tensor, cov: Tensor) -> DualMoments:
    r"""The dual of ReLU, an arc-cosine kernel of order one (Cho & Saul 2009, eq. 1 and 6).

    With :math:`\cos\theta = c / \sqrt{ab}`,

    .. math::
        \kappa = \frac{\sqrt{ab}}{2\pi} \left(\sin\theta + (\pi - \theta) \cos\theta\right), \qquad
        \dot\kappa = \frac{\pi - \theta}{2\pi}.

    First-order gradients only, finite everywhere; at zero variance, where the function has a kink, the gradient with
    respect to that variance is 0.

    Args:
        var1: variances of u, non-negative, broadcastable to ``cov``: ``(..., n, 1)`` for an ``(..., n, m)`` matrix.
        var2: variances of v, likewise, ``(..., 1, m)``.
        cov: covariances of u and v. Beyond ``sqrt(var1 * var2)`` by rounding is allowed.

    Returns:
        kappa and kappa_dot, of the shape of ``cov``.
    """
    return DualMoments(*_ReLUMoments.apply(var1, var2, cov))


def relu_diagonal(var: Tensor) -> Tensor:
    """E[relu(u)^2] = var / 2."""
    return var / 2


def erf_moments(var1: Tensor, var2: Tensor, cov: Tensor) -> DualMoments:
    r"""The dual of erf, the arc-sine kernel (Williams 1997, eq. 11).

    .. math::
        \kappa = \frac{2}{\pi} \arcsin \frac{2c}{\sqrt{(1 + 2a)(1 + 2b)}}, \qquad
        \dot\kappa = \frac{4}{\pi \sqrt{(1 + 2a)(1 + 2b) - 4c^2}}.

    Arguments, result and gradients as for :func:`relu_moments`.
    """
    return DualMoments(*_ErfMoments.apply(var1, var2, cov))


def erf_diagonal(var: Tensor) -> Tensor:
    """E[erf(u)^2] = (2 / pi) atan2(2 var, sqrt(1 + 4 var))."""
    return torch.atan2(2 * var, (1 + 4 * var).sqrt()) * (2 / math.pi)


def dual_activation(name: str) -> DualActivation:
    """The dual of the activation called ``name``.

    The critical weight variances solve chi = weight_var E[phi'(u)^2] = 1 at the fixed point of the variance (Poole et
    al. 2016; Schoenholz et al. 2017): 2 for ReLU, whatever the bias variance, and 1.552 for erf.

    Raises:
        ValueError: if no closed form is known for it.
    """
    if name not in _DUAL_ACTIVATIONS:
        known = ", ".join(repr(known) for known in _DUAL_ACTIVATIONS)
        raise ValueError(f"activation: found {name!r}; a closed form is known for {known}.")
    return _DUAL_ACTIVATIONS[name]


class _ReLUMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, var1: Tensor, var2: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
        std1, std2 = var1.sqrt(), var2.sqrt()
        # One standard deviation at a time: the product of two variances can overflow where kappa does not.
        minus_cos = (cov * -_one_where_zero(std1).reciprocal()).mul_(_one_where_zero(std2).reciprocal())
        sin = torch.addcmul(minus_cos.new_ones(()), minus_cos, minus_cos, value=-1).clamp_min_(0).sqrt_()
        supplement = torch.atan2(sin, minus_cos)  # pi - theta
        kappa = sin.addcmul_(minus_cos, supplement, value=-1).mul_(std1 / (2 * math.pi)).mul_(std2)
        kappa_dot = supplement.mul_(1 / (2 * math.pi))
        ctx.save_for_backward(var1, var2, kappa_dot)
        ctx.mark_non_differentiable(kappa_dot)
        ctx.set_materialize_grads(False)
        return kappa, kappa_dot

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if grad is None:
            return None, None, None
        var1, var2, kappa_dot = ctx.saved_tensors
        needs_var1, needs_var2, needs_cov = ctx.needs_input_grad
        grad_var1 = grad_var2 = None
        if needs_var1 or needs_var2:
            # a dkappa/da = b dkappa/db = sqrt(ab) sin(theta) / (4 pi), and kappa_dot knows theta.
            half = kappa_dot.mul(2 * math.pi).sin_().mul_(grad).mul_(var1.sqrt() / (4 * math.pi)).mul_(var2.sqrt())
            grad_var1 = half.sum_to_size(var1.shape) / _one_where_zero(var1) if needs_var1 else None
            grad_var2 = half.sum_to_size(var2.shape) / _one_where_zero(var2) if needs_var2 else None
        return grad_var1, grad_var2, grad * kappa_dot if needs_cov else None


class _ErfMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, var1: Tensor, var2: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
        precision1, precision2 = 1 / (1 + 2 * var1), 1 / (1 + 2 * var2)
        scale1, scale2 = precision1.sqrt(), precision2.sqrt()
        sin = (cov * (2 * scale1)).mul_(scale2)
        # c^2 <= ab bounds the cosine from below; rounding at coincident points of large variance would go under it.
        least = torch.addcmul(precision1, precision2, 1 - precision1)
        cos = torch.addcmul(sin.new_ones(()), sin, sin, value=-1).clamp_(min=least).sqrt_()
        kappa = sin.atan2_(cos).mul_(2 / math.pi)
        kappa_dot = cos.reciprocal_().mul_(scale1 * (4 / math.pi)).mul_(scale2)
        ctx.save_for_backward(precision1, precision2, cov, kappa_dot)
        ctx.mark_non_differentiable(kappa_dot)
        ctx.set_materialize_grads(False)
        return kappa, kappa_dot

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if grad is None:
            return None, None, None
        precision1, precision2, cov, kappa_dot = ctx.saved_tensors
        needs_var1, needs_var2, needs_cov = ctx.needs_input_grad
        grad_cov = grad * kappa_dot
        grad_var1 = grad_var2 = None
        if needs_var1 or needs_var2:
            # dkappa/da = -kappa_dot c / (1 + 2a), and likewise for b.
            pull = -grad_cov * cov
            grad_var1 = pull.sum_to_size(precision1.shape) * precision1 if needs_var1 else None
            grad_var2 = pull.sum_to_size(precision2.shape) * precision2 if needs_var2 else None
        return grad_var1, grad_var2, grad_cov if needs_cov else None


def _one_where_zero(value: Tensor) -> Tensor:
    return torch.where(value > 0, value, 1)


_DUAL_ACTIVATIONS = {
    "relu": DualActivation("relu", relu_moments, relu_diagonal, critical_weight_var=2.0),
    "erf": DualActivation("erf", erf_moments, erf_diagonal, critical_weight_var=1.552),
}
