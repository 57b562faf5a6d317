r"""Finite networks of an architecture: the same definition that its infinite-width kernels come from.

Two parameterisations have the same law of functions:

- "ntk": all parameters are N(0, 1), and the forward pass scales them, :math:`\sqrt{\sigma_w^2 / \text{fan-in}}\, W`. With
  the prior N(0, 1) of all parameters, a Bayesian network's functions tend to the NNGP; under gradient descent its tangent
  kernel to the NTK.
- "standard": PyTorch's own layers, with weights :math:`N(0, \sigma_w^2 / \text{fan-in})` and biases
  :math:`N(0, \sigma_b^2)` at the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayesnn.checks import count
from bayesnn.processes.architectures import finite_modules as modules
from bayesnn.processes.architectures.attention import PositionalEncoding, SelfAttention
from bayesnn.processes.architectures.combinations import Concatenation, Repeated, Sequential, Sum
from bayesnn.processes.architectures.convolutions import Convolution
from bayesnn.processes.architectures.graphs import Aggregate, check_nodes, needs_graphs, unflattened
from bayesnn.processes.architectures.layers import Activation, Dense, Dropout, Flatten, Identity, Layer, LayerNorm
from bayesnn.processes.architectures.pooling import GlobalPooling, WindowPooling
from bayesnn.processes.architectures.windows import Window, windows
from bayesnn.processes.dual_activations import dual_activation

Parameterisation = Literal["ntk", "standard"]
Shape = tuple[int, ...]
"""Channels, and positions, of what a layer gives for one input."""


class FiniteNetwork(nn.Module):
    """A network of an architecture, on flat rows; :func:`finite_network` makes one.

    Attributes:
        architecture: what it was made from.
        input_shape: (C, *positions) of one input.
    """

    def __init__(self, architecture: Layer, input_shape: Shape, body: nn.Module) -> None:
        super().__init__()
        self.architecture, self.input_shape = architecture, input_shape
        self.graphs = needs_graphs(architecture)
        self.body = body

    def forward(self, X: Tensor) -> Tensor:
        """(n, num_outputs) from rows (n, d): each an input, channel by channel, and its adjacency matrix if it has one.

        Raises:
            ValueError: if rows have another length.
        """
        x, adjacency = unflattened(X, self.input_shape, self.graphs)
        return modules.call(self.body, x, adjacency)


def finite_network(
    architecture: Layer,
    input_shape: Sequence[int],
    num_outputs: int,
    width: int = 512,
    parameterisation: Parameterisation = "ntk",
    *,
    generator: torch.Generator,
) -> FiniteNetwork:
    """A network of an architecture, with random weights.

    Every layer with weights has ``width`` channels, the last one ``num_outputs``. Biases of variance 0 are left out. What
    has random masks (``Dropout``) draws from PyTorch's global generator, in training mode only.

    Args:
        architecture: a layer, of vectors in the end.
        input_shape: (C, *positions) of one input: (d,) for vectors, (channels, height, width) for images, (features, nodes)
            for graphs.
        num_outputs: of the network.
        width: channels of the hidden layers.
        parameterisation: "ntk" or "standard".
        generator: draws the weights.

    Raises:
        TypeError: if a layer has no finite network here, or a number isn't an integer.
        ValueError: if shapes don't suit: the message names the sizes.
    """
    if parameterisation not in get_args(Parameterisation):
        raise ValueError(f"parameterisation must be 'ntk' or 'standard', found {parameterisation!r}")
    shape = tuple(count("input_shape", size) for size in input_shape)
    if not shape:
        raise ValueError("input_shape must be the channels and positions of an input, found ()")
    num_outputs = count("num_outputs", num_outputs)
    plan = Plan(shape, num_outputs, count("width", width), parameterisation, generator)
    body, found = build(architecture, plan)
    if found != (num_outputs,):
        raise ValueError(
            f"the architecture's outputs have shape {found}, want ({num_outputs},): end in Dense after Flatten or global "
            "pooling, and not in a branch that keeps its input's channels"
        )
    return FiniteNetwork(architecture, shape, body)


@dataclass(frozen=True)
class Plan:
    """What a layer's module is made for.

    Args:
        shape: of its inputs.
        channels: of the last layer with weights within.
        width: channels of all others.
        parameterisation: of all.
        generator: draws the weights.
    """

    shape: Shape
    channels: int
    width: int
    parameterisation: Parameterisation
    generator: torch.Generator

    def normal(self, *sizes: int) -> Tensor:
        """Standard normal, in the default dtype."""
        return torch.randn(sizes, generator=self.generator, device=self.generator.device)


@singledispatch
def build(layer: Layer, plan: Plan) -> tuple[nn.Module, Shape]:
    """The module of a layer, and the shape of its outputs; ``build.register`` teaches it a layer of your own.

    Raises:
        TypeError: for a layer that it doesn't know.
    """
    raise TypeError(f"found no finite network of {type(layer).__name__}: register one with build.register")


@build.register
def _(layer: Identity, plan: Plan) -> tuple[nn.Module, Shape]:
    return nn.Identity(), plan.shape


@build.register
def _(layer: Activation, plan: Plan) -> tuple[nn.Module, Shape]:
    return modules.Elementwise(dual_activation(layer.function).function), plan.shape


@build.register
def _(layer: LayerNorm, plan: Plan) -> tuple[nn.Module, Shape]:
    return modules.Normalise(layer.epsilon), plan.shape


@build.register
def _(layer: Dropout, plan: Plan) -> tuple[nn.Module, Shape]:
    return nn.Dropout(1 - layer.keep), plan.shape


@build.register
def _(layer: Flatten, plan: Plan) -> tuple[nn.Module, Shape]:
    return nn.Flatten(), (math.prod(plan.shape),)


@build.register
def _(layer: Dense, plan: Plan) -> tuple[nn.Module, Shape]:
    linear = _linear(plan, plan.shape[0], plan.channels, layer.weight_var, layer.bias_var)
    return modules.AtPositions(linear) if len(plan.shape) > 1 else linear, (plan.channels, *plan.shape[1:])


@build.register
def _(layer: Convolution, plan: Plan) -> tuple[nn.Module, Shape]:
    sides, pads, sizes = _sides(layer, layer.kernel_size, layer.stride, plan.shape)
    num = len(sides)
    operations: list[Callable[..., Tensor]] = [F.conv1d, F.conv2d, F.conv3d]
    kinds: list[type[nn.Module]] = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
    if num > 3:
        raise ValueError(f"finite convolutions have at most 3 dimensions of positions, found {num}")
    kernel, stride = tuple(side.size for side in sides), tuple(side.stride for side in sides)
    fan_in = plan.shape[0] * math.prod(kernel)
    weight = plan.normal(plan.channels, plan.shape[0], *kernel)
    bias = plan.normal(plan.channels) if layer.bias_var > 0 else None
    scales = math.sqrt(layer.weight_var / fan_in), math.sqrt(layer.bias_var)
    if plan.parameterisation == "ntk":
        operation = operations[num - 1]
        convolution: nn.Module = modules.Scaled(lambda x, w, b: operation(x, w, b, stride), weight, bias, *scales)
    else:
        made = kinds[num - 1](plan.shape[0], plan.channels, kernel, stride, bias=bias is not None)
        convolution = _initialised(made, weight, bias, *scales)
    return nn.Sequential(modules.Pad(pads, layer.padding), convolution), (plan.channels, *sizes)


@build.register
def _(layer: WindowPooling, plan: Plan) -> tuple[nn.Module, Shape]:
    sides, pads, sizes = _sides(layer, layer.size, layer.size if layer.stride is None else layer.stride, plan.shape)
    pool = modules.Pool([(side.size, side.stride) for side in sides], mean=layer.mean)
    return nn.Sequential(modules.Pad(pads, layer.padding), pool), (plan.shape[0], *sizes)


@build.register
def _(layer: GlobalPooling, plan: Plan) -> tuple[nn.Module, Shape]:
    _check_positions(layer, plan.shape)
    return modules.GlobalPool(mean=layer.mean), plan.shape[:1]


@build.register
def _(layer: Aggregate, plan: Plan) -> tuple[nn.Module, Shape]:
    adjacency = None if layer.adjacency is None else torch.tensor(layer.adjacency, dtype=torch.get_default_dtype())
    check_nodes(plan.shape[-1] if adjacency is None else len(adjacency), plan.shape[1:])
    return modules.Aggregation(adjacency), plan.shape


@build.register
def _(layer: SelfAttention, plan: Plan) -> tuple[nn.Module, Shape]:
    _check_positions(layer, plan.shape)
    half = math.sqrt(layer.weight_var)
    channels = plan.shape[0]
    attention = modules.Attention(
        keys=_linear(plan, channels, plan.width, layer.key_var, 0.0),
        values=_linear(plan, channels, plan.width, half, 0.0),
        outputs=_linear(plan, plan.width, plan.channels, half, layer.bias_var),
    )
    return attention, (plan.channels, *plan.shape[1:])


@build.register
def _(layer: PositionalEncoding, plan: Plan) -> tuple[nn.Module, Shape]:
    _check_positions(layer, plan.shape)
    num_places = math.prod(plan.shape[1:])
    covariance = layer.covariance(plan.shape[1:], torch.zeros((), dtype=torch.float64))
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    root = (vectors * eigenvalues.clamp_min(0).sqrt()).to(torch.get_default_dtype())
    vectors = plan.normal(plan.shape[0], num_places)
    if plan.parameterisation == "ntk":
        return modules.Encoding(vectors, root), plan.shape
    return modules.Encoding(vectors @ root.mT.to(vectors), None), plan.shape


@build.register(Sequential)
@build.register(Repeated)
def _(layer: Sequential | Repeated, plan: Plan) -> tuple[nn.Module, Shape]:
    made, shape = [], plan.shape
    weighted = [index for index, each in enumerate(layer.layers) if each.variances()]
    for index, each in enumerate(layer.layers):
        last = bool(weighted) and index == weighted[-1]
        module, shape = build(each, replace(plan, shape=shape, channels=plan.channels if last else plan.width))
        made.append(module)
    return modules.Chain(made), shape


@build.register
def _(layer: Sum, plan: Plan) -> tuple[nn.Module, Shape]:
    made, shapes = zip(*(build(branch, plan) for branch in layer.layers), strict=True)
    if len(set(shapes)) > 1:
        raise ValueError(f"branches that are added must have outputs of one shape, found {', '.join(map(str, shapes))}")
    return modules.Branches(made, "sum"), shapes[0]


@build.register
def _(layer: Concatenation, plan: Plan) -> tuple[nn.Module, Shape]:
    num = len(layer.layers)
    if plan.channels % num and layer.variances():
        raise ValueError(f"{plan.channels} channels can't be divided among {num} branches that are concatenated")
    shared = replace(plan, channels=max(plan.channels // num, 1))
    made, shapes = zip(*(build(branch, shared) for branch in layer.layers), strict=True)
    if len(set(shapes)) > 1:
        raise ValueError(
            f"branches that are concatenated must have as many channels, found {', '.join(map(str, shapes))}"
        )
    return modules.Branches(made, "concatenation"), (num * shapes[0][0], *shapes[0][1:])


def _linear(plan: Plan, fan_in: int, outputs: int, weight_var: float, bias_var: float) -> nn.Module:
    weight = plan.normal(outputs, fan_in)
    bias = plan.normal(outputs) if bias_var > 0 else None
    scales = math.sqrt(weight_var / fan_in), math.sqrt(bias_var)
    if plan.parameterisation == "ntk":
        return modules.Scaled(F.linear, weight, bias, *scales)
    return _initialised(nn.Linear(fan_in, outputs, bias=bias is not None), weight, bias, *scales)


def _initialised(
    module: nn.Module, weight: Tensor, bias: Tensor | None, weight_scale: float, bias_scale: float
) -> nn.Module:
    with torch.no_grad():
        cast(Tensor, module.weight).copy_(weight_scale * weight)
        if bias is not None:
            cast(Tensor, module.bias).copy_(bias_scale * bias)
    return module


def _sides(
    layer: Convolution | WindowPooling,
    size: int | Sequence[int],
    stride: int | Sequence[int],
    shape: Shape,
) -> tuple[list[Window], list[tuple[int, int]], Shape]:
    """Windows, what they are padded with, and positions of the outputs."""
    sides = windows(size, stride, layer.padding, len(shape) - 1)
    pads = [side.pads(n) for side, n in zip(sides, shape[1:], strict=True)]
    return sides, pads, tuple(side.count(n) for side, n in zip(sides, shape[1:], strict=True))


def _check_positions(layer: Layer, shape: Shape) -> None:
    if len(shape) == 1:
        raise ValueError(f"{type(layer).__name__} needs inputs with positions, found vectors of {shape[0]}")
