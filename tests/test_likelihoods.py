import math

import numpy as np
import pytest
import scipy.stats
import torch
from oracles import z_score

from bayesnn import likelihoods
from bayesnn.posteriors import FunctionDraws, Gaussian, StudentT

S, Q, M = 4, 5, 2
GENERATOR = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


F, LOG = randn(S, Q, M), randn(S, 1, M)
REAL, COUNTS, BITS = (
    randn(Q, M),
    torch.tensor([[0.0, 3.0], [1, 0], [7, 2], [2, 2], [4, 11]]).double(),
    randn(Q, M).gt(0).double(),
)
NEGATIVE_BINOMIAL = scipy.stats.nbinom(LOG.exp(), LOG.exp() / (LOG.exp() + F.exp()))  # mean exp(f)
CASES = {
    "gaussian": (likelihoods.Gaussian(), {"log_noise_std": LOG}, F, REAL, scipy.stats.norm(F, LOG.exp()).logpdf),
    "student-t": (likelihoods.StudentT(df=3.0), {"log_scale": LOG}, F, REAL, scipy.stats.t(3, F, LOG.exp()).logpdf),
    "bernoulli": (likelihoods.Bernoulli(), {}, F, BITS, scipy.stats.bernoulli(torch.sigmoid(F)).logpmf),
    "poisson": (likelihoods.Poisson(), {}, F, COUNTS, scipy.stats.poisson(F.exp()).logpmf),
    "negative binomial": (
        likelihoods.NegativeBinomial(),
        {"log_total_count": LOG},
        F,
        COUNTS,
        NEGATIVE_BINOMIAL.logpmf,
    ),
    "heteroscedastic": (
        likelihoods.HeteroscedasticGaussian(min_noise_std=0.1),
        {},
        torch.cat([F, LOG.expand_as(F)], -1),
        REAL,
        scipy.stats.norm(F, 0.1 + np.log1p(np.exp(LOG - 1))).logpdf,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_log_prob_equals_scipy_with_parameters_stacked_over_draws(name):
    likelihood, parameters, f, y, reference = CASES[name]
    expected = torch.as_tensor(reference(y)).sum(-1)
    found = likelihood.log_prob(f, y, parameters)
    assert found.shape == (S, Q)
    torch.testing.assert_close(found, expected)
    # The distribution says the same, and so does one draw by itself, or with a batch in front.
    torch.testing.assert_close(likelihood(f, parameters).log_prob(y).sum(-1), expected)
    first = {key: value[0] for key, value in parameters.items()}
    torch.testing.assert_close(likelihood.log_prob(f[0], y, first), expected[0])
    torch.testing.assert_close(likelihood.log_prob(f.expand(3, S, -1, -1), y, parameters), expected.expand(3, S, Q))
    assert f.shape[-1] == likelihood.latent_size(M)
    assert torch.equal(likelihood.function_values(f), F)


@pytest.mark.parametrize("name", CASES)
def test_gradients_flow_into_functions_and_parameters(name):
    likelihood, parameters, f, y, _ = CASES[name]
    inputs = [f.clone().requires_grad_(), *(v.clone().requires_grad_() for v in parameters.values())]
    value = likelihood.log_prob(inputs[0], y, dict(zip(parameters, inputs[1:], strict=True))).sum()
    for gradient in torch.autograd.grad(value, inputs):
        assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0


def test_categorical():
    likelihood, f = likelihoods.Categorical(3), randn(S, Q, 3)
    labels = torch.tensor([[0], [2], [1], [1], [0]])
    expected = torch.log_softmax(f, -1).gather(-1, labels.expand(S, Q, 1)).squeeze(-1)
    torch.testing.assert_close(likelihood.log_prob(f, labels, {}), expected)
    assert likelihood.latent_size(1) == 3


def test_histogram_is_a_normalised_density_with_the_function_as_its_mean():
    likelihood, f = likelihoods.Histogram(num_buckets=20), randn(S, Q, 2 * 20)
    y = torch.linspace(-30, 30, 200_001).double()
    density = likelihood(f, {}).log_prob(y[:, None, None, None]).exp()
    torch.testing.assert_close(torch.trapezoid(density, y, dim=0), torch.ones(S, Q, 2).double(), atol=1e-3, rtol=0)
    means = torch.trapezoid(density * y[:, None, None, None], y, dim=0)
    torch.testing.assert_close(likelihood.function_values(f), means, atol=1e-3, rtol=1e-3)
    assert likelihood.log_prob(f, REAL, {}).shape == (S, Q) and likelihood.latent_size(2) == 40
    assert likelihood.borders(f).shape == (21,) and (likelihood.borders(f).diff() > 0).all()


@pytest.mark.parametrize(
    ("likelihood", "name", "value"),
    [
        (likelihoods.Gaussian(noise_std=0.5), "log_noise_std", [0.5, 0.5]),
        (likelihoods.Gaussian(noise_std=[0.5, 2.0]), "log_noise_std", [0.5, 2.0]),
        (likelihoods.StudentT(scale=0.5), "log_scale", [0.5, 0.5]),
    ],
)
def test_fixed_noise_is_in_the_units_of_y(likelihood, name, value):
    scale = torch.tensor([[2.0, 10.0]]).double()
    assert likelihood.parameter_priors() == {}
    fixed = likelihood.fixed_parameters(scale)
    torch.testing.assert_close(fixed[name].exp(), torch.tensor([value]).double() / scale)
    # The density in user units: standardised, minus the log of the scale.
    f, y = randn(Q, 2), randn(Q, 2)
    standardised = likelihood.log_prob(f, y, fixed) - scale.log().sum()
    spread = torch.tensor(value).double()
    own = scipy.stats.norm if name == "log_noise_std" else scipy.stats.t(4.0).dist
    arguments = () if name == "log_noise_std" else (4.0,)
    expected = torch.as_tensor(own.logpdf(y * scale, *arguments, loc=f * scale, scale=spread)).sum(-1)
    torch.testing.assert_close(standardised, expected)


def test_one_noise_for_each_output_must_match_their_number():
    with pytest.raises(ValueError, match="noise_std must be one number or one for each of the 2 outputs, found 3"):
        likelihoods.Gaussian(noise_std=[1.0, 1.0, 1.0]).fixed_parameters(torch.ones(1, 2))


def test_fixed_total_count():
    fixed = likelihoods.NegativeBinomial(total_count=3.0).fixed_parameters(torch.ones(1, 2))
    assert torch.allclose(fixed["log_total_count"], torch.tensor(3.0).log().expand(1, 2))


def test_learned_parameters_start_at_the_data_s_spread():
    prior = likelihoods.Gaussian().parameter_priors()["log_noise_std"]
    assert (prior.loc, prior.scale, prior.initial) == (math.log(0.3), 1.5, 0.0)


@pytest.mark.parametrize(
    ("likelihood", "Y", "message"),
    [
        (likelihoods.Gaussian(), [1.0, math.nan], "finite"),
        (likelihoods.Bernoulli(), [0, 2], "0 and 1 only, found 2"),
        (likelihoods.Bernoulli(), [0, 0.5], "0 and 1 only"),
        (likelihoods.Categorical(3), [0, 3], "labels 0 … 2"),
        (likelihoods.Categorical(3), [[0, 1], [1, 0]], "one column"),
        (likelihoods.Poisson(), [0, -1], "counts"),
        (likelihoods.NegativeBinomial(), [0, 1.5], "counts"),
        (likelihoods.StudentT(), [1.0], "one row for each row of X"),
    ],
)
def test_targets_that_cannot_be(likelihood, Y, message):
    with pytest.raises(ValueError, match=message):
        likelihood.check(Y, 2, torch.ones(2, 1))


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: likelihoods.Gaussian(noise_std=0.0), "noise_std"),
        (lambda: likelihoods.Gaussian(noise_std=[1.0, -1.0]), "noise_std"),
        (lambda: likelihoods.Gaussian(noise_std=math.nan), "noise_std"),
        (lambda: likelihoods.HeteroscedasticGaussian(min_noise_std=0.0), "min_noise_std"),
        (lambda: likelihoods.StudentT(df=0.0), "df"),
        (lambda: likelihoods.StudentT(scale=-1.0), "scale"),
        (lambda: likelihoods.Categorical(1), "num_classes"),
        (lambda: likelihoods.NegativeBinomial(total_count=0.0), "total_count"),
        (lambda: likelihoods.Histogram(num_buckets=2), "num_buckets"),
    ],
)
def test_wrong_settings(build, name):
    with pytest.raises(ValueError, match=name):
        build()


