r"""Duals of polynomials and of powers of ReLU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bayesnn.processes.dual_activations.base import DualActivation, DualMoments, check_degree, check_finite
from bayesnn.processes.dual_activations.piecewise_linear import arc_cosine_moments


class _Polynomial(DualActivation):
    r"""phi(x) = sum_k p_k x^k, by its Hermite expansion.

    .. math::
        \kappa = \sum_r \frac{h_r(a)\, h_r(b)}{r!} c^r, \qquad
        h_r(a) = E[\phi^{(r)}(u)] = \sum_k p_{r + 2k} \frac{(r + 2k)!}{k!\, 2^k} a^k,

    and kappa_dot is the dual of the derivative.
    """

    @property
    def _coefficients(self) -> Sequence[float]:
        raise NotImplementedError

    @property
    def _derivative(self) -> Sequence[float]:
        return [power * value for power, value in enumerate(self._coefficients)][1:]

    def function(self, x: Tensor) -> Tensor:
        return _horner(self._coefficients, x)

    def kappa(self, var1: Tensor, var2: Tensor, cov: Tensor) -> Tensor:
        return _hermite_series(self._coefficients, var1, var2, cov)

    def moments(self, var1: Tensor, var2: Tensor, cov: Tensor) -> DualMoments:
        return DualMoments(self.kappa(var1, var2, cov), _hermite_series(self._derivative, var1, var2, cov))

    def diagonal(self, var: Tensor) -> DualMoments:
        return self.moments(var, var, var)


@dataclass(frozen=True)
class Polynomial(_Polynomial):
    """phi(x) = sum_k coefficients[k] x^k.

    Args:
        coefficients: from the constant term up; one above the constant must not be zero.
    """

    coefficients: Sequence[float]
    name = "polynomial"

    def __post_init__(self) -> None:
        for index, value in enumerate(self.coefficients):
            check_finite(**{f"coefficients[{index}]": value})
        if not any(self.coefficients[1:]):
            raise ValueError(
                f"coefficients: found {self.coefficients!r}, want one above the constant that is not zero."
            )
        object.__setattr__(self, "coefficients", tuple(self.coefficients))

    @property
    def _coefficients(self) -> Sequence[float]:
        return self.coefficients


@dataclass(frozen=True)
class Monomial(_Polynomial):
    """phi(x) = x^degree.

    Args:
        degree: at least 1.
    """

    degree: int
    name = "monomial"

    def __post_init__(self) -> None:
        check_degree(self.degree, least=1)

    @property
    def _coefficients(self) -> Sequence[float]:
        return [0.0] * self.degree + [1.0]


@dataclass(frozen=True)
class Hermite(_Polynomial):
    """phi(x) = He_degree(x) / sqrt(degree!), the orthonormal Hermite polynomial: kappa = c^degree at unit variances.

    Args:
        degree: at least 1.
    """

    degree: int
    name = "hermite"

    def __post_init__(self) -> None:
        check_degree(self.degree, least=1)

    @property
    def _coefficients(self) -> Sequence[float]:
        unit = [0.0] * self.degree + [1.0]
        return (np.polynomial.hermite_e.herme2poly(unit) / math.sqrt(math.factorial(self.degree))).tolist()


@dataclass(frozen=True)
class RectifiedMonomial(DualActivation):
    r"""phi(x) = max(x, 0)^degree: the arc-cosine kernel of that order (Cho & Saul 2009).

    From the kernels of order zero and one (see :class:`ReLU`),

    .. math::
        \kappa_{n + 1} = (2n + 1)\, c\, \kappa_n + n^2 (ab - c^2)\, \kappa_{n - 1}, \qquad
        \dot\kappa_n = n^2 \kappa_{n - 1}.

    The recurrence solves kappa_n' = n^2 kappa_(n - 1) and the values at c = 0; it has no division, but loses relative
    (not absolute) accuracy towards opposite points, where kappa falls to 0.

    Args:
        degree: at least 2; :class:`ReLU` is of degree 1.
    """

    degree: int
    name = "rectified_monomial"

    def __post_init__(self) -> None:
        check_degree(self.degree, least=2)

    def function(self, x: Tensor) -> Tensor:
        return x.clamp_min(0) ** self.degree

    def kappa(self, var1: Tensor, var2: Tensor, cov: Tensor) -> Tensor:
        return self.moments(var1, var2, cov).kappa

    def moments(self, var1: Tensor, var2: Tensor, cov: Tensor) -> DualMoments:
        kappa, previous = arc_cosine_moments(var1, var2, cov)
        size = cov.abs()
        determinant = (var1 - size) * var2 + size * (var2 - size)
        for order in range(1, self.degree):
            kappa, previous = (2 * order + 1) * cov * kappa + order**2 * determinant * previous, kappa
        return DualMoments(kappa, self.degree**2 * previous)

    def diagonal(self, var: Tensor) -> DualMoments:
        odd = math.prod(range(1, 2 * self.degree - 1, 2))  # (2 degree - 3)!!
        slope = odd / 2 * var ** (self.degree - 1)
        return DualMoments((2 * self.degree - 1) * var * slope, self.degree**2 * slope)


def _horner(coefficients: Sequence[float], x: Tensor) -> Tensor:
    total = torch.full_like(x, coefficients[-1])
    for value in reversed(coefficients[:-1]):
        total = total * x + value
    return total


def _hermite_series(coefficients: Sequence[float], var1: Tensor, var2: Tensor, cov: Tensor) -> Tensor:
    total = torch.zeros_like(cov)
    for order in reversed(range(len(coefficients))):
        total = total * cov
        # h_r / sqrt(r!), as a polynomial in the variance
        scale = math.sqrt(math.factorial(order))
        terms = [
            value * (math.factorial(order + 2 * k) // (math.factorial(k) * 2**k)) / scale
            for k, value in enumerate(coefficients[order::2])
        ]
        if any(terms):
            total = torch.addcmul(total, _horner(terms, var1), _horner(terms, var2))
    return total
