import math

import numpy as np
import pytest
import scipy.stats
import torch
from oracles import z_score
from torch.distributions import Bernoulli, Categorical, NegativeBinomial, Normal, Poisson, StudentT

from bayesnn.distributions import cdf
from bayesnn.histogram import Histogram
from bayesnn.predictive import ClassPredictive, Predictive

S, Q, M = 5, 4, 2
GENERATOR = torch.Generator().manual_seed(0)
LOC, SCALE = torch.tensor([[3.0, -1.0]]).double(), torch.tensor([[2.0, 0.5]]).double()
LEVELS = (0.01, 0.05, 0.3, 0.5, 0.9, 0.999)


def randn(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


MEAN, STD = 2 * randn(S, Q, M), randn(S, Q, M).exp()
REAL = {
    "normal": Normal(MEAN, STD),
    "student-t": StudentT(torch.full_like(MEAN, 4.0), MEAN, STD),
    "histogram": Histogram(torch.linspace(-3, 3, 11).double(), randn(S, Q, M, 10)),
}
COUNTS = {"poisson": Poisson((MEAN / 2).exp()), "negative binomial": NegativeBinomial(STD, logits=MEAN / 3)}
LOG_WEIGHTS = {"equal": None, "weighted": randn(S), "batched": randn(3, S)}


def weights(log_weights):
    return torch.full((S,), 1 / S).double() if log_weights is None else torch.softmax(log_weights, -1)


@pytest.mark.parametrize("kind", [*REAL, *COUNTS])
@pytest.mark.parametrize("weighting", ["equal", "weighted"])
def test_moments_cdf_and_density_are_the_mixture_s(kind, weighting):
    components = (REAL | COUNTS)[kind]
    own = Predictive(components, LOG_WEIGHTS[weighting])
    w = weights(LOG_WEIGHTS[weighting])[:, None, None]
    assert own.shape == (Q, M)
    mean = (w * components.mean).sum(0)
    second = (w * (components.variance + components.mean.square())).sum(0)
    torch.testing.assert_close(own.mean, mean)
    torch.testing.assert_close(own.variance, second - mean.square())
    torch.testing.assert_close(own.stddev.square(), own.variance)
    # The law of total variance, part by part.
    torch.testing.assert_close(own.aleatoric, (w * components.variance).sum(0))
    torch.testing.assert_close(own.epistemic, (w * (components.mean - mean).square()).sum(0))
    y = torch.full((Q, M), 2.0).double()
    torch.testing.assert_close(own.cdf(y), (w * cdf(components, y)).sum(0))
    torch.testing.assert_close(own.log_prob(y), (w[..., 0] * components.log_prob(y).sum(-1).exp()).sum(0).log())


@pytest.mark.parametrize("kind", REAL)
@pytest.mark.parametrize("weighting", LOG_WEIGHTS)
def test_quantiles_invert_the_cdf(kind, weighting):
    components = REAL[kind]
    if weighting == "batched":
        components = components.expand((3, S, Q, M)) if kind != "histogram" else Histogram(
            components.borders, components.logits.expand(3, S, Q, M, 10))  # fmt: skip
    own = Predictive(components, LOG_WEIGHTS[weighting]).affine(LOC, SCALE)
    for p in LEVELS:
        quantile = own.quantile(p)
        assert quantile.shape == own.shape
        torch.testing.assert_close(own.cdf(quantile), torch.full(own.shape, p, dtype=torch.float64), rtol=0, atol=1e-9)
    levels = torch.rand(Q, M, generator=GENERATOR).double()
    torch.testing.assert_close(own.cdf(own.quantile(levels)), levels.expand(own.shape), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", COUNTS)
def test_quantiles_of_counts_are_the_smallest_count_that_reaches_the_level(kind):
    own = Predictive(COUNTS[kind], LOG_WEIGHTS["weighted"])
    for p in LEVELS:
        k = own.quantile(p)
        assert torch.equal(k, k.round()) and (k >= 0).all()
        assert (own.cdf(k) >= p).all()
        assert ((own.cdf(k - 1) < p) | (k == 0)).all()


def test_quantiles_far_from_the_mean():
    # A component far away, with next to no weight, and one that is much narrower than the mixture.
    components = Normal(
        torch.tensor([0.0, 1e6]).double()[:, None, None], torch.tensor([1e-6, 1.0]).double()[:, None, None]
    )
    own = Predictive(components, torch.tensor([1 - 1e-4, 1e-4]).double().log())
    for p in (1e-9, 0.5, 0.9998, 0.99995, 1 - 1e-9):
        torch.testing.assert_close(
            own.cdf(own.quantile(p)), torch.tensor([[p]], dtype=torch.float64), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("df", [0.7, 1.0, 1.5, 2.0])
def test_quantiles_without_a_mean_or_variance(df):
    loc = torch.tensor([0.0, 3.0]).double()[:, None, None]
    own = Predictive(StudentT(torch.full_like(loc, df), loc, torch.ones_like(loc)))
    for p in (0.05, 0.5, 0.99):
        torch.testing.assert_close(
            own.cdf(own.quantile(p)), torch.tensor([[p]], dtype=torch.float64), rtol=0, atol=1e-9
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_gaussian_in_closed_form(dtype):
    mean, std = MEAN[:1].to(dtype), STD[:1].to(dtype)
    own = Predictive(Normal(mean, std)).affine(LOC.to(dtype), SCALE.to(dtype))
    reference = scipy.stats.norm(LOC + SCALE * MEAN[0], SCALE * STD[0])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for p in LEVELS:
        assert own.quantile(p).dtype == dtype
        np.testing.assert_allclose(own.quantile(p), reference.ppf(p), rtol=tolerance, atol=10 * tolerance)
    np.testing.assert_allclose(own.entropy, reference.entropy(), rtol=tolerance, atol=10 * tolerance)
    low, high = own.interval(0.8)
    np.testing.assert_allclose(high - low, 2 * 1.2815515655446004 * SCALE * STD[0], rtol=10 * tolerance)


def test_function_variance_in_closed_form_is_epistemic():
    own = Predictive(Normal(MEAN[:1], STD[:1]), function_var=0.25 * STD[:1].square()).affine(LOC, SCALE)
    torch.testing.assert_close(own.epistemic, 0.25 * (SCALE * STD[0]).square())
    torch.testing.assert_close(own.variance, (SCALE * STD[0]).square())


@pytest.mark.parametrize("kind", REAL)
def test_units(kind):
    standard = Predictive(REAL[kind], LOG_WEIGHTS["weighted"])
    own = standard.affine(torch.ones(1, M), 2 * torch.ones(1, M)).affine(LOC, SCALE)
    loc, scale = LOC + SCALE, 2 * SCALE
    y = randn(Q, M)
    user = loc + scale * y
    torch.testing.assert_close(own.mean, loc + scale * standard.mean)
    for name in ("variance", "aleatoric", "epistemic"):
        torch.testing.assert_close(getattr(own, name), scale.square() * getattr(standard, name))
    torch.testing.assert_close(own.cdf(user), standard.cdf(y))
    torch.testing.assert_close(own.quantile(0.3), loc + scale * standard.quantile(0.3), rtol=1e-8, atol=1e-8)
    # The density of a change of units: divided by the scale of every output.
    torch.testing.assert_close(own.log_prob(user), standard.log_prob(y) - scale.log().sum())
    torch.testing.assert_close(own.entropy, standard.entropy + scale.log(), rtol=1e-6, atol=1e-6)
    samples = own.sample(5, torch.Generator().manual_seed(1))
    torch.testing.assert_close(samples, loc + scale * standard.sample(5, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("kind", REAL)
def test_entropy_is_the_integral(kind):
    own = Predictive(REAL[kind], LOG_WEIGHTS["weighted"])
    y = torch.linspace(-60, 60, 40_001).double()[:, None, None]
    log_p = own._log_density(y)
    expected = -torch.trapezoid(log_p.exp() * log_p, y, dim=0)
    torch.testing.assert_close(own.entropy, expected, rtol=0, atol=0.06 if kind == "histogram" else 0.03)


@pytest.mark.parametrize("kind", [*REAL, *COUNTS])
def test_intervals_cover(kind):
    own = Predictive((REAL | COUNTS)[kind], LOG_WEIGHTS["weighted"])
    if kind in REAL:
        own = own.affine(LOC, SCALE)
    draws = own.sample(20_000, torch.Generator().manual_seed(2))
    assert draws.shape == (20_000, Q, M)
    for level in (0.5, 0.9):
        low, high = own.interval(level)
        covered = ((draws >= low) & (draws <= high)).double().mean(0)
        error = math.sqrt(level * (1 - level) / 20_000)
        if kind in REAL:
            assert ((covered - level) / error).abs().max() < 4
        else:
            assert (covered > level - 4 * error).all()
    if kind != "student-t":  # whose squares have no variance
        assert z_score(draws, own.mean).abs().max() < 4
        assert z_score((draws - own.mean).square(), own.variance).abs().max() < 4


def test_samples_share_one_function_over_points():
    """With hardly any noise, a sample is one of the functions at all points; weights say how often."""
    own = Predictive(Normal(MEAN, 1e-9 * STD), LOG_WEIGHTS["weighted"])
    draws = own.sample(4000, torch.Generator().manual_seed(0))
    distance = (draws.unsqueeze(1) - MEAN).abs().amax((-1, -2))
    assert distance.amin(1).max() < 1e-6
    counts = torch.bincount(distance.argmin(1), minlength=S)
    p = weights(LOG_WEIGHTS["weighted"])
    assert ((counts - 4000 * p) / (4000 * p * (1 - p)).sqrt()).abs().max() < 4


def test_batches():
    components = Normal(MEAN.expand(3, S, Q, M), STD.expand(3, S, Q, M))
    own = Predictive(components, LOG_WEIGHTS["batched"])
    assert own.shape == own.mean.shape == own.sample(7, torch.Generator()).shape[1:] == (3, Q, M)
    for b in range(3):
        single = Predictive(REAL["normal"], LOG_WEIGHTS["batched"][b])
        torch.testing.assert_close(own.mean[b], single.mean)
        torch.testing.assert_close(own.log_prob(MEAN[0])[b], single.log_prob(MEAN[0]))
        torch.testing.assert_close(own.quantile(0.2)[b], single.quantile(0.2), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(own.entropy[b], single.entropy, rtol=1e-6, atol=1e-6)


def test_observations_of_one_output_may_be_flat_or_a_number():
    own = Predictive(Normal(MEAN[..., :1], STD[..., :1]))
    y = randn(Q)
    torch.testing.assert_close(own.log_prob(y), own.log_prob(y[:, None]))
    torch.testing.assert_close(own.cdf(y), own.cdf(y[:, None]))
    torch.testing.assert_close(own.cdf(0.5), own.cdf(torch.full((Q, 1), 0.5)))
    for wrong in (randn(Q + 1), randn(Q, 2), randn(1, Q)):
        with pytest.raises(ValueError, match=r"y must have shape \(4, 1\)"):
            own.log_prob(wrong)
    with pytest.raises(ValueError, match="y must have shape"):
        Predictive(REAL["normal"]).log_prob(y)


@pytest.mark.parametrize("p", [0.0, 1.0, -0.1, 2.0, math.nan])
def test_levels_must_lie_between_0_and_1(p):
    own = Predictive(REAL["normal"])
    with pytest.raises(ValueError, match="p must lie strictly between 0 and 1"):
        own.quantile(p)
    with pytest.raises(ValueError, match="level must lie strictly between 0 and 1"):
        own.interval(p)


# Class labels ------------------------------------------------------------------------------------------------------


def class_predictive(kind, log_weights=None):
    logits = randn(S, Q, 1, 3) if kind == "categorical" else randn(S, Q, M)
    components = Categorical(logits=logits) if kind == "categorical" else Bernoulli(logits=logits)
    return components, ClassPredictive(components, log_weights)


def entropy(p):
    return -(p * p.log()).sum(-1)


def test_probabilities_and_mutual_information_of_classes():
    components, own = class_predictive("categorical", LOG_WEIGHTS["weighted"])
    w = weights(LOG_WEIGHTS["weighted"])[:, None, None]
    p = (w * components.probs[..., 0, :]).sum(0)
    torch.testing.assert_close(own.probabilities, p)
    torch.testing.assert_close(own.mean, p)
    assert torch.equal(own.labels, p.argmax(-1))
    torch.testing.assert_close(own.entropy[:, 0], entropy(p))
    torch.testing.assert_close(own.aleatoric[:, 0], (w[..., 0] * entropy(components.probs[..., 0, :])).sum(0))
    # Mutual information as a mean Kullback-Leibler divergence from each function's prediction to the mixture.
    divergence = (components.probs[..., 0, :] * (components.probs[..., 0, :] / p).log()).sum(-1)
    torch.testing.assert_close(own.epistemic[:, 0], (w[..., 0] * divergence).sum(0))
    labels = torch.tensor([0, 2, 1, 1])
    torch.testing.assert_close(own.log_prob(labels), p.gather(-1, labels[:, None]).log()[:, 0])
    torch.testing.assert_close(own.log_prob(labels[:, None]), own.log_prob(labels))


def test_probabilities_and_mutual_information_of_bits():
    components, own = class_predictive("bernoulli", LOG_WEIGHTS["weighted"])
    w = weights(LOG_WEIGHTS["weighted"])[:, None, None]
    p = (w * components.probs).sum(0)
    torch.testing.assert_close(own.probabilities, p)
    assert torch.equal(own.labels, (p > 0.5).long())
    torch.testing.assert_close(own.variance, p * (1 - p))
    torch.testing.assert_close(own.entropy, entropy(torch.stack([p, 1 - p], -1)))
    conditional = entropy(torch.stack([components.probs, 1 - components.probs], -1))
    torch.testing.assert_close(own.epistemic, own.entropy - (w * conditional).sum(0))
    labels = torch.tensor([[0, 1], [1, 1], [0, 0], [1, 0]])
    joint = (w[..., 0] * components.log_prob(labels.double()).sum(-1).exp()).sum(0).log()
    torch.testing.assert_close(own.log_prob(labels), joint)


def test_without_disagreement_there_is_no_mutual_information():
    own = ClassPredictive(Categorical(logits=randn(1, Q, 1, 3).expand(S, Q, 1, 3)))
    assert own.epistemic.abs().max() < 1e-12 and (own.epistemic >= 0).all()


def test_certain_labels_have_no_entropy():
    own = ClassPredictive(Categorical(probs=torch.tensor([1.0, 0.0, 0.0]).expand(S, Q, 1, 3)))
    assert own.entropy.abs().max() < 1e-5 and torch.isfinite(own.epistemic).all()


def test_class_labels_of_batches():
    _, own = class_predictive("categorical")
    batched = ClassPredictive(Categorical(logits=own.components.logits.expand(2, S, Q, 1, 3)))
    labels = torch.tensor([[0, 2, 1, 1], [1, 1, 0, 2]])
    found = batched.log_prob(labels)
    torch.testing.assert_close(found, torch.stack([own.log_prob(one) for one in labels]))
    torch.testing.assert_close(batched.log_prob(labels[..., None]), found)


def test_class_samples():
    _, own = class_predictive("categorical", LOG_WEIGHTS["weighted"])
    draws = own.sample(20_000, torch.Generator().manual_seed(0))
    assert draws.shape == (20_000, Q, 1)
    found = torch.nn.functional.one_hot(draws.long().squeeze(-1), 3).double()
    assert z_score(found, own.probabilities).abs().max() < 4


@pytest.mark.parametrize("label", [3, -1, 0.5])
def test_labels_that_cannot_be(label):
    _, own = class_predictive("categorical")
    with pytest.raises(ValueError, match="y must hold"):
        own.log_prob(torch.tensor([0, 1, 2, label]))
    with pytest.raises(ValueError, match="y must have shape"):
        own.log_prob(torch.zeros(Q, 2))
    _, bits = class_predictive("bernoulli")
    with pytest.raises(ValueError, match="y must hold"):
        bits.log_prob(torch.full((Q, M), label))


def test_labels_have_no_order():
    _, own = class_predictive("categorical")
    for ask in (lambda: own.quantile(0.5), lambda: own.interval(0.9), lambda: own.cdf(torch.zeros(Q, 1))):
        with pytest.raises(TypeError, match=r"use \.probabilities"):
            ask()
