"""Variational inference with inducing points against the collapsed bound, quadrature and Monte Carlo."""

import functools

import pytest
import torch
from gpytorch.kernels import RBFKernel, ScaleKernel
from sklearn.datasets import load_wine
from torch.distributions import Bernoulli, MultivariateNormal

from bayesnn import Model, likelihoods
from bayesnn.data import Data
from bayesnn.inference.run import run
from bayesnn.processes import CollapsedBound, SparseNNGP, SparseVariational, VariationalNNGP
from bayesnn.processes.sparse_gaussian import CollapsedTarget
from bayesnn.processes.sparse_prior import SparsePrior
from bayesnn.processes.variational_gaussian import VariationalTarget, unpacked_root


def rbf(num_features, batch_shape):
    return ScaleKernel(RBFKernel(ard_num_dims=num_features, batch_shape=batch_shape), batch_shape=batch_shape)


def problem(n=40, m=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, 3, generator=generator).double()
    Y = torch.stack([(2 * X[:, 0]).sin(), X[:, 1] * X[:, 2]], 1)[:, :m]
    return X, Y + 0.2 * torch.randn(n, m, generator=generator).double()


def test_the_collapsed_bound_is_the_maximum():
    """At the best q of the collapsed bound the two bounds are equal and no direction of q leads up."""
    X, Y = problem()
    data, prior = Data(X, Y), SparsePrior(rbf(3, torch.Size([2])), 2)
    noise, Z = {"log_noise_std": torch.tensor([[-1.5, -1.0]]).double()}, problem(7, seed=2)[0]
    collapsed = CollapsedTarget(data, prior, likelihoods.Gaussian(), noise)
    parameters = prior.start() | {"mean": torch.tensor([0.2, -0.1]).double()}
    best = collapsed.optimum(parameters, Z)
    # Its factor isn't triangular: another one of the same covariance is.
    root = torch.linalg.cholesky(best.root @ best.root.mT)
    raw = root.tril(-1) + torch.diag_embed(root.diagonal(dim1=-2, dim2=-1).log())
    torch.testing.assert_close(unpacked_root(raw), root)
    q = {"inducing": Z, "q_mean": best.mean, "q_root": raw}
    leaves = {name: value.clone().requires_grad_() for name, value in (parameters | q).items()}
    target = VariationalTarget(data, prior, likelihoods.Gaussian(), noise)
    elbo = SparseVariational().elbo(target, leaves, data, torch.Generator())
    torch.testing.assert_close(elbo, collapsed.bound(parameters, Z).sum().detach(), rtol=1e-9, atol=0)
    elbo.backward()
    assert leaves["q_mean"].grad.abs().max() < 1e-8 and leaves["q_root"].grad.tril().abs().max() < 1e-8
    # Envelope theorem: the gradients by everything else are the collapsed bound's.
    own = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    collapsed.bound(own, Z).sum().backward()
    for name, value in own.items():
        torch.testing.assert_close(leaves[name].grad, value.grad, rtol=1e-6, atol=1e-8)


def test_minibatches_are_unbiased():
    X, Y = problem(12, 1)
    data, prior = Data(X, Y), SparsePrior(rbf(3, torch.Size([1])), 1)
    noise = {"log_noise_std": torch.full((1, 1), -1.0).double()}
    target = VariationalTarget(data, prior, likelihoods.Gaussian(), noise)
    state = SparseVariational(num_inducing=4).init(target, torch.Generator().manual_seed(0)).variational
    whole, *parts = (
        SparseVariational().elbo(target, state, Data(X[rows], Y[rows]), torch.Generator())
        for rows in (slice(None), slice(0, 4), slice(4, 8), slice(8, 12))
    )
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_finds_what_the_collapsed_bound_finds():
    X, Y = problem()
    noise = likelihoods.Gaussian(noise_std=0.2)
    new = problem(20, seed=1)[0]
    exact = SparseNNGP(kernel=rbf, likelihood=noise, optimise=False, method=CollapsedBound(num_inducing=12))
    method = SparseVariational(num_inducing=12, num_steps=300, learning_rate=0.1, batch_size=None)
    found = VariationalNNGP(noise, kernel=rbf, optimise=False, method=method)
    expected, p = exact.fit(X, Y).predict(new), found.fit(X, Y).predict(new)
    torch.testing.assert_close(p.mean, expected.mean, rtol=0, atol=0.01)
    torch.testing.assert_close(p.variance, expected.variance, rtol=0.02, atol=0)
    assert torch.equal(exact._values.points, found._values.points)
    further = problem(3, seed=4)
    torch.testing.assert_close(
        found.condition_on_observations(*further).posterior(new).mean,
        exact.condition_on_observations(*further).posterior(new).mean,
        rtol=0,
        atol=0.01,
    )


def test_learns_noise_and_hyperparameters_from_minibatches():
    generator = torch.Generator().manual_seed(0)
    X = torch.rand(600, 1, generator=generator).double() * 6 - 3
    Y = (2 * X).sin() + 0.2 * torch.randn(600, 1, generator=generator).double()
    method = SparseVariational(num_inducing=15, num_steps=250, learning_rate=0.05, batch_size=100)
    p = VariationalNNGP(kernel=rbf, method=method).fit(X, Y).predict(X)
    assert (p.mean - (2 * X).sin()).square().mean().sqrt() < 0.06
    assert 0.18 < p.aleatoric.mean().sqrt() < 0.22


