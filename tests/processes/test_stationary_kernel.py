"""The kernel over Fourier features in its short form against the general kernel of the same architecture."""

from __future__ import annotations

import copy

import pytest
import torch
from gpytorch.constraints import Interval
from torch import Tensor

from bayesnn.processes.architectures import fourier_mlp
from bayesnn.processes.kernels import NNGPKernel
from bayesnn.processes.kernels.stationary import FourierNNGPKernel

LENGTHSCALES = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)


def kernels(depth: int, activation: str, batch: tuple[int, ...] = ()) -> tuple[FourierNNGPKernel, NNGPKernel]:
    options = {"ard_num_dims": 4, "batch_shape": torch.Size(batch)}
    pair = (
        FourierNNGPKernel(depth, activation, **options).double(),
        NNGPKernel(architecture=fourier_mlp(depth, activation), **options).double(),
    )
    for kernel in pair:
        kernel.lengthscale = LENGTHSCALES
    return pair


def everything(kernel: NNGPKernel, X: Tensor, Z: Tensor) -> list[Tensor]:
    """Values, and gradients of random sums of them."""
    X, Z = X.clone().requires_grad_(True), Z.clone().requires_grad_(True)
    values = [kernel(X, Z).to_dense(), kernel(X).to_dense(), kernel(X, diag=True), kernel(X, X.flip(-2), diag=True)]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(each.shape, generator=generator, dtype=each.dtype) for each in values]
    total = torch.stack([(value * weight).sum() for value, weight in zip(values, weights, strict=True)]).sum()
    return [*values, *torch.autograd.grad(total, [X, Z, kernel.raw_lengthscale])]


@pytest.mark.parametrize("activation", ["gelu", "relu", "erf"])
@pytest.mark.parametrize("depth, batch, num_rows", [(1, (), 8), (3, (2,), 8), (1, (), 300)])
def test_values_and_gradients_are_those_of_the_general_kernel(activation, depth, batch, num_rows):
    """300 rows are computed block by block. Two rows are the same point."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(2, *(1 for _ in batch), num_rows, 4, generator=generator, dtype=torch.float64)
    Z = torch.randn(num_rows - 1, 4, generator=generator, dtype=torch.float64)
    Z[0] = X[0].reshape(-1, 4)[0]
    short, general = kernels(depth, activation, batch)
    for found, exact in zip(everything(short, X, Z), everything(general, X, Z), strict=True):
        assert found.shape == exact.shape
        assert torch.allclose(found, exact, rtol=1e-9, atol=1e-10)


def test_far_from_the_origin():
    """Distances don't lose their digits to the products they are made of."""
    X = torch.rand(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    short, _ = kernels(1, "gelu")
    assert torch.allclose(short(X + 1e4).to_dense(), short(X).to_dense(), rtol=0, atol=1e-9)


def test_variances_can_be_set_and_set_free():
    X = torch.rand(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    short, general = kernels(1, "gelu")
    before = short(X).to_dense()
    for kernel in (short, general):
        kernel.weight_var = torch.tensor([0.7, 1.3, 0.4])
        kernel.bias_var = torch.tensor([0.0, 0.2, 0.1])
    twin = copy.deepcopy(short)
    assert torch.allclose(short(X).to_dense(), general(X).to_dense(), rtol=1e-12)
    assert not torch.allclose(short(X).to_dense(), before, rtol=1e-2)
    twin.load_state_dict(kernels(1, "gelu")[0].state_dict() | {"raw_lengthscale": twin.raw_lengthscale})
    assert torch.equal(twin(X).to_dense(), before)
    # Learned variances need gradients.
    short.raw_weight_var.requires_grad_(True)
    own = [torch.autograd.grad(kernel(X).to_dense().sum(), kernel.raw_weight_var)[0] for kernel in (short, general)]
    assert torch.allclose(*own) and bool((own[0] != 0).all())


def test_another_dtype_and_no_rows():
    X = torch.rand(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    short, _ = kernels(1, "gelu")
    exact = short(X).to_dense()
    single = short.float()(X.float()).to_dense()
    assert single.dtype == torch.float32 and (single - exact).abs().max() < 1e-6
    assert short(X[:0].float(), X.float()).to_dense().shape == (0, 6)
    assert short.is_stationary


def test_another_constraint_is_another_variance():
    X = torch.rand(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    short, general = kernels(1, "gelu")
    short(X).to_dense()
    for kernel in (short, general):
        kernel.register_constraint("raw_weight_var", Interval(0.5, 4.0))
    assert torch.allclose(short(X).to_dense(), general(X).to_dense(), rtol=1e-12)
