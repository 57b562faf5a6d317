"""Metrics against closed forms, quadrature, brute force and scikit-learn."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.integrate import quad
from sklearn.metrics import brier_score_loss, roc_auc_score
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, NegativeBinomial, Normal, Poisson, StudentT

from bayesnn import metrics
from bayesnn.histogram import Histogram
from bayesnn.metrics.crps import _crps_quadrature
from bayesnn.predictive import ClassPredictive, Predictive


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(mean: Tensor, std: Tensor) -> Predictive:
    """One Gaussian for each of q points."""
    return Predictive(Normal(mean[None, :, None], std[None, :, None]))


def crps_by_quadrature(p: Predictive, y: float, reach: float) -> float:
    """The definition, for a prediction of a single point."""
    below = quad(lambda z: float(p.cdf(torch.tensor([[z]]))) ** 2, y - reach, y, limit=200, epsabs=1e-6)[0]
    above = quad(lambda z: (1 - float(p.cdf(torch.tensor([[z]])))) ** 2, y, y + reach, limit=200, epsabs=1e-6)[0]
    return below + above


def test_crps_of_a_gaussian_equals_quadrature() -> None:
    for mean, std, y in [(0.0, 1.0, 0.3), (2.0, 0.5, -1.0), (-1.0, 3.0, 8.0)]:
        p = gaussian(torch.tensor([mean], dtype=torch.float64), torch.tensor([std], dtype=torch.float64))
        assert metrics.crps(p, torch.tensor([y])) == pytest.approx(crps_by_quadrature(p, y, 40.0), abs=1e-7)


def test_crps_of_a_mixture_of_gaussians_equals_quadrature_in_the_users_units() -> None:
    components = Normal(3 * randn(5, 1, 1), 0.2 + rand(5, 1, 1))
    p = Predictive(components, randn(5, seed=1)).affine(torch.tensor([[10.0]]), torch.tensor([[4.0]]))
    for y in (-5.0, 9.0, 40.0):
        assert metrics.crps(p, torch.tensor([y])) == pytest.approx(crps_by_quadrature(p, y, 150.0), abs=1e-6)


@pytest.mark.parametrize("offset", [0.0, 0.7, -30.0])
def test_crps_by_the_cdf_agrees_with_the_closed_form(offset: float) -> None:
    mean, std = randn(6), 0.1 + rand(6)
    y = (mean + offset * std).unsqueeze(-1)
    exact = metrics.crps_gaussian(mean.unsqueeze(-1), std.unsqueeze(-1), y)
    torch.testing.assert_close(_crps_quadrature(gaussian(mean, std), y), exact, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "components",
    [
        StudentT(torch.full((3, 1, 1), 4.0).double(), randn(3, 1, 1), 0.5 + rand(3, 1, 1)),
        Histogram(torch.linspace(-2, 3, 8).double(), randn(3, 1, 1, 7)),
    ],
)
@pytest.mark.parametrize("y", [0.2, -4.0])
def test_crps_of_other_distributions_equals_quadrature(components: Distribution, y: float) -> None:
    p = Predictive(components)
    assert metrics.crps(p, torch.tensor([y])) == pytest.approx(crps_by_quadrature(p, y, 400.0), rel=2e-4)


@pytest.mark.parametrize(
    "components",
    [Poisson(3 + 4 * rand(3, 1, 1)), NegativeBinomial(torch.full((3, 1, 1), 2.0).double(), logits=randn(3, 1, 1))],
)
@pytest.mark.parametrize("y", [0.0, 4.0, 60.0])
def test_crps_of_counts_sums_over_whole_numbers(components: Distribution, y: float) -> None:
    p = Predictive(components)
    counts = torch.arange(0, 2000, dtype=torch.float64)[:, None, None]
    exact = (components.log_prob(counts[:, None]).exp().mean(1).cumsum(0) - (y <= counts).double()).square().sum()
    assert metrics.crps(p, torch.tensor([y])) == pytest.approx(float(exact), rel=1e-6)


@pytest.mark.parametrize("fair", [True, False])
def test_crps_of_draws_equals_brute_force(fair: bool) -> None:
    samples, y = randn(9, 4, 2), randn(4, 2, seed=1)
    pairs = (samples[:, None] - samples[None]).abs().sum((0, 1))
    expected = (samples - y).abs().mean(0) - pairs / 2 / (9 * 8 if fair else 81)
    torch.testing.assert_close(metrics.crps_draws(samples, y, fair=fair), expected)


def test_fair_crps_of_draws_is_unbiased() -> None:
    y = torch.full((20000,), 0.5, dtype=torch.float64)
    scores = metrics.crps_draws(randn(3, 20000), y)
    exact = metrics.crps_gaussian(torch.zeros(()).double(), torch.ones(()).double(), y[0])
    assert abs(float((scores.mean() - exact) / (scores.std() / math.sqrt(20000)))) < 4


def test_crps_of_draws_needs_enough_draws() -> None:
    with pytest.raises(ValueError, match="at least 2 draws"):
        metrics.crps_draws(torch.zeros(1, 3), torch.zeros(3))
    assert float(metrics.crps_draws(torch.zeros(1), torch.tensor(2.0), fair=False)) == 2.0


def test_nll_and_rmse_by_hand() -> None:
    p = gaussian(torch.tensor([0.0, 1.0]).double(), torch.tensor([1.0, 2.0]).double())
    y = torch.tensor([1.0, 4.0])
    expected = math.log(2 * math.pi) / 2 + (0.5 + math.log(2) + 9 / 8) / 2
    assert metrics.nll(p, y) == pytest.approx(expected)
    assert metrics.rmse(p, y) == pytest.approx(math.sqrt(5))


def test_exact_gaussian_is_covered_and_calibrated() -> None:
    n = 20000
    mean, std = randn(n), 0.5 + rand(n)
    y = mean + std * randn(n, seed=1)
    exact, narrow = gaussian(mean, std), gaussian(mean, std / 2)
    for level in (0.5, 0.9):
        z = (metrics.coverage(exact, y, level) - level) / math.sqrt(level * (1 - level) / n)
        assert abs(z) < 4
    assert metrics.calibration_error(exact, y) < 3 * 0.313 / math.sqrt(n)
    # Twice too sure: the share below the alpha-quantile is Phi(z_alpha / 2).
    levels, shares = metrics.calibration_curve(narrow, y)
    predicted = torch.special.ndtr(torch.special.ndtri(levels) / 2)
    assert float((shares - predicted).abs().max()) < 4 * math.sqrt(0.25 / n)
    assert metrics.calibration_error(narrow, y) == pytest.approx(float((predicted - levels).abs().mean()), abs=0.01)


def test_sharpness_is_the_mean_width() -> None:
    std = torch.tensor([1.0, 3.0]).double()
    assert metrics.sharpness(gaussian(torch.zeros(2).double(), std)) == pytest.approx(2 * 2 * 1.6448536, rel=1e-6)


def test_calibrated_counts_lie_on_the_diagonal() -> None:
    rate = 0.5 + 3 * rand(20000)
    y = torch.poisson(rate, generator=torch.Generator().manual_seed(0))
    p = Predictive(Poisson(rate[None, :, None]))
    levels, shares = metrics.calibration_curve(p, y)
    assert float((shares - levels).abs().max()) < 4 * math.sqrt(0.25 / 20000)


def categorical(probabilities: list[list[float]]) -> ClassPredictive:
    return ClassPredictive(Categorical(probs=torch.tensor(probabilities).double()[None, :, None]))


def test_expected_calibration_error_by_hand() -> None:
    p = categorical([[0.9, 0.1], [0.85, 0.15], [0.3, 0.7], [0.45, 0.55]])
    y = torch.tensor([0, 1, 1, 0])
    # Five bins: (0.4, 0.6] holds 0.55 (wrong), (0.6, 0.8] 0.7 (right), (0.8, 1] 0.9 (right) and 0.85 (wrong).
    expected = 0.25 * 0.55 + 0.25 * 0.3 + 0.5 * abs(0.5 - 0.875)
    assert metrics.expected_calibration_error(p, y, num_bins=5) == pytest.approx(expected)
    counts, confidences, accuracies = metrics.reliability(p, y, num_bins=5)
    assert counts.tolist() == [0, 0, 1, 1, 2]
    assert accuracies[2:].tolist() == [0.0, 1.0, 0.5]
    assert confidences[2:].tolist() == pytest.approx([0.55, 0.7, 0.875])
    assert metrics.accuracy(p, y) == 0.5


def test_bins_are_closed_on_the_right() -> None:
    p = categorical([[0.6, 0.4], [0.8, 0.2], [1.0, 0.0]])
    assert metrics.reliability(p, torch.zeros(3), num_bins=5)[0].tolist() == [0, 0, 1, 1, 1]


def test_brier_score() -> None:
    p = categorical([[0.5, 0.2, 0.3], [0.1, 0.1, 0.8]])
    assert metrics.brier(p, torch.tensor([0, 1])) == pytest.approx((0.25 + 0.04 + 0.09 + 0.01 + 0.81 + 0.64) / 2)
    probability, labels = rand(50), (rand(50, seed=1) < 0.5).long()
    binary = ClassPredictive(Bernoulli(probability[None, :, None]))
    assert metrics.brier(binary, labels) == pytest.approx(brier_score_loss(labels, probability))


def test_binary_confidence_is_that_of_the_likelier_label() -> None:
    binary = ClassPredictive(Bernoulli(torch.tensor([[[0.1], [0.7]]]).double()))
    two = categorical([[0.9, 0.1], [0.3, 0.7]])
    y = torch.tensor([1, 1])
    assert metrics.expected_calibration_error(binary, y) == pytest.approx(metrics.expected_calibration_error(two, y))
    assert metrics.accuracy(binary, y) == metrics.accuracy(two, y) == 0.5
    assert metrics.nll(binary, y) == pytest.approx(metrics.nll(two, y)) == pytest.approx(-math.log(0.07) / 2)


def test_auroc_equals_scikit_learn_with_ties() -> None:
    scores_in, scores_out = (10 * rand(40)).round(), (10 * rand(30, seed=1) + 2).round()
    truth = torch.cat([torch.zeros(40), torch.ones(30)])
    expected = roc_auc_score(truth, torch.cat([scores_in, scores_out]))
    assert metrics.auroc(scores_in, scores_out) == pytest.approx(expected)
    assert metrics.auroc(torch.ones(3), torch.ones(2)) == 0.5
    with pytest.raises(ValueError, match="scores_out"):
        metrics.auroc(scores_in, torch.empty(0))


def test_summary_names_each_score() -> None:
    p = gaussian(randn(8), 0.1 + rand(8))
    scores = metrics.summary(p, torch.zeros(8))
    assert list(scores) == ["nll", "rmse", "crps", "coverage_90", "sharpness_90", "calibration_error"]
    assert scores["crps"] == metrics.crps(p, torch.zeros(8, 1))
    assert list(metrics.summary(categorical([[0.5, 0.5]]), torch.zeros(1))) == ["nll", "accuracy", "brier", "ece"]


def test_bad_observations_are_refused() -> None:
    p, labels = gaussian(randn(3), torch.ones(3)), categorical([[0.5, 0.5]])
    with pytest.raises(ValueError, match=r"shape \(3, 1\).*found \(4, 1\)"):
        metrics.rmse(p, torch.zeros(4))
    with pytest.raises(ValueError, match="1 NaN"):
        metrics.coverage(p, torch.tensor([0.0, math.nan, 1.0]))
    with pytest.raises(ValueError, match="labels 0 … 1, found 2"):
        metrics.nll(labels, torch.tensor([2]))
    with pytest.raises(ValueError, match=r"found 0\.5"):
        metrics.accuracy(labels, torch.tensor([0.5]))
    with pytest.raises(TypeError, match="class labels"):
        metrics.crps(labels, torch.tensor([0]))
    with pytest.raises(TypeError, match="class labels"):
        metrics.accuracy(p, torch.zeros(3))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_precisions(dtype: torch.dtype) -> None:
    components = Normal(randn(4, 6, 2).to(dtype), (0.1 + rand(4, 6, 2)).to(dtype))
    y = randn(6, 2, seed=1).to(dtype)
    low, high = metrics.summary(Predictive(components), y), metrics.summary(Predictive(components), y.double())
    assert low == high
    assert metrics.pointwise_crps(Predictive(components), y).dtype == dtype
