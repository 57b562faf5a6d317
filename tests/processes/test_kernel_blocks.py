"""Infinite-width kernels in blocks, by layer, of images, and the tangent kernel."""

from __future__ import annotations

import pytest
import torch
from dual_oracles import UPPER, X, dense
from torch import Tensor

from bayesnn.processes.architectures import Activation, Aggregate, Dense, Flatten, GlobalAveragePooling, serial
from bayesnn.processes.dual_activations import dual_activation
from bayesnn.processes.kernels import NNGPKernel, NTKKernel, blocks

ACTIVATIONS = {"relu": torch.relu, "erf": torch.erf}


@pytest.mark.parametrize("cls", [NNGPKernel, NTKKernel])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_blocks_are_the_whole_matrix(cls: type, num_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(count, 3, generator=generator, dtype=torch.float64) for count in (41, 23))
    kernel = cls(per_layer=True, ard_num_dims=3, batch_shape=torch.Size([2])).double()
    weights = torch.randn(2, 41, 41, generator=generator, dtype=torch.float64)

    def values(entries: int) -> list[Tensor]:
        monkeypatch.setattr(blocks, "ENTRIES", entries)
        leaf, other = x.clone().requires_grad_(), z.clone().requires_grad_()
        own, between = dense(kernel, leaf), dense(kernel, leaf, other)
        loss = (own * weights).sum() + between.square().sum()
        return [own, between, *torch.autograd.grad(loss, [leaf, other, *kernel.parameters()])]

    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for found, wanted in zip(values(120), values(10**6), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    finally:
        torch.set_num_threads(before)


def test_the_tangent_kernel_of_published_values() -> None:
    kernel = NTKKernel(2).double()
    kernel.weight_var, kernel.bias_var = 1.96, 0.09
    upper = torch.tensor(
        [
            [20.9901986147, 1.4859531982, 1.8077324776, 10.4425005081],
            [0.0, 1.605699173, 2.7728225404, 0.7701234194],
            [0.0, 0.0, 9.7168813123, 1.4400250201],
            [0.0, 0.0, 0.0, 21.6416401426],
        ],
        dtype=torch.float64,
    )
    matrix = dense(kernel, X)
    torch.testing.assert_close(matrix.triu(), upper, rtol=1e-9, atol=1e-9)
    nngp, ntk = kernel.nngp_and_ntk(X)
    assert torch.equal(ntk, matrix)
    torch.testing.assert_close(nngp.triu(), UPPER, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(kernel(X, diag=True), matrix.diagonal())
    torch.testing.assert_close(kernel(X[:2], X[2:], diag=True), matrix[[0, 1], [2, 3]])


def test_tangent_gradients_at_coincident_points() -> None:
    kernel = NTKKernel(2).double()
    x = torch.cat([X, X[:1]])
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(dense(kernel, leaf)[:, 1].sum(), leaf)
    for i, j in ((0, 0), (1, 2), (4, 1)):
        step = torch.zeros_like(x)
        step[i, j] = 1e-6
        difference = (dense(kernel, x + step)[:, 1].sum() - dense(kernel, x - step)[:, 1].sum()) / 2e-6
        torch.testing.assert_close(gradient[i, j], difference, rtol=1e-6, atol=1e-6)
    whole = torch.autograd.grad(dense(kernel, leaf).sum(), [leaf, *(p for p in kernel.parameters())])
    assert all(torch.isfinite(values).all() for values in whole)


def test_layers_have_variances_of_their_own() -> None:
    architecture = serial(Dense(1.5, 0.2), Activation("erf"), Dense(0.7, 0.0))
    kernel = NNGPKernel(architecture=architecture).double()
    torch.testing.assert_close(kernel.weight_var, torch.tensor([1.5, 0.7]).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(kernel.bias_var, torch.tensor([0.2, 0.0]).double(), rtol=1e-6, atol=1e-7)
    first = 1.5 * X @ X.mT / 3 + 0.2
    var = first.diagonal()
    expected = 0.7 * dual_activation("erf").kappa(var[:, None], var[None], first)
    torch.testing.assert_close(dense(kernel, X), expected, rtol=1e-6, atol=1e-6)


def test_images_are_rows() -> None:
    images = torch.randn(5, 2 * 3 * 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kernel = NNGPKernel(architecture=serial(Dense(), Activation(), Flatten(), Dense()), input_shape=(2, 3, 3)).double()
    pixels = images.unflatten(-1, (2, 3, 3))
    cov = torch.einsum("nchw,mchw->nmhw", pixels, pixels) / 2
    var = cov.diagonal(dim1=0, dim2=1).permute(2, 0, 1)
    expected = dual_activation("relu").kappa(var[:, None], var[None], cov).mean((-2, -1))
    torch.testing.assert_close(dense(kernel, images), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"rows must have 18 columns, for inputs of shape \(2, 3, 3\), found 17"):
        kernel(images[:, 1:]).to_dense()


def test_graphs_are_rows_of_features_and_adjacency() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5, 2, 4, generator=generator, dtype=torch.float64)
    adjacency = (torch.rand(5, 4, 4, generator=generator, dtype=torch.float64) > 0.5).double()
    adjacency = adjacency + adjacency.mT + torch.eye(4)
    rows = torch.cat([features.flatten(1), adjacency.flatten(1)], 1)
    architecture = serial(Dense(), Aggregate(), Activation(), Dense(), GlobalAveragePooling())
    kernel = NNGPKernel(architecture=architecture, input_shape=(2, 4)).double()
    matrix = dense(kernel, rows)
    # The same graphs with their nodes in another order.
    order = torch.tensor([2, 0, 3, 1])
    moved = torch.cat([features[..., order].flatten(1), adjacency[:, order][:, :, order].flatten(1)], 1)
    torch.testing.assert_close(dense(kernel, rows, moved), matrix, rtol=1e-10, atol=1e-12)
    assert torch.linalg.eigvalsh(matrix)[0] > 0
    cov = torch.einsum("ncu,mcv->nmuv", features, features) / 2
    cov = torch.einsum("nij,nmjk,mlk->nmil", adjacency, cov, adjacency)
    var = torch.stack([cov[i, i].diagonal() for i in range(5)])
    kappa = dual_activation("relu").kappa(var[:, None, :, None], var[None, :, None, :], cov)
    torch.testing.assert_close(matrix, kappa.mean((-2, -1)), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(kernel(rows[:2], rows[2:4], diag=True), matrix[[0, 1], [2, 3]])
