"""Kernels of architectures: reference values, sums written out, identities between forms, gradients, deep networks, errors."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from bayesnn.configured import build, describe
from bayesnn.processes.architectures import (
    Activation,
    Aggregate,
    AveragePooling,
    Concatenation,
    Convolution,
    Covariance,
    Dense,
    Dropout,
    Flatten,
    GlobalAveragePooling,
    GlobalSumPooling,
    Identity,
    Layer,
    LayerNorm,
    PositionalEncoding,
    Repeated,
    SelfAttention,
    Sum,
    SumPooling,
    mlp,
    needs_graphs,
    needs_pairs,
    of_each_with_itself,
    of_inputs,
    residual,
    serial,
    unflattened,
    with_adjacency,
)
from bayesnn.processes.architectures.mixing import as_matrices, as_pairs
from bayesnn.processes.architectures.windows import Window, window_sums

RELU, ERF, DENSE, READOUT = Activation("relu"), Activation("erf"), Dense(1.7, 0.2), Dense(1.3, 0.1)
CONVOLUTION, ATTENTION = Convolution(3, 1.6, 0.1), SelfAttention(1.4, 0.1, 1.2)
ARCHITECTURES: dict[str, tuple[tuple[int, ...], Layer]] = {
    "strided": (
        (2, 6, 5),
        serial(Convolution(3, 1.6, 0.1, 2), RELU, Convolution(2, 1.2, 0.2), RELU, Flatten(), READOUT),
    ),
    "circular": (
        (2, 6, 5),
        serial(
            Convolution(3, 1.6, 0.1, 1, "circular"),
            RELU,
            Convolution(2, 1.2, 0.2, 2, "circular"),
            RELU,
            GlobalAveragePooling(),
            READOUT,
        ),
    ),
    "pooled": (
        (2, 6, 5),
        serial(
            CONVOLUTION, RELU, AveragePooling(2, 1, "same"), CONVOLUTION, RELU, SumPooling(3, 2), Flatten(), READOUT
        ),
    ),
    "attention": (
        (3, 7),
        serial(DENSE, PositionalEncoding(0.6, 1.5), ATTENTION, RELU, GlobalAveragePooling(), READOUT),
    ),
    "graphs": (
        (3, 5),
        serial(Repeated(serial(Aggregate(), DENSE, RELU), 2), Aggregate(), GlobalAveragePooling(), READOUT),
    ),
    "mixed": (
        (2, 4, 4),
        serial(
            CONVOLUTION,
            residual(RELU, CONVOLUTION, LayerNorm()),
            AveragePooling(2),
            residual(LayerNorm(), ATTENTION),
            Concatenation((serial(RELU, DENSE), serial(RELU, Dropout(0.8), READOUT))),
            DENSE,
            RELU,
            Flatten(),
            READOUT,
        ),
    ),
}
# NNGP and NTK of two inputs and two others, by neural-tangents 0.6.5 in float64.
REFERENCES = {
    "strided": (
        [[0.3488811219252821, 0.3189446391078421], [0.34084339831669047, 0.36031125563580824]],
        [[0.5932151038181374, 0.4797444668841807], [0.5617318607954382, 0.6281008997249251]],
    ),
    "circular": (
        [[0.41668095335888167, 0.40745782630298566], [0.41226155317659385, 0.4205930033693348]],
        [[0.6434038455792496, 0.6057211080027889], [0.6211043092530617, 0.6577973576315168]],
    ),
    "pooled": (
        [[14.413509019895399, 14.186585329267366], [14.168046753312007, 14.978861669956299]],
        [[28.51238987955024, 26.700724079380848], [26.68632247513225, 30.029065009958586]],
    ),
    "attention": (
        [[0.7043722607896764, 0.6572965227722961], [0.6627909489239063, 0.6608727123323576]],
        [[1.87344352039249, 1.6567795435237724], [1.6134341753614154, 1.7396929854569256]],
    ),
    "graphs": (
        [[9.855235082206752, 11.50298033706862], [14.505848036295593, 17.188926409694705]],
        [[15.64364190888992, 18.871248725489973], [35.697752404889215, 42.8396831448532]],
    ),
    "mixed": (
        [[1.8925828298268912, 1.8332956721867502], [1.8054376913517065, 1.9597318805059085]],
        [[7.0957006707362495, 6.550616195116646], [6.330407002431512, 7.8577368186846055]],
    ),
}


def waves(n: int, shape: tuple[int, ...], shift: float) -> Tensor:
    places = torch.arange(n * math.prod(shape), dtype=torch.float64)
    return torch.sin(1.3 * places**1.1 + shift).reshape(n, *shape)


def rows(n: int, num_columns: int, seed: int = 0) -> Tensor:
    return torch.randn(n, num_columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def variances(architecture: Layer, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    return [(w, b) for w, b in torch.tensor(architecture.variances(), dtype=dtype)]


def num_columns(architecture: Layer, shape: tuple[int, ...]) -> int:
    return math.prod(shape) + (shape[-1] ** 2 if needs_graphs(architecture) else 0)


def kernels(
    architecture: Layer, X1: Tensor, X2: Tensor | None, shape: tuple[int, ...], pairs: bool | None = None
) -> Covariance:
    """Of flat rows; of each row with itself where there are no second ones."""
    pairs = needs_pairs(architecture) if pairs is None else pairs
    options = {"num_positions": len(shape) - 1, "pairs": pairs, "tangent": True}
    x1, adjacency1 = unflattened(X1, shape, needs_graphs(architecture))
    x2, adjacency2 = (None, None) if X2 is None else unflattened(X2, shape, needs_graphs(architecture))
    covariance = of_each_with_itself(x1, **options) if x2 is None else of_inputs(x1, x2, **options)
    if adjacency1 is not None:
        covariance = with_adjacency(covariance, adjacency1, adjacency2)
    return architecture.propagate(covariance, variances(architecture, X1.dtype))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_reference_values(name: str) -> None:
    shape, architecture = ARCHITECTURES[name]
    X1, X2 = (waves(2, shape, shift).flatten(1) for shift in (0.0, 1.0))
    if name == "graphs":
        X1, X2 = (torch.cat([X, waves(2, (5, 5), shift).square().flatten(1)], 1) for X, shift in ((X1, 2.0), (X2, 3.0)))
    found = kernels(architecture, X1, X2, shape)
    for value, reference in zip((found.between, found.tangent), REFERENCES[name], strict=True):
        torch.testing.assert_close(value, torch.tensor(reference, dtype=torch.float64), rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_kernels_are_covariances(name: str) -> None:
    shape, architecture = ARCHITECTURES[name]
    X = rows(6, num_columns(architecture, shape))
    found, own = kernels(architecture, X, X, shape), kernels(architecture, X, None, shape)
    for matrix in (found.between, found.tangent):
        assert matrix is not None
        torch.testing.assert_close(matrix, matrix.mT)
    for diagonal in (own.first, own.between):
        torch.testing.assert_close(diagonal.squeeze(-1), found.first.squeeze(-1))
    if name == "mixed":  # dropout has one mask for an input with itself, two for equal inputs
        assert (own.first.squeeze(-1) > found.between.diagonal()).all()
        return
    torch.testing.assert_close(own.first.squeeze(-1), found.between.diagonal())
    # kappa_dot at coincident points is exact in one and has the square root of rounding in the other.
    assert own.tangent is not None and found.tangent is not None
    torch.testing.assert_close(own.tangent.squeeze(-1), found.tangent.diagonal(), rtol=1e-7, atol=0)
    for matrix in (found.between, found.tangent):
        assert torch.linalg.eigvalsh(matrix).min() > 0


@pytest.mark.parametrize("padding", ["same", "valid", "circular"])
def test_pairs_of_positions_give_what_positions_give(padding) -> None:
    shape = (2, 6, 5)
    architecture = serial(
        Convolution((3, 2), 1.6, 0.1, (2, 1), padding),
        Activation("relu"),
        LayerNorm(),
        Dropout(0.7),
        residual(Convolution(3, 1.1, 0.2, 1, "same"), PositionalEncoding(0.4), ERF, DENSE),
        Flatten(),
        READOUT,
    )
    assert not needs_pairs(architecture)
    X1, X2 = rows(3, 60), rows(2, 60, seed=1)
    for second in (X2, None):
        positions, pairs = (kernels(architecture, X1, second, shape, pairs) for pairs in (False, True))
        for field in ("between", "first", "second", "tangent"):
            torch.testing.assert_close(getattr(pairs, field), getattr(positions, field))


@pytest.mark.parametrize("padding", ["same", "valid", "circular"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_window_sums_are_sums(padding, stride: int, size: int) -> None:
    window, n = Window(size, stride, padding), 6
    x = rows(2 * n * 3, n).reshape(2, n, 3, n).requires_grad_()
    y = window_sums(x, (-3, -1), window)
    expected = torch.zeros(2, window.count(n), 3, window.count(n), dtype=torch.float64)
    for i in range(expected.shape[1]):
        for j in range(expected.shape[3]):
            for offset in range(size):
                a, b = (stride * place + offset - window.pads(n)[0] for place in (i, j))
                if padding == "circular":
                    a, b = a % n, b % n
                if 0 <= a < n and 0 <= b < n:
                    expected[:, i, :, j] += x.detach()[:, a, :, b]
    torch.testing.assert_close(y, expected)
    assert torch.autograd.gradcheck(lambda x: window_sums(x, (-3, -1), window), x[:1, :, :1])


def test_same_padding_gives_one_output_for_each_stride() -> None:
    assert [Window(3, 2, "same").pads(n) for n in (5, 6)] == [(1, 1), (0, 1)]
    assert [Window(3, 2, "circular").count(n) for n in (5, 6, 7)] == [3, 3, 4]
    assert [Window(3, 2, "valid").count(n) for n in (5, 6, 7)] == [2, 2, 3]


def test_pairs_as_matrices_and_back() -> None:
    values = rows(4, 6 * 6).reshape(4, 2, 2, 3, 3)  # (…, h, h', w, w')
    matrices = as_matrices(values, 2)
    assert matrices[3, 1 * 3 + 2, 0 * 3 + 1] == values[3, 1, 0, 2, 1]
    torch.testing.assert_close(as_pairs(matrices, (2, 3)), values, rtol=0, atol=0)


def test_pooling_averages_what_it_sums() -> None:
    shape, X = (2, 5, 4), rows(3, 40)
    mean, total = (
        kernels(serial(CONVOLUTION, RELU, pool), X, X, shape) for pool in (GlobalAveragePooling(), GlobalSumPooling())
    )
    torch.testing.assert_close(total.between, 400 * mean.between)
    means, sums = (
        kernels(serial(CONVOLUTION, RELU, pool, Flatten()), X, X, shape) for pool in (AveragePooling(2), SumPooling(2))
    )
    torch.testing.assert_close(sums.tangent, 16 * means.tangent)
    # A window as large as the input is a global one.
    whole = kernels(serial(CONVOLUTION, RELU, AveragePooling((5, 4)), Flatten()), X, X, shape)
    torch.testing.assert_close(whole.between, mean.between)


def test_circular_convolutions_do_not_see_shifts() -> None:
    architecture = ARCHITECTURES["circular"][1].layers[:2]
    X = rows(2, 60).reshape(2, 2, 6, 5)
    shifted = X.roll((2, 1), (-2, -1))
    layers = serial(*architecture, GlobalAveragePooling(), READOUT)
    found = kernels(layers, X.flatten(1), shifted.flatten(1), (2, 6, 5))
    torch.testing.assert_close(found.between, kernels(layers, X.flatten(1), X.flatten(1), (2, 6, 5)).between)


def test_graphs_do_not_depend_on_the_order_of_nodes() -> None:
    shape, architecture = ARCHITECTURES["graphs"]
    x, adjacency = unflattened(rows(3, 40), shape, graphs=True)
    order = torch.tensor([3, 0, 4, 2, 1])
    permuted = torch.cat([x[..., order].flatten(1), adjacency[..., order, :][..., order].flatten(1)], 1)
    X = rows(3, 40)
    torch.testing.assert_close(
        kernels(architecture, X, X, shape).tangent, kernels(architecture, X, permuted, shape).tangent
    )


def test_a_fixed_adjacency_matrix_is_every_inputs_own() -> None:
    matrix = rows(5, 5, seed=3)
    layers = [serial(DENSE, RELU, Aggregate(a), DENSE, RELU, Flatten(), READOUT) for a in (matrix.tolist(), None)]
    X = rows(3, 15)
    with_matrix = torch.cat([X, matrix.flatten().expand(3, 25)], 1)
    for second in (True, False):
        fixed = kernels(layers[0], X, X if second else None, (3, 5))
        own = kernels(layers[1], with_matrix, with_matrix if second else None, (3, 5))
        torch.testing.assert_close(own.tangent, fixed.tangent)
    identity = serial(DENSE, RELU, Aggregate(torch.eye(5).tolist()), DENSE, Flatten())
    without = serial(DENSE, RELU, DENSE, Flatten())
    torch.testing.assert_close(kernels(identity, X, X, (3, 5)).tangent, kernels(without, X, X, (3, 5)).tangent)


def test_attention_that_is_blunt_takes_means() -> None:
    X = rows(3, 14)
    blunt = kernels(serial(DENSE, SelfAttention(1.0, 0.0, 0.0), GlobalAveragePooling()), X, X, (2, 7))
    mean = kernels(serial(DENSE, GlobalAveragePooling()), X, X, (2, 7))
    torch.testing.assert_close(blunt.between, mean.between)
    torch.testing.assert_close(blunt.tangent, mean.tangent + 2 * mean.between)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_are_central_differences(name: str) -> None:
    shape, architecture = ARCHITECTURES[name]
    X = rows(2, num_columns(architecture, shape))
    X[1] = X[0]  # coincident inputs
    X = torch.cat([X, rows(1, X.shape[1], seed=4)])
    direction, weights = rows(3, X.shape[1], seed=5), rows(3, 3, seed=6)
    direction[1] = direction[0]  # the tangent kernel has a kink across coincident inputs, but none along them
    pairs = torch.tensor(architecture.variances(), dtype=torch.float64)
    changes = rows(*pairs.shape, seed=7) * 0.1

    def value(step: Tensor, field: str) -> Tensor:
        moved = X + step * direction
        own = [(w, b) for w, b in pairs * (1 + step * changes)]
        x, adjacency = unflattened(moved, shape, needs_graphs(architecture))
        covariance = of_inputs(x, x, len(shape) - 1, needs_pairs(architecture), tangent=True)
        if adjacency is not None:
            covariance = with_adjacency(covariance, adjacency, adjacency)
        return (weights * getattr(architecture.propagate(covariance, own), field)).sum()

    # At coincident inputs the tangent kernel's values have the square root of rounding, which a small step would magnify.
    for field, h, tolerance in (("between", 1e-5, 1e-6), ("tangent", 1e-3, 2e-4)):
        step = torch.zeros((), dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(value(step, field), step)
        difference = (value(torch.tensor(h).double(), field) - value(torch.tensor(-h).double(), field)) / (2 * h)
        torch.testing.assert_close(gradient, difference.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_hundred_layers_are_finite(dtype: torch.dtype) -> None:
    block = serial(RELU, Convolution(3, 2.0, 0.0, 1, "circular"))
    X = rows(3, 9).to(dtype)
    X[1] = X[0]
    X.requires_grad_()
    for architecture, shape in (
        (mlp(100), (9,)),
        (serial(Convolution(1), Repeated(block, 100), GlobalAveragePooling(), READOUT), (1, 3, 3)),
        (serial(Dense(), Repeated(residual(LayerNorm(), RELU, Dense()), 100), Flatten(), READOUT), (3, 3)),
        (serial(Dense(), Repeated(residual(LayerNorm(), SelfAttention()), 30), Flatten(), READOUT), (3, 3)),
    ):
        found = kernels(architecture, X, X, shape)
        assert found.between.isfinite().all() and found.tangent.isfinite().all()
        assert found.between.dtype == dtype
        (gradient,) = torch.autograd.grad((found.between.sum() + found.tangent.sum()) * 1e-3, X)
        assert gradient.isfinite().all()


def test_variances_come_in_batches() -> None:
    for name, (shape, architecture) in ARCHITECTURES.items():
        X1, X2 = (rows(n, num_columns(architecture, shape), seed=n) for n in (2, 3))
        x1, adjacency1 = unflattened(X1, shape, needs_graphs(architecture))
        x2, adjacency2 = unflattened(X2, shape, needs_graphs(architecture))
        covariance = of_inputs(x1, x2, len(shape) - 1, needs_pairs(architecture), tangent=True)
        if adjacency1 is not None:
            covariance = with_adjacency(covariance, adjacency1, adjacency2)
        single = variances(architecture)
        batch = [(torch.stack([w, 2 * w]), torch.stack([b, b])) for w, b in single]
        found = architecture.propagate(covariance, batch)
        assert found.between.shape == (2, 2, 3), name
        for index, factor in enumerate((1, 2)):
            one = architecture.propagate(covariance, [(factor * w, b) for w, b in single])
            torch.testing.assert_close(found.tangent[index], one.tangent)


def test_architectures_are_saved_as_json() -> None:
    for shape, architecture in ARCHITECTURES.values():
        again = build(json.loads(json.dumps(describe(architecture))))
        assert again == architecture
        X = rows(2, num_columns(architecture, shape))
        torch.testing.assert_close(
            kernels(again, X, X, shape).tangent, kernels(architecture, X, X, shape).tangent, rtol=0, atol=0
        )
    for layer in (
        Convolution((3, 2), stride=[2, 1], padding="valid"),
        SumPooling((2, 3), 1, "circular"),
        Aggregate([[0.0, 1.0], [1.0, 0.5]]),
        GlobalSumPooling(),
        Identity(),
    ):
        assert build(json.loads(json.dumps(describe(layer)))) == layer


def test_pairs_are_needed_where_positions_mix() -> None:
    image = of_inputs(rows(2, 16).reshape(2, 1, 4, 4), rows(2, 16).reshape(2, 1, 4, 4), 2)
    vectors = of_inputs(rows(2, 3), rows(2, 3))
    for layer in (AveragePooling(), SumPooling(), GlobalAveragePooling(), GlobalSumPooling(), ATTENTION, Aggregate()):
        assert needs_pairs(serial(DENSE, Repeated(residual(layer, DENSE), 2)))
        with pytest.raises(ValueError, match="pairs=True"):
            layer.propagate(image, [(torch.ones(()), torch.ones(()))])
        with pytest.raises(ValueError, match="found vectors"):
            layer.propagate(vectors, [(torch.ones(()), torch.ones(()))])
    assert not needs_pairs(serial(CONVOLUTION, RELU, PositionalEncoding(), LayerNorm(), Flatten(), DENSE))


def test_sizes_that_do_not_suit_are_named() -> None:
    X = rows(2, 16)
    for layer, message in (
        (Convolution(5, padding="valid"), "window of 5 positions doesn't fit into 4"),
        (Convolution(10, padding="circular"), "10 positions wraps around 4"),
        (Convolution((3, 3, 3)), "found 3 sizes of a window for 2 dimensions"),
        (Convolution(3, stride=(1,)), "found 1 strides of a window for 2 dimensions"),
        (AveragePooling(5), "window of 5 positions doesn't fit into 4"),
        (Aggregate(torch.eye(4).tolist()), "one dimension of positions, the nodes, found 2"),
        (Sum((CONVOLUTION, Convolution(3, padding="valid"))), r"positions, found \(4, 4\) beside \(2, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels(layer, X, X, (1, 4, 4), pairs=True)
    with pytest.raises(ValueError, match="found vectors"):
        kernels(CONVOLUTION, X, X, (16,))
    with pytest.raises(ValueError, match="found vectors"):
        kernels(PositionalEncoding(), X, X, (16,))
    with pytest.raises(ValueError, match="of 3 nodes for inputs of 8 nodes"):
        kernels(Aggregate(torch.eye(3).tolist()), X, X, (2, 8))
    graph = of_inputs(X.reshape(2, 2, 8), X.reshape(2, 2, 8), 1, pairs=True)
    with pytest.raises(ValueError, match="needs adjacency matrices"):
        Aggregate().propagate(graph, [])
    with pytest.raises(ValueError, match=r"adjacency2 must be 2 square matrices, found shape \(3, 8, 8\)"):
        with_adjacency(graph, torch.ones(2, 8, 8), torch.ones(3, 8, 8))
    with pytest.raises(ValueError, match="adjacency2 is missing"):
        with_adjacency(graph, torch.ones(2, 8, 8))
    with pytest.raises(ValueError, match="rows must have 80 columns"):
        unflattened(X, (2, 8), graphs=True)


def test_only_gaussian_channels_have_activations() -> None:
    X = rows(2, 6)
    for before in (Identity(), serial(DENSE, RELU), serial(DENSE, Flatten()), serial(DENSE, Dropout(0.5))):
        with pytest.raises(ValueError, match="needs a layer with weights"):
            kernels(serial(before, RELU), X, X, (2, 3))
    for before in (Sum((RELU, DENSE)), Concatenation((DENSE, CONVOLUTION)), Sum((serial(DENSE, RELU), DENSE))):
        with pytest.raises(ValueError, match="needs a layer with weights"):
            kernels(serial(DENSE, before, LayerNorm(), RELU), X, X, (2, 3))
    kernels(serial(DENSE, Flatten(), residual(DENSE), LayerNorm(), READOUT, RELU), X, X, (2, 3))
    kernels(serial(DENSE, Flatten(), DENSE, Flatten(), Dropout(1.0), RELU), X, X, (2, 3))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Convolution(0), "kernel_size must be at least 1"),
        (lambda: Convolution(3, stride=(1, 0)), "stride must be at least 1"),
        (lambda: Convolution(()), "kernel_size must be an integer, or one for each dimension"),
        (lambda: Convolution(3, -1.0), "weight_var"),
        (lambda: Convolution(3, padding="full"), "padding must be one of same, valid, circular, found 'full'"),
        (lambda: AveragePooling(2, padding="none"), "padding must be one of"),
        (lambda: SumPooling(0), "size must be at least 1"),
        (lambda: SelfAttention(key_var=-1.0), "weight_var|key_var"),
        (lambda: PositionalEncoding(lengthscale=0.0), "lengthscale must be positive"),
        (lambda: Aggregate([[1.0, 2.0]]), "square matrix"),
        (lambda: Aggregate([[float("nan")]]), "must be finite"),
    ],
)
def test_settings_are_checked(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
