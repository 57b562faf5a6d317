"""Dual activations against quadrature of the function itself, published values and exact limits."""

from __future__ import annotations

import math

import pytest
import torch
from dual_oracles import ALL, HOMOGENEOUS, SMOOTH, polar_quadrature, quadrature, scalars

from bayesnn.processes.dual_activations import DualActivation, LeakyReLU, Monomial, ReLU, dual_activation

MODERATE = [
    (1.3, 0.7, 0.4),
    (2.0, 1.5, -1.1),
    (0.5, 0.5, 0.45),
    (1.0, 2.5, 0.0),
    (0.01, 3.0, 0.17),
    (1.0, 1.0, 0.9999),
    (1.0, 1.0, 1 - 1e-9),
    (1.0, 1.0, -0.99),
    (2.0, 0.5, 1.0),
    (1.21, 1.21, 1.21),
    (2.25, 0.25, -0.75),
]
TINY = [(1e-10, 1e-10, 4e-11), (1e-10, 1.0, -6e-6), (1e-10, 1e-10, 1e-10), (1e-10, 1e-10, -1e-10)]
HUGE = [(1e10, 3e9, 1.5e9), (1e10, 1e10, -6e9), (1e10, 1e-10, 0.3), (1e10, 1e10, 1e10)]
BOUNDED_BY_GROWTH = {"sin", "sin_abc", "cos", "cos_abc", "rbf", "exp"}  # nothing to integrate at a huge variance
FIXTURES: list[tuple[DualActivation, list[tuple[float, float]]]] = [
    (ReLU(), [(0.26537809, 0.31886467), (0.05840409, 0.14048247), (0.22738460, 0.42821685)]),
    (LeakyReLU(0.3), [(0.25003526, 0.45624369), (-0.30138200, 0.36883641), (0.24641845, 0.50982626)]),
    (dual_activation("abs"), [(0.66151237, 0.27545868), (1.33361634, -0.43807012), (0.45953840, 0.71286741)]),
    (dual_activation("erf"), [(0.17547966, 0.45015816), (-0.32742045, 0.32700961), (0.29715204, 0.71287729)]),
    (dual_activation("gelu"), [(0.18806068, 0.32481722), (-0.03273622, 0.12192788), (0.16963641, 0.38967461)]),
    (dual_activation("sin"), [(0.15110734, 0.39770430), (-0.23210073, 0.28994505), (0.28224420, 0.66898522)]),
    (Monomial(2), [(1.23, 1.6)]),
    (Monomial(3), [(3.66, 11.07)]),
    (Monomial(4), [(18.5505, 58.56)]),
    (Monomial(5), [(110.70180, 463.76250)]),
]


def scales(dual: DualActivation, a: float, b: float) -> list[float]:
    first, second = (dual.diagonal(value) for value in scalars(a, b))
    return [math.sqrt(abs(x.item())) * math.sqrt(abs(y.item())) for x, y in zip(first, second, strict=True)]


@pytest.mark.parametrize("dual, values", FIXTURES, ids=lambda value: getattr(value, "name", ""))
def test_moments_equal_the_published_values(dual: DualActivation, values: list[tuple[float, float]]) -> None:
    for covariance, expected in zip(MODERATE, values, strict=False):
        assert [value.item() for value in dual.moments(*scalars(*covariance))] == pytest.approx(expected, abs=5.1e-9)


@pytest.mark.parametrize("covariance", MODERATE + TINY + HUGE, ids=str)
@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_homogeneous_functions_equal_quadrature(name: str, covariance: tuple[float, float, float]) -> None:
    dual, degree = HOMOGENEOUS[name]
    expected = polar_quadrature(dual, degree, *covariance)
    found = dual.moments(*scalars(*covariance))
    a, b, c = covariance
    # The angle's own conditioning: at coincident points it is known to the square root of the rounding error only.
    rounding = 1e-15 / max(math.sqrt(1 - min(c * c / (a * b), 1)), 1e-8)
    tolerances = (rounding if degree == 0 else 1e-14, rounding if degree == 1 else 1e-14)
    for value, exact, scale, tolerance in zip(found, expected, scales(dual, a, b), tolerances, strict=True):
        assert value.item() == pytest.approx(exact, rel=1e-9, abs=scale * tolerance)
    assert dual.kappa(*scalars(*covariance)).item() == found.kappa.item()


