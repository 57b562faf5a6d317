"""Layers made of layers: one after the other, side by side, again and again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from bayesnn.checks import check_fields, count
from bayesnn.configured import Configured
from bayesnn.processes.architectures.covariance import Covariance
from bayesnn.processes.architectures.layers import Activation, Dense, Identity, Layer, Variances
from bayesnn.processes.dual_activations import DualActivation, dual_activation


@dataclass(frozen=True)
class Combination(Configured):
    """Layers with weights of their own, put together.

    Args:
        layers: at least one.

    Raises:
        TypeError: if one isn't a layer.
        ValueError: if there is none.
    """

    layers: Sequence[Layer]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", _checked("layers", self.layers))

    def variances(self) -> list[tuple[float, float]]:
        """Those of all layers."""
        return [pair for layer in self.layers for pair in layer.variances()]

    def mixes_positions(self) -> bool:
        """Whether one of them does."""
        return any(layer.mixes_positions() for layer in self.layers)

    def is_centred(self, centred: bool) -> bool:
        """Side by side, whether all of them are."""
        return all(layer.is_centred(centred) for layer in self.layers)


@dataclass(frozen=True)
class Sequential(Combination):
    """Layers one after the other; :func:`serial` takes them as arguments."""

    def is_centred(self, centred: bool) -> bool:
        """Whether the last one is, after the others."""
        return reduce(lambda before, layer: layer.is_centred(before), self.layers, centred)

    def propagate(self, covariance: Covariance, variances: Variances) -> Covariance:
        """Through one after the other."""
        for layer, own in zip(self.layers, _shares(self.layers, variances), strict=True):
            covariance = layer.propagate(covariance, own)
        return covariance


@dataclass(frozen=True)
class Repeated(Configured):
    """One layer (a block of them, usually) several times, with weights of its own each time.

    Args:
        layer: what is repeated.
        times: how often.

    Raises:
        TypeError: if it isn't a layer.
        ValueError: if times isn't positive.
    """

    layer: Layer
    times: int

    def __post_init__(self) -> None:
        _checked("layer", [self.layer])
        check_fields(self, count, "times")

    @property
    def layers(self) -> list[Layer]:
        """All of them."""
        return [self.layer] * self.times

    def variances(self) -> list[tuple[float, float]]:
        """Those of each repetition."""
        return self.layer.variances() * self.times

    def mixes_positions(self) -> bool:
        """Whether the layer does."""
        return self.layer.mixes_positions()

    def is_centred(self, centred: bool) -> bool:
        """Whether the last repetition is."""
        return reduce(lambda before, layer: layer.is_centred(before), self.layers, centred)

    def propagate(self, covariance: Covariance, variances: Variances) -> Covariance:
        """Through each repetition."""
        for own in _shares(self.layers, variances):
            covariance = self.layer.propagate(covariance, own)
        return covariance


@dataclass(frozen=True)
class Sum(Combination):
    r"""Branches that share their input, added up, and so are their covariances.

    That leaves out products of different branches, :math:`E[f_1(x)\, f_2(x')]`. They vanish where all branches but one end in
    weights of their own (or in something linear after them, or in an odd activation), since those have mean zero.

    Raises:
        ValueError: if two branches or more don't, such as the input itself beside an activation: put a ``Dense`` after it.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        others = [layer for layer in self.layers if not layer.is_centred(False)]
        if len(others) > 1:
            raise ValueError(
                "branches that are added must, all but one, end in weights of their own, such as Dense: products of the "
                f"others don't vanish; found {' and '.join(type(layer).__name__ for layer in others)} without"
            )

    def propagate(self, covariance: Covariance, variances: Variances) -> Covariance:
        """The sum of what the branches give."""
        return _added(_outputs(self.layers, covariance, variances))


@dataclass(frozen=True)
class Concatenation(Combination):
    """Branches that share their input, their channels (as many each) side by side: the mean of their covariances."""

    def propagate(self, covariance: Covariance, variances: Variances) -> Covariance:
        """The mean of what the branches give."""
        total = _added(_outputs(self.layers, covariance, variances))
        gaussian = total.gaussian and len(self.layers) == 1
        return total.map(lambda values: values / len(self.layers), gaussian=gaussian)


