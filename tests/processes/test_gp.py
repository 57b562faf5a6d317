"""The default Gaussian process against BoTorch's own fit and the closed form."""

import math

import pytest
import torch
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from gpytorch.mlls import ExactMarginalLogLikelihood

import bayesnn
from bayesnn import GaussianProcess, likelihoods
from bayesnn.processes.exact import log_evidence


def data(num_rows=25, num_outputs=1):
    generator = torch.Generator().manual_seed(0)
    X = torch.rand(num_rows, 3, generator=generator, dtype=torch.float64)
    signal = torch.cat([(5 * X[:, :1]).sin(), X[:, 1:2] - X[:, 2:].square()], 1)
    Y = 3 + 20 * (signal + 0.1 * torch.randn(num_rows, 2, generator=generator, dtype=torch.float64))
    return X, Y[:, :num_outputs], torch.rand(6, 3, generator=generator, dtype=torch.float64)


def closed_form(X, y, new, lengthscale, mean, noise_var):
    """Mean and covariance of the posterior, written out."""
    A, B = X / lengthscale, new / lengthscale
    K, cross, prior = (torch.exp(-0.5 * torch.cdist(P, Q).square()) for P, Q in ((A, A), (A, B), (B, B)))
    solved = torch.linalg.solve(K + noise_var * torch.eye(len(X), dtype=X.dtype), cross)
    return mean + solved.mT @ (y - mean), prior - cross.mT @ solved


@pytest.mark.parametrize("num_outputs", [1, 2])
def test_equals_what_botorch_fits(num_outputs):
    X, Y, new = data(num_outputs=num_outputs)
    y = (Y - Y.mean(0)) / Y.std(0)
    theirs = SingleTaskGP(X, y, outcome_transform=None)
    fit_gpytorch_mll(ExactMarginalLogLikelihood(theirs.likelihood, theirs))
    ours = bayesnn.surrogate("gp").fit(X, Y)
    assert (log_evidence(ours._gp) - log_evidence(theirs)).min() > -1e-6  # at least as high
    found, expected = ours.posterior(new), theirs.posterior(new)
    assert torch.allclose((found.mean - Y.mean(0)) / Y.std(0), expected.mean, atol=2e-3)
    assert torch.allclose(found.variance / Y.var(0), expected.variance, rtol=2e-2, atol=1e-5)


def test_equals_botorchs_at_the_same_hyperparameters_and_the_closed_form():
    X, Y, new = data()
    ours = bayesnn.surrogate("gp").fit(X, Y)
    y = (Y - Y.mean()) / Y.std()
    theirs = SingleTaskGP(X, y, outcome_transform=None)
    hyper = ours._gp.covar_module.lengthscale, ours._gp.mean_module.constant, ours._gp.likelihood.noise
    theirs.covar_module.initialize(lengthscale=hyper[0].detach() + 0)
    theirs.mean_module.initialize(constant=hyper[1].detach() + 0)
    theirs.likelihood.initialize(noise=hyper[2].detach() + 0)
    found, expected = ours.posterior(new), theirs.eval().posterior(new)
    assert torch.allclose(found.mean, Y.mean() + Y.std() * expected.mean, atol=1e-8)
    covariance = found.distribution.covariance_matrix
    assert torch.allclose(covariance, Y.var() * expected.distribution.covariance_matrix, atol=1e-6)
    mean, exact = closed_form(X, y, new, *hyper)
    assert torch.allclose(found.mean, Y.mean() + Y.std() * mean, atol=1e-8)
    assert torch.allclose(covariance, Y.var() * exact, atol=1e-6)
    noise_var = Y.var() * ours._gp.likelihood.noise
    assert torch.allclose(ours.predict(new).variance, found.variance + noise_var, rtol=1e-9)


def test_priors_modes_where_nothing_is_learned():
    X, Y, new = data()
    model = GaussianProcess(likelihoods.Gaussian(noise_std=2.0), bounds=(0.0, 1.0), optimise=False).fit(X, Y)
    mode = torch.tensor(math.exp(math.sqrt(2) + 0.5 * math.log(3) - 3), dtype=torch.float64)
    y = (Y - Y.mean()) / Y.std()
    mean, covariance = closed_form(X, y, new, mode, 0.0, 4.0 / Y.var())
    posterior = model.posterior(new)
    assert torch.allclose(posterior.mean, Y.mean() + Y.std() * mean, atol=1e-6)
    assert torch.allclose(posterior.distribution.covariance_matrix, Y.var() * covariance, atol=1e-5)


def test_inputs_become_the_unit_cube():
    X, Y, new = data()
    low, high = X.amin(0), X.amax(0)
    stretched = torch.tensor([1.0, 1e3, 1e-3], dtype=torch.float64)
    found = GaussianProcess().fit(stretched * X + 7, Y).predict(stretched * new + 7)
    expected = GaussianProcess(bounds=list(zip(low.tolist(), high.tolist(), strict=True))).fit(X, Y).predict(new)
    assert torch.allclose(found.mean, expected.mean, atol=1e-4)
    with pytest.raises(ValueError, match="X must have 2 columns, one for each pair of bounds, found 3"):
        GaussianProcess(bounds=[(0.0, 1.0)] * 2).fit(X, Y)
    with pytest.raises(TypeError, match=r"likelihood must be likelihoods\.Gaussian"):
        GaussianProcess(likelihoods.Bernoulli())
