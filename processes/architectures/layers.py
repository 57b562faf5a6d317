r"""Layers of networks of any width: what each does to covariances as the width grows to infinity.

An architecture is a layer, usually a ``Sequential`` of them. A layer with weights has two variances,

.. math:: f_i(x) = \sum_j \sqrt{\sigma_w^2 / C}\; W_{ij}\, h_j(x) + \sigma_b\, \beta_i, \qquad
    W_{ij}, \beta_i \sim \mathcal N(0, 1),

over the C channels below, so that covariances become :math:`K' = \sigma_w^2 K + \sigma_b^2` and the tangent kernel, for
gradients with respect to W and :math:`\beta`, :math:`\Theta' = K' + \sigma_w^2 \Theta` (Jacot et al. 2018; Lee et al. 2019).
Layers that mix positions are in ``convolutions``, ``attention`` and ``graphs``; ``combinations`` puts layers together, and
``finite`` makes finite networks of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bayesnn.checks import fraction
from bayesnn.configured import Configured
from bayesnn.processes.architectures.covariance import Covariance, at_equal_positions, spread
from bayesnn.processes.dual_activations import DualActivation, dual_activation

Variances = Sequence[tuple[Tensor, Tensor]]
"""Weight and bias variance of each layer with weights, in their order; (*batch) each."""


@runtime_checkable
class Layer(Protocol):
    """What an architecture is made of."""

    def variances(self) -> list[tuple[float, float]]:
        """Default weight and bias variances of all layers with weights within, in their order."""
        ...

    def propagate(self, covariance: Covariance, variances: Variances) -> Covariance:
        """The covariances of its outputs from those of its inputs."""
        ...

    def mixes_positions(self) -> bool:
        """Whether outputs depend on covariances between different positions of an input."""
        ...

    def is_centred(self, centred: bool) -> bool:
        """Whether its outputs have mean zero over the weights within, and those before it if its inputs have ``centred``."""
        ...


def needs_pairs(architecture: Layer) -> bool:
    """Whether its kernels need covariances between different positions of inputs, not only at equal ones."""
    return architecture.mixes_positions()


class Plain(Configured):
    """A layer without weights that takes each position by itself."""

    def variances(self) -> list[tuple[float, float]]:
        """None."""
        return []

    def mixes_positions(self) -> bool:
        """No."""
        return False

    def is_centred(self, centred: bool) -> bool:
        """If its inputs are: it is linear in the limit."""
        return centred


class Weighted(Configured):
    """A layer with weights, which are as often of one sign as of the other."""

    def is_centred(self, centred: bool) -> bool:
        """Always."""
        return True


@dataclass(frozen=True)
class Identity(Plain):
    """What it is given."""

    def propagate(self, covariance: Covariance, variances: Variances) -> Covariance:
        """The same."""
        return covariance


@dataclass(frozen=True)
class Dense(Weighted):
    """A fully connected layer; where inputs have positions, the same one at each of them.

    Args:
        weight_var: over the fan-in.
        bias_var: of the biases.

    Raises:
        ValueError: if a variance is negative.
    """

    weight_var: float = 1.0
    bias_var: float = 0.0

    def __post_init__(self) -> None:
        check_variances(self.weight_var, self.bias_var)

    def variances(self) -> list[tuple[float, float]]:
        """Its own."""
        return [(self.weight_var, self.bias_var)]

    def mixes_positions(self) -> bool:
        """No."""
        return False

    def propagate(self, covariance: Covariance, variances: Variances) -> Covariance:
        """K' = w K + b, Theta' = K' + w Theta."""
        return with_weights(covariance, *variances[0])


