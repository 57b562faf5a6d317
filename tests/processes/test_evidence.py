"""The pieces of marginal likelihoods against autograd, SciPy and GPyTorch's own."""

import itertools

import pytest
import torch
from gpytorch.kernels import RBFKernel
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.priors import LogNormalPrior
from linear_operator.utils.errors import NanError
from scipy.stats import multivariate_normal

from bayesnn import NNGP, StudentTProcess, likelihoods
from bayesnn.processes.evidence import log_prior, quadratic
from bayesnn.processes.exact import log_evidence
from bayesnn.processes.shared_scale import condition, fit_of, no_observations


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_quadratic(batch):
    root, residual, noise = draws(*batch, 7, 7), draws(*batch, 7, seed=1), draws(*batch, 7, seed=2).exp()
    covariance = root @ root.mT
    found = quadratic(covariance, noise, residual)
    assert found.size == 7
    for where in itertools.product(*map(range, batch)):
        matrix = covariance[where] + noise[where].diag()
        log_density = multivariate_normal(cov=matrix.numpy()).logpdf(residual[where].numpy())
        own = -0.5 * (found.squared_distance[where] + found.log_det[where] + 7 * torch.log(torch.tensor(2 * torch.pi)))
        assert float(own) == pytest.approx(log_density, rel=1e-6)
    arguments = [value.requires_grad_() for value in (root, noise, residual)]
    assert torch.autograd.gradcheck(lambda r, n, y: quadratic(r @ r.mT, n, y)[:2], arguments)


def test_what_cannot_be_factored():
    with pytest.raises(NanError):
        quadratic(torch.full((2, 2), torch.nan), torch.ones(2), torch.ones(2))


@pytest.mark.parametrize("noise_std", [None, 0.3])
@pytest.mark.parametrize("m", [1, 3])
def test_evidence_equals_gpytorch(m, noise_std):
    X, Y = draws(12, 2), draws(12, m, seed=1)
    gp = NNGP(likelihood=likelihoods.Gaussian(noise_std=noise_std), optimise=False).fit(X, Y)._gp
    gp.train().requires_grad_(True)
    mll = ExactMarginalLogLikelihood(gp.likelihood, gp)
    theirs = 12 * mll(gp(*gp.train_inputs), gp.train_targets).reshape(m)
    assert torch.allclose(log_evidence(gp), theirs, atol=1e-9)
    parameters = [value for value in gp.parameters() if value.requires_grad]
    pairs = zip(*(torch.autograd.grad(value.sum(), parameters) for value in (log_evidence(gp), theirs)), strict=True)
    assert all(torch.allclose(own, other, atol=1e-8) for own, other in pairs)


def test_student_t_has_the_gradients_of_its_conditioning():
    X, Y = draws(12, 2), draws(12, 2, seed=1)
    model = StudentTProcess(optimise=False).fit(X, Y)
    prior = model._prior.requires_grad_(True)
    known = condition(prior, no_observations(prior, 2), model._data.X, model._data.Y)
    found = fit_of(prior, model._data.X, model._data.Y)
    densities = model._log_evidence(prior, known), model._log_evidence(prior, found)
    assert torch.allclose(*densities, atol=1e-10)
    parameters = list(prior.parameters())
    pairs = zip(*(torch.autograd.grad(value.sum(), parameters) for value in densities), strict=True)
    assert all(torch.allclose(own, other, atol=1e-9) for own, other in pairs)


def test_priors_of_outputs_and_of_what_they_share():
    law = LogNormalPrior(0.0, 1.0)
    kernel = RBFKernel(ard_num_dims=3, batch_shape=torch.Size([2]), lengthscale_prior=law)
    kernel.lengthscale = draws(2, 1, 3).exp()
    assert torch.allclose(log_prior(kernel, 2), law.log_prob(kernel.lengthscale).sum((-1, -2)))
    assert torch.allclose(log_prior(kernel, 1).sum(), law.log_prob(kernel.lengthscale).sum())
    shared = RBFKernel(ard_num_dims=3, lengthscale_prior=law)
    assert torch.allclose(log_prior(shared, 2), law.log_prob(shared.lengthscale).sum() / 2)