def test_gaussian_predictive_in_closed_form_equals_the_mixture():
    mean, root = randn(Q, M), 0.5 * randn(M, Q, Q)
    posterior = Gaussian.from_moments(mean, root @ root.mT + 0.1 * torch.eye(Q))
    likelihood, parameters = likelihoods.Gaussian(), {"log_noise_std": LOG[0]}
    closed = likelihood.predictive(posterior, parameters)
    noise_var = (2 * LOG[0]).exp().expand(Q, M)
    torch.testing.assert_close(closed.mean, mean)
    torch.testing.assert_close(closed.epistemic, posterior.variance)
    torch.testing.assert_close(closed.aleatoric, noise_var)
    torch.testing.assert_close(closed.variance, posterior.variance + noise_var)
    draws = posterior.rsample(torch.Size([20_000]))
    mixture = likelihood.predictive(FunctionDraws(draws), parameters)
    assert z_score(draws, closed.mean).abs().max() < 4
    y = mean + 0.7
    density = likelihood(draws, parameters).log_prob(y).exp()
    expected = torch.distributions.Normal(mean, closed.stddev).log_prob(y).exp()
    assert z_score(density, expected).abs().max() < 4
    torch.testing.assert_close(mixture.variance, closed.variance, rtol=0.05, atol=0)
    torch.testing.assert_close(mixture.quantile(0.9), closed.quantile(0.9), rtol=0, atol=0.05)


@pytest.mark.parametrize("name", [*CASES, "categorical", "histogram"])
def test_predictive_is_the_mixture_over_draws(name):
    if name in CASES:
        likelihood, parameters, f, y, _ = CASES[name]
    else:
        likelihood = likelihoods.Categorical(3) if name == "categorical" else likelihoods.Histogram(20)
        f, y = randn(S, Q, 3 if name == "categorical" else 40), torch.tensor([[0], [2], [1], [1], [0]])
        parameters, y = {}, y if name == "categorical" else REAL
    log_weights = randn(S)
    predictive = likelihood.predictive(FunctionDraws(f, log_weights), parameters)
    weights = torch.softmax(log_weights, 0)
    expected = (weights[:, None] * likelihood.log_prob(f, y, parameters).exp()).sum(0).log()
    torch.testing.assert_close(predictive.log_prob(y), expected)


def test_predictive_of_a_posterior_without_draws_uses_fixed_ones():
    posterior = StudentT(randn(Q, 1), torch.eye(Q).double().expand(1, Q, Q), df=5.0)
    first, second = (likelihoods.Poisson().predictive(posterior, {}) for _ in range(2))
    assert torch.equal(first.mean, second.mean) and first.components.batch_shape == (256, Q, 1)
