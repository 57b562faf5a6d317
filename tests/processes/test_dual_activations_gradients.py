"""Gradients of dual activations: Price's theorem, central differences, coincident points, zero variance."""

from __future__ import annotations

import math

import pytest
import torch
from dual_oracles import ALL, scalars
from torch import Tensor

from bayesnn.processes.dual_activations import GELU, DualActivation, Numerical, ReLU

CASES: dict[str, DualActivation] = {**ALL, "tanh": Numerical("tanh", 200), "silu": Numerical("silu", 200)}
WITHOUT_JUMPS = [name for name in CASES if name != "sign"]
SMOOTH_KAPPA_DOT = [
    name for name in WITHOUT_JUMPS if name not in {"relu", "leaky", "leaky_negative", "abs"}
]  # also at coincident points


def covariances() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x1, x2 = (torch.randn(n, 3, generator=generator, dtype=torch.float64) / 2 for n in (4, 5))
    return x1.square().sum(-1, keepdim=True), x2.square().sum(-1).unsqueeze(-2), x1 @ x2.mT


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_central_differences(name: str) -> None:
    inputs = [value.requires_grad_() for value in covariances()]
    assert torch.autograd.gradcheck(CASES[name].kappa, inputs)
    assert torch.autograd.gradcheck(lambda *x: tuple(CASES[name].moments(*x)), inputs)


@pytest.mark.parametrize("name", WITHOUT_JUMPS)
def test_kappa_dot_is_the_derivative_of_kappa(name: str) -> None:
    var1, var2, cov = covariances()
    kappa, kappa_dot = CASES[name].moments(var1, var2, cov.requires_grad_())
    (slope,) = torch.autograd.grad(kappa.sum(), cov)
    # 1e-9: the quadratures of phi and of phi' differ by their errors.
    torch.testing.assert_close(slope, kappa_dot, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_diagonal_gradients(name: str) -> None:
    var = torch.tensor([0.1, 0.7, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: tuple(CASES[name].diagonal(a)), [var])


def at_shifted(dual: DualActivation, z: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(dual.moments(z @ z, x @ x, z @ x))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", CASES)
def test_inputs_at_coincident_and_opposite_points(name: str, sign: int) -> None:
    dual = CASES[name]
    x = torch.tensor([0.6, -1.1], dtype=torch.float64)
    z = (sign * x).requires_grad_()
    step = 1e-5
    for index in range(2):
        if index == 1 and name in {"sign", "identity"}:
            continue  # constant
        gradient = torch.autograd.grad(at_shifted(dual, z, x)[index], z)[0]
        differences = torch.stack(
            [
                (at_shifted(dual, sign * x + move, x)[index] - at_shifted(dual, sign * x - move, x)[index]) / (2 * step)
                for move in step * torch.eye(2, dtype=torch.float64)
            ]
        )
        # A kink is symmetrical to first order in the step: kappa_dot of ReLU, kappa of sign.
        kinks = name == "sign" or (index == 1 and name not in SMOOTH_KAPPA_DOT)
        torch.testing.assert_close(gradient, differences, rtol=1e-7, atol=1e-4 if kinks else 1e-8)
        assert not kinks or torch.equal(gradient, torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("name", CASES)
def test_hyperparameters_at_coincident_points(name: str) -> None:
    """A variance shared by both points moves kappa and kappa_dot as it moves the diagonal's."""
    (a,) = scalars(0.8)
    parameter = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    var = 1.3 * a + parameter
    for found, exact in zip(CASES[name].moments(var, var, var), CASES[name].diagonal(var), strict=True):
        if exact.requires_grad:
            slope, expected = (torch.autograd.grad(value, parameter, retain_graph=True)[0] for value in (found, exact))
            assert slope.item() == pytest.approx(expected.item(), rel=1e-7, abs=1e-8)


@pytest.mark.parametrize("name", WITHOUT_JUMPS)
def test_covariances_above_their_bound_by_rounding(name: str) -> None:
    var, cov = scalars(0.8, 0.8 * (1 + 1e-15))
    inputs = [value.requires_grad_() for value in (var, var.clone(), cov)]
    grads = torch.autograd.grad(CASES[name].kappa(*inputs), inputs, allow_unused=True)
    at_bound = [value.detach().clone().requires_grad_() for value in (var, var, var)]
    expected = torch.autograd.grad(CASES[name].kappa(*at_bound), at_bound, allow_unused=True)
    for grad, exact in zip(grads, expected, strict=True):
        assert (grad is None) == (exact is None)
        assert grad is None or grad.item() == pytest.approx(exact.item(), rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_finite_everywhere(name: str, dtype: torch.dtype) -> None:
    dual = CASES[name]
    unbounded = name in {"exp", "polynomial", "hermite", "relu2", "relu3", "x2", "x5"}  # these overflow by themselves
    largest = 4.0 if unbounded else torch.finfo(dtype).max / 8
    values = torch.tensor([0.0, torch.finfo(dtype).tiny, 1e-10, 1.0, largest], dtype=dtype)
    for factor in (-1.0, -0.5, 0.0, 0.5, 1.0):
        var1, var2 = values.unsqueeze(-1).clone().requires_grad_(), values.unsqueeze(-2).clone().requires_grad_()
        cov = (factor * var1.detach().sqrt() * var2.detach().sqrt()).requires_grad_()
        outputs = (*dual.moments(var1, var2, cov), dual.kappa(var1, var2, cov), *dual.diagonal(var1))
        for index, output in enumerate(outputs):
            assert torch.isfinite(output).all(), (index, factor, output)
            if not output.requires_grad:
                continue
            grads = torch.autograd.grad(output.sum(), (var1, var2, cov), retain_graph=True, allow_unused=True)
            for grad in grads:
                assert grad is None or torch.isfinite(grad).all(), (index, factor, grad)


@pytest.mark.parametrize("dual", [ReLU(), GELU(), Numerical("silu")], ids=lambda dual: dual.name)
def test_depth_100_is_finite(dual: DualActivation) -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = torch.cat([x, x[:1]]).requires_grad_()
    var, cov = x.square().sum(-1) / 3, x @ x.mT / 3
    for _ in range(100):
        scale = dual.diagonal(var).kappa
        cov = dual.kappa(var.unsqueeze(-1), var.unsqueeze(-2), cov) / (scale.unsqueeze(-1) * scale).sqrt()
        var = torch.ones_like(var)
    assert torch.isfinite(cov).all() and cov.abs().max() <= 1 + 1e-7
    assert torch.isfinite(torch.autograd.grad(cov.sum(), x)[0]).all()


def test_gradients_through_kappa_dot_alone_and_with_frozen_inputs() -> None:
    dual = ReLU()
    var1, var2, cov = covariances()
    expected = torch.autograd.grad(dual.moments(var1, var2, cov.requires_grad_()).kappa_dot.sum(), cov)[0]
    sine = (1 - cov.detach().square() / (var1 * var2)).sqrt()
    torch.testing.assert_close(expected, 1 / (2 * math.pi * (var1 * var2).sqrt() * sine))
    both = torch.autograd.grad(sum(dual.moments(var1, var2, cov), torch.zeros(())).sum(), cov)[0]
    torch.testing.assert_close(both, expected + dual.moments(var1, var2, cov).kappa_dot)
