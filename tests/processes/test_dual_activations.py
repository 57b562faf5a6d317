"""Dual activations against quadrature, the derivative identity, published values and central differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import erf
from torch import Tensor

from bayesnn.processes.kernels import DualActivation, dual_activation

COVARIANCES = [
    (1.3, 0.7, 0.4),
    (2.0, 1.5, -1.1),
    (0.5, 0.5, 0.45),
    (1.0, 4.0, 0.0),
    (0.01, 3.0, 0.17),
    (1.0, 1.0, 0.9999),
    (1.0, 1.0, -0.99),
]
FIXTURES = {
    "relu": [(0.26537809, 0.31886467), (0.05840409, 0.14048247), (0.22738460, 0.42821685)],
    "erf": [(0.17547966, 0.45015816), (-0.32742045, 0.32700961), (0.29715204, 0.71287729)],
}


@pytest.fixture(params=["relu", "erf"])
def dual(request: pytest.FixtureRequest) -> DualActivation:
    return dual_activation(request.param)


def scalars(*values: float, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.tensor(value, dtype=dtype) for value in values]


def relu_quadrature(a: float, b: float, c: float) -> tuple[float, float]:
    """Polar coordinates: the radius integrates out, and the angle is integrated between the kinks."""
    rho = c / math.sqrt(a * b)
    phase = math.acos(rho)  # u = sqrt(a) r cos(t), v = sqrt(b) r cos(t - phase)
    low, high = phase - math.pi / 2, math.pi / 2  # where both are positive
    kappa = quad(lambda t: math.cos(t) * math.cos(t - phase), low, high, epsabs=0, epsrel=1e-12)[0]
    return math.sqrt(a * b) * kappa / math.pi, (high - low) / (2 * math.pi)


def erf_quadrature(a: float, b: float, c: float) -> tuple[float, float]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(180)
    weights = weights / weights.sum()
    u = math.sqrt(a) * nodes[:, None]
    v = c / math.sqrt(a) * nodes[:, None] + math.sqrt(b - c * c / a) * nodes[None, :]
    outer = weights[:, None] * weights[None, :]
    slope = 4 / math.pi * np.exp(-u * u - v * v)
    return float((outer * erf(u) * erf(v)).sum()), float((outer * slope).sum())


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_moments_equal_quadrature(dual: DualActivation, covariance: tuple[float, float, float]) -> None:
    expected = (relu_quadrature if dual.name == "relu" else erf_quadrature)(*covariance)
    moments = dual.moments(*scalars(*covariance))
    assert moments.kappa.item() == pytest.approx(expected[0], rel=1e-9, abs=1e-15)
    assert moments.kappa_dot.item() == pytest.approx(expected[1], rel=1e-9)


@pytest.mark.parametrize("index", range(3))
def test_moments_equal_the_published_values(dual: DualActivation, index: int) -> None:
    moments = dual.moments(*scalars(*COVARIANCES[index]))
    kappa, kappa_dot = FIXTURES[dual.name][index]
    assert moments.kappa.item() == pytest.approx(kappa, abs=5.1e-9)
    assert moments.kappa_dot.item() == pytest.approx(kappa_dot, abs=5.1e-9)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_gradients(dual: DualActivation, covariance: tuple[float, float, float]) -> None:
    inputs = [value.requires_grad_() for value in scalars(*covariance)]
    moments = dual.moments(*inputs)
    grad_cov = torch.autograd.grad(moments.kappa, inputs[2])[0]
    torch.testing.assert_close(grad_cov, moments.kappa_dot, rtol=1e-14, atol=0)
    assert not moments.kappa_dot.requires_grad
    assert torch.autograd.gradcheck(lambda *x: dual.moments(*x).kappa, inputs, eps=1e-7, atol=1e-6)


def test_gradients_of_a_broadcast_matrix(dual: DualActivation) -> None:
    generator = torch.Generator().manual_seed(0)
    x1, x2 = (torch.randn(2, n, 3, generator=generator, dtype=torch.float64) for n in (4, 5))
    var1, var2 = x1.square().sum(-1, keepdim=True), x2.square().sum(-1).unsqueeze(-2)
    inputs = [value.requires_grad_() for value in (var1, var2, x1 @ x2.mT)]
    assert torch.autograd.gradcheck(lambda *x: dual.moments(*x).kappa, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("var", [1e-12, 1e-3, 0.7, 3.0, 1e6, 1e30])
def test_coincident_points_equal_the_diagonal(dual: DualActivation, var: float, dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    # Many values at once: the cosine of some of them is above 1 by rounding.
    a = torch.linspace(0.9, 1.1, 1000, dtype=torch.float64).mul(var).to(dtype).requires_grad_()
    b = a.detach().clone().requires_grad_()
    cov = (a.detach() * (1 + eps * torch.randint(-2, 3, a.shape))).requires_grad_()
    kappa, kappa_dot = dual.moments(a, b, cov)
    diagonal = dual.diagonal(a)
    # What rounding cov alone does: kappa_dot var eps, and never above the square root of eps.
    rounding = 0 if dual.name == "relu" else min(5 * math.sqrt(var) * eps, 5 * math.sqrt(eps))
    torch.testing.assert_close(kappa, diagonal, rtol=10 * eps + rounding, atol=0)
    grad_a, grad_b, grad_cov = torch.autograd.grad(kappa.sum(), (a, b, cov))
    total = torch.autograd.grad(diagonal.sum(), a)[0]
    assert all(torch.isfinite(grad).all() for grad in (grad_a, grad_b, grad_cov))
    largest = 0.5 if dual.name == "relu" else 4 / (math.pi * (1 + 4 * a.detach().double()).sqrt()).to(dtype)
    assert (kappa_dot <= largest * (1 + 10 * eps)).all()
    if var <= 1e3:
        torch.testing.assert_close(grad_a + grad_b + grad_cov, total, rtol=20 * math.sqrt(eps), atol=0)
        torch.testing.assert_close(kappa_dot, torch.zeros_like(a) + largest, rtol=20 * math.sqrt(eps), atol=0)


def test_gradients_at_coincident_points_equal_central_differences(dual: DualActivation) -> None:
    x = torch.tensor([0.6, -1.1], dtype=torch.float64)

    def kappa(z: Tensor) -> Tensor:
        return dual.moments(z @ z, x @ x, z @ x).kappa

    z = x.clone().requires_grad_()
    gradient = torch.autograd.grad(kappa(z), z)[0]
    steps = 1e-5 * torch.eye(2, dtype=torch.float64)
    differences = torch.stack([(kappa(x + step) - kappa(x - step)) / 2e-5 for step in steps])
    torch.testing.assert_close(gradient, differences, rtol=1e-7, atol=1e-8)


def test_opposite_points(dual: DualActivation) -> None:
    a, cov = (value.requires_grad_() for value in scalars(1.7, -1.7))
    kappa, kappa_dot = dual.moments(a, a, cov)
    expected, slope = (0.0, 0.0) if dual.name == "relu" else (-dual.diagonal(a).item(), 4 / (math.pi * math.sqrt(7.8)))
    assert kappa.item() == pytest.approx(expected, abs=1e-15)
    assert kappa_dot.item() == pytest.approx(slope, abs=1e-8)
    assert all(torch.isfinite(grad) for grad in torch.autograd.grad(kappa, (a, cov)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_variance_and_overflowing_products(dual: DualActivation, dtype: torch.dtype) -> None:
    huge = torch.finfo(dtype).max / 8
    var1 = torch.tensor([0.0, huge, 1.0], dtype=dtype).unsqueeze(-1).requires_grad_()
    var2 = torch.tensor([0.0, huge, 1.0], dtype=dtype).unsqueeze(-2).requires_grad_()
    cov = (var1.detach().sqrt() * var2.detach().sqrt()).requires_grad_()
    kappa, kappa_dot = dual.moments(var1, var2, cov)
    assert (kappa[0] == 0).all() and (kappa[:, 0] == 0).all()
    torch.testing.assert_close(
        kappa.diagonal(), dual.diagonal(var1.squeeze(-1)), rtol=5 * math.sqrt(torch.finfo(dtype).eps), atol=0
    )
    grads = torch.autograd.grad(kappa, (var1, var2, cov), torch.ones_like(kappa))
    assert torch.isfinite(kappa_dot).all() and all(torch.isfinite(grad).all() for grad in grads)


def test_float32_agrees_with_float64(dual: DualActivation) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, 4, generator=generator, dtype=torch.float64)
    inputs = (x.square().sum(-1, keepdim=True), x.square().sum(-1).unsqueeze(-2), x @ x.mT)
    double = dual.moments(*inputs).kappa
    single = dual.moments(*(value.float() for value in inputs)).kappa
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=1e-6, atol=1e-6)


def test_weight_variance_is_critical(dual: DualActivation) -> None:
    """chi = weight_var E[phi'(u)^2] = 1 at the variance that the layers converge to, or grow from."""
    var = torch.tensor(1.0, dtype=torch.float64)
    for _ in range(500):
        var = dual.critical_weight_var * dual.diagonal(var) + 0.1
    chi = dual.critical_weight_var * dual.moments(var, var, var).kappa_dot.item()
    assert chi == pytest.approx(1, abs=1e-3)


def test_unknown_activation_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"activation: found 'swish'.*'relu', 'erf'"):
        dual_activation("swish")
