"""Kernels averaged over random networks against the infinite-width limits, and feature kernels against linear regression."""

from __future__ import annotations

import math

import gpytorch
import pytest
import torch
from torch import Tensor, nn

from bayesnn.processes.kernels.monte_carlo import FeatureKernel, RandomFeatures, monte_carlo_kernel

# Two hidden ReLU layers, weight standard deviation 1.4 and bias 0.3: kernels from the recursion in another library's terms.
X = torch.tensor(
    [
        [2.0409191214, -2.5556650313, 0.4180988467],
        [-0.5677696061, -0.4526492921, -0.2155971631],
        [-2.0199861291, -0.2319323776, -0.8652130763],
        [3.3229995166, 0.2257866132, -0.3526307943],
    ],
    dtype=torch.float64,
)


def symmetric(*rows: list[float]) -> Tensor:
    upper = torch.zeros(4, 4, dtype=torch.float64)
    for i, row in enumerate(rows):
        upper[i, i:] = torch.tensor(row, dtype=torch.float64)
    return upper + upper.triu(1).T


NNGP = symmetric(
    [7.0861328716, 1.0727897408, 1.9112297891, 5.1571533565],
    [0.6246330577, 1.217644658, 0.8257098627],
    [3.3283604374, 1.7206780044],
    [7.3032800475],
)
NTK = symmetric(
    [20.9901986147, 1.4859531982, 1.8077324776, 10.4425005081],
    [1.605699173, 2.7728225404, 0.7701234194],
    [9.7168813123, 1.4400250201],
    [21.6416401426],
)


class Dense(nn.Module):
    """In the NTK parameterisation: standard normal parameters, scaled in the forward pass."""

    def __init__(self, inputs: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, generator=generator, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(outputs, generator=generator, dtype=torch.float64))

    def forward(self, X: Tensor) -> Tensor:
        return 1.4 / math.sqrt(self.weight.shape[1]) * X @ self.weight.T + 0.3 * self.bias


def network(width: int, p: int = 1):
    def make(generator: torch.Generator) -> nn.Module:
        layers = [Dense(3, width, generator), nn.ReLU(), Dense(width, width, generator), nn.ReLU()]
        return nn.Sequential(*layers, Dense(width, p, generator))

    return make


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_averages_over_wide_networks_are_the_limits() -> None:
    found = monte_carlo_kernel(network(192, 4), X, None, 120, seeded())
    for value, error, exact in ((found.nngp, found.nngp_error, NNGP), (found.ntk, found.ntk_error, NTK)):
        assert value is not None and error is not None
        z = (value - exact) / error
        assert z.abs().max() < 4
        assert error.max() < 0.06 * exact.max()  # enough to tell another kernel apart


def test_standard_errors_are_those_of_repetitions() -> None:
    repeated = [monte_carlo_kernel(network(16, 2), X[:2], X[2:], 8, seeded(seed)) for seed in range(25)]
    for name in ("nngp", "ntk"):
        values = torch.stack([getattr(found, name) for found in repeated])
        errors = torch.stack([getattr(found, f"{name}_error") for found in repeated]).square().mean(0).sqrt()
        ratio = values.std(0) / errors  # 1 up to about 0.15
        assert ((ratio > 0.55) & (ratio < 1.6)).all()


def test_the_error_of_one_network_falls_with_its_width() -> None:
    errors = []
    for width in (32, 512):
        found = monte_carlo_kernel(network(width), X, None, 30, seeded(1))
        assert found.ntk_error is not None
        errors.append(found.ntk_error.norm())
    assert 2.5 < errors[0] / errors[1] < 6  # (512 / 32)^(1/2) = 4


def test_same_generator_same_kernel_and_blocks() -> None:
    full = monte_carlo_kernel(network(16), X, None, 5, seeded(), tangent=False)
    block = monte_carlo_kernel(network(16), X[:3], X[1:], 5, seeded())
    torch.testing.assert_close(block.nngp, full.nngp[:3, 1:])
    assert full.ntk is None and full.ntk_error is None
    with pytest.raises(ValueError, match="num_networks: found 1"):
        monte_carlo_kernel(network(16), X, None, 1, seeded())


def test_random_features_approximate_the_kernel() -> None:
    features = RandomFeatures(network(64, 64), 60, seeded())
    phi = features(X)
    assert phi.shape == (4, 3840) and not any(value.requires_grad for value in features.parameters())
    # The standard deviation of a product of Gaussians is at most sqrt(2) of the variances; finite width adds a little.
    scale = (NNGP.diagonal().outer(NNGP.diagonal()) + NNGP.square()).sqrt()
    assert ((phi @ phi.T - NNGP).abs() / scale).max() < 0.08
    torch.testing.assert_close(features(X.reshape(2, 2, 3)).reshape(4, -1), phi)
    with pytest.raises(ValueError, match="num_networks: found 0"):
        RandomFeatures(network(4), 0, seeded())


class Regression(gpytorch.models.ExactGP):
    def __init__(self, inputs: Tensor, outcomes: Tensor, kernel: gpytorch.kernels.Kernel) -> None:
        super().__init__(inputs, outcomes, gpytorch.likelihoods.GaussianLikelihood().double())
        self.mean_module, self.covar_module = gpytorch.means.ZeroMean(), kernel

    def forward(self, inputs: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(inputs), self.covar_module(inputs))


@pytest.mark.parametrize("num_rows", [8, 60])  # fewer than features, and more
def test_regression_with_a_feature_kernel_is_linear_regression(num_rows: int) -> None:
    generator = seeded(2)
    inputs = torch.randn(num_rows, 3, generator=generator, dtype=torch.float64)
    outcomes = inputs[:, 0].sin()
    new = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    features = RandomFeatures(network(16, 6), 3, seeded())
    model = Regression(inputs, outcomes, FeatureKernel(features))
    model.likelihood.noise = 0.1
    phi, phi_new = features(inputs), features(new)
    precision = phi.T @ phi / 0.1 + torch.eye(18, dtype=torch.float64)
    mean = phi_new @ torch.linalg.solve(precision, phi.T @ outcomes / 0.1)
    covariance = phi_new @ torch.linalg.solve(precision, phi_new.T)
    loss = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    likelihood = loss(model(inputs), outcomes)
    full = torch.distributions.MultivariateNormal(
        torch.zeros(num_rows).double(), phi @ phi.T + 0.1 * torch.eye(num_rows).double()
    )
    torch.testing.assert_close(likelihood, full.log_prob(outcomes) / num_rows)
    model.eval()
    with torch.no_grad():
        posterior = model(new)
        torch.testing.assert_close(posterior.mean, mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(posterior.covariance_matrix, covariance, rtol=1e-4, atol=1e-5)


def test_feature_kernel_shapes() -> None:
    kernel = FeatureKernel(RandomFeatures(network(8, 2), 2, seeded()))
    matrix = kernel(X).to_dense()
    torch.testing.assert_close(kernel(X, diag=True), matrix.diagonal())
    torch.testing.assert_close(kernel(X, X[:2]).to_dense(), matrix[:, :2])
    torch.testing.assert_close(kernel(X.reshape(2, 2, 3)).to_dense()[1], matrix[2:, 2:])
    assert not kernel.is_stationary
    with pytest.raises(ValueError, match="last_dim_is_batch"):
        kernel(X, diag=True, last_dim_is_batch=True)
