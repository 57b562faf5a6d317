r"""GPyTorch kernels of infinitely wide networks: the covariance of their outputs, and the tangent kernel of their training.

The NNGP kernel is the covariance of a network's outputs under its prior as its layers become infinitely wide (Neal 1996; Lee
et al. 2018; Matthews et al. 2018). The neural tangent kernel :math:`\Theta(x, x') = E[\nabla_\theta f(x) \cdot
\nabla_\theta f(x')]` in the NTK parameterisation governs its training by gradient flow (Jacot et al. 2018).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpytorch.constraints import GreaterThan, Interval, Positive
from gpytorch.kernels import Kernel
from gpytorch.priors import Prior
from torch import Tensor

from bayesnn.processes.architectures import Layer, mlp, needs_graphs, needs_pairs, of_each_with_itself, of_inputs
from bayesnn.processes.architectures.covariance import Covariance
from bayesnn.processes.architectures.graphs import unflattened, with_adjacency
from bayesnn.processes.dual_activations import DualActivation
from bayesnn.processes.dual_activations.base import at_least_zero
from bayesnn.processes.kernels.blocks import blockwise, by_rows


class NonNegative(GreaterThan):
    """At least 0, which a positive constraint can't begin at: the parameter itself, cut off."""

    def __init__(self) -> None:
        super().__init__(0.0, transform=at_least_zero, inv_transform=torch.clone)


