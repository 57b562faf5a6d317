"""Probabilities of arms against closed forms and limits."""

import math

import pytest
import torch
from hypothesis import given, strategies as st

from bayesnn.bo.exploration import fast_cb, fast_cb_gamma, greedy, square_cb, square_cb_gamma, thompson


def losses(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("rule", [square_cb, fast_cb])
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0, 1e6))
def test_probabilities_sum_to_one_and_prefer_smaller_losses(rule, values, gamma):
    found = rule(losses(*values), gamma)
    assert found.min() >= 0
    torch.testing.assert_close(found.sum(), losses(1.0)[0])
    best = int(torch.argmin(losses(*values)))
    assert (found <= found[best] + 1e-12).all()


def test_two_arms_in_closed_form():
    torch.testing.assert_close(square_cb(losses(0.7, 0.2), 30.0), losses(1 / 17, 16 / 17))
    torch.testing.assert_close(fast_cb(losses(0.7, 0.2), 30.0), losses(0.2 / 15.4, 15.2 / 15.4))


def test_without_gamma_all_arms_are_alike():
    for rule in (square_cb, fast_cb):
        torch.testing.assert_close(rule(losses(0.0, 0.4, 1.0), 0.0), torch.full((3,), 1 / 3, dtype=torch.float64))


def test_a_large_gamma_is_greedy():
    predicted = losses(0.5, 0.1, 0.3)
    for rule in (square_cb, fast_cb):
        torch.testing.assert_close(rule(predicted, 1e14), greedy(-predicted))


def test_an_arm_without_loss_ends_exploration_by_relative_gaps():
    torch.testing.assert_close(fast_cb(losses(0.3, 0.0, 0.9), 5.0), losses(0.0, 1.0, 0.0))
    torch.testing.assert_close(fast_cb(losses(0.0, 0.0), 5.0), losses(0.5, 0.5))
    assert square_cb(losses(0.3, 0.0, 0.9), 5.0).min() > 0.1


def test_batches_are_rows():
    batch = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stds = batch + 0.1
    rules = [lambda row, _: square_cb(row, 9.0), lambda row, _: fast_cb(row, 9.0), thompson]
    for rule in rules:
        torch.testing.assert_close(rule(batch, stds)[1, 2], rule(batch[1, 2], stds[1, 2]))


def test_thompson_with_two_arms_is_the_probability_that_a_difference_is_positive():
    means, stds = losses(0.3, 0.5), losses(0.4, 0.3)
    wins = torch.special.ndtr((means[0] - means[1]) / math.hypot(0.4, 0.3))
    torch.testing.assert_close(
        thompson(means, stds), torch.stack([wins, 1 - wins]), atol=1e-8, rtol=0
    )  # 6 standard deviations


def test_thompson_knows_arms_of_very_different_certainty():
    means, stds = losses(0.0, 0.5), losses(1.0, 1e-6)
    wins = 1 - torch.special.ndtr(losses(0.5))
    # The other arm is a step, in the worst case half a node away; normalising brings in the same error once more.
    torch.testing.assert_close(thompson(means, stds)[:1], wins, atol=0.03, rtol=0)


def test_thompson_is_the_frequency_of_largest_draws():
    means, stds = losses(0.1, 0.3, 0.2), losses(0.3, 0.1, 0.5)
    draws = means + stds * torch.randn(100_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    frequency = greedy(draws).mean(0)
    found = thompson(means, stds)
    z = (frequency - found) / (found * (1 - found) / 100_000).sqrt()
    assert z.abs().max() < 3.5


def test_gammas_are_the_theorems():
    assert square_cb_gamma(4, 900, 9.0) == pytest.approx(20.0)
    assert fast_cb_gamma(2, 60_000.0, 4.0) == pytest.approx(100.0)
    assert fast_cb_gamma(2, 0.0, 4.0) == 20.0


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="losses must be finite"):
        square_cb(losses(0.1, math.nan), 1.0)
    with pytest.raises(ValueError, match=r"losses must lie in \[0, 1\], found -0.1"):
        fast_cb(losses(-0.1, 0.5), 1.0)
    with pytest.raises(TypeError, match="losses must be a tensor of floating-point"):
        square_cb(torch.tensor([1, 2]), 1.0)
    with pytest.raises(ValueError, match="losses must be of shape"):
        square_cb(torch.zeros(3, 0), 1.0)
    with pytest.raises(ValueError, match="gamma must be a number from 0 on"):
        square_cb(losses(0.1, 0.2), -1.0)
    with pytest.raises(ValueError, match="stds must be positive"):
        thompson(losses(0.1, 0.2), losses(0.0, 1.0))
