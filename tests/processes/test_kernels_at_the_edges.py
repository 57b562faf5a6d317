"""Kernels where they are easily wrong: added branches, variances of zero, equal inputs, positions left over."""

import pytest
import torch

from bayesnn.processes.architectures import (
    Activation,
    Aggregate,
    AveragePooling,
    Concatenation,
    Convolution,
    Dense,
    Flatten,
    GlobalAveragePooling,
    Identity,
    LayerNorm,
    Repeated,
    SelfAttention,
    Sum,
    finite_network,
    residual,
    serial,
)
from bayesnn.processes.kernels import NNGPKernel, NTKKernel, blocks

RELU, ERF, DENSE = Activation("relu"), Activation("erf"), Dense(1.7, 0.2)
CONVOLUTION, ATTENTION = Convolution(3, 1.6, 0.1), SelfAttention(1.4, 0.1, 1.2)


def rows(n, d):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(n + d), dtype=torch.float64)


def test_branches_whose_products_count_cannot_be_added():
    """x + relu(W x) has a covariance of its own between both; behind a Dense, or an odd activation, it vanishes."""
    pool = serial(CONVOLUTION, AveragePooling(1))
    for branches in (
        (Identity(), RELU),
        (Identity(), serial(DENSE, RELU)),
        (Identity(), Identity()),
        (serial(DENSE, RELU), serial(DENSE, RELU)),
        (Identity(), GlobalAveragePooling()),
        (Identity(), Repeated(serial(DENSE, RELU), 3)),
        (Identity(), residual(DENSE)),
        (Identity(), Concatenation((DENSE, RELU))),
        (Identity(), ERF),
    ):
        with pytest.raises(ValueError, match="products of the others don't vanish"):
            Sum(branches)
    for branch in (
        DENSE,
        serial(DENSE, ERF),
        serial(DENSE, LayerNorm()),
        pool,
        ATTENTION,
        Concatenation((DENSE, DENSE)),
    ):
        Sum((Identity(), branch, branch))


@pytest.mark.parametrize(
    "branch", [serial(Dense(2.0), RELU, Dense(1.5)), serial(Dense(2.0), ERF)], ids=["dense", "odd"]
)
def test_what_branches_add_equals_finite_networks(branch):
    """The mean of many networks' kernels, within 4.5 standard errors."""
    architecture = serial(Dense(), residual(branch), Dense())
    X = rows(2, 6) + 1
    exact = NNGPKernel(architecture=architecture).double()(X).to_dense()
    generator = torch.Generator().manual_seed(0)
    outputs = torch.stack(
        [finite_network(architecture, (6,), 1, 128, generator=generator).double()(X)[:, 0] for _ in range(4000)]
    )
    products = outputs[:, :, None] * outputs[:, None]
    z = (products.mean(0) - exact) / (products.std(0) / len(products) ** 0.5)
    assert z.abs().max() < 4.5


