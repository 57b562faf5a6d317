"""Draws of the stochastic-gradient samplers against exact laws: full data, minibatches, control variates, thermostat."""

import arviz
import pytest
import torch
from oracles import LinearGaussian, affine_map, stationary_law, with_intercept, z_score

from bayesnn import likelihoods, networks, priors
from bayesnn.data import Data
from bayesnn.inference import (
    BAOAB,
    RMS,
    SGHMC,
    SGLD,
    SGNHT,
    Cosine,
    FunctionTarget,
    NetworkTarget,
    run,
)
from bayesnn.inference.flat import log_density_and_gradient

PRECISION = torch.tensor([[2.0, 1.2, 0.0], [1.2, 3.0, -0.7], [0.0, -0.7, 0.8]], dtype=torch.float64)
MEAN = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def gaussian():
    def log_density(parameters):
        centred = parameters["x"] - MEAN
        return -0.5 * (centred @ PRECISION * centred).sum(-1)

    def initial(count, generator):
        return {"x": torch.randn(count, 3, generator=generator, dtype=torch.float64)}

    return FunctionTarget(log_density, initial)


def line(num_rows=6, temperature=1.0, noise_std=0.7):
    """A straight line through a few points: positions are (slope, intercept)."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(num_rows, 1, generator=generator, dtype=torch.float64)
    y = 2 * X[:, 0] - 0.5 + noise_std * torch.randn(num_rows, generator=generator, dtype=torch.float64)
    oracle = LinearGaussian(with_intercept(X), y, noise_std, torch.tensor([2.0, 1.5]).double(), temperature)
    network, prior = networks.mlp(1, 1, hidden=()), priors.Normal(scale=2.0, bias_scale=1.5)
    one = torch.ones(1, 1, dtype=torch.float64)
    target = NetworkTarget(
        network, likelihoods.Gaussian(noise_std=noise_std), prior, Data(X, y[:, None]), one, temperature
    )
    return target, oracle


def assert_law(draws, mean, covariance):
    """Draws (draws, chains, P) that may be dependent along both: tested by the effective size of the chains' average."""
    centred = draws - mean
    squares = (centred[..., :, None] * centred[..., None, :]).flatten(-2)
    for values, truth in ((draws, mean), (squares, covariance.flatten())):
        series = values.mean(1)
        sizes = torch.tensor([float(arviz.ess(column[None].numpy(), method="mean")) for column in series.T])
        assert sizes.min() > 30
        z = z_score(series, truth, sizes)
        assert z.abs().max() < 4, z


def draws_of(posterior):
    """(draws, chains, P)."""
    flat = torch.cat([values.flatten(1) for values in posterior.parameters.values()], 1)
    return posterior.by_chain(flat).transpose(0, 1)


def widened(factor):
    return torch.linalg.inv(PRECISION - factor * PRECISION @ PRECISION)


SETTINGS = {"num_chains": 300, "num_burn_in": 300, "num_draws": 150, "thinning": 20, "batch_size": None}


@pytest.mark.parametrize(
    "sampler,covariance",
    [
        (SGLD(step_size=0.3, **SETTINGS), widened(0.15)),
        (SGHMC(step_size=0.5, friction=1.4, **SETTINGS), widened(0.25 / (4 - 2 * 0.7))),
        (SGHMC(step_size=Cosine(0.2, 0.5, 300), friction=1.4, **SETTINGS), widened(0.25 / (4 - 2 * 0.7))),
        (BAOAB(step_size=0.8, friction=1.0, **SETTINGS), torch.linalg.inv(PRECISION)),
        (BAOAB(step_size=0.8, friction=1.0, preconditioner=RMS(), **SETTINGS), torch.linalg.inv(PRECISION)),
        (SGNHT(step_size=0.2, friction=1.0, **SETTINGS), torch.linalg.inv(PRECISION)),
    ],
    ids=["SGLD", "SGHMC", "SGHMC-schedule", "BAOAB", "BAOAB-RMS", "SGNHT"],
)
def test_draws_follow_the_law_of_the_update(sampler, covariance):
    posterior = run(sampler, gaussian(), seed=1)
    draws = draws_of(posterior)
    assert draws.shape == (150, 300, 3)
    skip = 10 if sampler.preconditioner else 0  # the chain whose metric adapts has another law, soon forgotten
    assert_law(draws[skip:], MEAN, covariance)