class InfiniteWidthKernel(Kernel):
    r"""What :class:`NNGPKernel` and :class:`NTKKernel` share.

    The inputs' products are over the channels, :math:`\frac1d \sum_i x_i x'_i / \ell_i^2` for vectors of d entries, whose
    lengthscales give the first layer a weight variance for each input. The diagonal is exact, and gradients with respect to
    inputs and parameters are finite at coincident points as elsewhere; they are of first order only. Inputs of about zero
    mean and unit variance suit the defaults. Correlations tend to 1 with the depth, and the matrix towards singular: float64
    is advised.

    Args:
        depth: hidden layers of a multilayer perceptron; 3.
        activation: its activation; "relu".
        architecture: any other network, in place of those two.
        input_shape: (channels, *positions) of inputs that aren't vectors, which come as rows of channels * positions numbers:
            (3, 32, 32) for images. Where each input has a graph of its own (``Aggregate()``), the rows of its adjacency matrix
            follow.
        per_layer: whether each layer has variances of its own; by default all share one pair, if they begin as equals.
        weight_var_prior: a prior over the weight variances.
        weight_var_constraint: default positive; they begin where the architecture says, which for a perceptron is at the edge
            of chaos (Poole et al. 2016). A constraint of your own starts at its ``initial_value``, as everywhere in GPyTorch.
        bias_var_prior: likewise for the bias variances.
        bias_var_constraint: likewise for the bias variances, which begin at 0.1 in a perceptron.
        lengthscale_constraint: likewise for the lengthscales; the default starts at 1.
        **kwargs: ``ard_num_dims``, ``batch_shape``, ``active_dims``, ``lengthscale_prior``, as for every GPyTorch kernel.

    Attributes:
        weight_var: :math:`\sigma_w^2`, (*batch_shape, 1), or (*batch_shape, L) for each of L layers with weights; can be set.
        bias_var: :math:`\sigma_b^2`, likewise.

    Raises:
        ValueError: if depth isn't a positive integer, there is no such activation, or the architecture has no weights; in an
            evaluation, if inputs don't have the input shape or outputs have positions.
        TypeError: if a prior isn't a GPyTorch prior, or the architecture isn't a layer.
    """

    has_lengthscale = True
    tangent: bool

    def __init__(
        self,
        depth: int = 3,
        activation: str | DualActivation = "relu",
        architecture: Layer | None = None,
        input_shape: Sequence[int] | None = None,
        per_layer: bool = False,
        weight_var_prior: Prior | None = None,
        weight_var_constraint: Interval | None = None,
        bias_var_prior: Prior | None = None,
        bias_var_constraint: Interval | None = None,
        lengthscale_constraint: Interval | None = None,
        **kwargs: Any,
    ) -> None:
        architecture = mlp(depth, activation) if architecture is None else architecture
        if isinstance(architecture, type) or not isinstance(architecture, Layer):
            raise TypeError(
                f"architecture must be a layer, such as serial(Dense(), Activation()), found {architecture!r}"
            )
        if not architecture.variances():
            raise ValueError("architecture must have a layer with weights, such as Dense, found none")
        super().__init__(lengthscale_constraint=lengthscale_constraint or Positive(initial_value=1.0), **kwargs)
        self.architecture, self.input_shape = architecture, None if input_shape is None else checked_shape(input_shape)
        weight_vars, bias_vars = (list(values) for values in zip(*architecture.variances(), strict=True))
        self.num_layers = len(weight_vars)
        per_layer = per_layer or len(set(weight_vars)) > 1 or len(set(bias_vars)) > 1
        self._add_variances("weight_var", weight_vars, per_layer, weight_var_prior, weight_var_constraint)
        self._add_variances("bias_var", bias_vars, per_layer, bias_var_prior, bias_var_constraint)

    def _add_variances(
        self, name: str, values: list[float], per_layer: bool, prior: Prior | None, constraint: Interval | None
    ) -> None:
        size = len(values) if per_layer else 1
        self.register_parameter(f"raw_{name}", torch.nn.Parameter(torch.zeros(*self.batch_shape, size)))
        positive = Positive() if min(values) > 0 else NonNegative()
        self.register_constraint(f"raw_{name}", constraint or positive)
        if constraint is None:
            initial = torch.tensor(values[:size]).expand(*self.batch_shape, size)
            self.initialize(**{f"raw_{name}": positive.inverse_transform(initial)})
        if prior is not None:
            if not isinstance(prior, Prior):
                raise TypeError(f"{name}_prior: found {type(prior).__name__}, want a gpytorch.priors.Prior.")
            self.register_prior(f"{name}_prior", prior, name)

    @property
    def is_stationary(self) -> bool:
        """False: the kernel depends on where the inputs are, not on their difference alone."""
        return False

    @property
    def weight_var(self) -> Tensor:
        """The variances of the weights, times the fan-in."""
        return self.raw_weight_var_constraint.transform(self.raw_weight_var)

    @weight_var.setter
    def weight_var(self, value: Tensor | float) -> None:
        self._set("weight_var", value)

    @property
    def bias_var(self) -> Tensor:
        """The variances of the biases."""
        return self.raw_bias_var_constraint.transform(self.raw_bias_var)

    @bias_var.setter
    def bias_var(self, value: Tensor | float) -> None:
        self._set("bias_var", value)

    def _set(self, name: str, value: Tensor | float) -> None:
        value = torch.as_tensor(value, dtype=self.dtype, device=self.device)
        if not bool((value >= 0).all()) or value.shape[-1:] not in ((), (1,), getattr(self, name).shape[-1:]):
            size = getattr(self, name).shape[-1]
            raise ValueError(f"{name} must be {size} number(s) of at least 0, found {value.tolist()}")
        constraint = getattr(self, f"raw_{name}_constraint")
        self.initialize(**{f"raw_{name}": constraint.inverse_transform(value)})

    def forward(
        self, x1: Tensor, x2: Tensor, diag: bool = False, last_dim_is_batch: bool = False, **params: Any
    ) -> Tensor:
        """The kernel of x1 (*batch, n, d) and x2 (*batch, m, d): (*batch, n, m); with ``diag`` of pairs, (*batch, n).

        Raises:
            ValueError: if ``last_dim_is_batch`` is set, which GPyTorch has deprecated; or inputs don't have the input shape.
        """
        if last_dim_is_batch:
            raise ValueError("last_dim_is_batch: found True; GPyTorch deprecates it, add kernels with active_dims.")

        def own(covariance: Covariance) -> Tensor:
            kernel = covariance.tangent if self.tangent else covariance.between
            assert kernel is not None
            return kernel

        return self._evaluate(x1, x2, diag, own, self.tangent)

    def nngp_and_ntk(self, x1: Tensor, x2: Tensor | None = None, diag: bool = False) -> tuple[Tensor, Tensor]:
        """Both kernels at these variances and lengthscales, each as :meth:`forward` gives it."""

        def both(covariance: Covariance) -> Tensor:
            assert covariance.tangent is not None
            return torch.stack([covariance.between, covariance.tangent])

        nngp, ntk = self._evaluate(x1, x1 if x2 is None else x2, diag, both, True).unbind(0)
        return nngp, ntk

    def _evaluate(
        self, x1: Tensor, x2: Tensor, diag: bool, read: Callable[[Covariance], Tensor], tangent: bool
    ) -> Tensor:
        pairs, graphs = needs_pairs(self.architecture), needs_graphs(self.architecture)
        shape = self.input_shape or x1.shape[-1:]
        num_positions = len(shape) - 1

        def inputs(rows: Tensor, lengthscale: Tensor) -> tuple[Tensor, Tensor | None]:
            x, adjacency = unflattened(rows, shape, graphs)
            scaled = x.flatten(-1 - num_positions) / lengthscale
            return scaled.unflatten(-1, shape), adjacency

        def propagate(covariance: Covariance, weight_var: Tensor, bias_var: Tensor) -> Tensor:
            layers = range(self.num_layers)
            weights, biases = (
                list(v.expand(*v.shape[:-1], self.num_layers).unbind(-1)) for v in (weight_var, bias_var)
            )
            outputs = self.architecture.propagate(covariance, [(weights[i], biases[i]) for i in layers])
            if outputs.num_positions:
                raise ValueError(
                    f"architecture must end with vectors, found outputs with {outputs.num_positions} dimension(s) of "
                    "positions: put Flatten or global pooling, and Dense, at its end"
                )
            return read(outputs)

        def block(x1: Tensor, x2: Tensor, weight_var: Tensor, bias_var: Tensor, lengthscale: Tensor) -> Tensor:
            (first, adjacency1), (second, adjacency2) = (inputs(x, lengthscale) for x in (x1, x2))
            covariance = of_inputs(first, second, num_positions, pairs, tangent)
            if adjacency1 is not None:
                covariance = with_adjacency(covariance, adjacency1, adjacency2)
            return propagate(covariance, weight_var, bias_var)

        def itself(x1: Tensor, x2: Tensor) -> Tensor:
            (first, adjacency), (second, _) = (inputs(x, self.lengthscale) for x in (x1, x2))
            own = of_each_with_itself(first, second, num_positions, pairs, tangent)
            own = own if adjacency is None else with_adjacency(own, adjacency)
            return propagate(own, self.weight_var, self.bias_var).squeeze(-1)

        # Between positions, outputs aren't symmetric in the two tensors, so that these can't share their gradients.
        apart = pairs and x1 is not x2 and (x1.requires_grad or x2.requires_grad)
        equal = x1 is x2 or (not apart and x1.shape == x2.shape and torch.equal(x1, x2))
        parameters = self.weight_var, self.bias_var, self.lengthscale
        size = math.prod(shape[1:]) ** (2 if pairs else 1)

        def each(x1: Tensor, x2: Tensor) -> Tensor:  # a pair is a matrix of one entry
            values = block(x1.unsqueeze(-2), x2.unsqueeze(-2), *(value.unsqueeze(-2) for value in parameters))
            return values.squeeze(-1).squeeze(-1)

        if diag:
            return by_rows(itself if equal else each, x1, x2, size)
        diagonal = by_rows(itself, x1, x2, size) if equal else None
        return blockwise(block, x1, x2, *parameters, entries=size, diagonal=diagonal)


def checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """(channels, *positions).

    Raises:
        ValueError: unless they are positive integers.
    """
    if not isinstance(shape, Sequence) or not shape or any(type(size) is not int or size < 1 for size in shape):
        raise ValueError(f"input_shape must be (channels, *positions), positive integers, found {shape!r}")
    return tuple(shape)


class NNGPKernel(InfiniteWidthKernel):
    r"""The covariance of an infinitely wide network's outputs under its prior; of a multilayer perceptron by default,

    .. math::
        K^0(x, x') = \sigma_w^2 \frac{1}{d} \sum_i \frac{x_i x'_i}{\ell_i^2} + \sigma_b^2, \qquad
        K^{l+1} = \sigma_w^2\, \kappa(K^l) + \sigma_b^2, \qquad l = 0, \ldots, \text{depth} - 1,

    where :math:`\kappa(K^l)(x, x') = E[\phi(u) \phi(v)]` for :math:`(u, v)` Gaussian with zero mean and the covariance
    :math:`K^l` of the pair (Lee et al. 2018, eq. 4-6). Arguments, attributes and errors are those of
    :class:`InfiniteWidthKernel`.
    """

    tangent = False


class NTKKernel(InfiniteWidthKernel):
    r"""The neural tangent kernel of an infinitely wide network, NTK parameterisation; of a multilayer perceptron by default,

    .. math::
        \Theta^0 = K^0, \qquad \Theta^{l+1} = K^{l+1} + \sigma_w^2\, \dot\kappa(K^l)\, \Theta^l,

    with the NNGP kernels :math:`K^l` and :math:`\dot\kappa(K^l)(x, x') = E[\phi'(u) \phi'(v)]` (Jacot et al. 2018, theorem 1).
    Arguments, attributes and errors are those of :class:`InfiniteWidthKernel`.
    """

    tangent = True
