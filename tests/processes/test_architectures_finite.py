"""Finite networks of architectures: kernels are what they tend to, and they are networks like any others."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from bayesnn import BNN, likelihoods, priors
from bayesnn.inference.members import apply_network
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
    SumPooling,
    finite_network,
    mlp,
    needs_graphs,
    needs_pairs,
    of_inputs,
    residual,
    serial,
    unflattened,
    with_adjacency,
)
from bayesnn.processes.kernels.empirical import empirical_ntk

RELU, DENSE, READOUT = Activation("relu"), Dense(1.7, 0.2), Dense(1.3, 0.3)
CONVOLUTION, ATTENTION = Convolution(3, 1.6, 0.2), SelfAttention(1.4, 0.2, 1.2)
IMAGE, SEQUENCE, GRAPH = (2, 4, 5), (2, 6), (3, 4)
MATRIX = [[0.5, 1.0, 0.0, -0.3], [0.0, 0.2, 0.7, 0.0], [1.1, 0.0, 0.0, 0.4], [0.3, 0.3, 0.0, 0.9]]
CASES: dict[str, tuple[tuple[int, ...], Layer]] = {
    "perceptron": ((4,), mlp(2, "erf")),
    "convolution": (
        IMAGE,
        serial(CONVOLUTION, RELU, Convolution((2, 3), 1.2, 0.1, padding="valid"), RELU, Flatten(), READOUT),
    ),
    "strides": (
        IMAGE,
        serial(Convolution(3, 1.6, 0.2, 2), RELU, Convolution(2, 1.2, 0.1, (1, 2)), RELU, Flatten(), READOUT),
    ),
    "circular": (
        SEQUENCE,
        serial(Convolution(3, 1.6, 0.2, 2, "circular"), RELU, AveragePooling(2, 1, "circular"), Flatten(), READOUT),
    ),
    "pooling": (
        IMAGE,
        serial(
            CONVOLUTION,
            RELU,
            AveragePooling(2, 1, "same"),
            CONVOLUTION,
            RELU,
            SumPooling((2, 3), 2),
            Flatten(),
            READOUT,
        ),
    ),
    "global": (IMAGE, serial(CONVOLUTION, RELU, GlobalAveragePooling(), DENSE, RELU, READOUT)),
    "sums": (IMAGE, serial(CONVOLUTION, RELU, GlobalSumPooling(), Dense(0.1, 0.1))),
    "attention": (SEQUENCE, serial(DENSE, ATTENTION, RELU, Flatten(), READOUT)),
    "encoding": (IMAGE, serial(DENSE, PositionalEncoding(0.7, 1.5), LayerNorm(), ATTENTION, GlobalAveragePooling())),
    "graphs": (GRAPH, serial(Repeated(serial(Aggregate(), DENSE, RELU), 2), GlobalAveragePooling(), READOUT)),
    "one graph": (GRAPH, serial(Aggregate(MATRIX), DENSE, RELU, Aggregate(MATRIX), Flatten(), READOUT)),
    "residual": (IMAGE, serial(CONVOLUTION, residual(RELU, CONVOLUTION, LayerNorm()), RELU, Flatten(), READOUT)),
    "mixed": (
        IMAGE,
        serial(
            CONVOLUTION,
            Repeated(residual(LayerNorm(), RELU, CONVOLUTION), 2),
            AveragePooling(2),
            residual(LayerNorm(), ATTENTION),
            Concatenation((serial(RELU, Dense(0.8)), serial(RELU, Convolution(1, 0.9, 0.3)))),
            DENSE,
            RELU,
            GlobalAveragePooling(),
            READOUT,
        ),
    ),
}


def rows(architecture: Layer, shape: tuple[int, ...], n: int = 2, seed: int = 0) -> Tensor:
    size = math.prod(shape) + (shape[-1] ** 2 if needs_graphs(architecture) else 0)
    return torch.randn(n, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kernels(architecture: Layer, X: Tensor, shape: tuple[int, ...]) -> Covariance:
    x, adjacency = unflattened(X, shape, needs_graphs(architecture))
    covariance = of_inputs(x, x, len(shape) - 1, needs_pairs(architecture), tangent=True)
    if adjacency is not None:
        covariance = with_adjacency(covariance, adjacency, adjacency)
    values = torch.tensor(architecture.variances(), dtype=X.dtype)
    return architecture.propagate(covariance, [(w, b) for w, b in values])


def networks(architecture: Layer, shape: tuple[int, ...], count: int, num_outputs: int, **options) -> list[nn.Module]:
    generator = torch.Generator().manual_seed(1)
    made = (finite_network(architecture, shape, num_outputs, generator=generator, **options) for _ in range(count))
    return [network.double().eval() for network in made]


def assert_means(values: list[Tensor], expected: Tensor) -> None:
    draws = torch.stack(values)
    z = (draws.mean(0) - expected) / (draws.std(0) / math.sqrt(len(draws)))
    assert z.abs().max() < 4, z
    # The z-scores would let anything pass if networks differed a lot.
    assert ((draws.mean(0) - expected).abs() / expected.diagonal().max()).max() < 0.15


@pytest.mark.parametrize("name", CASES)
def test_outputs_have_the_nngp_kernel(name: str) -> None:
    shape, architecture = CASES[name]
    X = rows(architecture, shape)
    found = []
    for network in networks(architecture, shape, 40, 64, width=64):
        with torch.no_grad():
            f = network(X)
        found.append(f @ f.mT / 64)
    assert_means(found, kernels(architecture, X, shape).between)


@pytest.mark.parametrize("name", CASES)
def test_gradients_have_the_tangent_kernel(name: str) -> None:
    shape, architecture = CASES[name]
    X = rows(architecture, shape)
    found = [empirical_ntk(network, X) for network in networks(architecture, shape, 20, 1, width=64)]
    tangent = kernels(architecture, X, shape).tangent
    assert tangent is not None
    assert_means(found, tangent)


def test_the_error_falls_with_the_root_of_the_width() -> None:
    shape, architecture = CASES["mixed"]
    X = rows(architecture, shape, n=3)
    tangent = kernels(architecture, X, shape).tangent
    assert tangent is not None
    widths = torch.tensor([12.0, 48.0, 192.0])
    errors = []
    for width in widths.int().tolist():
        found = [empirical_ntk(network, X) for network in networks(architecture, shape, 6, 1, width=width)]
        errors.append((torch.stack(found) - tangent).square().mean().sqrt())
    x, y = widths.log(), torch.stack(errors).log().float()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert -0.75 < slope < -0.35, errors


def test_dropout_masks_give_the_nngp_kernel() -> None:
    architecture = serial(DENSE, RELU, Dropout(0.6), Dense(2.0, 0.1), Activation("erf"), READOUT)
    X = rows(architecture, (4,))
    found = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for network in networks(architecture, (4,), 24, 64, width=128):
            with torch.no_grad():
                f, again = network.train()(X), network(X)
            found.append(f @ again.mT / 64)
    assert_means(found, kernels(architecture, X, (4,)).between)


def test_a_networks_weights_come_from_its_generator_alone() -> None:
    shape, architecture = CASES["mixed"]
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(made))
        generator = torch.Generator().manual_seed(seed)
        made.append(finite_network(architecture, shape, 3, 8, "standard", generator=generator))
    assert {nn.Linear, nn.Conv2d} <= {type(module) for module in made[0].modules()}
    first, second, third = (network.state_dict() for network in made)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not any(torch.equal(value, third[name]) for name, value in first.items())


def test_parameterisations_differ_in_scales_alone() -> None:
    for shape, architecture in CASES.values():
        X = rows(architecture, shape).float()
        outputs = []
        for parameterisation in ("ntk", "standard"):
            generator = torch.Generator().manual_seed(0)
            outputs.append(finite_network(architecture, shape, 2, 8, parameterisation, generator=generator)(X))
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_members_are_evaluated_side_by_side() -> None:
    for shape, architecture in CASES.values():
        X = rows(architecture, shape)
        own = networks(architecture, shape, 2, 2, width=6)
        states = [dict(network.named_parameters()) for network in own]
        stacked = {name: torch.stack([state[name].detach() for state in states]) for name in states[0]}
        expected = torch.stack([network(X) for network in own])
        torch.testing.assert_close(apply_network(own[0], stacked, X), expected.detach(), check_dtype=True)


def test_networks_are_bayesian_neural_networks() -> None:
    shape, architecture = CASES["convolution"]
    network = finite_network(architecture, shape, 1, 8, generator=torch.Generator().manual_seed(0))
    X = rows(architecture, shape, n=12).float()
    prior = priors.Normal(scale=1.0, bias_scale=1.0, fan_in=False)
    model = BNN(network, likelihoods.Gaussian(noise_std=0.1), prior)
    assert model is not None
    assert network(X).shape == (12, 1)


@pytest.mark.parametrize(
    "layer, shape, message",
    [
        (serial(CONVOLUTION, RELU), (2, 4, 4), r"outputs have shape \(3, 4, 4\), want \(3,\)"),
        (residual(DENSE), (2,), r"one shape, found \(2,\), \(3,\)"),
        (serial(DENSE, Concatenation((DENSE, Identity())), DENSE), (2,), r"as many channels, found \(4,\), \(8,\)"),
        (Concatenation((DENSE, DENSE)), (2,), "3 channels can't be divided among 2 branches"),
        (Convolution(5, padding="valid"), (2, 4, 4), "window of 5 positions doesn't fit into 4"),
        (CONVOLUTION, (2,), "found vectors"),
        (ATTENTION, (2,), "found vectors of 2"),
        (GlobalSumPooling(), (2,), "found vectors of 2"),
        (PositionalEncoding(), (2,), "found vectors of 2"),
        (Aggregate(MATRIX), (2, 5), "4 nodes for inputs of 5 nodes"),
        (Aggregate(), (2, 5, 5), "one dimension of positions, the nodes, found 2"),
        (DENSE, (), "input_shape must be"),
    ],
)
def test_shapes_that_do_not_suit_are_named(layer: Layer, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        finite_network(layer, shape, 3, 8, generator=torch.Generator())


def test_other_settings_are_checked() -> None:
    generator = torch.Generator()
    with pytest.raises(ValueError, match="parameterisation must be 'ntk' or 'standard', found 'mean-field'"):
        finite_network(DENSE, (2,), 1, 8, "mean-field", generator=generator)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="width must be at least 1"):
        finite_network(DENSE, (2,), 1, 0, generator=generator)
    with pytest.raises(ValueError, match="rows must have 2 columns"):
        finite_network(DENSE, (2,), 1, 8, generator=generator)(torch.ones(3, 4))

    class Unknown:
        def variances(self) -> list[tuple[float, float]]:
            return []

        def mixes_positions(self) -> bool:
            return False

        def is_centred(self, centred: bool) -> bool:
            return centred

        def propagate(self, covariance, variances):
            return covariance

    with pytest.raises(TypeError, match="no finite network of Unknown"):
        finite_network(serial(Unknown()), (2,), 1, 8, generator=generator)
