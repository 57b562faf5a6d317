"""Classification by regression of transformed labels, against GPyTorch's transform and the exact Gaussian process."""

import functools
import math

import pytest
import torch
from gpytorch.likelihoods import DirichletClassificationLikelihood
from scipy.stats import gamma, lognorm
from sklearn.datasets import load_digits, load_wine
from torch.distributions import MultivariateNormal

from bayesnn import Model, likelihoods
from bayesnn.processes import DirichletNNGP, MaximumEvidence
from bayesnn.processes.dirichlet_classification import transformed_labels


def split(load, count):
    data = load()
    X, labels = torch.as_tensor(data.data).double(), torch.as_tensor(data.target)
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(0))
    train, test = order[:count], order[count:]
    varying = X[train].std(0) > 0
    return X[train][:, varying], labels[train], X[test][:, varying], labels[test]


@functools.cache
def wine(optimise=False):
    X, labels, new, truth = split(load_wine, 90)
    return DirichletNNGP(likelihoods.Categorical(3), depth=1, optimise=optimise).fit(X, labels), new, truth


def calibration_error(p, truth, num_bins=10):
    """Of the confidence, in bins of equal width."""
    confidence, right = p.probabilities.amax(-1), (p.labels == truth).double()
    index = (confidence * num_bins).long().clamp_max(num_bins - 1)
    gaps = [(confidence[index == k] - right[index == k]).sum().abs() for k in range(num_bins)]
    return float(torch.stack(gaps).sum() / len(truth))


def test_transform_is_gpytorch_s_and_matches_moments():
    labels = torch.tensor([0, 2, 1, 2])
    outcomes, noise_var = transformed_labels(labels, 3, 0.01)
    other = DirichletClassificationLikelihood(labels, alpha_epsilon=0.01, dtype=torch.float64)
    torch.testing.assert_close(outcomes, other.transformed_targets.mT, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(noise_var, other.noise_covar.noise.mT, rtol=1e-6, atol=1e-6)
    law = lognorm(s=math.sqrt(noise_var[0, 0]), scale=math.exp(outcomes[0, 0]))
    assert law.mean() == pytest.approx(gamma(1.01).mean()) and law.var() == pytest.approx(gamma(1.01).var())


def test_it_is_the_exact_process_of_transformed_labels():
    model, new, _ = wine()
    X, data = model._scaled(new[:5]), model._data
    outcomes, noise_var = transformed_labels(data.Y[:, 0], 3, 0.001)
    K, cross, prior = (model._prior.covariance(*v)[0] for v in ((data.X, data.X), (X, data.X), (X, X)))
    posterior = model._latent(X)
    for k in range(3):
        Sigma = K + noise_var[:, k].diag()
        c = outcomes[:, k].mean()
        mean = c + cross @ torch.linalg.solve(Sigma, outcomes[:, k] - c)
        torch.testing.assert_close(posterior.mean[:, k], mean, rtol=1e-8, atol=1e-8)
        covariance = prior - cross @ torch.linalg.solve(Sigma, cross.mT)
        torch.testing.assert_close(posterior.output_covariance.to_dense()[k], covariance, rtol=1e-8, atol=1e-8)


def test_evidence_and_its_gradient():
    model, _, _ = wine()
    target = model._target(model._data)
    parameters = target.start()
    value, gradient = target.objective(parameters)
    K = target.prior.covariance(target.X)[0].detach()
    evidence = sum(
        MultivariateNormal(target.Y.mean(0)[k].expand(90), K + target.noise_var[:, k].diag()).log_prob(target.Y[:, k])
        for k in range(3)
    )
    expected = -(evidence + target.prior.log_prior()) / 90
    torch.testing.assert_close(value, expected.detach(), rtol=1e-9, atol=0)
    for name, own in parameters.items():
        moved = []
        for sign in (1, -1):
            shifted = own.clone()
            shifted.view(-1)[0] += sign * 1e-5
            moved.append(target.objective(parameters | {name: shifted})[0])
        difference = float(moved[0] - moved[1]) / 2e-5
        assert float(gradient[name].reshape(-1)[0]) == pytest.approx(difference, rel=1e-4, abs=1e-7), name


def test_wine():
    model, new, truth = wine(True)
    p = model.predict(new)
    assert (p.labels == truth).double().mean() > 0.93
    assert p.log_prob(truth).mean() > -0.2
    assert calibration_error(p, truth) < 0.08
    target = model._target(model._data)
    assert target.objective(dict(model._prior.named_parameters()))[0] < target.objective(target.start())[0]


def test_digits():
    X, labels, new, truth = split(load_digits, 400)
    p = DirichletNNGP(likelihoods.Categorical(10), depth=1, optimise=False).fit(X, labels).predict(new)
    accuracy = (p.labels == truth).double().mean()
    assert accuracy > 0.92
    assert p.log_prob(truth).mean() > -0.3
    assert calibration_error(p, truth) < 0.05


def test_probabilities_are_averages_over_the_posterior():
    model, new, _ = wine()
    posterior = model.posterior(new[:6])
    draws = posterior.rsample(torch.Size([20_000])).softmax(-1)
    many = DirichletNNGP(likelihoods.Categorical(3), depth=1, optimise=False, num_draws=20_000)
    many.fit(*(model.train_inputs[0], model.train_targets))
    found = many.predict(new[:6]).probabilities
    error = (draws.var(0) / 10_000).sqrt()
    assert ((found - draws.mean(0)) / error).abs().max() < 4.5
    torch.testing.assert_close(found.sum(-1), torch.ones(6).double())


def test_files_batches_and_single_precision(tmp_path):
    model, new, _ = wine()
    model.save(tmp_path / "model")
    loaded = Model.load(tmp_path / "model")
    assert torch.equal(loaded.predict(new).probabilities, model.predict(new).probabilities)
    batches = model.predict(new[:6].reshape(3, 2, -1))
    assert batches.probabilities.shape == (3, 2, 3) and batches.labels.shape == (3, 2)
    assert model.posterior(new[:6].reshape(3, 2, -1)).rsample(torch.Size([2])).shape == (2, 3, 2, 3)
    X, labels = model.train_inputs[0].float(), model.train_targets
    method = MaximumEvidence(num_steps=2)
    single = DirichletNNGP(likelihoods.Categorical(3), depth=1, method=method).fit(X, labels)
    assert single.predict(new).probabilities.dtype == torch.float32


def test_equal_rows_have_one_probability_near_the_exact_one():
    model, new, _ = wine()
    found = model.predict(new[:6].repeat_interleave(50, 0)).probabilities.reshape(6, 50, 3)
    assert (found - found[:, :1]).abs().max() < 1e-12
    draws = model.posterior(new[:6]).rsample(torch.Size([200_000])).softmax(-1).mean(0)
    assert (found[:, 0] - draws).abs().max() < 0.005


def test_bad_arguments():
    with pytest.raises(TypeError, match="Categorical"):
        DirichletNNGP(likelihoods.Bernoulli())
    for arguments in ({"alpha_epsilon": 0.0}, {"num_draws": 0}, {"depth": 0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            DirichletNNGP(likelihoods.Categorical(2), **arguments)
    with pytest.raises(ValueError, match="num_steps"):
        MaximumEvidence(num_steps=0)