@pytest.mark.parametrize("sampler,temperature", [(SGLD, 0.4), (SGHMC, 1.0), (BAOAB, 0.4)])
def test_minibatches_with_replacement_have_the_law_of_random_maps(sampler, temperature):
    # One row a step, drawn independently: the update is one of N affine maps at random, and its law is known exactly.
    target, oracle = line(temperature=temperature)
    step_size = {SGLD: 0.01, SGHMC: 0.04, BAOAB: 0.04}[sampler] * temperature ** (1 if sampler is SGLD else 0.5)
    friction = {} if sampler is SGLD else {"friction": 1.0}
    method = sampler(
        num_chains=100,
        num_burn_in=300,
        num_draws=600,
        thinning=5,
        step_size=step_size,
        batch_size=1,
        replacement=True,
        **friction,
    )
    names = list(method.initial_variables(torch.zeros(1, 2, dtype=torch.float64), torch.Generator()))
    maps = []
    for row in range(6):
        batch = Data(target.data.X[row : row + 1], target.data.Y[row : row + 1])

        def step(x, z, batch=batch):
            variables = dict(zip(names, x.split(2, 1), strict=True))
            gradient = log_density_and_gradient(target, variables["position"], batch)[1]
            size, scale = torch.tensor(step_size, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
            return torch.cat(list(method.update(variables, gradient, size, scale, z[None]).values()), 1)

        maps.append(affine_map(step, 2 * len(names), 2))
    A, b, B = (torch.stack(values) for values in zip(*maps, strict=True))
    mean, covariance = stationary_law(A, b, B[0] @ B[0].mT)
    torch.testing.assert_close(mean[:2], oracle.mean)
    # The minibatches' share is there to be seen.
    assert (covariance.diagonal()[:2] / oracle.covariance.diagonal()).min() > 1.1
    draws = draws_of(run(method, target, seed=2))
    assert_law(draws, mean[:2], covariance[:2, :2])


def test_control_variates_take_the_minibatches_noise_away():
    target, oracle = line(num_rows=60)
    settings = {
        "num_chains": 50,
        "num_burn_in": 1000,
        "num_draws": 200,
        "step_size": 0.02,
        "batch_size": 8,
        "friction": 5.0,
    }
    excess = []
    for control_variates in (False, True):
        posterior = run(BAOAB(control_variates=control_variates, **settings), target, seed=1)
        variance = draws_of(posterior).flatten(0, 1).var(0)
        excess.append(float((variance / oracle.covariance.diagonal()).mean()) - 1)
    assert excess[0] > 0.2 and abs(excess[1]) < 0.07, excess


def test_the_thermostat_takes_unknown_noise_away():
    target, sampler = gaussian(), SGNHT(step_size=0.2, friction=0.5, **(SETTINGS | {"thinning": 40}))
    generator, noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    std = 3.0

    def gradient(position, batch):
        exact = log_density_and_gradient(target, position)[1]
        return exact + std * torch.randn(exact.shape, generator=noise, dtype=exact.dtype)

    state, positions, thermostats = sampler.init(target, generator), [], []
    for index in range(150):
        state, info = sampler.advance(gradient, target.data, state, generator)
        if index >= 40:
            positions.append(state.variables["position"])
            thermostats.append(info["thermostat"])
    assert_law(torch.stack(positions), MEAN, torch.linalg.inv(PRECISION))
    # The noise amounts to B = step_size std^2 / 2 = 0.9.
    assert float(torch.stack(thermostats).mean()) == pytest.approx(0.5 + 0.9, abs=0.05)


def test_the_thermostat_keeps_the_kinetic_temperature():
    sampler = SGNHT(step_size=0.4, friction=1.0, **SETTINGS)
    posterior = run(sampler, gaussian(), seed=1)
    assert float(posterior.statistics["kinetic_temperature"].mean()) == pytest.approx(1.0, abs=0.03)
