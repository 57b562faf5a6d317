"""Which rows the samplers see, and estimates of the gradient, by enumeration."""

import itertools
import math

import pytest
import torch

from bayesnn import likelihoods, networks, priors
from bayesnn.data import Data
from bayesnn.inference import SGLD, NetworkTarget
from bayesnn.inference.flat import log_density_and_gradient, ravel
from bayesnn.inference.sgmcmc.control_variates import Anchor, around, plain
from bayesnn.inference.sgmcmc.minibatches import Minibatches, draw_rows


def small_target(num_rows=6, temperature=1.0):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(num_rows, 2, generator=generator, dtype=torch.float64)
    data = Data(X, (X.sum(-1, keepdim=True) + 0.3).sin())
    network = networks.mlp(2, 1, hidden=(3,))
    return NetworkTarget(network, likelihoods.Gaussian(), priors.Normal(), data, torch.ones(1, 1), temperature)


def positions(target, count, seed):
    return ravel(target.initial(count, torch.Generator().manual_seed(seed)), target.shapes())


def draw(state, *arguments):
    state, rows = draw_rows(state, *arguments)
    return state, rows.tolist()


def test_an_epoch_without_replacement_sees_every_row_once():
    generator = torch.Generator().manual_seed(0)
    _, rows = draw(Minibatches.start(12, 3, False), 12, 3, 8, generator)
    assert [sorted(itertools.chain(*rows[start : start + 4])) for start in (0, 4)] == [list(range(12))] * 2
    assert rows[:4] != rows[4:]


def test_batches_that_dont_divide_the_data():
    generator = torch.Generator().manual_seed(0)
    state, seen = Minibatches.start(10, 4, False), []
    for _ in range(3000):
        state, rows = draw(state, 10, 4, 1, generator)
        assert len(set(rows[0])) == 4
        seen.append(frozenset(rows[0]))
    for first, second in zip(seen[::2], seen[1::2], strict=True):  # two batches to an epoch, two rows left over
        assert not first & second
    counts = torch.tensor([sum(row in batch for batch in seen) for row in range(10)])
    assert (counts - 1200).abs().max() < 4 * math.sqrt(3000 * 0.4 * 0.6)


def test_the_rows_dont_depend_on_how_many_are_drawn_at_once():
    for replacement in (False, True):
        one, all_at_once = (torch.Generator().manual_seed(3) for _ in range(2))
        state, singly = Minibatches.start(10, 4, replacement), []
        for _ in range(7):
            state, rows = draw(state, 10, 4, 1, one)
            singly += rows
        if not replacement:
            assert singly == draw(Minibatches.start(10, 4, replacement), 10, 4, 7, all_at_once)[1]
        assert all(0 <= row < 10 for batch in singly for row in batch)


def test_with_replacement_rows_are_independent():
    state, rows = draw_rows(Minibatches.start(5, 2, True), 5, 2, 20000, torch.Generator().manual_seed(0))
    counts = torch.bincount(5 * rows[:, 0] + rows[:, 1], minlength=25)
    assert (counts - 800).abs().max() < 4 * math.sqrt(20000 * 0.04 * 0.96)
    assert len(state.order) == 0


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("replacement", [False, True])
def test_estimates_are_unbiased(replacement, temperature):
    target = small_target(temperature=temperature)
    position, anchor = positions(target, 2, 1), positions(target, 2, 2)
    full = log_density_and_gradient(target, position)[1]
    anchored = around(target, Anchor(anchor, log_density_and_gradient(target, anchor)[1]))
    enumerate_batches = itertools.product if replacement else lambda rows, repeat: itertools.combinations(rows, repeat)
    for gradient in (plain(target), anchored):
        estimates = []
        for rows in enumerate_batches(range(6), repeat=2):
            batch = Data(target.data.X[list(rows)], target.data.Y[list(rows)])
            estimates.append(gradient(position, batch))
        assert torch.stack(estimates).std(0).min() > 0
        torch.testing.assert_close(torch.stack(estimates).mean(0), full)


def test_control_variates_have_no_variance_at_the_anchor_and_little_near_it():
    target = small_target()
    anchor = positions(target, 2, 1)
    full = log_density_and_gradient(target, anchor)[1]
    gradient = around(target, Anchor(anchor, full))
    direction = positions(target, 2, 2)
    variances = []
    for distance in (0.0, 1e-3, 1e-2):
        estimates = [
            gradient(anchor + distance * direction, Data(target.data.X[row : row + 1], target.data.Y[row : row + 1]))
            for row in range(6)
        ]
        variances.append(float(torch.stack(estimates).var(0).sum()))
    assert variances[0] < 1e-20
    assert variances[2] / variances[1] == pytest.approx(100, rel=0.05)


def test_the_anchor_is_the_mean_of_the_second_half_of_burn_in():
    target, generator = small_target(), torch.Generator().manual_seed(0)
    sampler = SGLD(num_chains=2, num_burn_in=8, thinning=2, num_draws=3, batch_size=2, control_variates=True)
    state, seen = sampler.init(target, generator), []
    for _ in range(sampler.num_steps):
        seen.append(state.variables["position"])
        state, _ = sampler.step(target, state, generator)
    mean = torch.stack(seen[2:5]).mean(0)  # before calls 2 and 3 of the 4 that burn in, and after them
    torch.testing.assert_close(state.anchor.position, mean)
    torch.testing.assert_close(state.anchor.gradient, log_density_and_gradient(target, mean)[1])


def test_control_variates_without_burn_in_are_centred_at_the_start():
    target, generator = small_target(), torch.Generator().manual_seed(0)
    sampler = SGLD(num_chains=2, num_burn_in=0, thinning=2, num_draws=3, batch_size=2, control_variates=True)
    state = sampler.init(target, generator)
    first = state.variables["position"]
    for _ in range(2):
        state, _ = sampler.step(target, state, generator)
    assert torch.equal(state.anchor.position, first)
    torch.testing.assert_close(state.anchor.gradient, log_density_and_gradient(target, first)[1])
