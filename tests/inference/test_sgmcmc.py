"""The loop around the updates: counts, phases, statistics, resumed runs and errors."""

import numpy as np
import pytest
import torch

from bayesnn import likelihoods, networks, priors
from bayesnn.bnn import BNN
from bayesnn.data import Data
from bayesnn.inference import (
    BAOAB,
    RMS,
    SGHMC,
    SGLD,
    SGNHT,
    Cyclical,
    FunctionTarget,
    NetworkTarget,
    Polynomial,
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


def draws_of(posterior):
    """(draws, chains, P)."""
    flat = torch.cat([values.flatten(1) for values in posterior.parameters.values()], 1)
    return posterior.by_chain(flat).transpose(0, 1)


METHODS = {
    "sgld-rms": SGLD(preconditioner=RMS()),
    "sghmc": SGHMC(step_size=0.01),
    "sghmc-control-variates": SGHMC(step_size=0.01, control_variates=True),
    "sghmc-cyclical": SGHMC(step_size=Cyclical(0.01, 20, exploration=0.5)),
    "sgnht": SGNHT(step_size=0.01),
    "baoab-replacement": BAOAB(step_size=0.01, replacement=True),
    "sgld-polynomial": SGLD(step_size=Polynomial(0.01)),
}
SHORT = {"num_chains": 2, "num_burn_in": 60, "num_draws": 8, "thinning": 5, "batch_size": 7}


def short(name):
    return type(METHODS[name])(**(METHODS[name]._arguments | SHORT))


def network(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(20, 2, generator=generator, dtype=torch.float64).to(dtype)
    data = Data(X, X.sum(-1, keepdim=True).tanh())
    return NetworkTarget(
        networks.mlp(2, 1, hidden=(5,)), likelihoods.Gaussian(), priors.Normal(), data, torch.ones(1, 1)
    )


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("stop", [4, 11, 12, 15])
def test_resumed_equals_uninterrupted_bit_for_bit(name, stop, tmp_path):
    # 2 batches to an epoch and 5 steps to a call: all but every other of these is in the middle of an epoch.
    def interrupt(index, state, info):
        if index == stop:
            raise Stop

    whole = run(short(name), network(), seed=3)
    with pytest.raises(Stop):
        run(short(name), network(), seed=3, checkpoint=tmp_path / "a", checkpoint_every=1, callbacks=[interrupt])
    steps = []
    resumed = run(
        short(name), network(), seed=3, checkpoint=tmp_path / "a", callbacks=[lambda index, *_: steps.append(index)]
    )
    assert steps[0] == stop
    for group in ("parameters", "statistics"):
        for key, values in getattr(whole, group).items():
            assert torch.equal(values, getattr(resumed, group)[key]), key


@pytest.mark.parametrize("name", METHODS)
def test_single_precision(name):
    single = run(short(name), network(torch.float32), seed=3)
    for values in single.parameters.values():
        assert values.dtype == torch.float32 and bool(torch.isfinite(values).all())
    for values in single.statistics.values():
        assert values.shape == (8, 2)


def test_a_batch_of_all_rows_or_more_is_the_full_data():
    runs = [run(SGHMC(step_size=0.01, **(SHORT | {"batch_size": size})), network(), seed=1) for size in (None, 20, 50)]
    for other in runs[1:]:
        for name, values in runs[0].parameters.items():
            assert torch.equal(values, other.parameters[name])


def test_counts_and_statistics():
    sampler = SGHMC(num_chains=3, num_burn_in=11, num_draws=4, thinning=5, step_size=0.01, batch_size=7)
    assert sampler.num_burn_in_steps == 3 and sampler.num_steps == 7
    infos = []
    posterior = run(sampler, network(), seed=1, callbacks=[lambda index, state, info: infos.append(info)])
    assert len(posterior) == 12 and posterior.num_chains == 3 and posterior.log_weights is None
    assert set(posterior.statistics) == {"mean_squared_gradient", "step_size", "kinetic_temperature"}
    for name, values in posterior.statistics.items():
        assert torch.equal(values, torch.stack([info[name] for info in infos[3:]]))
    assert torch.equal(posterior.statistics["step_size"], torch.full((4, 3), 0.01, dtype=torch.float64))


def test_polynomial_schedules_weigh_the_draws():
    schedule = Polynomial(0.01, b=3.0)
    sampler = SGLD(num_chains=2, num_burn_in=10, num_draws=4, thinning=5, step_size=schedule, batch_size=7)
    posterior = run(sampler, network(), seed=1)
    expected = torch.tensor([schedule(step) for step in (14, 19, 24, 29)] * 2, dtype=torch.float64)
    torch.testing.assert_close(posterior.log_weights.exp(), expected)
    torch.testing.assert_close(posterior.statistics["step_size"][:, 0], expected[:4])


def test_cycles_explore_without_noise_and_restart_the_momentum():
    sampler = SGHMC(
        num_chains=2, num_burn_in=0, num_draws=6, thinning=5, step_size=Cyclical(0.01, 20, 0.5), batch_size=None
    )
    target, states = network(), []
    posterior = run(sampler, target, seed=1, callbacks=[lambda index, state, info: states.append(state)])
    assert len(states) == 12 and len(posterior) == 12
    # Calls 0 and 1 of each cycle of 4 explore; what is kept comes from 2 and 3.
    kept = torch.stack([states[index].variables["position"] for index in (2, 3, 6, 7, 10, 11)])
    assert torch.equal(draws_of(posterior), kept)
    # Exploration is a deterministic function of the variables it starts with …
    assert_close(explored(sampler, target, states[4], 25), states[5])
    # … and a cycle doesn't start with the momenta that the one before ended with.
    with pytest.raises(AssertionError):
        assert_close(explored(sampler, target, states[3], 20), states[4])


def explored(sampler, target, state, first):
    """The variables after a call without noise."""
    variables, one = state.variables, torch.ones(1, 1, dtype=torch.float64)
    for step in range(first, first + sampler.thinning):
        gradient = log_density_and_gradient(target, variables["position"])[1]
        step_size = torch.tensor(sampler.schedule(step), dtype=torch.float64)
        variables = sampler.update(variables, gradient, step_size, one, torch.zeros(1, *gradient.shape).double())
    return variables


def assert_close(variables, state):
    for name, values in variables.items():
        torch.testing.assert_close(values, state.variables[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: SGLD(num_chains=0), "num_chains must be at least 1, found 0"),
        (lambda: SGLD(num_draws=0), "num_draws must be at least 1"),
        (lambda: SGLD(thinning=0), "thinning must be at least 1"),
        (lambda: SGLD(num_burn_in=-1), "num_burn_in must be at least 0, found -1"),
        (lambda: SGLD(batch_size=0), "batch_size must be at least 1, found 0"),
        (lambda: SGHMC(friction=0.0), "friction must be positive and finite, found 0.0"),
        (lambda: SGHMC(mass=-1.0), "mass must be positive and finite, found -1.0"),
        (lambda: SGHMC(friction=20.0, step_size=0.1), r"friction must be below mass / step_size = 10, .* found 20.0"),
        (
            lambda: SGHMC(gradient_variance=20.0, step_size=0.1, friction=1.0),
            r"gradient_variance must lie in \[0, .* = \[0, 20\)",
        ),
        (lambda: SGHMC(gradient_variance=-1.0), "gradient_variance must lie in"),
        (lambda: SGHMC(friction=20.0, step_size=Cyclical(0.1, 20)), "friction must be below mass / step_size = 10"),
        (lambda: SGNHT(friction=-1.0), "friction must be positive and finite, found -1.0"),
        (lambda: BAOAB(friction=0.0), "friction must be positive and finite, found 0.0"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: SGLD(num_chains=2.5), "num_chains must be an integer, found 2.5"),
        (lambda: SGLD(num_draws=2.5), "num_draws must be an integer"),
        (lambda: SGLD(thinning=2.5), "thinning must be an integer"),
        (lambda: SGLD(num_burn_in=10.0), "num_burn_in must be an integer, found 10.0"),
        (lambda: SGLD(batch_size=7.5), "batch_size must be an integer"),
        (lambda: SGLD(batch_size="all"), "batch_size must be an integer, found 'all'"),
        (lambda: SGLD(step_size="0.1"), "step_size must be a positive number"),
        (lambda: SGLD(step_size=Polynomial), "step_size must be a positive number, found <class"),
        (lambda: SGLD(replacement="no"), "replacement must be True or False, found 'no'"),
        (lambda: SGLD(control_variates=1), "control_variates must be True or False"),
        (lambda: SGLD(preconditioner="rms"), r"preconditioner must be RMS\(…\) or None, found 'rms'"),
        (lambda: SGLD(preconditioner=RMS), r"preconditioner must be RMS\(…\) or None, found <class"),
        (lambda: SGHMC(friction="10"), "friction must be a positive number"),
        (lambda: SGHMC(gradient_variance=None), "gradient_variance must be a number"),
        (lambda: SGHMC(symplectic="yes"), "symplectic must be True or False"),
        (lambda: SGNHT(friction=None), "friction must be a positive number"),
        (lambda: BAOAB(friction=None), "friction must be a positive number"),
    ],
)
def test_settings_of_the_wrong_type(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_numpy_s_numbers_are_numbers(tmp_path):
    # A byte's product with thinning would overflow.
    counts = {"num_chains": np.int32(2), "num_burn_in": np.uint8(60), "num_draws": np.int64(8), "thinning": np.uint8(5)}
    sampler = SGHMC(**counts, batch_size=np.int16(7), step_size=np.float64(0.01), friction=np.float32(10))
    plain = SGHMC(step_size=0.01, friction=10.0, **SHORT)
    assert sampler == plain
    found = run(sampler, network(), seed=3, checkpoint=tmp_path / "a")
    for name, values in run(plain, network(), seed=3, checkpoint=tmp_path / "a").parameters.items():
        assert torch.equal(found.parameters[name], values)


def test_targets_that_dont_fit():
    generator = torch.Generator()
    with pytest.raises(ValueError, match="batch_size must be None for a target without data, found 32"):
        SGLD().init(gaussian(), generator)
    broken = FunctionTarget(lambda p: p["x"].log().sum(-1), lambda count, g: {"x": torch.zeros(count, 2)})
    with pytest.raises(ValueError, match="gradient of the log density isn't finite at the initial points"):
        SGLD(batch_size=None).init(broken, generator)


def test_as_a_model_s_method():
    generator = torch.Generator().manual_seed(0)
    X = torch.rand(40, 1, generator=generator, dtype=torch.float64) * 4
    Y = X.sin() + 0.1 * torch.randn(40, 1, generator=generator, dtype=torch.float64)
    method = SGHMC(num_chains=4, num_burn_in=1000, num_draws=20, step_size=5e-3, friction=10.0, batch_size=16)
    model = BNN(networks.mlp(1, 1, hidden=(20,)), method=method).fit(X, Y)
    prediction = model.predict(X)
    assert float((prediction.mean - X.sin()).square().mean().sqrt()) < 0.2