def serial(*layers: Layer) -> Sequential:
    """Layers one after the other."""
    return Sequential(layers)


def residual(*layers: Layer) -> Sum:
    """The input, plus the layers one after the other."""
    return Sum((Identity(), Sequential(layers)))


def mlp(
    depth: int = 3,
    activation: str | DualActivation = "relu",
    weight_var: float | None = None,
    bias_var: float = 0.1,
) -> Sequential:
    """A multilayer perceptron: ``depth`` hidden layers with activations, and a linear last one.

    Args:
        depth: hidden layers, at least 1.
        activation: its name, or a dual activation.
        weight_var: of all layers; None: that at the edge of chaos, which keeps deep kernels from losing what distinguishes
            inputs (Poole et al. 2016; Schoenholz et al. 2017).
        bias_var: of all layers.

    Raises:
        ValueError: for an unknown activation, a depth below 1, or a negative variance.
    """
    dual, depth = dual_activation(activation), count("depth", depth)
    dense = Dense(dual.critical_weight_var if weight_var is None else weight_var, bias_var)
    return Sequential((Repeated(Sequential((dense, Activation(activation))), depth), dense))


def fourier_mlp(depth: int = 1, activation: str | DualActivation = "gelu") -> Sequential:
    """A multilayer perceptron over random Fourier features: its kernel is stationary.

    Args:
        depth: hidden layers above the features, at least 1.
        activation: theirs, its name or a dual activation; weights are at the edge of chaos, without biases.

    Raises:
        ValueError: for an unknown activation or a depth below 1.
    """
    hidden = Sequential((Dense(dual_activation(activation).critical_weight_var), Activation(activation)))
    return serial(Dense(), Activation("rbf"), Repeated(hidden, count("depth", depth)), Dense())


def _checked(name: str, layers: Sequence[Layer]) -> tuple[Layer, ...]:
    layers = tuple(layers)
    if not layers:
        raise ValueError(f"{name} must be at least one layer, found none")
    for index, layer in enumerate(layers):
        if isinstance(layer, type) or not isinstance(layer, Layer):
            raise TypeError(f"{name} must be layers of an architecture, found {layer!r} at {index}")
    return layers


def _shares(layers: Sequence[Layer], variances: Variances) -> list[Variances]:
    """Each layer's own variances."""
    parts, start = [], 0
    for layer in layers:
        end = start + len(layer.variances())
        parts.append(variances[start:end])
        start = end
    return parts


def _outputs(branches: Sequence[Layer], covariance: Covariance, variances: Variances) -> list[Covariance]:
    parts = _shares(branches, variances)
    return [branch.propagate(covariance, own) for branch, own in zip(branches, parts, strict=True)]


def _added(outputs: Sequence[Covariance]) -> Covariance:
    return reduce(lambda left, right: _combined(left, right, torch.add), outputs)


def _combined(left: Covariance, right: Covariance, operation: Callable[[Tensor, Tensor], Tensor]) -> Covariance:
    kinds = [(each.num_positions, each.pairs) for each in (left, right)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            "branches must end alike: found one whose outputs have positions beside one whose outputs have none"
        )
    sizes = [tuple(each.first.shape[each.first.dim() - each.num_trailing :]) for each in (left, right)]
    if sizes[0] != sizes[1]:
        here, there = (size[:: 2 if left.pairs else 1] for size in sizes)
        raise ValueError(f"branches must end with the same positions, found {here} beside {there}")
    left = left.replace(gaussian=left.gaussian and right.gaussian)
    between = operation(left.between, right.between)
    tangent = None
    if left.tangent is not None and right.tangent is not None:
        tangent = operation(left.tangent, right.tangent)
    if left.itself:
        return left.replace(between=between, first=between, second=between, tangent=tangent)
    first, second = operation(left.first, right.first), operation(left.second, right.second)
    return left.replace(between=between, first=first, second=second, tangent=tangent)
