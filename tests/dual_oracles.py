"""Dual activations to test, and E[phi(u) phi(v)] and E[phi'(u) phi'(v)] by quadrature of phi itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesnn.processes.dual_activations import (
    GELU,
    RBF,
    Abs,
    Cos,
    DualActivation,
    Erf,
    Exp,
    Gaussian,
    Hermite,
    Identity,
    LeakyReLU,
    Monomial,
    Polynomial,
    RectifiedMonomial,
    ReLU,
    Sign,
    Sin,
)

HOMOGENEOUS: dict[str, tuple[DualActivation, int]] = {  # with their degree
    "identity": (Identity(), 1),
    "relu": (ReLU(), 1),
    "leaky": (LeakyReLU(0.3), 1),
    "leaky_negative": (LeakyReLU(-0.5), 1),
    "abs": (Abs(), 1),
    "sign": (Sign(), 0),
    "relu2": (RectifiedMonomial(2), 2),
    "relu3": (RectifiedMonomial(3), 3),
    "x2": (Monomial(2), 2),
    "x5": (Monomial(5), 5),
}
SMOOTH: dict[str, DualActivation] = {
    "erf": Erf(),
    "gelu": GELU(),
    "gaussian": Gaussian(-0.7),
    "sin": Sin(),
    "sin_abc": Sin(1.5, 0.8, 0.3),
    "cos": Cos(),
    "cos_abc": Cos(0.7, 1.2, -0.4),
    "rbf": RBF(0.6),
    "exp": Exp(),
    "polynomial": Polynomial((0.5, -1.0, 0.3, 0.2)),
    "hermite": Hermite(4),
}
ALL: dict[str, DualActivation] = {name: dual for name, (dual, _) in HOMOGENEOUS.items()} | SMOOTH


def scalars(*values: float, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.tensor(value, dtype=dtype) for value in values]


def derivative(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def slope(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(function(x).sum(), x)[0]

    return slope


def determinant(a: float, b: float, c: float) -> float:
    """ab - c^2 without rounding."""
    return float(Fraction(a) * Fraction(b) - Fraction(c) ** 2)


def polar_quadrature(dual: DualActivation, degree: int, a: float, b: float, c: float) -> tuple[float, float]:
    """For phi(rx) = r^degree phi(x), r > 0: the radius integrates out, the angle is integrated between the kinks."""
    phase = math.atan2(math.sqrt(max(determinant(a, b, c), 0)), c)
    kinks = sorted(
        kink % (2 * math.pi) for kink in (math.pi / 2, -math.pi / 2, phase + math.pi / 2, phase - math.pi / 2)
    )
    edges = np.array([*kinks, kinks[0] + 2 * math.pi])
    nodes, weights = np.polynomial.legendre.leggauss(30)
    half = np.diff(edges)[:, None] / 2
    angles = torch.as_tensor(edges[:-1, None] + half * (1 + nodes))

    def expectation(function: Callable[[Tensor], Tensor], power: int) -> float:
        values = function(angles.cos()) * function((angles - phase).cos())
        radial = 2**power * math.factorial(power)
        return math.sqrt(a * b) ** power * radial * float((values.numpy() * weights * half).sum()) / (2 * math.pi)

    return expectation(dual.function, degree), expectation(derivative(dual.function), degree - 1) if degree else 0.0


def quadrature(dual: DualActivation, a: float, b: float, c: float) -> tuple[float, float]:
    """The trapezoidal rule, after a change of variables that resolves unit scale and the standard deviations alike."""
    size = determinant(a, b, c) / (a * b)
    steps = torch.linspace(-24, 24, 961, dtype=torch.float64)
    if size < 1e-12:  # u and v are proportional
        scale = min(1.0, 1 / math.sqrt(max(a, b)))
        z, weights = scale * steps.sinh(), 0.05 * scale * steps.cosh()
        weights = weights * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
        u, v = math.sqrt(a) * z, math.copysign(math.sqrt(b), c) * z
    elif size < 0.1 or max(a, b) < 30:  # from independent variables
        z = torch.linspace(-10, 10, 401, dtype=torch.float64)
        u = math.sqrt(a) * z[:, None]
        v = c / math.sqrt(a) * z[:, None] + math.sqrt(b * size) * z
        weights = 0.05**2 * torch.exp(-(z[:, None].square() + z.square()) / 2) / (2 * math.pi)
    else:
        scale1, scale2 = min(1.0, math.sqrt(a)), min(1.0, math.sqrt(b))
        u, v = scale1 * steps.sinh()[:, None], scale2 * steps.sinh()
        x, y = u / math.sqrt(a), v / math.sqrt(b)
        density = torch.exp(-(x * x - 2 * c / math.sqrt(a * b) * x * y + y * y) / (2 * size))
        density = density / (2 * math.pi * math.sqrt(size) * math.sqrt(a) * math.sqrt(b))
        weights = 0.05**2 * density * scale1 * scale2 * steps.cosh()[:, None] * steps.cosh()

    def expectation(function: Callable[[Tensor], Tensor]) -> float:
        keep = weights > 1e-300
        values = torch.where(keep, function(torch.where(keep, u, 0)) * function(torch.where(keep, v, 0)), 0)
        return (values * weights).sum().item()

    return expectation(dual.function), expectation(derivative(dual.function))


# A published matrix of the NNGP kernel

# Two hidden ReLU layers, weight standard deviation 1.4, bias standard deviation 0.3.
X = torch.tensor(
    [
        [2.0409191214, -2.5556650313, 0.4180988467],
        [-0.5677696061, -0.4526492921, -0.2155971631],
        [-2.0199861291, -0.2319323776, -0.8652130763],
        [3.3229995166, 0.2257866132, -0.3526307943],
    ],
    dtype=torch.float64,
)
UPPER = torch.tensor(
    [
        [7.0861328716, 1.0727897408, 1.9112297891, 5.1571533565],
        [0.0, 0.6246330577, 1.217644658, 0.8257098627],
        [0.0, 0.0, 3.3283604374, 1.7206780044],
        [0.0, 0.0, 0.0, 7.3032800475],
    ],
    dtype=torch.float64,
)


def dense(kernel: Any, x1: Tensor, x2: Tensor | None = None) -> Tensor:
    """A GPyTorch kernel's matrix."""
    return kernel(x1, x2).to_dense()