@pytest.mark.parametrize("kernel", [NNGPKernel, NTKKernel])
@pytest.mark.parametrize("last", [Flatten(), GlobalAveragePooling()], ids=["flatten", "pool"])
def test_zero_rows_and_black_corners(kernel, last):
    """Without biases, where variances of zero arrive at every activation."""
    for dtype in (torch.float32, torch.float64):
        k = kernel(architecture=serial(Convolution(3, 2.0), RELU, last, Dense()), input_shape=(1, 8, 8)).to(dtype)
        X = torch.rand(4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
        X[0, :4], X[1] = 0, 0
        X = X.flatten(1).requires_grad_()
        matrix = k(X).to_dense()
        assert bool((k.bias_var == 0).all()) and bool((matrix[1] == 0).all())
        gradients = torch.autograd.grad(matrix.sum() + k(X, diag=True).sum(), [X, *k.parameters()])
        assert all(bool(torch.isfinite(value).all()) for value in (matrix, *gradients))
    assert gradients[-2].abs().max() > 0 or gradients[-1].abs().max() > 0


def test_a_variance_that_begins_at_zero_is_learned():
    k = NNGPKernel(architecture=serial(Dense(), RELU, Dense())).double()
    X = rows(5, 3)
    (slope,) = torch.autograd.grad(k(X).to_dense().sum(), k.raw_bias_var)
    k.bias_var = 1e-6
    after = k(X).to_dense().sum()
    k.bias_var = 0.0
    assert float(slope) == pytest.approx(float(after - k(X).to_dense().sum()) / 1e-6, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_repeated_rows_are_as_the_diagonal(dtype):
    """Where the angle is known to half of the digits only."""
    X = rows(50, 4).to(dtype)
    for k in (NNGPKernel(depth=5, activation="sign"), NTKKernel(depth=50), NTKKernel(depth=5, activation="abs")):
        k = k.to(dtype)
        between = k(X, X.flip(0)).to_dense().flip(1).diagonal()
        assert (between / k(X, diag=True) - 1).abs().max() < 200 * torch.finfo(dtype).eps


def test_equal_inputs_in_two_tensors_have_gradients_of_their_own():
    """Through attention and graphs, which aren't symmetric in them; against central differences."""
    graph = torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.0, 0.3], [0.5, 0.3, 0.0]], dtype=torch.float64)
    cases = (
        (serial(ATTENTION, GlobalAveragePooling(), DENSE), (2, 3), rows(2, 6)),
        (
            serial(Aggregate(), DENSE, RELU, GlobalAveragePooling(), DENSE),
            (2, 3),
            torch.cat([rows(2, 6), graph.flatten().repeat(2, 1)], 1),
        ),
    )
    for architecture, shape, X in cases:
        k = NNGPKernel(architecture=architecture, input_shape=shape).double()
        for diag in (False, True):

            def value(first, k=k, X=X, diag=diag):
                out = k(first, X, diag=diag)
                return (out if diag else out.to_dense()).sum()

            first = X.clone().requires_grad_()
            (found,) = torch.autograd.grad(value(first), first)
            steps = 1e-5 * torch.eye(X.numel(), dtype=X.dtype).reshape(-1, *X.shape)
            exact = torch.stack([(value(X + step) - value(X - step)).detach() / 2e-5 for step in steps])
            assert (found.flatten() - exact).abs().max() < 1e-6


def test_the_diagonal_takes_some_rows_at_a_time(monkeypatch):
    k = NNGPKernel(
        architecture=serial(CONVOLUTION, RELU, GlobalAveragePooling(), DENSE), input_shape=(1, 3, 3)
    ).double()
    X = rows(7, 9).requires_grad_()

    def values():
        outputs = (k(X).to_dense(), k(X, diag=True), k(X, X.detach() + 1, diag=True))
        weights = torch.arange(7, dtype=torch.float64)
        gradients = torch.autograd.grad(sum((output @ weights).sum() for output in outputs), [X, *k.parameters()])
        return [*outputs, *gradients]

    whole = values()
    monkeypatch.setattr(blocks, "ENTRIES", 2 * 81)
    for found, expected in zip(values(), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: NNGPKernel(architecture=Dense), TypeError, "architecture must be a layer"),
        (lambda: NNGPKernel(architecture=Flatten()), ValueError, "layer with weights"),
        (lambda: NNGPKernel(architecture=DENSE, input_shape=64), ValueError, "input_shape must be"),
        (lambda: NNGPKernel(architecture=DENSE, input_shape=(1, 0)), ValueError, "input_shape must be"),
        (lambda: setattr(NNGPKernel(), "weight_var", -1.0), ValueError, "weight_var must be 1 number"),
        (
            lambda: setattr(NNGPKernel(per_layer=True), "bias_var", torch.ones(3)),
            ValueError,
            "bias_var must be 4 number",
        ),
        (lambda: Dense("a"), TypeError, "weight_var must be a number"),
        (lambda: LayerNorm(-1.0), ValueError, "epsilon must be"),
        (
            lambda: NNGPKernel(architecture=serial(CONVOLUTION, RELU, DENSE), input_shape=(1, 2, 2))(
                rows(3, 4)
            ).to_dense(),
            ValueError,
            "must end with vectors",
        ),
    ],
)
def test_kernels_of_what_is_no_architecture(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_what_is_not_a_number_is_not_hidden():
    X = torch.tensor([[1.0, float("nan")], [1.0, 2.0]])
    for activation in ("rbf", "sign"):
        k = NNGPKernel(architecture=serial(Dense(), Activation(activation), Dense()))
        assert bool(k(X, diag=True)[0].isnan()) and bool(k(X).to_dense()[0].isnan().all())
