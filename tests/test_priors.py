import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch

from bayesnn import priors

REFERENCES = {
    "normal": (priors.Normal(scale=0.7, fan_in=False), lambda s: scipy.stats.norm(0, s)),
    "laplace": (priors.Laplace(scale=0.7, fan_in=False), lambda s: scipy.stats.laplace(0, s)),
    "student-t": (priors.StudentT(scale=0.7, fan_in=False, df=3.0), lambda s: scipy.stats.t(3, 0, s)),
    "cauchy": (priors.Cauchy(scale=0.7, fan_in=False), lambda s: scipy.stats.cauchy(0, s)),
}
SHAPE = (2, 3)


def log_density(prior, w):
    """Of one scalar weight, elementwise."""
    flat = torch.as_tensor(w, dtype=torch.float64).reshape(-1, 1, 1)
    return prior.log_prob("weight", flat)


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("fan_in", [False, True])
def test_log_prob_equals_scipy(name, fan_in):
    prior, reference = REFERENCES[name]
    prior = type(prior)(**(prior._arguments | {"fan_in": fan_in, "bias_scale": 0.3}))
    values = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = 0.7 / math.sqrt(3) if fan_in else 0.7
    expected = reference(scale).logpdf(values).sum((1, 2))
    np.testing.assert_allclose(prior.log_prob("0.weight", values), expected, rtol=1e-12)
    bias = values[:, 0]
    np.testing.assert_allclose(prior.log_prob("0.bias", bias), reference(0.3).logpdf(bias).sum(1), rtol=1e-12)
    # A normalisation layer's gains are centred at one.
    np.testing.assert_allclose(prior.log_prob("norm.weight", bias), reference(0.3).logpdf(bias - 1).sum(1), rtol=1e-12)


def test_fan_in_counts_the_whole_receptive_field():
    prior = priors.Normal(scale=2.0)
    assert prior.scale_of("conv.weight", torch.Size([8, 4, 3, 3])) == pytest.approx(2 / 6)
    assert prior.scale_of("conv.bias", torch.Size([8])) == 1.0
    # The prior variance of a layer's output doesn't depend on its width.
    generator = torch.Generator().manual_seed(0)
    for width in (10, 1000):
        scale = priors.Normal(scale=1.0).scale_of("weight", torch.Size([1, width]))
        outputs = scale * torch.randn(4000, width, generator=generator).sum(1)
        assert abs(outputs.var() - 1) < 4 * math.sqrt(2 / 4000)


@pytest.mark.parametrize("prior", [*(p for p, _ in REFERENCES.values()), priors.Horseshoe(scale=0.7, fan_in=False)])
def test_densities_integrate_to_one(prior):
    # In log w, where neither a peak nor heavy tails need care.
    def integrand(u):
        return math.exp(float(log_density(prior, math.exp(u))) + u)

    half, _ = scipy.integrate.quad(integrand, -60, 60, limit=500, epsabs=1e-11)
    assert 2 * half == pytest.approx(1, abs=1e-8)


@pytest.mark.parametrize("w", [1e-8, 1e-3, 0.1, 1.0, 5.0, 6.99, 7.01, 30.0, 1e4])
def test_horseshoe_equals_quadrature_over_its_local_scale(w):
    tau = 0.7

    # In u = log(lambda) the trapezoidal rule converges exponentially fast.
    u = np.arange(math.log(w / tau) - 8, max(math.log(w / tau), 0) + 25, 0.01)
    half_cauchy = 2 / math.pi / (1 + np.exp(2 * u))
    expected = math.log((scipy.stats.norm.pdf(w, 0, tau * np.exp(u)) * half_cauchy * np.exp(u)).sum() * 0.01)
    assert float(log_density(priors.Horseshoe(scale=tau, fan_in=False), w)) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("prior", [*(p for p, _ in REFERENCES.values()), priors.Horseshoe(scale=0.7, fan_in=False)])
def test_gradients_equal_finite_differences(prior):
    w = torch.tensor([-8.0, -2.0, -0.3, 1e-3, 0.5, 6.9, 7.1, 20.0, 300.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(log_density(prior, w).sum(), w)
    h = 1e-5 * w.detach().abs()
    difference = (log_density(prior, w.detach() + h) - log_density(prior, w.detach() - h)) / (2 * h)
    torch.testing.assert_close(gradient, difference, rtol=1e-6, atol=1e-8)


def test_horseshoe_is_finite_at_extremes():
    for dtype in (torch.float32, torch.float64):
        w = torch.tensor([0.0, 1e-20, 1e10], dtype=dtype, requires_grad=True)
        value = priors.Horseshoe().log_prob("bias", w[:, None])
        (gradient,) = torch.autograd.grad(value.sum(), w)
        assert torch.isfinite(value).all() and torch.isfinite(gradient).all()


def test_per_layer_takes_the_first_pattern_that_matches():
    prior = priors.PerLayer({"0.*": priors.Laplace(), "*.bias": priors.Normal(bias_scale=3.0)}, default=priors.Cauchy())
    values = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    for name, own in (
        ("0.bias", priors.Laplace()),
        ("2.bias", priors.Normal(bias_scale=3.0)),
        ("2.gain", priors.Cauchy()),
    ):
        assert torch.equal(prior.log_prob(name, values), own.log_prob(name, values))
    assert prior.gaussian_scale("2.bias", torch.Size([5])) == 3.0
    assert prior.gaussian_scale("0.bias", torch.Size([5])) is None


def test_gaussian_scale_is_the_density_s():
    prior = priors.Normal(scale=0.4)
    scale = prior.gaussian_scale("weight", torch.Size(SHAPE))
    values = torch.randn(3, *SHAPE)
    torch.testing.assert_close(
        prior.log_prob("weight", values), torch.distributions.Normal(0, scale).log_prob(values).sum((1, 2))
    )


@pytest.mark.parametrize(
    "options", [{"scale": 0.0}, {"scale": -1.0}, {"bias_scale": float("nan")}, {"scale": float("inf")}]
)
def test_scales_must_be_positive(options):
    for prior in (priors.Normal, priors.Horseshoe):
        with pytest.raises(ValueError, match=next(iter(options))):
            prior(**options)


def test_df_must_be_positive():
    with pytest.raises(ValueError, match="df"):
        priors.StudentT(df=0.0)


@pytest.mark.parametrize(
    "prior", [priors.Normal(), priors.Laplace(), priors.StudentT(df=3.0), priors.Cauchy(), priors.Horseshoe()]
)
def test_draws_have_the_density(prior):
    """The share of draws in each of ten intervals is the density's integral."""
    draws = prior.sample("weight", torch.Size([2, 4]), 5000, torch.Generator().manual_seed(0), torch.float64)
    assert draws.shape == (5000, 2, 4)
    flat = draws.flatten().sort().values
    edges = flat[torch.linspace(0.05, 0.95, 11, dtype=torch.float64).mul(len(flat)).long()]
    for low, high in pairwise(edges):
        grid = torch.linspace(0, 1, 4002, dtype=torch.float64)[1:-1] * (high - low) + low
        scaled = type(prior)(
            **{**prior._arguments, "scale": prior.scale_of("weight", torch.Size([2, 4])), "fan_in": False}
        )
        density = scaled.log_prob("weight", grid.reshape(-1, 1, 1)).exp()
        share = float(density.mean() * (high - low))
        assert abs(share - 0.09) < 4 * (0.09 * 0.91 / len(flat)) ** 0.5 + 1e-3, (low, high, share)
