import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from bayesnn.histogram import Histogram, default_tail_scale, prior_borders, prior_tail_scales, refined_borders

BORDERS = torch.tensor([-2.0, -1.0, -0.3, 0.2, 0.9, 2.0], dtype=torch.float64)
PROBS = torch.tensor([0.1, 0.2, 0.3, 0.25, 0.15], dtype=torch.float64)
TAILS = torch.tensor([0.7, 1.4], dtype=torch.float64)
# The last one has nearly all of its mass in the last bucket.
CASES = {
    "even": PROBS.log(),
    "top": torch.tensor([0.0, 0.0, 0.0, 0.0, 6.0], dtype=torch.float64),
    "bottom": torch.tensor([5.0, 0.0, -3.0, 0.0, 0.0], dtype=torch.float64),
}


@pytest.fixture(params=CASES)
def histogram(request):
    return Histogram(BORDERS, CASES[request.param], TAILS)


def quadrature(function):
    """Integrate over the line, piece by piece between the inner borders."""
    pieces = [-40.0, *BORDERS[1:-1].tolist(), 40.0]
    return sum(integrate.quad(function, a, b, limit=200)[0] for a, b in pairwise(pieces))


def density(histogram):
    return lambda v: float(histogram.log_prob(torch.tensor(v, dtype=torch.float64)).exp())


def test_density_integrates_to_one(histogram):
    assert quadrature(density(histogram)) == pytest.approx(1, abs=1e-9)


def test_density_is_what_the_docstring_says():
    histogram = Histogram(BORDERS, PROBS.log(), TAILS)
    assert histogram.log_prob(torch.tensor(0.0)) == pytest.approx(math.log(0.3 / 0.5))
    assert histogram.log_prob(torch.tensor(-2.5)) == pytest.approx(
        math.log(0.1) + stats.halfnorm(scale=0.7).logpdf(1.5)
    )
    assert histogram.log_prob(torch.tensor(4.0)) == pytest.approx(
        math.log(0.15) + stats.halfnorm(scale=1.4).logpdf(3.1)
    )


def test_mean_variance_and_entropy_by_quadrature(histogram):
    pdf = density(histogram)
    mean = quadrature(lambda v: v * pdf(v))
    assert float(histogram.mean) == pytest.approx(mean, abs=1e-8)
    assert float(histogram.variance) == pytest.approx(quadrature(lambda v: (v - mean) ** 2 * pdf(v)), abs=1e-8)
    entropy = quadrature(lambda v: -pdf(v) * math.log(pdf(v)) if pdf(v) > 0 else 0.0)
    assert float(histogram.entropy()) == pytest.approx(entropy, abs=1e-8)


@pytest.mark.parametrize("best", [-3.0, -1.5, -1.0, 0.0, 0.5, 0.9, 1.2, 4.0])
def test_expected_improvement_by_quadrature(histogram, best):
    pdf = density(histogram)
    expected = quadrature(lambda v: max(v - best, 0.0) * pdf(v))
    assert float(histogram.expected_improvement(best)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.1), (0.4, 2.0), (-4.0, 0.5), (5.0, 1.0), (0.9, 0.01)])
def test_expected_log_prob_by_quadrature(histogram, mean, std):
    normal = stats.norm(mean, std)

    def weighted(v):
        return float(histogram.log_prob(torch.tensor(v, dtype=torch.float64))) * normal.pdf(v)

    ends = [mean - 12 * std, mean + 12 * std]
    pieces = sorted([*ends, mean, *[b for b in BORDERS[1:-1].tolist() if ends[0] < b < ends[1]]])
    expected = sum(integrate.quad(weighted, a, b, limit=200)[0] for a, b in pairwise(pieces))
    found = histogram.expected_log_prob(*torch.tensor([mean, std], dtype=torch.float64))
    assert float(found) == pytest.approx(expected, abs=1e-7)


