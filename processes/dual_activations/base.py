r"""What a dual activation is: what an elementwise function does to a Gaussian covariance.

For :math:`(u, v)` Gaussian with zero mean, variances :math:`a, b` and covariance :math:`c`,

.. math::
    \kappa(a, b, c) = E[\phi(u)\, \phi(v)], \qquad \dot\kappa(a, b, c) = E[\phi'(u)\, \phi'(v)].

:math:`\partial\kappa / \partial c = \dot\kappa` for every continuous :math:`\phi` (Price's theorem).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesnn.configured import Configured

EDGE_OF_CHAOS_BIAS_VAR = 0.1
_LOG10_VARIANCES = (-4.0, 8.0)  # where the edge of chaos is looked for


class DualMoments(NamedTuple):
    """``kappa`` = E[phi(u) phi(v)] and ``kappa_dot`` = E[phi'(u) phi'(v)]."""

    kappa: Tensor
    kappa_dot: Tensor


class DualActivation(Configured, ABC):
    r"""An elementwise function and its dual. Immutable; saved as its constructor's arguments.

    Variances and covariances beyond ``|cov| <= sqrt(var1 * var2)`` by rounding are allowed. Values and gradients of
    first order are finite for all finite ones (as far as the function's own growth allows); where kappa or kappa_dot
    has a kink, as kappa_dot of ReLU at coincident points, the gradient is 0, the central difference.

    Args of ``kappa`` and ``moments``:
        var1: variances of u, non-negative, broadcastable to ``cov``: ``(..., n, 1)`` for an ``(..., n, m)`` matrix.
        var2: variances of v, likewise, ``(..., 1, m)``.
        cov: covariances of u and v, of the shape of the result.

    Attributes:
        name: the function's name.
    """

    name: str

    def __init_subclass__(cls, saved_as: str | None = None, **kwargs: Any) -> None:
        # "Identity" or "Gaussian" alone would be ambiguous among all that is saved.
        super().__init_subclass__(saved_as=saved_as or f"{cls.__name__}Activation", **kwargs)

    @abstractmethod
    def function(self, x: Tensor) -> Tensor:
        """phi(x), elementwise, as a finite network applies it."""

    @abstractmethod
    def kappa(self, var1: Tensor, var2: Tensor, cov: Tensor) -> Tensor:
        """E[phi(u) phi(v)], of the shape of ``cov``, at the least cost; never ``cov`` itself."""

    @abstractmethod
    def moments(self, var1: Tensor, var2: Tensor, cov: Tensor) -> DualMoments:
        """kappa and kappa_dot, of the shape of ``cov``; both are differentiable."""

    @abstractmethod
    def diagonal(self, var: Tensor) -> DualMoments:
        """E[phi(u)^2] and E[phi'(u)^2], of the shape of ``var``: what coincident points have, free of rounding."""

    @cached_property
    def is_odd(self) -> bool:
        """Whether phi(-x) = -phi(x)."""
        x = torch.linspace(0.1, 3, 30, dtype=torch.float64)
        return torch.allclose(self.function(-x), -self.function(x), rtol=1e-9, atol=1e-12)

    @cached_property
    def critical_weight_var(self) -> float:
        r"""The weight variance at the edge of chaos for a bias variance of 0.1.

        There correlations between inputs neither vanish nor saturate exponentially fast in the depth:
        :math:`\chi = \sigma_w^2 E[\phi'(u)^2] = 1` at the variance :math:`q = \sigma_w^2 E[\phi(u)^2] + 0.1` that a
        layer leaves unchanged (Poole et al. 2016; Schoenholz et al. 2017), the least one if there are several. That
        variance need not be stable: where the function grows faster than linearly, layers lead away from it. For
        functions of linear growth without such a variance, the limit of large variances (2 for softplus).
        """
        return _edge_of_chaos(self)


def _edge_of_chaos(dual: DualActivation) -> float:
    """Bisect q - E[phi^2] / E[phi'^2] - bias_var between the first grid points where it turns positive."""

    def excess(log10_var: Tensor) -> tuple[Tensor, Tensor]:
        var = 10**log10_var
        kappa, kappa_dot = dual.diagonal(var)
        return var - kappa / kappa_dot - EDGE_OF_CHAOS_BIAS_VAR, kappa_dot

    with torch.no_grad():
        grid = torch.linspace(*_LOG10_VARIANCES, 241, dtype=torch.float64)
        values, slopes = excess(grid)
        turns = ((values[:-1] < 0) & (values[1:] >= 0)).nonzero().flatten()
        if len(turns) == 0:
            return 1 / slopes[(values < 0).nonzero().max()].item()
        low, high = grid[turns[0]], grid[turns[0] + 1]
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if excess(middle)[0] < 0 else (low, middle)
        return 1 / excess(high)[1].item()


def check_finite(**values: float) -> None:
    """Raise a ``ValueError`` that names the first argument that is not a finite number."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{name}: found {value!r}, want a finite number.")


def check_degree(degree: int, least: int) -> None:
    """Raise a ``ValueError`` unless ``degree`` is an integer from ``least`` up."""
    if isinstance(degree, bool) or not isinstance(degree, int) or degree < least:
        raise ValueError(f"degree: found {degree!r}, want an integer of at least {least}.")


def at_least_zero(value: Tensor) -> Tensor:
    """0 where ``value`` is negative by rounding; the gradient is the identity's, so that it stays exact there."""
    return value + (value.clamp_min(0) - value).detach()
