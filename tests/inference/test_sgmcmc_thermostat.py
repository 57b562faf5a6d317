"""The Nosé–Hoover thermostat: starts outside the posterior's bulk, reshuffled epochs, and warnings."""

import math
import warnings

import pytest
import torch
from oracles import z_score

from bayesnn.data import BayesnnWarning, Data
from bayesnn.inference import SGNHT, Cyclical, FunctionTarget, run

STD = 0.07


def narrow(num_parameters, start=1.0):
    """A Gaussian with chains that start far outside it, if ``start`` is far more than STD."""

    def initial(count, generator):
        return start * torch.randn(count, num_parameters, generator=generator, dtype=torch.float64)

    return FunctionTarget(lambda x: -0.5 * (x / STD).square().sum(-1), initial)


def test_a_start_outside_doesnt_charge_the_thermostat():
    posterior = run(SGNHT(num_chains=100, batch_size=None, num_draws=50), narrow(4), seed=1)
    squares = (posterior.by_chain(posterior.parameters["position"]) / STD).square().mean((1, 2))
    assert z_score(squares, 1.0).abs() < 4 and float(squares.mean()) == pytest.approx(1.0, abs=0.1)
    thermostats = posterior.statistics["thermostat"].mean(0)
    assert z_score(thermostats, 10.0).abs() < 4


def test_it_is_held_in_the_first_half_of_burn_in():
    sampler = SGNHT(num_chains=2, batch_size=None, num_burn_in=60, num_draws=1, thinning=10)
    target, generator, thermostats = narrow(3), torch.Generator().manual_seed(0), []
    state = sampler.init(target, generator)
    for _ in range(5):
        thermostats.append(state.variables["thermostat"])
        state, _ = sampler.step(target, state, generator)
    assert torch.equal(thermostats[3], thermostats[0]) and not torch.equal(thermostats[4], thermostats[3])


def test_held_it_has_no_part_in_the_motion():
    sampler, generator = SGNHT(friction=2.0), torch.Generator().manual_seed(0)
    variables = sampler.initial_variables(torch.zeros(5, 3), generator) | {"thermostat": torch.full((5, 1), 7.0)}
    noise, gradient = torch.randn(1, 5, 3, generator=generator), torch.randn(5, 3, generator=generator)
    arguments = (gradient, torch.tensor(0.01), torch.ones(1, 1), noise)
    held, cold = sampler.update_held(variables, *arguments), sampler.update(variables, *arguments)
    assert torch.equal(held["thermostat"], variables["thermostat"])
    at_friction = sampler.update(variables | {"thermostat": torch.full((5, 1), 2.0)}, *arguments)
    torch.testing.assert_close(held["momentum"], at_friction["momentum"], rtol=1e-3, atol=1e-3)
    assert (held["momentum"] - cold["momentum"]).abs().max() > 0.01


def noisy_rows(num_batches, std, shape):
    """Each chain's and parameter's noise of each batch, which adds up to zero over all of them."""
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(num_batches, generator=generator, dtype=torch.float64)
    values = values - values.mean()
    values = std * values / values.square().mean().sqrt()
    return values[torch.rand(num_batches, *shape, generator=generator).argsort(0)]


@pytest.mark.parametrize(("replacement", "expected"), [(True, 1.0), (False, 0.7)])
def test_noise_of_reshuffled_epochs_is_taken_for_more_than_it_is(replacement, expected):
    step_size, num_batches = 0.05, 64
    sampler = SGNHT(200, 2000, 1, 20, step_size, batch_size=1, friction=1.0, replacement=replacement)
    rows = noisy_rows(num_batches, math.sqrt(2 / step_size), (200, 2))  # B = 1
    target = FunctionTarget(
        lambda x: -0.5 * x.square().sum(-1), lambda count, generator: torch.zeros(count, 2).double()
    )
    data = Data(torch.arange(num_batches).double()[:, None], torch.zeros(num_batches, 1).double())
    target.data = data

    def gradient(position, batch):
        return rows[batch.X[0, 0].long()] - position

    generator = torch.Generator().manual_seed(1)
    state, squares = sampler.init(target, generator), []
    for index in range(300):
        state, _ = sampler.advance(gradient, data, state, generator)
        if index >= 100:
            squares.append(state.variables["position"].square().mean(-1))
    per_chain = torch.stack(squares).mean(0)
    assert float(per_chain.mean()) == pytest.approx(expected, abs=0.03)
    assert SGNHT().replacement


def test_a_wrong_temperature_warns():
    settings = {"batch_size": None, "num_draws": 50}
    with pytest.warns(
        BayesnnWarning, match=r"temperature after burn-in is \d+\.\d\d ± 0\.\d\d and should be 1: .* too wide"
    ):
        run(SGNHT(num_burn_in=0, **settings), narrow(50), seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(SGNHT(num_burn_in=2000, **settings), narrow(50), seed=1)
        run(SGNHT(num_burn_in=0, **settings), narrow(50, start=STD), seed=1)
        # Cycles have no stationary law; momenta are cold after a phase without noise.
        run(SGNHT(num_burn_in=0, step_size=Cyclical(1e-3, 500, 0.5), **settings), narrow(50, start=STD), seed=1)


class Noisy(FunctionTarget):
    """A standard Gaussian with rows whose gradients differ."""

    def log_likelihood(self, parameters, batch=None):
        rows = self.data if batch is None else batch
        return (rows.X.sum(0) * parameters["position"]).sum(-1)


def test_what_the_noise_of_a_large_step_does_to_the_momentum_isnt_warned_of():
    # Measured after the friction, momenta are colder than 1 by epsilon B = 0.2: twice what is warned of.
    generator = torch.Generator().manual_seed(0)
    target = Noisy(lambda x: -0.5 * x.square().sum(-1), lambda count, g: torch.randn(count, 40, generator=g).double())
    X = torch.randn(500, 40, generator=generator, dtype=torch.float64)
    step_size = 0.2
    X = (X - X.mean(0)) / X.std(0) * math.sqrt(2 / step_size) / 500  # B = 1 from one row scaled up to all
    target.data = Data(X, torch.zeros(500, 1).double())
    sampler = SGNHT(num_burn_in=400, num_draws=100, step_size=step_size, friction=0.5, batch_size=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior = run(sampler, target, seed=1)
    assert float(posterior.statistics["kinetic_temperature"].mean()) < 0.85
