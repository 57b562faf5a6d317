"""The NNGP kernel against published values, finite networks, central differences and GPyTorch's own kernel tests."""

from __future__ import annotations

import math
import unittest
from collections.abc import Callable

import gpytorch
import numpy as np
import pytest
import torch
from botorch.models import SingleTaskGP
from dual_oracles import UPPER, X, dense
from gpytorch.constraints import GreaterThan, Interval
from gpytorch.priors import GammaPrior
from gpytorch.test.base_kernel_test_case import BaseKernelTestCase
from torch import Tensor

from bayesnn.processes.dual_activations import dual_activation
from bayesnn.processes.kernels import NNGPKernel

ACTIVATIONS = {"relu": torch.relu, "erf": torch.erf}


class TestGPyTorchMixin(BaseKernelTestCase, unittest.TestCase):
    def create_kernel_no_ard(self, **kwargs: object) -> NNGPKernel:
        return NNGPKernel(**kwargs)

    def create_kernel_ard(self, num_dims: int, **kwargs: object) -> NNGPKernel:
        return NNGPKernel(ard_num_dims=num_dims, **kwargs)


class TestGPyTorchMixinErf(TestGPyTorchMixin):
    def create_kernel_no_ard(self, **kwargs: object) -> NNGPKernel:
        return NNGPKernel(depth=2, activation="erf", **kwargs)


def kernel_of(depth: int = 3, activation: str = "relu", **kwargs: object) -> NNGPKernel:
    kernel = NNGPKernel(depth, activation, **kwargs).double()
    kernel.weight_var, kernel.bias_var = 1.96, 0.09
    kernel.lengthscale = 1.0
    return kernel


def central_differences(function: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-5) -> Tensor:
    flat = x.detach().flatten()
    shifts = step * torch.eye(flat.numel(), dtype=x.dtype)
    with torch.no_grad():
        values = [function((flat + s).view_as(x)) - function((flat - s).view_as(x)) for s in shifts]
    return torch.stack(values).view_as(x) / (2 * step)


@pytest.fixture(params=list(ACTIVATIONS))
def activation(request: pytest.FixtureRequest) -> str:
    return request.param


def test_published_matrix() -> None:
    matrix = dense(kernel_of(depth=2), X)
    torch.testing.assert_close(matrix, UPPER.triu(1).mT + UPPER, rtol=0, atol=2e-9)


def test_lengthscales_divide_the_inputs_and_depth_counts_hidden_layers(activation: str) -> None:
    kernel = kernel_of(depth=1, activation=activation, ard_num_dims=3)
    kernel.lengthscale = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
    scaled = X / torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
    first = 1.96 * scaled @ scaled.mT / 3 + 0.09
    variances = first.diagonal()
    kappa = dual_activation(activation).moments(variances.unsqueeze(-1), variances.unsqueeze(-2), first).kappa
    torch.testing.assert_close(dense(kernel, X), 1.96 * kappa + 0.09, rtol=1e-7, atol=0)


def finite_network_kernels(
    x: Tensor, activation: str, depth: int, width: int, num_networks: int, generator: torch.Generator
) -> Tensor:
    """The covariance of the outputs given all but the last layer's weights, one matrix per network."""
    kernels = []
    for _ in range(num_networks):
        hidden = x
        for _ in range(depth):
            weight = torch.randn(hidden.shape[-1], width, generator=generator, dtype=x.dtype)
            bias = torch.randn(width, generator=generator, dtype=x.dtype)
            hidden = ACTIVATIONS[activation](1.4 * hidden @ weight / math.sqrt(hidden.shape[-1]) + 0.3 * bias)
        kernels.append(1.96 * hidden @ hidden.mT / width + 0.09)
    return torch.stack(kernels)


def test_mean_over_finite_networks_of_one_hidden_layer(activation: str) -> None:
    """Unbiased at any width, so that the mean has to agree within its standard error."""
    num_networks = 2000
    generator = torch.Generator().manual_seed(2)
    samples = finite_network_kernels(X, activation, 1, 100, num_networks, generator)
    standard_error = samples.std(0) / math.sqrt(num_networks)
    z_scores = (samples.mean(0) - dense(kernel_of(1, activation), X)) / standard_error
    assert z_scores.abs().max() < 4


def test_error_of_finite_networks_falls_as_the_square_root_of_the_width(activation: str) -> None:
    exact = dense(kernel_of(2, activation), X)
    generator = torch.Generator().manual_seed(3)
    widths = [64, 256, 1024]
    errors = []
    for width in widths:
        samples = finite_network_kernels(X, activation, 2, width, 60, generator)
        errors.append(((samples - exact).square().sum((-2, -1)).mean().sqrt() / exact.norm()).item())
    slope = np.polyfit(np.log(widths), np.log(errors), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.1)
    assert errors[-1] < 0.1


