import math
import warnings

import arviz
import numpy as np
import pandas
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.extra import numpy as arrays
from oracles import LinearGaussian, with_intercept, z_score
from torch import nn

from bayesnn import BNN, BayesnnWarning, NotFittedError, likelihoods, networks, priors
from bayesnn.inference import HMC, DeepEnsemble, MeanField
from bayesnn.inference.ess import effective_sample_size

METHODS = {
    "hmc": HMC(num_chains=2, num_warmup=20, num_draws=10, num_leapfrog=4),
    "mean-field": MeanField(num_steps=30, num_draws=10),
    "ensemble": DeepEnsemble(num_members=3, num_steps=30),
}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
quick = MeanField(num_steps=5, num_draws=4)


def data(n=12, d=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return X.to(dtype), (X.sum(-1).sin() + 0.1 * torch.randn(n, generator=generator, dtype=torch.float64)).to(dtype)[
        :, None
    ]


def small(d, p):
    return networks.mlp(d, p, hidden=(8,))


# The whole way, against the conjugate model -----------------------------------------------------------------------


def test_linear_regression_in_the_users_units_is_the_conjugate_posterior():
    """Standardising X and y and the noise's units, HMC, predictions and their parts: all of it at once."""
    generator = torch.Generator().manual_seed(1)
    X = 100 + 7 * torch.randn(25, 2, generator=generator, dtype=torch.float64)
    y = 1e3 + 40 * X[:, 0] - 25 * X[:, 1] + 90 * torch.randn(25, generator=generator, dtype=torch.float64)
    model = BNN(
        networks.mlp(2, 1, hidden=()),
        likelihoods.Gaussian(noise_std=90.0),
        priors.Normal(scale=1.0, bias_scale=0.5),
        HMC(num_chains=8, num_warmup=200, num_draws=400, num_leapfrog=8),
        max_draws=3200,
    ).fit(X, y, seed=1)
    standard, scale = (X - X.mean(0)) / X.std(0), y.std()
    prior_std = torch.tensor([1 / math.sqrt(2)] * 2 + [0.5]).double()
    oracle = LinearGaussian(with_intercept(standard), (y - y.mean()) / scale, 90.0 / float(scale), prior_std)
    points = torch.tensor([[90.0, 110.0], [100.0, 100.0], [130.0, 70.0]]).double()
    mean, covariance = oracle.predictive(with_intercept((points - X.mean(0)) / X.std(0)))
    mean, covariance = y.mean() + scale * mean, scale**2 * covariance
    draws = model.posterior(points).values.squeeze(-1)
    sizes = torch.tensor(
        [float(arviz.ess(model.weights.by_chain(draws)[..., j].numpy(), method="mean")) for j in range(3)]
    )
    assert z_score(draws, mean, sizes).abs().max() < 4
    products = ((draws - mean)[:, :, None] * (draws - mean)[:, None, :]).flatten(1)
    sizes = torch.tensor(
        [float(arviz.ess(model.weights.by_chain(products)[..., j].numpy(), method="mean")) for j in range(9)]
    )
    assert z_score(products, covariance.flatten(), sizes).abs().max() < 4
    p = model.predict(points)
    torch.testing.assert_close(p.aleatoric, torch.full((3, 1), 90.0**2, dtype=torch.float64))
    std = (covariance.diagonal() + 90.0**2).sqrt()
    torch.testing.assert_close(p.stddev[:, 0], std, rtol=0.05, atol=0)
    low, high = p.interval(0.9)
    torch.testing.assert_close(((high - low) / 2)[:, 0], 1.6448536 * std, rtol=0.05, atol=0)
    exact = torch.distributions.Normal(mean, std)
    torch.testing.assert_close(p.log_prob(mean + std), exact.log_prob(mean + std), rtol=0, atol=0.06)
    assert model.diagnostics()["r_hat"] < 1.02


# What is fitted to what --------------------------------------------------------------------------------------------


LIKELIHOODS = {
    "gaussian": (likelihoods.Gaussian(), "real"),
    "fixed": (likelihoods.Gaussian(noise_std=0.3), "real"),
    "heteroscedastic": (likelihoods.HeteroscedasticGaussian(), "real"),
    "student-t": (likelihoods.StudentT(), "real"),
    "histogram": (likelihoods.Histogram(num_buckets=12), "real"),
    "bernoulli": (likelihoods.Bernoulli(), "bits"),
    "categorical": (likelihoods.Categorical(3), "labels"),
    "poisson": (likelihoods.Poisson(), "counts"),
    "negative binomial": (likelihoods.NegativeBinomial(), "counts"),
}


def outcomes(kind, X, Y):
    return {
        "real": Y,
        "bits": (Y > 0).to(Y),
        "labels": (Y[:, 0] > 0).long() + (Y[:, 0] > 0.5).long(),
        "counts": (2 * Y.clamp(-1, 1)).exp().round(),
    }[kind]


@pytest.mark.parametrize("method", [HMC, "hmc"])
def test_what_is_no_method(method):
    with pytest.raises(TypeError, match=r"method must be an object such as HMC\(\), found"):
        BNN(method=method)


@each_method
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_every_likelihood_with_every_method(method, name, tmp_path):
    likelihood, kind = LIKELIHOODS[name]
    X, Y = data(dtype=torch.float32)
    Y = outcomes(kind, X, Y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BayesnnWarning)
        model = BNN(small, likelihood, method=method).fit(X, Y)
    p, posterior = model.predict(X), model.posterior(X.reshape(3, 4, 2))
    assert torch.isfinite(p.log_prob(Y)).all() and p.log_prob(Y).shape == (12,)
    assert (p.epistemic >= 0).all() and (p.aleatoric >= 0).all() and torch.isfinite(p.entropy).all()
    width = 3 if name == "categorical" else 1
    assert p.mean.shape == (12, width) and posterior.mean.shape == (3, 4, width) and model.num_outputs == width
    if kind in ("bits", "labels"):
        assert p.labels.shape == (12, 1) if kind == "bits" else (12,)
    else:
        low, high = p.interval(0.8)
        assert (low <= high).all()
    assert model.posterior(X, observation_noise=True).mean.shape == (12, 1)
    assert p.sample(3, torch.Generator()).shape == (3, 12, 1)
    model.save(tmp_path / "model")
    again = BNN.load(tmp_path / "model").predict(X)
    assert torch.equal(again.log_prob(Y), p.log_prob(Y)) and torch.equal(again.mean, p.mean)


def test_labels_are_learned():
    X, Y = data(60)
    labels = outcomes("labels", X, Y)
    model = BNN(small, likelihoods.Categorical(3), method=DeepEnsemble(num_members=4, num_steps=300)).fit(X, labels)
    assert (model.predict(X).labels == labels).double().mean() > 0.8
    far = model.predict(50 * X)
    assert far.epistemic.mean() > model.predict(X).epistemic.mean()


@each_method
def test_heavy_priors_and_a_cold_posterior(method):
    X, Y = data()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BayesnnWarning)
        model = BNN(small, prior=priors.PerLayer({"*.bias": priors.Horseshoe()}, priors.StudentT()), method=method)
        assert torch.isfinite(model.fit(X, Y).predict(X).log_prob(Y)).all()
        # Colder posteriors are narrower.
        hot, cold = (
            BNN(small, method=method, temperature=T).fit(X, Y).predict(X).epistemic.mean() for T in (1.0, 0.01)
        )
    if not isinstance(method, DeepEnsemble):
        assert cold < hot


