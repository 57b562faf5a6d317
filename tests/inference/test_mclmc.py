import math
from itertools import pairwise

import pytest
import torch
from oracles import effective_sizes
from scipy.integrate import solve_ivp

from bayesnn.data import BayesnnWarning
from bayesnn.inference import FunctionTarget, run
from bayesnn.inference.flat import density_of
from bayesnn.inference.mcmc import MCLMC, AdjustedMCLMC
from bayesnn.inference.mcmc.chain import start
from bayesnn.inference.mcmc.isokinetic import _turn, isokinetic_step, random_direction, refresh
from bayesnn.inference.mcmc.mass import Diagonal


def target(size=4, scales=None, dtype=torch.float64):
    scales = torch.ones(size, dtype=dtype) if scales is None else scales

    def log_density(p):
        z = p["x"] / scales
        return -(0.5 * z.square() + 0.1 * z**4).sum(-1)

    def initial(count, generator):
        return {"x": scales * torch.randn(count, size, generator=generator, dtype=dtype)}

    return FunctionTarget(log_density, initial)


def started(count=3, size=4):
    generator = torch.Generator().manual_seed(0)
    density = density_of(target(size))
    point = start(density, torch.randn(count, size, generator=generator, dtype=torch.float64))
    mass = Diagonal(torch.linspace(0.5, 2.0, size, dtype=torch.float64).unsqueeze(0))
    return density, point, random_direction(point.position, generator), mass


def test_steps_follow_the_differential_equation():
    density, point, direction, mass = started(1)
    size, scale = 4, mass.inverse.sqrt()

    def slope(time, values):
        z, u = torch.from_numpy(values).split(size)
        _, gradient = density((scale * z).reshape(1, -1))
        g = (scale * gradient).flatten()
        return torch.cat([math.sqrt(size) * u, math.sqrt(size) / (size - 1) * (g - u * (u @ g))]).numpy()

    begin = torch.cat([(point.position / scale).flatten(), direction.flatten()]).numpy()
    exact = torch.from_numpy(solve_ivp(slope, (0, 0.8), begin, rtol=1e-11, atol=1e-12).y[:, -1])
    errors = []
    for num_steps in (8, 16, 32):
        here, u, total = point, direction, 0.0
        for _ in range(num_steps):
            here, u, change = isokinetic_step(density, here, u, torch.full((1, 1), 0.8 / num_steps).double(), mass)
            total = total + change
        errors.append(
            [
                float((torch.cat([(here.position / scale).flatten(), u.flatten()]) - exact).abs().max()),
                float(total.abs()),
            ]
        )
    for coarse, fine in pairwise(errors):
        for index in range(2):
            assert 3.2 < coarse[index] / fine[index] < 4.8, errors


def test_steps_are_reversible_and_unit():
    density, point, direction, mass = started()
    step = torch.tensor([[0.1], [0.5], [1.0]]).double()
    there, turned, change = isokinetic_step(density, point, direction, step, mass)
    back, turned_back, change_back = isokinetic_step(density, there, -turned, step, mass)
    torch.testing.assert_close(back.position, point.position, rtol=0, atol=1e-12)
    torch.testing.assert_close(-turned_back, direction, rtol=0, atol=1e-12)
    torch.testing.assert_close(change_back, -change, rtol=0, atol=1e-11)
    torch.testing.assert_close(turned.norm(dim=-1), torch.ones(3).double())
    mixed = refresh(turned, step, torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixed.norm(dim=-1), torch.ones(3).double())


def test_the_change_of_energy_counts_the_change_of_volume():
    """A turn maps the sphere to itself: minus the log of its Jacobian, by differentiation, is the kinetic energy's change."""
    generator = torch.Generator().manual_seed(0)
    u = random_direction(torch.zeros(1, 4).double(), generator)
    gradient = 3 * torch.randn(1, 4, generator=generator, dtype=torch.float64)
    step = torch.full((1, 1), 0.7).double()
    _, change = _turn(u, gradient, step)
    jacobian = torch.autograd.functional.jacobian(lambda v: _turn(v.unsqueeze(0), gradient, step)[0][0], u[0])
    tangent = torch.linalg.svd(u)[2][1:]  # an orthonormal basis of the tangent space at u
    turned = _turn(u, gradient, step)[0]
    tangent_there = torch.linalg.svd(turned)[2][1:]
    volume = torch.linalg.det(tangent_there @ jacobian @ tangent.T).abs().log()
    torch.testing.assert_close(change[0], -volume, rtol=0, atol=1e-10)