def test_expected_log_prob_of_a_known_value_is_its_log_density(histogram):
    values = torch.tensor([-5.0, -1.5, -0.5, 0.0, 0.5, 1.0, 4.0], dtype=torch.float64)
    found = histogram.expected_log_prob(values, torch.zeros_like(values))
    torch.testing.assert_close(found, histogram.log_prob(values), atol=1e-5, rtol=1e-5)


def test_cdf_by_quadrature(histogram):
    pdf = density(histogram)
    for value in (-2.5, -1.0, -0.4, 0.2, 0.7, 1.0, 3.0):
        expected = quadrature(lambda v, value=value: pdf(v) * (v <= value)) if value in BORDERS else None
        if expected is None:
            points = [-40.0, *[b for b in BORDERS[1:-1].tolist() if b < value], value]
            expected = sum(integrate.quad(pdf, a, b)[0] for a, b in pairwise(points))
        assert float(histogram.cdf(torch.tensor(value))) == pytest.approx(expected, abs=1e-8)


def test_icdf_inverts_cdf(histogram):
    levels = torch.cat([torch.logspace(-12, -1, 12, dtype=torch.float64), torch.linspace(0.01, 0.999999, 201)])
    torch.testing.assert_close(histogram.cdf(histogram.icdf(levels)), levels, rtol=1e-9, atol=1e-13)
    values = torch.linspace(-3, 4, 71, dtype=torch.float64)
    torch.testing.assert_close(histogram.icdf(histogram.cdf(values)), values, rtol=0, atol=1e-7)
    assert histogram.median == histogram.icdf(torch.tensor(0.5))


def test_moments_and_improvement_of_draws(histogram):
    draws = histogram.sample((200_000,), generator=torch.Generator().manual_seed(0))

    def z_score(sample, value):
        return float((sample.mean() - value) / (sample.std() / math.sqrt(len(sample))))

    assert abs(z_score(draws, histogram.mean)) < 4
    assert abs(z_score((draws - histogram.mean).square(), histogram.variance)) < 4
    for best in (-1.5, 0.0, 1.5):
        assert abs(z_score((draws - best).clamp_min(0), histogram.expected_improvement(best))) < 4
        assert abs(z_score((draws > best).to(draws), histogram.probability_of_improvement(best))) < 4
    assert stats.kstest(draws[:20_000].numpy(), lambda v: histogram.cdf(torch.as_tensor(v)).numpy()).pvalue > 1e-3