def test_max_draws_thins_what_answers_not_what_is_kept():
    X, Y = data()
    model = BNN(small, method=MeanField(num_steps=5, num_draws=50), max_draws=7).fit(X, Y)
    assert model.posterior(X).num_draws == 7 and len(model.weights) == 50


def test_a_given_network_is_copied():
    X, Y = data()
    network = networks.mlp(2, 1, hidden=(8,))
    before = [p.clone() for p in network.parameters()]
    model = BNN(network, method=quick).fit(X, Y)
    assert all(torch.equal(a, b) and b.requires_grad for a, b in zip(before, network.parameters(), strict=True))
    assert network.layers[0].weight.dtype == torch.float32 and model.predict(X).mean.dtype == torch.float64


def test_networks_of_the_users_own_are_given_again_at_loading(tmp_path):
    X, Y = data()
    network = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1))
    network(torch.randn(50, 2))  # running statistics
    network.eval()
    model = BNN(network, method=quick).fit(X, Y)
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"network of BNN couldn't be saved .* load\(path, network=…\)"):
        BNN.load(tmp_path / "model")
    blank = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)).eval()
    assert torch.equal(BNN.load(tmp_path / "model", network=blank).predict(X).mean, model.predict(X).mean)


@each_method
def test_a_bare_linear_layer_is_a_network(method):
    X, Y = data()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BayesnnWarning)
        assert torch.isfinite(BNN(nn.Linear(2, 1), method=method).fit(X, Y).predict(X).mean).all()


