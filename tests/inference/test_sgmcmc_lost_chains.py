"""Chains that leave the finite numbers: they are stopped, counted and left out, and the others aren't touched."""

import warnings

import pytest
import torch

from bayesnn.data import BayesnnWarning
from bayesnn.inference import BAOAB, RMS, SGHMC, SGLD, SGNHT, FunctionTarget, Polynomial, Structured, run

SHORT = {"num_burn_in": 20, "num_draws": 8, "thinning": 5, "batch_size": None}
LOST = "chains 1, 4 left the finite numbers in minibatch steps .* of the other 4 of 6"


def target(log_density, points):
    return FunctionTarget(log_density, lambda count, generator: points[torch.arange(count) % len(points)])


def quartic(starts):
    """Of density exp(-x^4 / 4): from where x^2 > 2 / step_size, gradient steps overshoot further and further."""
    points = torch.tensor(starts, dtype=torch.float64)[:, None].expand(-1, 2)
    return target(lambda x: -0.25 * x.pow(4).sum(-1), points)


BAD, GOOD = quartic([0.1, 1e4, 0.2, 0.3, 1e4, 0.0]), quartic([0.1, 0.0, 0.2, 0.3, 0.0, 0.0])
METHODS = {
    "sgld": SGLD(6, step_size=0.05, **SHORT),
    "sgld-polynomial": SGLD(6, step_size=Polynomial(0.05), **SHORT),
    "sghmc": SGHMC(6, step_size=0.05, friction=1.0, **SHORT),
    "baoab": BAOAB(6, step_size=0.05, friction=1.0, **SHORT),
    "sgnht": SGNHT(6, step_size=0.05, friction=1.0, **SHORT),
    "sghmc-control-variates": SGHMC(6, step_size=0.05, friction=1.0, control_variates=True, **SHORT),
    "structured": Structured(SGLD(6, step_size=0.05, **SHORT), groups="parameter"),
}


@pytest.mark.parametrize("name", METHODS)
def test_lost_chains_are_left_out_and_the_others_arent_touched(name):
    states = []
    with pytest.warns(BayesnnWarning, match=LOST) as caught:
        found = run(METHODS[name], BAD, seed=1, callbacks=[lambda index, state, info: states.append((state, info))])
    assert len(caught) == 1
    whole = run(METHODS[name], GOOD, seed=1)
    assert found.num_chains == 4 and len(found) == 32
    others = [0, 2, 3, 5]
    expected = whole.by_chain(whole.parameters["position"])[others].flatten(0, 1)
    if name == "structured":  # its groups take from the past by another draw of the same chain
        assert found.groups["position"].shape == (4, 2) and len(found.draws(50)) == 32
    assert torch.equal(found.parameters["position"], expected)
    for key, values in whole.statistics.items():
        assert torch.equal(found.statistics[key], values[:, others]), key
    if whole.log_weights is not None:
        assert torch.equal(found.log_weights, whole.by_chain(whole.log_weights)[others].flatten())
    for state, info in states:
        base = getattr(state, "base", state)
        assert base.alive.tolist() == [True, False, True, True, False, True]
        assert all(bool(torch.isfinite(values).all()) for values in [*base.variables.values(), *info.values()])
        assert (base.variables["position"][[1, 4]] == 1e4).all()


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", ["sgld", "sgnht"])
@pytest.mark.parametrize("stop", [1, 3, 7])
def test_resumed_equals_uninterrupted_bit_for_bit(name, stop, tmp_path):
    # The middle one of three chains is thrown over the edge by and by.
    starts = quartic([0.1, 50.0, 0.2])
    method = type(METHODS[name])(**(METHODS[name]._arguments | {"num_chains": 3, "thinning": 2, "num_burn_in": 4}))

    def interrupt(index, state, info):
        if index == stop:
            raise Stop

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BayesnnWarning)
        complete = []
        whole = run(method, starts, callbacks=[lambda index, state, info: complete.append(bool(state.alive.all()))])
        with pytest.raises(Stop):
            run(method, starts, checkpoint=tmp_path / "a", checkpoint_every=1, callbacks=[interrupt])
        resumed = run(method, starts, checkpoint=tmp_path / "a")
    assert complete[0] and not complete[4] and whole.num_chains == resumed.num_chains == 2
    assert torch.equal(whole.parameters["position"], resumed.parameters["position"])
    for key, values in whole.statistics.items():
        assert torch.equal(values, resumed.statistics[key]), key


def test_a_preconditioner_s_other_chains_go_on():
    def log_density(x):  # beyond 30 it rises, towards an edge
        return torch.where(x > 30, x + 0 * (50 - x).sqrt(), -0.5 * x.square()).sum(-1)

    cliff = target(log_density, torch.tensor([[1.0, 1.0], [45.0, 1.0], [2.0, 1.0]]).double())
    sampler = SGLD(3, step_size=1.0, preconditioner=RMS(), **SHORT)
    with pytest.warns(BayesnnWarning, match="chain 1 left"):
        posterior = run(sampler, cliff, seed=3)
    assert posterior.num_chains == 2 and bool(torch.isfinite(posterior.parameters["position"]).all())


@pytest.mark.parametrize("sampler", [SGHMC, BAOAB])
def test_a_chain_that_runs_away_within_the_finite_numbers_is_named(sampler):
    def log_density(x):  # beyond 30 it rises
        return torch.where(x.abs() > 30, 1000 * x.abs(), -0.5 * x.square()).sum(-1)

    away = target(log_density, torch.tensor([[1.0], [45.0], [2.0]]).double())
    method = sampler(3, step_size=0.1, friction=2.0, **SHORT)
    with pytest.warns(BayesnnWarning, match=r"mean kinetic temperature .* near 1 and is [0-9.e+]+ in chain 1, of"):
        assert run(method, away).num_chains == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(method, target(log_density, torch.tensor([[1.0], [3.0], [2.0]]).double()))


@pytest.mark.parametrize(("starts", "left"), [([1e4], 0), ([1e4, 0.0, 1e4], 1)])
def test_a_run_that_lost_more_than_half_of_its_chains_ends_and_leaves_its_checkpoint(starts, left, tmp_path):
    sampler = SGLD(len(starts), step_size=0.05, **SHORT)
    message = rf"left the finite numbers in minibatch steps 0 to 4, at step size 0.05; {left} of {len(starts)} are left"
    with pytest.raises(ValueError, match=message):
        run(sampler, quartic(starts))
    slow = SGLD(1, step_size=0.05, **(SHORT | {"thinning": 1}))
    states = []
    options = {"checkpoint": tmp_path / "a", "checkpoint_every": 1}
    with pytest.raises(ValueError, match="Use a smaller step_size"):
        run(slow, quartic([8.0]), callbacks=[lambda index, state, info: states.append(state)], **options)
    assert states and all(bool(torch.isfinite(state.variables["position"]).all()) for state in states)
    with pytest.raises(ValueError, match="left the finite numbers"):  # it goes on from the last finite state
        run(slow, quartic([8.0]), callbacks=[lambda *_: pytest.fail("repeated a step")], **options)