def test_draws_depend_on_the_generator_alone(histogram):
    one, two = (histogram.sample((5,), generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)
    assert one.shape == (5,)


@pytest.mark.parametrize("level", [0.01, 0.05, 0.25, 0.5, 0.7, 0.9, 0.99])
def test_quantile_gradient_by_finite_differences(level):
    logits = torch.tensor([0.3, -0.2, 0.5, 0.1, 0.4], dtype=torch.float64, requires_grad=True)
    level = torch.tensor(level, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda logits, u: Histogram(BORDERS, logits, TAILS).icdf(u), (logits, level))


def test_other_gradients_by_finite_differences():
    logits = torch.tensor([0.3, -0.2, 0.5, 0.1, 0.4], dtype=torch.float64, requires_grad=True)
    values = torch.tensor([-2.7, -0.5, 0.3, 1.9], dtype=torch.float64, requires_grad=True)
    for name in ("log_prob", "cdf", "expected_improvement"):
        assert torch.autograd.gradcheck(
            lambda logits, v, name=name: getattr(Histogram(BORDERS, logits, TAILS), name)(v), (logits, values)
        )


@pytest.mark.parametrize("scale", [3.0, -0.5])
def test_change_of_units(histogram, scale):
    loc = 7.0
    moved = histogram.affine(loc, scale)
    values = torch.tensor([-2.7, -0.5, 0.3, 1.9], dtype=torch.float64)
    torch.testing.assert_close(moved.log_prob(loc + scale * values), histogram.log_prob(values) - math.log(abs(scale)))
    torch.testing.assert_close(moved.mean, loc + scale * histogram.mean)
    torch.testing.assert_close(moved.variance, scale**2 * histogram.variance)
    torch.testing.assert_close(moved.entropy(), histogram.entropy() + math.log(abs(scale)))
    levels = torch.tensor([0.02, 0.4, 0.97], dtype=torch.float64)
    turned = levels if scale > 0 else 1 - levels
    torch.testing.assert_close(moved.icdf(turned), loc + scale * histogram.icdf(levels))


@pytest.mark.parametrize("batched_borders", [False, True])
def test_batches_equal_one_by_one(batched_borders):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    batch = Histogram(BORDERS, logits, TAILS)
    loc, scale = torch.randn(2, 3, generator=generator, dtype=torch.float64), 2.0
    if batched_borders:
        batch = batch.affine(loc, torch.full((2, 3), scale, dtype=torch.float64))
    values = torch.randn(4, 2, 3, generator=generator, dtype=torch.float64) * 2
    levels = torch.rand(4, 2, 3, generator=generator, dtype=torch.float64)
    assert batch.sample((6, 4)).shape == (6, 4, 2, 3)
    for i in range(2):
        for j in range(3):
            alone = Histogram(BORDERS, logits[i, j], TAILS)
            alone = alone.affine(loc[i, j], scale) if batched_borders else alone
            for name in ("mean", "variance", "median"):
                torch.testing.assert_close(getattr(batch, name)[i, j], getattr(alone, name))
            torch.testing.assert_close(batch.entropy()[i, j], alone.entropy())
            for name in ("log_prob", "cdf", "expected_improvement"):
                torch.testing.assert_close(getattr(batch, name)(values)[:, i, j], getattr(alone, name)(values[:, i, j]))
            torch.testing.assert_close(batch.icdf(levels)[:, i, j], alone.icdf(levels[:, i, j]))


def test_expand():
    wide = Histogram(BORDERS, PROBS.log(), TAILS).expand((3, 2))
    assert wide.batch_shape == (3, 2)
    assert wide.mean.shape == (3, 2) and wide.log_prob(torch.zeros(3, 2)).shape == (3, 2)


def test_float32_agrees_with_float64(histogram):
    small = Histogram(BORDERS.float(), histogram.logits.float(), TAILS.float())
    values = torch.linspace(-5, 6, 45, dtype=torch.float64)
    levels = torch.tensor([1e-6, 0.01, 0.3, 0.7, 0.99, 1 - 1e-6], dtype=torch.float64)
    for found, exact in (
        (small.log_prob(values.float()), histogram.log_prob(values)),
        (small.cdf(values.float()), histogram.cdf(values)),
        (small.expected_improvement(values.float()), histogram.expected_improvement(values)),
        (small.mean, histogram.mean),
        (small.variance, histogram.variance),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(small.icdf(levels.float()).double(), histogram.icdf(levels), rtol=0.02, atol=1e-3)
    draws = small.sample((100_000,), generator=torch.Generator().manual_seed(0))
    assert bool(draws.isfinite().all())


def test_extreme_logits_stay_finite():
    logits = torch.tensor([-200.0, 0.0, 200.0, 0.0, -200.0], requires_grad=True)
    histogram = Histogram(BORDERS.float(), logits, TAILS.float())
    draws = histogram.rsample((1000,), generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(draws.sum() + histogram.expected_improvement(0.0), logits)
    assert bool(draws.isfinite().all()) and bool(gradient.isfinite().all())
    assert bool(((draws >= -0.3) & (draws <= 0.2)).all())


def test_a_narrow_last_bucket_leaves_the_tail_wide():
    borders = torch.tensor([-4.0, -2.0, 0.0, 2.0, 2.001], dtype=torch.float64)
    far = torch.tensor(5.0, dtype=torch.float64)
    assert Histogram(borders, torch.zeros(4, dtype=torch.float64)).log_prob(far) > -25
    assert default_tail_scale(borders) == 0.5


def test_refined_borders():
    samples = 2 * torch.randn(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    refined = refined_borders(BORDERS, samples, 0.25)
    assert float(refined[1:-1].diff().max()) <= 0.25 + 1e-9 and float(refined.diff().min()) > 0
    assert bool(torch.isin(BORDERS[1:-1], refined[1:-1]).all())
    outside = (samples < refined[1]) | (samples > refined[-2])
    assert 0 < float(outside.double().mean()) <= 1e-4
    # Where the samples end before the old borders, nothing is added outside, and what is fine enough isn't split.
    assert refined_borders(BORDERS, 0.01 * samples, 10.0)[1:-1].tolist() == BORDERS[1:-1].tolist()
    with pytest.raises(ValueError, match="max_width must be"):
        refined_borders(BORDERS, samples, 0.0)
    with pytest.raises(ValueError, match="samples must be finite"):
        refined_borders(BORDERS, samples / 0.0, 0.1)


def test_prior_borders():
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(20_000, generator=generator, dtype=torch.float64)
    borders = prior_borders(samples, 100)
    widths = borders.diff()
    low, high = np.quantile(samples.numpy(), [0.001, 0.999])
    assert borders.shape == (101,)
    assert float(borders[0]) == pytest.approx(low) and float(borders[-1]) == pytest.approx(high)
    assert widths.min() >= 0.5 * (high - low) / 100 - 1e-12
    assert widths[50] < widths[1] < widths[0]
    # Repeated values can't make an empty bucket.
    assert prior_borders(samples.round(), 100).diff().min() > 0


def test_prior_tail_scales():
    generator = torch.Generator().manual_seed(0)
    inside = torch.rand(1000, generator=generator, dtype=torch.float64) * 3.2 - 1.3
    tail = 2.5 * torch.randn(5000, generator=generator, dtype=torch.float64).abs() + 2.0
    borders = torch.tensor([-2.0, -1.4, 0.0, 2.0, 3.0], dtype=torch.float64)
    lower, upper = prior_tail_scales(torch.cat([inside, tail]), borders)
    assert lower == default_tail_scale(borders)
    assert float(upper) == pytest.approx(2.5, rel=0.05)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((BORDERS, torch.zeros(4)), "one entry more"),
        ((BORDERS.flip(0), torch.zeros(5)), "borders must increase"),
        ((BORDERS, torch.zeros(5), 0.0), "tail_scale must be positive"),
    ],
)
def test_bad_histograms(arguments, message):
    with pytest.raises(ValueError, match=message):
        Histogram(*arguments)


def test_bad_samples():
    with pytest.raises(ValueError, match="num_buckets"):
        prior_borders(torch.randn(10), 2)
    with pytest.raises(ValueError, match="finite"):
        prior_borders(torch.tensor([0.0, math.nan, 1.0]), 5)
    with pytest.raises(ValueError, match="spread"):
        prior_borders(torch.ones(10), 5)


def test_small_probabilities_of_improvement_keep_their_digits():
    """Far in the upper tail: p_K erfc(d / (s sqrt 2)), where one minus the cdf is 0."""
    law = Histogram(torch.linspace(-2, 2, 9).double(), torch.zeros(8).double(), 0.5)
    for level in (4.0, 6.0, 9.0):
        expected = math.erfc((level - 1.5) / (0.5 * math.sqrt(2))) / 8
        assert float(law.probability_of_improvement(level)) == pytest.approx(expected, rel=1e-9)


def test_entropy_of_impossible_buckets():
    logits = torch.tensor([0.0, -math.inf, 0.0, 0.0]).double()
    law = Histogram(torch.linspace(-2, 2, 5).double(), logits, validate_args=False)
    x = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    density = law.log_prob(x).exp()
    expected = torch.trapezoid(torch.special.entr(density), x)
    assert float(law.entropy()) == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Histogram(torch.linspace(-2, 2, 5), torch.zeros(4), math.inf),
            "tail_scale must be positive and finite",
        ),
        (lambda: prior_borders(torch.arange(50), 5), "samples must be of a floating-point dtype"),
        (lambda: prior_borders(torch.randn(50), 5, coverage=2.0), "coverage must be in"),
    ],
)
def test_more_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