@pytest.mark.parametrize("norm", [0.0, 1e-30, 1e8])
def test_gradients_of_any_size(norm):
    u = random_direction(torch.zeros(2, 5), torch.Generator().manual_seed(0))
    gradient = torch.stack([norm * u[0], -norm * u[1]])
    turned, change = _turn(u, gradient, torch.ones(2, 1))
    assert torch.isfinite(turned).all() and torch.isfinite(change).all()
    torch.testing.assert_close(turned.norm(dim=-1), torch.ones(2))


def second_moment(variance, seed=0):
    """Of a badly scaled quartic target's first coordinates, in units of the exact one, with its standard error."""
    scales = torch.tensor([0.1, 1.0, 1.0, 10.0]).double().repeat(5)
    posterior = run(
        MCLMC(num_chains=16, num_warmup=200, num_draws=400, thinning=4, energy_error_variance=variance),
        target(20, scales),
        seed=seed,
    )
    z = (posterior.parameters["x"] / scales).square()
    grid = torch.linspace(-8, 8, 4001).double()
    weight = (-0.5 * grid.square() - 0.1 * grid**4).exp()
    exact = float((weight * grid.square()).sum() / weight.sum())
    found = z.mean(-1, keepdim=True)
    error = found.std() / effective_sizes(posterior, found).sqrt()
    assert (posterior.statistics["energy_error_variance"].mean() / variance).log().abs() < math.log(2)
    return float(found.mean()) / exact - 1, float(error) / exact


def test_the_bias_falls_with_the_energy_error():
    coarse, error = second_moment(0.2)
    assert abs(coarse) > 5 * error
    fine, error = second_moment(5e-4)
    assert abs(fine) < 0.01 + 4 * error and abs(fine) < abs(coarse) / 3


def test_walls_are_reported_and_survived():
    def log_density(p):
        x = p["x"]
        return torch.where(x.abs() < 1, -0.5 * x.square(), torch.nan).sum(-1)

    def initial(count, generator):
        return {"x": torch.zeros(count, 2, dtype=torch.float64)}

    with pytest.warns(BayesnnWarning, match="diverged"):
        posterior = run(
            MCLMC(num_chains=4, num_warmup=0, num_draws=200, initial_step_size=0.3),
            FunctionTarget(log_density, initial),
        )
    x = posterior.parameters["x"]
    assert torch.isfinite(x).all() and x.abs().max() < 1 and x.std() > 0.3


def test_float32():
    posterior = run(MCLMC(num_chains=4, num_warmup=50, num_draws=20), target(6, dtype=torch.float32))
    assert posterior.parameters["x"].dtype == torch.float32 and torch.isfinite(posterior.parameters["x"]).all()


@pytest.mark.parametrize("method", [MCLMC(), AdjustedMCLMC()])
def test_a_single_parameter_is_refused(method):
    with pytest.raises(ValueError, match="at least 2 parameters"):
        run(method, target(1))


@pytest.mark.parametrize("name", ["num_chains", "num_draws", "thinning", "energy_error_variance", "decoherence"])
def test_wrong_settings(name):
    with pytest.raises(ValueError, match=name):
        MCLMC(**{name: 0})


@pytest.mark.parametrize(
    "log_density", [lambda p: 0 * p["x"].sum(-1), lambda p: 1e-3 * p["x"].sum(-1)], ids=["flat", "linear"]
)
def test_densities_that_give_no_step_size(log_density):
    target = FunctionTarget(log_density, lambda count, generator: {"x": torch.randn(count, 3, generator=generator)})
    with pytest.raises(ValueError, match="no step size has the wanted energy error in 4 of 4 chains"):
        run(MCLMC(), target)
