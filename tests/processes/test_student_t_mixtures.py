"""Scale mixtures by importance sampling against closed forms and quadrature over the scale."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch

from bayesnn.processes.scale_mixtures import (
    BurrXII,
    HalfCauchy,
    InverseGamma,
    _log_gamma_ratio,
    importance_sample,
    log_multivariate_t,
)

LAWS = [InverseGamma(2.5, 0.7), HalfCauchy(0.8), BurrXII(2.0, 1.0), BurrXII(1.3, 0.7, scale=2.0)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def number(value):
    return torch.tensor(float(value)).double()


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_laws_are_densities_with_their_quantiles_and_tails(law):
    levels = torch.tensor([0.01, 0.3, 0.5, 0.9, 0.999]).double()
    edges = law.icdf(levels)
    # In log s, so that heavy tails are in reach.
    density = lambda t: math.exp(float(law.log_prob(number(math.exp(t)))) + t)  # noqa: E731
    for level, edge in zip(levels, edges, strict=True):
        mass, _ = scipy.integrate.quad(density, -60, math.log(edge), limit=300, epsabs=1e-12)
        assert mass == pytest.approx(float(level), abs=1e-7)
    slope = (law.log_prob(number(1e9)) - law.log_prob(number(1e8))) / math.log(10)
    assert float(slope) == pytest.approx(-law.tail_index - 1, abs=1e-3)
    if law.head_index > -math.inf:
        slope = (law.log_prob(number(1e-8)) - law.log_prob(number(1e-9))) / math.log(10)
        assert float(slope) == pytest.approx(-law.head_index - 1, abs=1e-3)


def test_laws_agree_with_scipy():
    s = torch.tensor([0.1, 1.0, 9.0]).double()
    pairs = [
        (InverseGamma(2.5, 0.7), scipy.stats.invgamma(2.5, scale=0.7).logpdf(s)),
        (BurrXII(1.3, 0.7, 2.0), scipy.stats.burr12(1.3, 0.7, scale=2.0).logpdf(s)),
        (HalfCauchy(0.8), scipy.stats.halfcauchy(scale=0.8).logpdf(s.sqrt()) - np.log(2 * s.sqrt().numpy())),
    ]
    for law, expected in pairs:
        assert np.abs(law.log_prob(s).numpy() - expected).max() < 1e-10


def by_quadrature(law, squared_distance, log_det, size):
    """log p(y), and E[s | y]: the mixture's integrals over log s."""

    def integrand(t, moment):
        log_gaussian = -0.5 * (size * (math.log(2 * math.pi) + t) + log_det + squared_distance * math.exp(-t))
        return math.exp(float(law.log_prob(number(math.exp(t)))) + log_gaussian + t * (1 + moment))

    evidence, first = (
        scipy.integrate.quad(
            integrand, -12, 40, args=(moment,), limit=400, points=[-2, 0, 2, 5], epsabs=0, epsrel=1e-10
        )[0]
        for moment in (0, 1)
    )
    return math.log(evidence), first / evidence


@pytest.mark.parametrize("law", LAWS, ids=repr)
@pytest.mark.parametrize(("size", "squared_distance"), [(1, 0.02), (3, 40.0), (8, 2.0), (8, 1e-3), (30, 25.0)])
def test_evidence_and_posterior_mean_equal_quadrature(law, size, squared_distance):
    log_evidence, mean = by_quadrature(law, squared_distance, 0.3, size)
    found = importance_sample(law, number(squared_distance), number(0.3), size, 4000, seeded())
    assert abs(float(found.log_evidence) - log_evidence) < 0.01
    assert found.log_weights.exp().sum() == pytest.approx(1.0)
    if law.tail_index + size / 2 > 2:  # else E[s | y] has no finite variance
        assert float((found.log_weights.exp() * found.variances).sum()) == pytest.approx(mean, rel=0.03)


def test_an_inverse_gamma_law_gives_the_closed_form():
    """Exactly, whatever the draws are; and with another inverse gamma for a proposal up to Monte Carlo error."""
    law, distance, log_det = (
        InverseGamma(1.5, 0.6),
        torch.tensor([3.0, 11.0]).double(),
        torch.tensor([-1.0, 2.0]).double(),
    )
    ratio = 0.6 / 1.5
    expected = log_multivariate_t(distance / ratio, log_det + 6 * math.log(ratio), number(3.0), 6)
    found = importance_sample(law, distance, log_det, 6, 7, seeded())
    assert (found.log_evidence - expected).abs().max() < 1e-12
    assert (found.log_weights + math.log(7)).abs().max() < 1e-12
    assert (found.effective_sample_size - 7).abs().max() < 1e-9
    other = importance_sample(law, distance, log_det, 6, 5000, seeded(), proposal=InverseGamma(1.0, 1.0))
    assert (other.log_evidence - expected).abs().max() < 0.01
    assert (other.effective_sample_size < 4990).all() and (other.effective_sample_size > 2500).all()
    # The weighted mixture of Gaussians is the Student-t predictive.
    df, size = 3.0 + 6, 6
    for draws in (importance_sample(law, distance, log_det, size, 5000, seeded(1)), other):
        for y in (0.0, 2.0):
            gaussian = torch.distributions.Normal(0.0, draws.variances.sqrt()).log_prob(number(y))
            mixed = torch.logsumexp(draws.log_weights + gaussian, -1).exp()
            width = (ratio * (3.0 + distance / ratio) / df).sqrt()
            exact = scipy.stats.t.pdf(y / width.numpy(), df) / width.numpy()
            assert np.abs(mixed.numpy() / exact - 1).max() < 0.02