def test_bound_of_labels_is_below_the_evidence_and_close():
    X = torch.tensor([[-0.7], [0.1], [0.9]]).double()
    Y = torch.tensor([[0.0], [1.0], [1.0]]).double()
    prior = SparsePrior(rbf(1, torch.Size([1])), 1)
    target = VariationalTarget(Data(X, Y), prior, likelihoods.Bernoulli(), {}, optimise=False)
    method = SparseVariational(num_inducing=3, num_steps=250, learning_rate=0.1, batch_size=None)
    elbo = float(run(method, target, seed=0).elbo[-1])
    K = prior.covariance(X)[0].detach()
    f = MultivariateNormal(torch.zeros(3).double(), K).covariance_matrix
    draws = torch.randn(400_000, 3, generator=torch.Generator().manual_seed(0)).double() @ torch.linalg.cholesky(f).T
    evidence = float(Bernoulli(logits=draws).log_prob(Y.T).sum(-1).exp().mean().log())
    assert evidence - 0.03 < elbo < evidence + 1e-3


@functools.cache
def wine():
    data = load_wine()
    X, labels = torch.as_tensor(data.data).double(), torch.as_tensor(data.target)
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(0))
    train, test = order[:100], order[100:]
    method = SparseVariational(num_inducing=30, num_steps=120, learning_rate=0.08, batch_size=None)
    model = VariationalNNGP(likelihoods.Categorical(3), depth=1, method=method).fit(X[train], labels[train])
    return model, X[test], labels[test]


def test_classifies_with_fair_probabilities():
    model, X, labels = wine()
    p = model.predict(X)
    assert (p.labels == labels).double().mean() > 0.93
    assert p.log_prob(labels).mean() > -0.2
    confidence = p.probabilities.amax(-1)
    assert abs(float(confidence.mean() - (p.labels == labels).double().mean())) < 0.06
    assert p.epistemic.min() >= 0 and model.num_outputs == 3
    assert model._prior.kernel.batch_shape == torch.Size([])  # classes are alike


def test_predictions_are_the_posterior_s_functions():
    model, X, _ = wine()
    posterior = model.posterior(X[:4])
    draws = posterior.rsample(torch.Size([20_000])).softmax(-1)
    many = VariationalNNGP(model.likelihood, depth=1, num_draws=20_000)
    many._take(model._prior, dict(model._prior.named_parameters()), model._values, {})
    many._data, many._inputs, many._outcomes = model._data, model._inputs, model._outcomes
    found = many.predict(X[:4]).probabilities
    error = (draws.var(0) / 10_000).sqrt()
    assert ((found - draws.mean(0)) / error).abs().max() < 4.5
    assert many.predict(X[:6].reshape(3, 2, -1)).probabilities.shape == (3, 2, 3)


def test_equal_rows_have_one_probability_near_the_exact_one():
    model, X, _ = wine()
    found = model.predict(X[:6].repeat_interleave(50, 0)).probabilities.reshape(6, 50, 3)
    assert (found - found[:, :1]).abs().max() < 1e-12
    draws = model.posterior(X[:6]).rsample(torch.Size([200_000])).softmax(-1).mean(0)
    assert (found[:, 0] - draws).abs().max() < 0.005


@pytest.mark.parametrize(
    "likelihood",
    [
        likelihoods.Poisson(),
        likelihoods.StudentT(),
        likelihoods.HeteroscedasticGaussian(),
        likelihoods.NegativeBinomial(),
        likelihoods.Histogram(num_buckets=8),
    ],
    ids=lambda likelihood: type(likelihood).__name__,
)
def test_any_likelihood(likelihood, tmp_path):
    X, Y = problem(30, 1)
    Y = Y if likelihood.standardises else Y.exp().round()
    method = SparseVariational(num_inducing=8, num_steps=30, learning_rate=0.05, batch_size=16)
    model = VariationalNNGP(likelihood, depth=1, method=method).fit(X, Y)
    p = model.predict(X)
    assert torch.isfinite(p.mean).all() and torch.isfinite(p.log_prob(Y)).all()
    model.save(tmp_path / "model")
    assert torch.equal(Model.load(tmp_path / "model").predict(X).mean, p.mean)


def test_checkpoints(tmp_path):
    X, Y = problem(30, 1)
    method = SparseVariational(num_inducing=8, num_steps=20, batch_size=10)

    def stop(index, state, info):
        if index == 11:
            raise RuntimeError("stop")

    resumed = VariationalNNGP(likelihoods.StudentT(), kernel=rbf, method=method)
    with pytest.raises(RuntimeError, match="stop"):
        resumed.fit(X, Y, checkpoint=tmp_path, callbacks=[stop])
    resumed.fit(X, Y, checkpoint=tmp_path)
    whole = VariationalNNGP(likelihoods.StudentT(), kernel=rbf, method=method).fit(X, Y)
    assert torch.equal(resumed.predict(X).mean, whole.predict(X).mean)


def test_bad_arguments():
    for name in ("num_inducing", "num_steps", "batch_size", "learning_rate", "num_samples"):
        with pytest.raises(ValueError, match=name):
            SparseVariational(**{name: 0})
    with pytest.raises(ValueError, match="num_draws"):
        VariationalNNGP(num_draws=0)
    with pytest.raises(ValueError, match="depth"):
        VariationalNNGP(depth=0)