def check_variances(weight_var: float, bias_var: float, weights: str = "weight_var") -> None:
    """Raise TypeError if one isn't a number, ValueError if it is negative or not finite."""
    for name, value in ((weights, weight_var), ("bias_var", bias_var)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, found {value!r}")
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be a finite number of at least 0, found {value}")


def with_weights(covariance: Covariance, weight_var: Tensor, bias_var: Tensor) -> Covariance:
    """K' = w K + b, Theta' = K' + w Theta, for K and Theta averaged already over the inputs that share weights."""
    w, b = covariance.broadcast(weight_var), covariance.broadcast(bias_var)
    new = covariance.map(lambda values: _affine(b, w, values), gaussian=True)
    if covariance.tangent is None:
        return new
    return new.replace(tangent=_affine(new.between, w, covariance.tangent))


def _affine(shift: Tensor, weight: Tensor, values: Tensor) -> Tensor:
    """shift + weight * values."""
    result: Tensor = _Affine.apply(shift, weight, values)
    return result


class _Affine(torch.autograd.Function):
    """The weight's gradient is a sum of products, for which torch would write all the products down."""

    @staticmethod
    def forward(ctx: Any, shift: Tensor, weight: Tensor, values: Tensor) -> Tensor:
        ctx.shift = shift.shape
        ctx.save_for_backward(weight, values)
        return torch.addcmul(shift, weight, values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, values = ctx.saved_tensors
        needs_shift, needs_weight, needs_values = ctx.needs_input_grad
        to_weight = None
        if needs_weight and weight.numel() == 1 and grad.shape == values.shape:
            to_weight = torch.dot(grad.flatten(), values.flatten()).reshape(weight.shape)
        elif needs_weight:
            to_weight = (grad * values).sum_to_size(weight.shape)
        return (
            grad.sum_to_size(ctx.shift) if needs_shift else None,
            to_weight,
            (grad * weight).sum_to_size(values.shape) if needs_values else None,
        )


@dataclass(frozen=True)
class Activation(Plain):
    """An elementwise function.

    Args:
        function: its name, or a dual activation.

    Raises:
        ValueError: for an unknown name.
    """

    function: str | DualActivation = "relu"

    def __post_init__(self) -> None:
        dual_activation(self.function)

    def is_centred(self, centred: bool) -> bool:
        """If its inputs are and it is odd."""
        return centred and dual_activation(self.function).is_odd

    def propagate(self, covariance: Covariance, variances: Variances) -> Covariance:
        """K' = kappa(K), Theta' = kappa_dot(K) Theta.

        Raises:
            ValueError: if no layer with weights makes its inputs Gaussian.
        """
        if not covariance.gaussian:
            raise ValueError(
                "Activation needs a layer with weights between it and the inputs, the activation, Flatten, Concatenation or "
                "Dropout before it: only Gaussian channels of one variance have a known covariance after it"
            )
        covariance = covariance.replace(gaussian=False)
        dual = dual_activation(self.function)
        if covariance.pairs:
            return _at_pairs(dual, covariance)
        if covariance.itself:
            own = dual.diagonal(covariance.first)
            tangent = None if covariance.tangent is None else own.kappa_dot * covariance.tangent
            return covariance.replace(between=own.kappa, first=own.kappa, second=own.kappa, tangent=tangent)
        first, second = dual.diagonal(covariance.first).kappa, dual.diagonal(covariance.second).kappa
        if covariance.tangent is None:
            kappa = dual.kappa(covariance.first, covariance.second, covariance.between)
            return covariance.replace(between=kappa, first=first, second=second)
        kappa, kappa_dot = dual.moments(covariance.first, covariance.second, covariance.between)
        return covariance.replace(between=kappa, first=first, second=second, tangent=kappa_dot * covariance.tangent)


def _at_pairs(dual: DualActivation, covariance: Covariance) -> Covariance:
    """Of pairs of positions: their variances are on the diagonals of each input's covariance with itself."""
    num = covariance.num_positions
    variance1 = at_equal_positions(covariance.first, num)
    variance2 = at_equal_positions(covariance.second, num)

    def own(variance: Tensor, values: Tensor) -> Tensor:
        kappa = dual.kappa(spread(variance, num, 0), spread(variance, num, 1), values)
        return torch.where(_equal(values, num), spread(dual.diagonal(variance).kappa, num, 0), kappa)

    first = own(variance1, covariance.first)
    if not covariance.itself:
        second = own(variance2, covariance.second)
        arguments = spread(variance1, num, 0), spread(variance2, num, 1), covariance.between
        if covariance.tangent is None:
            return covariance.replace(between=dual.kappa(*arguments), first=first, second=second)
        kappa, kappa_dot = dual.moments(*arguments)
        return covariance.replace(between=kappa, first=first, second=second, tangent=kappa_dot * covariance.tangent)
    tangent = covariance.tangent
    if tangent is not None:
        kappa_dot = dual.moments(spread(variance1, num, 0), spread(variance1, num, 1), covariance.first).kappa_dot
        exact = spread(dual.diagonal(variance1).kappa_dot, num, 0)
        tangent = torch.where(_equal(tangent, num), exact, kappa_dot) * tangent
    return covariance.replace(between=first, first=first, second=first, tangent=tangent)


def _equal(values: Tensor, num_positions: int) -> Tensor:
    """Where both positions of a pair (h, h', w, w') are the same."""
    sizes = values.shape[values.dim() - 2 * num_positions :: 2]
    equal = torch.ones((), dtype=torch.bool, device=values.device)
    for index, size in enumerate(sizes):
        eye = torch.eye(size, dtype=torch.bool, device=values.device)
        equal = equal & eye.reshape(*eye.shape, *([1] * (2 * (num_positions - index - 1))))
    return equal


@dataclass(frozen=True)
class LayerNorm(Plain):
    """Normalise over channels, at each position, without trained scales: K' = K / sqrt(K_11 K_22).

    After a layer with weights, the mean over channels vanishes as the width grows, so that it makes no difference whether it
    is subtracted. Elsewhere it does: here it isn't.

    Args:
        epsilon: added to the variances, as in a finite network, where it keeps an input of zeros from dividing by zero.
    """

    epsilon: float = 1e-12

    def __post_init__(self) -> None:
        check_variances(self.epsilon, 0.0, "epsilon")

    def propagate(self, covariance: Covariance, variances: Variances) -> Covariance:
        """K and Theta over both standard deviations."""
        num = covariance.num_positions if covariance.pairs else 0
        inverse1 = (at_equal_positions(covariance.first, num) + self.epsilon).rsqrt()
        inverse2 = (at_equal_positions(covariance.second, num) + self.epsilon).rsqrt()
        here1, there1 = spread(inverse1, num, 0), spread(inverse1, num, 1)
        here2, there2 = spread(inverse2, num, 0), spread(inverse2, num, 1)
        tangent = covariance.tangent
        return covariance.replace(
            between=covariance.between * here1 * there2,
            first=covariance.first * here1 * there1,
            second=covariance.second * here2 * there2,
            tangent=None if tangent is None else tangent * here1 * there2,
        )


@dataclass(frozen=True)
class Dropout(Plain):
    """Dropout at training time with inverse scaling: each input's covariance with itself becomes K / keep.

    Two evaluations of one input draw different masks, so that only the variances that later layers see change; in
    ``K(x, x)`` the masks are the same. (Neural Tangents treats it in the same way.)

    Args:
        keep: the probability that a unit is kept.

    Raises:
        ValueError: if it isn't in (0, 1].
    """

    keep: float = 1.0

    def __post_init__(self) -> None:
        fraction("keep", self.keep, interval="(0, 1]")

    def propagate(self, covariance: Covariance, variances: Variances) -> Covariance:
        """Variances over ``keep``; between positions, masks are independent."""

        def own(values: Tensor) -> Tensor:
            if not covariance.pairs:
                return values / self.keep
            return torch.where(_equal(values, covariance.num_positions), values / self.keep, values)

        gaussian = covariance.gaussian and self.keep == 1
        if covariance.itself:
            first, tangent = own(covariance.first), covariance.tangent
            tangent = None if tangent is None else own(tangent)
            return covariance.replace(between=first, first=first, second=first, tangent=tangent, gaussian=gaussian)
        return covariance.replace(first=own(covariance.first), second=own(covariance.second), gaussian=gaussian)


@dataclass(frozen=True)
class Flatten(Plain):
    """All positions' channels as one vector: the mean of the covariances at equal positions."""

    def propagate(self, covariance: Covariance, variances: Variances) -> Covariance:
        """Covariances of vectors."""
        num = covariance.num_positions
        dims = list(range(-num, 0))

        def mean(values: Tensor) -> Tensor:
            values = at_equal_positions(values, num) if covariance.pairs else values
            return values.mean(dims) if num else values

        gaussian = covariance.gaussian and num == 0
        return covariance.map(mean, num_positions=0, pairs=False, gaussian=gaussian)
