"""L-BFGS against known minima, scipy's own, and its state's independence of interruptions."""

import math

import pytest
import scipy.optimize
import torch

from bayesnn.inference.lbfgs import lbfgs_init, lbfgs_step


def rosenbrock(params):
    x = params["x"].detach().requires_grad_()
    value = (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()
    return value.detach(), {"x": torch.autograd.grad(value, x)[0]}


def minimised(state, objective, count=300, tolerance=1e-8):
    for index in range(count):
        if bool(state.converged):
            return state, index
        state = lbfgs_step(state, objective, tolerance)
    return state, count


def test_finds_the_minimum_in_about_as_many_steps_as_scipy():
    start = torch.full((10,), -1.0).double()
    state, count = minimised(lbfgs_init({"x": start}, rosenbrock), rosenbrock)
    torch.testing.assert_close(state.params["x"], torch.ones(10).double(), atol=1e-4, rtol=0)
    found = scipy.optimize.minimize(
        scipy.optimize.rosen, start.numpy(), jac=scipy.optimize.rosen_der, method="L-BFGS-B", options={"maxiter": 500}
    )
    assert count < 2 * found.nit


def test_quadratic_in_several_tensors_and_undefined_places():
    scale = torch.logspace(-2, 2, 6).double()

    def objective(params):
        x = torch.cat([params["a"].reshape(-1), params["b"]])
        if bool((x < 0.5).any()):
            return torch.tensor(math.inf), {name: torch.full_like(v, math.nan) for name, v in params.items()}
        gradient = scale * (x - 1)
        return 0.5 * (scale * (x - 1).square()).sum(), {"a": gradient[:4].reshape(2, 2), "b": gradient[4:]}

    start = {"a": torch.full((2, 2), 4.0).double(), "b": torch.full((2,), 3.0).double()}
    state, _ = minimised(lbfgs_init(start, objective), objective)
    for value in state.params.values():
        torch.testing.assert_close(value, torch.ones_like(value), atol=2e-2, rtol=0)
    assert state.value < 1e-5
    again = lbfgs_step(state, objective)
    assert again is not state and all(torch.equal(again.params[n], v) for n, v in state.params.items())


def test_descends_at_every_step_and_from_a_maximum_stays():
    state = lbfgs_init({"x": torch.zeros(4).double() + 0.3}, rosenbrock)
    for _ in range(20):
        new = lbfgs_step(state, rosenbrock)
        assert new.value < state.value
        state = new
    at_rest = lbfgs_init({"x": torch.ones(4).double()}, rosenbrock)
    assert bool(lbfgs_step(at_rest, rosenbrock).converged)
    with pytest.raises(ValueError, match="finite at the start"):
        lbfgs_init({"x": torch.full((2,), math.nan).double()}, rosenbrock)