def test_diagonal_is_the_exact_one(activation: str) -> None:
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    kernel = kernel_of(20, activation)
    exact = (1.96 * x.square().sum(-1) / 5) + 0.09
    for _ in range(20):
        exact = 1.96 * dual_activation(activation).diagonal(exact).kappa + 0.09
    diagonal = kernel(x, diag=True)
    torch.testing.assert_close(diagonal, exact, rtol=1e-13, atol=0)
    assert torch.equal(dense(kernel, x).diagonal(), diagonal)
    assert torch.equal(kernel(x).diagonal(), diagonal)


def test_diagonal_of_a_cross_covariance_is_that_of_the_pairs(activation: str) -> None:
    kernel = kernel_of(3, activation)
    torch.testing.assert_close(
        kernel(X, X.flip(0), diag=True), dense(kernel, X, X.flip(0)).diagonal(), rtol=1e-12, atol=0
    )


def test_gradients_of_equal_but_separate_inputs(activation: str) -> None:
    """Coincident points on the diagonal and, with repeated rows, off it."""
    kernel = kernel_of(3, activation)
    x = torch.cat([X, X[:2]])
    weights = torch.randn(6, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def first(x1: Tensor) -> Tensor:
        return (weights * dense(kernel, x1, x)).sum()

    x1 = x.clone().requires_grad_()
    gradient = torch.autograd.grad(first(x1), x1)[0]
    torch.testing.assert_close(gradient, central_differences(first, x), rtol=1e-6, atol=1e-7)

    x2 = x.clone().requires_grad_()
    gradient = torch.autograd.grad((weights * dense(kernel, x, x2)).sum(), x2)[0]
    differences = central_differences(lambda x2: (weights * dense(kernel, x, x2)).sum(), x)
    torch.testing.assert_close(gradient, differences, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("diag", [False, True])
def test_gradients_of_shared_inputs(activation: str, diag: bool) -> None:
    kernel = kernel_of(3, activation)
    weights = torch.randn(4, 4, generator=torch.Generator().manual_seed(6), dtype=torch.float64)

    def total(x: Tensor) -> Tensor:
        return (weights[0] * kernel(x, diag=True)).sum() if diag else (weights * dense(kernel, x)).sum()

    x = X.clone().requires_grad_()
    gradient = torch.autograd.grad(total(x), x)[0]
    torch.testing.assert_close(gradient, central_differences(total, X), rtol=1e-6, atol=1e-7)


def test_gradients_of_rectangular_blocks_at_coincident_points(activation: str) -> None:
    kernel = kernel_of(4, activation)

    def total(x: Tensor) -> Tensor:
        return dense(kernel, x, X).sum()

    x = X[1:3].clone().requires_grad_()
    gradient = torch.autograd.grad(total(x), x)[0]
    torch.testing.assert_close(gradient, central_differences(total, X[1:3]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["raw_weight_var", "raw_bias_var", "raw_lengthscale"])
def test_gradients_of_hyperparameters_with_duplicates(activation: str, name: str) -> None:
    kernel = kernel_of(3, activation, ard_num_dims=3)
    x = torch.cat([X, X, torch.zeros(2, 3, dtype=torch.float64)])
    weights = torch.randn(10, 10, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    parameter = getattr(kernel, name)

    def total(value: Tensor) -> Tensor:
        parameter.data.copy_(value)
        return (weights * dense(kernel, x)).sum()

    start = parameter.detach().clone()
    gradient = torch.autograd.grad(total(start), parameter)[0]
    torch.testing.assert_close(gradient, central_differences(total, start), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_depth_one_hundred_is_finite(activation: str, dtype: torch.dtype) -> None:
    kernel = NNGPKernel(100, activation).to(dtype)
    x = torch.randn(30, 5, generator=torch.Generator().manual_seed(8), dtype=dtype, requires_grad=True)
    matrix = dense(kernel, x)
    matrix.sum().backward()
    assert torch.isfinite(matrix).all()
    assert torch.isfinite(x.grad).all() and (x.grad != 0).any()
    assert all(torch.isfinite(parameter.grad).all() for parameter in kernel.parameters())
    correlation = matrix / (matrix.diagonal().unsqueeze(0) * matrix.diagonal().unsqueeze(1)).sqrt()
    assert correlation.max() <= 1 + 100 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", ["duplicates", "zeros", "huge", "mixed", "one point"])
def test_degenerate_inputs_give_finite_psd_matrices(activation: str, case: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(20, 4, generator=generator, dtype=torch.float64).to(dtype)
    huge = torch.finfo(dtype).max ** 0.4
    x = {
        "duplicates": torch.cat([x, x, x + torch.finfo(dtype).eps]),
        "zeros": torch.cat([x, torch.zeros_like(x)]),
        "huge": huge * x,
        "mixed": torch.cat([huge * x, x, x / huge, -huge * x]),
        "one point": x[:1],
    }[case].requires_grad_()
    kernel = NNGPKernel(3, activation).to(dtype)
    matrix = dense(kernel, x)
    assert torch.isfinite(matrix).all()
    gradients = torch.autograd.grad(matrix.sum(), [x, *kernel.parameters()])
    if case not in ("huge", "mixed"):  # there the sum's own gradient is beyond the range of the dtype
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert not any(torch.isnan(gradient).any() for gradient in gradients)
    eigenvalues = torch.linalg.eigvalsh(matrix.detach().double())
    assert eigenvalues[0] >= -50 * torch.finfo(dtype).eps * eigenvalues[-1]


def test_float32_agrees_with_float64(activation: str) -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(10), dtype=torch.float64)
    kernel = kernel_of(3, activation)
    double = dense(kernel, x)
    single = dense(kernel.float(), x.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=5e-6, atol=5e-6)


def test_batches_of_parameters_and_inputs() -> None:
    kernel = kernel_of(2, batch_shape=torch.Size([3]))
    kernel.weight_var = torch.tensor([[1.0], [1.96], [3.0]], dtype=torch.float64)
    matrices = dense(kernel, X)
    assert matrices.shape == (3, 4, 4)
    torch.testing.assert_close(matrices[1], dense(kernel_of(2), X), rtol=1e-12, atol=0)
    single = kernel_of(2)
    single.weight_var = 3.0
    torch.testing.assert_close(matrices[2], dense(single, X), rtol=1e-12, atol=0)
    assert kernel(X, diag=True).shape == (3, 4)
    assert dense(kernel, X.expand(3, 4, 3), X[:2]).shape == (3, 4, 2)


def test_defaults_constraints_and_priors() -> None:
    kernel = NNGPKernel()
    assert kernel.weight_var.item() == pytest.approx(2, rel=1e-6)
    assert kernel.bias_var.item() == pytest.approx(0.1, rel=1e-6)
    assert kernel.lengthscale.item() == pytest.approx(1, rel=1e-6)
    assert NNGPKernel(activation="erf").weight_var.item() == pytest.approx(1.5521178, rel=1e-6)
    assert not kernel.is_stationary

    prior = GammaPrior(2.0, 1.0)
    kernel = NNGPKernel(
        weight_var_prior=prior,
        bias_var_prior=prior,
        lengthscale_prior=prior,
        weight_var_constraint=Interval(0.5, 4.0, initial_value=1.5),
        bias_var_constraint=GreaterThan(1e-3, initial_value=0.2),
    )
    assert kernel.weight_var.item() == pytest.approx(1.5, rel=1e-6)
    assert kernel.bias_var.item() == pytest.approx(0.2, rel=1e-6)
    values = {name: closure(module) for name, module, _, closure, _ in kernel.named_priors()}
    assert torch.equal(values["weight_var_prior"], kernel.weight_var)
    assert torch.equal(values["bias_var_prior"], kernel.bias_var)
    for _, module, _, _, setting_closure in kernel.named_priors():
        setting_closure(module, torch.tensor(0.9))
    assert kernel.weight_var.item() == pytest.approx(0.9, rel=1e-5)
    assert kernel.bias_var.item() == pytest.approx(0.9, rel=1e-5)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="depth must be at least 1, found 0"):
        NNGPKernel(depth=0)
    with pytest.raises(ValueError, match="'nothing'"):
        NNGPKernel(activation="nothing")
    with pytest.raises(TypeError, match="bias_var_prior: found float"):
        NNGPKernel(bias_var_prior=1.0)  # type: ignore[arg-type]
    with (
        pytest.warns(DeprecationWarning, match="last_dim"),
        pytest.raises(ValueError, match="last_dim_is_batch: found True"),
    ):
        NNGPKernel()(X.float(), diag=True, last_dim_is_batch=True)


def test_gp_posterior_at_a_training_point_has_a_gradient(activation: str) -> None:
    """What Bayesian optimisation asks for when it revisits an observed point."""
    targets = torch.tensor([[0.3], [-1.0], [0.5], [1.2]], dtype=torch.float64)
    noise = torch.full_like(targets, 1e-2)
    model = SingleTaskGP(X, targets, noise, covar_module=kernel_of(3, activation), outcome_transform=None)

    def summary(x: Tensor) -> Tensor:
        posterior = model.posterior(x)
        return posterior.mean.sum() + posterior.variance.sum()

    x = X[2:3].clone().requires_grad_()
    with gpytorch.settings.fast_pred_var(False):
        gradient = torch.autograd.grad(summary(x), x)[0]
        differences = central_differences(summary, X[2:3])
    torch.testing.assert_close(gradient, differences, rtol=1e-5, atol=1e-6)
