"""The NNGP model against the closed form, with the kernel written out."""

import math

import torch

from bayesnn import NNGP, likelihoods


def relu_kernel(A, B, depth, weight_var, bias_var):
    """The arc-cosine recursion (Cho and Saul 2009), in its textbook form."""
    cov = weight_var * A @ B.T / A.shape[1] + bias_var
    a, b = (weight_var * Z.square().sum(-1) / Z.shape[1] + bias_var for Z in (A, B))
    for _ in range(depth):
        norm = (a[:, None] * b).sqrt()
        theta = torch.arccos((cov / norm).clamp(-1, 1))
        kappa = norm * (theta.sin() + (math.pi - theta) * theta.cos()) / (2 * math.pi)
        cov, a, b = (weight_var * value + bias_var for value in (kappa, a / 2, b / 2))
    return cov


def test_posterior_equals_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(30, 3, generator=generator, dtype=torch.float64)
    Y = torch.sin(X[:, :1]) + 3 + 0.1 * torch.randn(30, 1, generator=generator, dtype=torch.float64)
    new = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    model = NNGP(depth=2, likelihood=likelihoods.Gaussian(noise_std=0.2), optimise=False).fit(X, Y)
    kernel, mean = model._gp.covar_module, model._gp.mean_module.constant
    hyper = (2, kernel.base_kernel.weight_var.item(), kernel.base_kernel.bias_var.item())
    A, B = ((Z - X.mean(0)) / X.std(0) / kernel.base_kernel.lengthscale for Z in (X, new))
    y = (Y - Y.mean()) / Y.std()
    K, cross, prior = (kernel.outputscale * relu_kernel(P, Q, *hyper) for P, Q in ((A, A), (A, B), (B, B)))
    solved = torch.linalg.solve(K + (0.2 / Y.std()) ** 2 * torch.eye(30, dtype=K.dtype), cross)
    exact_mean = Y.mean() + Y.std() * (mean + solved.T @ (y - mean))
    exact_cov = Y.var() * (prior - cross.T @ solved)
    posterior = model.posterior(new)
    assert (posterior.mean - exact_mean).abs().max() < 1e-10
    off = ~torch.eye(7, dtype=torch.bool)
    assert (posterior.distribution.covariance_matrix - exact_cov)[off].abs().max() < 1e-10
    assert (posterior.variance[:, 0] - exact_cov.diagonal()).abs().max() < 1e-10
    assert torch.allclose(model.predict(new).variance, posterior.variance + 0.04, atol=1e-12)