def test_conditioning_is_importance_weighting():
    X, Y = data()
    model = BNN(small, likelihoods.Gaussian(noise_std=0.5), method=MeanField(num_steps=50, num_draws=40)).fit(X, Y)
    new_X, new_Y = torch.tensor([[0.3, -0.2], [1.0, 1.0]]).double(), torch.tensor([[0.1], [0.8]]).double()
    first = model.condition_on_observations(new_X[:1], new_Y[:1]).condition_on_observations(new_X[1:], new_Y[1:])
    both = model.condition_on_observations(new_X, new_Y)
    values = model.posterior(new_X).values
    log_likelihood = torch.distributions.Normal(values, 0.5).log_prob(new_Y).sum((-1, -2))
    weights = torch.softmax(log_likelihood, 0)
    expected = torch.einsum("s,sqm->qm", weights, model.posterior(X).values)
    for conditioned in (first, both):
        torch.testing.assert_close(conditioned.posterior(X).mean, expected)
    with pytest.warns(BayesnnWarning, match=r"effective sample size of 1\.\d draws: refit"):
        model.condition_on_observations(new_X, new_Y + 100)


# Settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_draws": 0}, "max_draws must be at least 1"), ({"temperature": 0.0}, "temperature must be positive"),
     ({"temperature": math.nan}, "temperature must be positive")],
)  # fmt: skip
def test_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message):
        BNN(**options)


class Counting(nn.Module):
    calls = 0

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, X):
        return nn.functional.dropout(self.linear(X), 0.5, self.training)


@each_method
@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)), "uses batch statistics"),
        (nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.2), nn.Linear(4, 1)), "draws random numbers"),
        (Counting(), "draws random numbers in its forward"),
        (nn.Linear(2, 3), r"network must map \(n, 2\) to \(n, 1\) for Gaussian with 1 output"),
        (lambda d, p: nn.Linear(d, p + 1), r"network must map \(n, 2\) to \(n, 1\)"),
        (nn.Linear(5, 1), "network can't take"),
        (nn.Sequential(nn.Linear(2, 1), nn.Flatten(0)), "network must map"),
    ],
)
def test_networks_that_cannot_be_used_are_refused_before_work_starts(method, network, message):
    started = []
    with pytest.raises(ValueError, match=message):
        BNN(network, method=method).fit(*data(), callbacks=[lambda *info: started.append(info)])
    assert not started


def test_a_network_without_parameters():
    with pytest.raises(ValueError, match="network has no parameters"):
        BNN(nn.Identity(), method=quick).fit(data()[0][:, :1], data()[1])


# Bad input, at random -----------------------------------------------------------------------------------------------


@st.composite
def some_data(draw):
    """Small arrays of all shapes, dtypes and oddities."""
    dtype = draw(st.sampled_from([np.float64, np.float32, np.int64, np.bool_, np.complex64, "<U3", object]))
    shape = draw(arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5))
    if dtype in (np.float64, np.float32):
        width = 32 if dtype == np.float32 else 64
        usual, odd = st.floats(-1e6, 1e6, width=width), st.sampled_from([math.nan, math.inf, -math.inf])
        elements = draw(st.sampled_from([usual, usual, usual, st.just(0.5), st.one_of(usual, odd)]))
    else:
        elements = None
    if dtype is object:
        return np.full(shape, draw(st.sampled_from(["a", None, 1.5])), dtype=object)
    return draw(arrays.arrays(dtype, shape, elements=elements))


def is_usable(X, Y):
    def real(values):
        return values.dtype.kind in "fib" and values.dtype != object and bool(np.isfinite(values.astype(float)).all())

    return (
        real(X) and real(Y) and X.ndim == 2 and X.size > 0 and Y.ndim in (1, 2) and Y.size > 0 and len(X) == len(Y)
    )  # fmt: skip


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(some_data(), some_data())
@pytest.mark.filterwarnings("ignore::bayesnn.BayesnnWarning")
def test_any_arrays_are_fitted_or_refused_by_name(X, Y):
    model = BNN(small, method=quick)
    if is_usable(X, Y):
        p = model.fit(X, Y).predict(X)
        assert torch.isfinite(p.mean).all() and torch.isfinite(p.variance).all() and (p.variance > 0).all()
        assert torch.isfinite(p.log_prob(Y.reshape(len(X), -1).astype(float))).all()
    else:
        with pytest.raises((TypeError, ValueError), match=r"^[XY] must"):
            model.fit(X, Y)
        with pytest.raises(NotFittedError):
            model.predict(X)