def test_without_data_the_draws_are_the_law_s():
    law = HalfCauchy(0.8)
    found = importance_sample(law, number(0.0), number(0.0), 0, 2000, seeded())
    assert float(found.log_evidence) == 0.0
    assert scipy.stats.kstest(found.variances.sqrt().numpy(), scipy.stats.halfcauchy(scale=0.8).cdf).statistic < 1e-3


def test_gradients_are_those_of_the_estimate():
    distance, log_det = number(5.0).requires_grad_(), number(0.2).requires_grad_()

    def estimate(first, second):
        return importance_sample(HalfCauchy(), first, second, 7, 200, seeded()).log_evidence

    gradients = torch.autograd.grad(estimate(distance, log_det), (distance, log_det))
    with torch.no_grad():
        difference = (estimate(distance + 1e-5, log_det) - estimate(distance - 1e-5, log_det)) / 2e-5
    assert float(gradients[0]) == pytest.approx(float(difference), rel=1e-6)
    assert float(gradients[1]) == pytest.approx(-0.5, abs=1e-12)


SHAPES = torch.tensor([0.3, 3.0, 15.99, 16.0, 40.0, 1e4, 1e8, 1e12, 1e16, 1e30], dtype=torch.float64)


@pytest.mark.parametrize("size", [2, 8, 60, 1000])
def test_multivariate_t_is_accurate_for_all_degrees_of_freedom(size):
    """lnGamma(z + k) - lnGamma(z) is a sum of k logarithms."""
    distance, log_det = torch.tensor([1.25 * size, 0.5], dtype=torch.float64)
    found = log_multivariate_t(distance, log_det, 2 * SHAPES, size)
    gaussian = -0.5 * (size * math.log(2 * math.pi) + float(log_det + distance))
    for z, value in zip(SHAPES.tolist(), found.tolist(), strict=True):
        ratio = math.fsum(math.log1p(i / z) for i in range(size // 2))
        tail = (z + size / 2) * math.log1p(float(distance) / 2 / z)
        expected = ratio - 0.5 * (size * math.log(2 * math.pi) + float(log_det)) - tail
        assert value == pytest.approx(expected, rel=1e-13, abs=1e-11), z
        assert abs(value - gaussian) < 1e-11 + size**2 / z, z


def test_half_steps_of_the_gamma_ratio():
    """Gamma(z + 1/2) / Gamma(z) times Gamma(z + 1) / Gamma(z + 1/2) is z."""
    twice = _log_gamma_ratio(SHAPES, 0.5) + _log_gamma_ratio(SHAPES + 0.5, 0.5)
    torch.testing.assert_close(twice, -0.5 * torch.log1p(0.5 / SHAPES), rtol=1e-12, atol=1e-13)
    z = SHAPES.clone().requires_grad_()
    (slope,) = torch.autograd.grad(_log_gamma_ratio(z, 0.5).sum(), z)
    torch.testing.assert_close(
        slope[:5], torch.digamma(SHAPES[:5] + 0.5) - torch.digamma(SHAPES[:5]) - 0.5 / SHAPES[:5]
    )
    torch.testing.assert_close(slope[5:], 0.125 / SHAPES[5:] ** 2, rtol=1e-3, atol=1e-16)


def test_equal_entries_of_a_batch_have_equal_draws():
    found = importance_sample(HalfCauchy(), torch.full((3, 2), 4.0).double(), number(0.3), 5, 64, seeded())
    for values in found:
        assert values.shape[:2] == (3, 2) and torch.equal(values, values[:1, :1].expand_as(values))


def test_bad_arguments():
    for build in (lambda: InverseGamma(0.0), lambda: HalfCauchy(-1.0), lambda: BurrXII(k=math.nan)):
        with pytest.raises(ValueError, match="must be positive and finite"):
            build()
    with pytest.raises(ValueError, match="num_draws must be positive"):
        importance_sample(HalfCauchy(), number(1.0), number(0.0), 1, 0, seeded())