@pytest.mark.parametrize("covariance", MODERATE + TINY + HUGE, ids=str)
@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_functions_equal_quadrature(name: str, covariance: tuple[float, float, float]) -> None:
    dual = SMOOTH[name]
    if covariance in HUGE and name in BOUNDED_BY_GROWTH:
        pytest.skip("the function oscillates over, or overflows at, this variance")
    expected = quadrature(dual, *covariance)
    found = dual.moments(*scalars(*covariance))
    for value, exact, scale in zip(found, expected, scales(dual, *covariance[:2]), strict=True):
        assert value.item() == pytest.approx(exact, rel=1e-9, abs=1e-14 * scale)
    assert dual.kappa(*scalars(*covariance)).item() == found.kappa.item()


@pytest.mark.parametrize("var", [1e-10, 1e-3, 0.7, 3.0])
@pytest.mark.parametrize("name", ALL)
def test_diagonal_equals_coincident_points(name: str, var: float) -> None:
    dual = ALL[name]
    (a,) = scalars(var)
    diagonal, moments = dual.diagonal(a), dual.moments(a, a, a)
    for exact, found in zip(diagonal, moments, strict=True):
        assert found.item() == pytest.approx(exact.item(), rel=2e-8, abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("var", [1e-12, 1e-3, 0.7, 3.0, 1e6, 1e30])
@pytest.mark.parametrize("name", ["identity", "relu", "leaky", "abs", "sign", "erf", "gelu", "gaussian", "rbf"])
def test_rounding_of_coincident_points_is_harmless(name: str, var: float, dtype: torch.dtype) -> None:
    dual, eps = ALL[name], torch.finfo(dtype).eps
    # Many values at once: the cosine of some of them is above 1 by rounding.
    a = torch.linspace(0.9, 1.1, 1000, dtype=torch.float64).mul(var).to(dtype)
    cov = a * (1 + eps * torch.randint(-2, 3, a.shape, generator=torch.Generator().manual_seed(0)))
    kappa, kappa_dot = dual.moments(a, a.clone(), cov)
    diagonal, slope = dual.diagonal(a)
    assert torch.isfinite(kappa).all() and torch.isfinite(kappa_dot).all()
    if name in {"rbf", "gaussian"} and var > 1e3:
        return  # functions of a difference of inputs that is lost in their size
    # What rounding cov alone does to bounded functions: kappa_dot var eps, and never above the square root of eps.
    rounding = 4 * math.sqrt(eps) if name == "sign" else min(10 * var * eps, 5 * math.sqrt(eps))
    torch.testing.assert_close(kappa, diagonal, rtol=10 * eps + rounding, atol=0)
    if var <= 1e3:
        torch.testing.assert_close(kappa_dot, slope, rtol=20 * math.sqrt(eps), atol=0)


@pytest.mark.parametrize("name", ALL)
def test_zero_variance(name: str) -> None:
    """u = 0: kappa = phi(0) E[phi(v)]."""
    dual = ALL[name]
    zero, one = scalars(0.0, 1.0)
    assert dual.kappa(zero, zero, zero).item() == pytest.approx(dual.function(zero).item() ** 2, abs=1e-15)
    assert dual.diagonal(zero).kappa.item() == pytest.approx(dual.function(zero).item() ** 2, abs=1e-15)
    x = torch.linspace(-12, 12, 4801, dtype=torch.float64)
    mean = (dual.function(x) * torch.exp(-x * x / 2)).sum().item() * 0.005 / math.sqrt(2 * math.pi)
    assert dual.kappa(zero, one, zero).item() == pytest.approx(dual.function(zero).item() * mean, abs=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_float32_agrees_with_float64(name: str) -> None:
    dual = ALL[name]
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 2
    inputs = (x.square().sum(-1, keepdim=True), x.square().sum(-1).unsqueeze(-2), x @ x.mT)
    double, single = dual.moments(*inputs), dual.moments(*(value.float() for value in inputs))
    for found, exact in zip(single, double, strict=True):
        assert found.dtype == torch.float32
        # 1e-3: at coincident points an angle is known to the square root of the rounding error.
        assert (found.double() - exact).abs().max() <= (1e-3 if name in HOMOGENEOUS else 2e-5) * (1 + exact.abs().max())
        assert (found.double() - exact).abs().median() <= 1e-6 * (1 + exact.abs().max())


def test_inputs_are_left_alone_and_broadcast() -> None:
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    var1, var2, cov = x.square().sum(-1, keepdim=True), x.square().sum(-1).unsqueeze(-2), x @ x.mT
    copies = [value.clone() for value in (var1, var2, cov)]
    for dual in ALL.values():
        for value in (dual.kappa(var1, var2, cov), *dual.moments(var1, var2, cov)):
            assert value.shape == cov.shape
            value.add_(1)  # must not be a view of an input
        for value, copy in zip((var1, var2, cov), copies, strict=True):
            assert torch.equal(value, copy)
