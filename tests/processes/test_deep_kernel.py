"""Deep kernel learning: the Gaussian process where features are the inputs, the closed form where they are given."""

import math

import pytest
import torch
from torch import nn

from bayesnn import GaussianProcess, likelihoods
from bayesnn.processes import DeepKernel
from bayesnn.processes.deep_kernel import FeatureKernel
from bayesnn.processes.exact import log_evidence


def data(num_rows=25, num_outputs=1):
    generator = torch.Generator().manual_seed(0)
    X = torch.rand(num_rows, 3, generator=generator, dtype=torch.float64)
    signal = torch.cat([(9 * X[:, :1] * X[:, 1:2]).sin(), X[:, 1:2] - X[:, 2:].square()], 1)
    Y = 3 + 20 * (signal + 0.1 * torch.randn(num_rows, 2, generator=generator, dtype=torch.float64))
    return X, Y[:, :num_outputs], torch.rand(6, 3, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("num_outputs", [1, 2])
def test_without_layers_it_is_the_gaussian_process(num_outputs):
    X, Y, new = data(num_outputs=num_outputs)
    found, expected = DeepKernel(widths=()).fit(X, Y).posterior(new), GaussianProcess().fit(X, Y).posterior(new)
    assert torch.equal(found.mean, expected.mean) and torch.equal(found.variance, expected.variance)


def test_identity_features_change_nothing():
    X, Y, new = data()
    plain = GaussianProcess(likelihoods.Gaussian(noise_std=2.0), optimise=False).fit(X, Y)
    deep = GaussianProcess(likelihoods.Gaussian(noise_std=2.0), optimise=False)
    kernel = deep._kernel
    deep._kernel = lambda *arguments: FeatureKernel(nn.Identity(), kernel(*arguments))
    found, expected = deep.fit(X, Y).posterior(new), plain.posterior(new)
    assert torch.allclose(found.mean, expected.mean, atol=1e-10)
    covariance, exact = (each.distribution.covariance_matrix for each in (found, expected))
    assert torch.allclose(covariance, exact, atol=1e-9)


def test_posterior_equals_the_closed_form_of_the_features():
    X, Y, new = data()
    low, high = X.amin(0), X.amax(0)
    model = DeepKernel(widths=(5, 2), num_steps=20).fit(X, Y, seed=3)
    gp = model._gp
    state = {name.removeprefix("features."): value for name, value in gp.covar_module.named_parameters()}

    def features(Z):
        first = (2 * (Z - low) / (high - low) - 1) @ state["weight_0"] / math.sqrt(3) + state["bias_0"]
        return first.tanh() @ state["weight_1"] / math.sqrt(5) + state["bias_1"]

    A, B = (features(Z) / gp.covar_module.base_kernel.lengthscale for Z in (X, new))
    K, cross, prior = (torch.exp(-0.5 * torch.cdist(P, Q).square()) for P, Q in ((A, A), (A, B), (B, B)))
    solved = torch.linalg.solve(K + gp.likelihood.noise * torch.eye(25, dtype=K.dtype), cross)
    y = (Y - Y.mean()) / Y.std()
    mean = gp.mean_module.constant + solved.mT @ (y - gp.mean_module.constant)
    posterior = model.posterior(new)
    assert torch.allclose(posterior.mean, Y.mean() + Y.std() * mean, atol=1e-5)
    assert torch.allclose(posterior.distribution.covariance_matrix, Y.var() * (prior - cross.mT @ solved), atol=1e-4)
    # What is maximised: the density of the outcomes, of the hyperparameters and of all weights.
    covariance = K + gp.likelihood.noise * torch.eye(25, dtype=K.dtype)
    centre = gp.mean_module.constant.expand(25)
    total = torch.distributions.MultivariateNormal(centre, covariance).log_prob(y.squeeze(1))
    for name, value in state.items():
        if name.startswith(("weight", "bias")):
            total = total + torch.distributions.Normal(0.0, 1.0).log_prob(value).sum()
    wide = torch.distributions.LogNormal(math.sqrt(2) + 0.5 * math.log(2), math.sqrt(3))
    total = total + wide.log_prob(gp.covar_module.base_kernel.lengthscale).sum()
    total = total + torch.distributions.LogNormal(-4.0, 1.0).log_prob(gp.likelihood.noise).sum()
    assert torch.allclose(log_evidence(gp), total, atol=1e-6)


def test_features_are_learned_with_the_process():
    X, Y, _ = data(num_outputs=2)
    model = DeepKernel(widths=(8, 2), num_steps=60)
    start, found = DeepKernel(widths=(8, 2), optimise=False).fit(X, Y, seed=1), model.fit(X, Y, seed=1)
    assert log_evidence(found._gp).sum() > log_evidence(start._gp).sum() + 5
    first = [fitted._gp.covar_module.features.weight_0 for fitted in (start, found)]
    assert (first[0] - first[1]).abs().max() > 0.05
    assert not torch.equal(model.fit(X, Y, seed=2)._gp.covar_module.features.weight_0, first[1])


def test_settings_are_checked():
    with pytest.raises(ValueError, match="widths must be"):
        DeepKernel(widths=(5, 0))
    with pytest.raises(ValueError, match="num_steps must be"):
        DeepKernel(num_steps=0)
    with pytest.raises(TypeError, match=r"likelihood must be likelihoods\.Gaussian"):
        DeepKernel(likelihood=likelihoods.Bernoulli())