FITTED = BNN(small, method=quick).fit(*data())


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(some_data())
def test_any_arrays_are_predicted_or_refused_by_name(X):
    usable = X.dtype.kind in "fib" and X.ndim >= 2 and X.size > 0 and X.shape[-1] == 2
    if usable and np.isfinite(X.astype(float)).all():
        p = FITTED.predict(X)
        assert p.mean.shape == (*X.shape[:-1], 1) and torch.isfinite(p.mean).all() and torch.isfinite(p.variance).all()
        assert torch.isfinite(FITTED.posterior(torch.as_tensor(X)).mean).all()
    else:
        for ask in (FITTED.predict, FITTED.posterior):
            with pytest.raises((TypeError, ValueError), match=r"^X must"):
                ask(X)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(1, 6), st.integers(1, 3), st.integers(1, 2), st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from(["constant Y", "constant X", "one X for all", "duplicates", "tiny", "huge", "offset"]),
    st.sampled_from(sorted(METHODS)),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::bayesnn.BayesnnWarning")
def test_odd_data_give_finite_predictions(n, d, m, dtype, oddity, method):
    generator = torch.Generator().manual_seed(n)
    X, Y = torch.randn(n, d, generator=generator).to(dtype), torch.randn(n, m, generator=generator).to(dtype)
    if oddity == "constant Y":
        Y = torch.full_like(Y, 0.1)
    elif oddity == "constant X":
        X[:, 0] = 0.1
    elif oddity == "one X for all":
        X = X[:1].expand(n, d)
    elif oddity == "duplicates":
        X, Y = X.repeat(3, 1), Y.repeat(3, 1)
    elif oddity == "offset":
        X, Y = X + 1e4, Y - 1e4
    else:
        X, Y = (values * (1e-12 if oddity == "tiny" else 1e12) for values in (X, Y))
    model = BNN(small, method=METHODS[method]).fit(X, Y)
    p = model.predict(X)
    for value in (p.mean, p.variance, p.epistemic, p.quantile(0.9), p.log_prob(Y), model.posterior(2 * X).mean):
        assert value.dtype == dtype and torch.isfinite(value).all()


@pytest.mark.parametrize(
    ("likelihood", "Y", "message"),
    [
        (likelihoods.Categorical(2), [0, 1, 2] * 4, "labels 0 … 1, found labels from 0 to 2"),
        (likelihoods.Categorical(2), [0, 1, -1] * 4, "found labels from -1"),
        (likelihoods.Categorical(2), [0.5] * 12, "whole numbers"),
        (likelihoods.Bernoulli(), [0, 1, 2] * 4, "0 and 1 only"),
        (likelihoods.Poisson(), [-1] * 12, "counts"),
        (likelihoods.Gaussian(noise_std=[1.0, 2.0]), [0.0, 1.0] * 6, "one for each of the 1 outputs"),
    ],
)
def test_targets_that_the_likelihood_cannot_have(likelihood, Y, message):
    with pytest.raises(ValueError, match=message):
        BNN(small, likelihood, method=quick).fit(data()[0], Y)


def test_a_failed_fit_leaves_the_model_as_it_was():
    X, Y = data()
    model = BNN(small, method=quick).fit(X, Y)
    before = model.predict(X).mean
    for bad in ((X, Y / 0), (X[:3], Y)):
        with pytest.raises(ValueError, match="Y must"):
            model.fit(*bad)
    assert torch.equal(model.predict(X).mean, before)


def test_data_frames():
    X, Y = data()
    frame = pandas.DataFrame(X.numpy(), columns=["a", "b"])
    model = BNN(small, method=quick).fit(frame, pandas.Series(Y[:, 0].numpy()))
    assert torch.equal(model.predict(frame).mean, BNN(small, method=quick).fit(X, Y).predict(X).mean)
    with pytest.raises(TypeError, match="X must hold numbers"):
        model.fit(frame.assign(a="text"), Y)


def test_stopping_rules():
    X = torch.linspace(-1, 1, 30)[:, None].double()
    y = torch.sin(3 * X) + 0.2 * torch.randn(30, 1, generator=torch.Generator().manual_seed(0)).double()
    method = HMC(num_chains=4, num_warmup=100, num_draws=100_000, num_leapfrog=8)
    model = BNN(networks.mlp(1, 1, hidden=(8,)), method=method, max_draws=100_000).fit(X, y, target_ess=60)
    num_draws = len(model.weights) // 4
    assert 20 <= num_draws < 5000
    places = model.posterior(X[torch.linspace(0, 29, 8).long()]).values.squeeze(-1)  # (S, 8)
    assert float(effective_sample_size(model.weights.by_chain(places)).min()) >= 60
    method = HMC(num_chains=4, num_warmup=5, num_draws=100_000, num_leapfrog=8)
    for stochastic in ("all", "last"):
        short = BNN(networks.mlp(1, 1, hidden=(8,)), method=method, stochastic=stochastic).fit(X, y, time_budget=2.0)
        assert 0 < len(short.weights) < 4 * 100_000
