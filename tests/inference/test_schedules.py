import math

import numpy as np
import pytest

from bayesnn.configured import build, describe
from bayesnn.inference import SGHMC, SGLD, Cosine, Cyclical, Polynomial
from bayesnn.inference.sgmcmc import Constant


def test_values():
    assert [Constant(0.1)(step) for step in (0, 7, 10**6)] == [0.1] * 3
    polynomial = Polynomial(0.5, b=10, gamma=0.55)
    assert [polynomial(step) for step in (0, 90)] == pytest.approx([0.5 * 10**-0.55, 0.5 * 100**-0.55])
    cosine = Cosine(0.1, 0.01, num_steps=100)
    assert [cosine(step) for step in (0, 50, 100, 1000)] == pytest.approx([0.1, 0.055, 0.01, 0.01])
    cyclical = Cyclical(0.1, cycle_length=10)
    expected = [0.05 * (math.cos(math.pi * (step % 10) / 10) + 1) for step in range(30)]
    assert [cyclical(step) for step in range(30)] == pytest.approx(expected)
    for schedule in (polynomial, cosine, cyclical, Cosine(0.01, 0.1, 100), Constant(0.1)):
        assert max(schedule(step) for step in range(300)) == pytest.approx(schedule.largest)


def test_phases_of_a_cycle():
    cyclical = Cyclical(0.1, cycle_length=10, exploration=0.8)
    sampling = [cyclical.sampling(step) for step in range(20)]
    assert sampling == ([False] * 8 + [True] * 2) * 2
    assert [cyclical.noisy(step) for step in range(20)] == sampling
    assert [step for step in range(25) if cyclical.restarts(step)] == [0, 10, 20]
    noisy = Cyclical(0.1, cycle_length=10, noise_in_exploration=True)
    assert all(noisy.noisy(step) for step in range(20)) and not noisy.sampling(0)
    assert all(Constant(0.1).sampling(step) and not Constant(0.1).restarts(step) for step in range(3))


def test_steps_until_the_last_draw():
    # Cycles of 10 steps in 5 calls, of which the last call's end alone is in the sampling phase.
    cyclical = Cyclical(0.01, cycle_length=10, exploration=0.9)
    assert SGLD(num_burn_in=0, num_draws=3, thinning=2, step_size=cyclical).num_steps == 15
    half = Cyclical(0.01, cycle_length=10, exploration=0.5)  # steps 5 to 9 sample: calls that end at 5, 7 and 9
    assert SGLD(num_burn_in=0, num_draws=4, thinning=2, step_size=half).num_steps == 5 + 3
    assert SGLD(num_burn_in=7, num_draws=4, thinning=2, step_size=half).num_steps == 10  # draws at calls 4, 7, 8, 9
    assert SGLD(num_burn_in=7, num_draws=4, thinning=2).num_steps == 4 + 4


def test_schedules_are_described_and_built():
    sampler = SGHMC(step_size=Cyclical(0.01, 50, exploration=0.5), friction=2.0)
    assert build(describe(sampler)) == sampler
    assert build(describe(SGLD(step_size=Polynomial(0.1)))) == SGLD(step_size=Polynomial(0.1))


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: Constant(0.0), "step_size must be positive and finite, found 0.0"),
        (lambda: Constant(math.nan), "step_size must be positive"),
        (lambda: Constant(math.inf), "step_size must be positive and finite"),
        (lambda: Polynomial(-1.0), "a must be positive"),
        (lambda: Polynomial(1.0, b=0.0), "b must be positive"),
        (lambda: Polynomial(1.0, gamma=0.5), "gamma must lie in"),
        (lambda: Cosine(0.1, 0.0, 10), "final must be positive"),
        (lambda: Cosine(0.1, 0.1, 0), "num_steps must be at least 1"),
        (lambda: Cyclical(0.1, 0), "cycle_length must be at least 1"),
        (lambda: Cyclical(0.1, 10, exploration=0.95), "leave at least one of the 10 steps"),
        (lambda: Cyclical(0.1, 10, exploration=1.0), "exploration must lie in"),
        (lambda: Cyclical(0.1, 10, exploration=-0.1), "exploration must lie in"),
        (lambda: SGLD(step_size=Cyclical(0.1, 15), thinning=10), "cycle_length must be a multiple of thinning"),
        (lambda: SGLD(step_size=-0.1), "step_size must be positive"),
    ],
)
def test_bad_schedules(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: Constant("0.1"), "step_size must be a positive number, found '0.1'"),
        (lambda: Polynomial(0.1, b=None), "b must be a positive number"),
        (lambda: Polynomial(0.1, gamma="0.55"), "gamma must be a number"),
        (lambda: Cosine(0.1, 0.01, 2.5), "num_steps must be an integer, found 2.5"),
        (lambda: Cyclical(1e-3, 50.0), "cycle_length must be an integer, found 50.0"),
        (lambda: Cyclical(1e-3, 50, exploration="half"), "exploration must be a number"),
        (lambda: Cyclical(1e-3, 50, noise_in_exploration=1), "noise_in_exploration must be True or False"),
    ],
)
def test_schedules_of_the_wrong_type(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_numpy_s_numbers_are_numbers():
    cyclical = Cyclical(np.float64(0.1), np.uint8(10), np.float64(0.5))
    assert cyclical == Cyclical(0.1, 10, 0.5) and cyclical(1009) == Cyclical(0.1, 10, 0.5)(1009)
    assert build(describe(cyclical)) == cyclical
