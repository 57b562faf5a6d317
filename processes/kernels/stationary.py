r"""The covariance of an infinitely wide network over random Fourier features whose weights have known variances.

The features' correlation :math:`c = \exp(-\frac{\sigma_w^2}{d} \sum_i (x_i - x'_i)^2 / \ell_i^2)` is all that depends on the
inputs (Rahimi and Recht 2007), and each layer above takes a function of it (Lee et al. 2018, eq. 5) with a known derivative:

.. math::
    K^l = \sigma_w^2\, \kappa(K^{l-1}) + \sigma_b^2, \qquad
    \frac{\partial K^l}{\partial K^{l-1}} = \sigma_w^2\, \dot\kappa(K^{l-1}).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bayesnn.processes.architectures import fourier_mlp
from bayesnn.processes.dual_activations import DualActivation, dual_activation
from bayesnn.processes.kernels.blocks import blockwise
from bayesnn.processes.kernels.infinite_width import NNGPKernel


class FourierNNGPKernel(NNGPKernel):
    """An :class:`NNGPKernel` of :func:`fourier_mlp`, with all weights' and biases' variances held fixed.

    The lengthscales are all that is learned, and the kernel is stationary. It is what the general kernel of that architecture
    is, at less than half the cost: one function of one correlation, forwards and backwards. Where variances are set free
    (``requires_grad_``), it is the general kernel.

    Args:
        depth: hidden layers above the features.
        activation: its name, or a dual activation.
        **kwargs: as for :class:`NNGPKernel`.
    """

    def __init__(self, depth: int = 1, activation: str | DualActivation = "gelu", **kwargs: Any) -> None:
        super().__init__(architecture=fourier_mlp(depth, activation), **kwargs)
        self.activation = dual_activation(activation)
        for parameter in self._raw:
            parameter.requires_grad_(False)
        self._known: tuple[object, _Layers] | None = None

    @property
    def _raw(self) -> tuple[Tensor, Tensor]:
        return self.raw_weight_var, self.raw_bias_var

    @property
    def is_stationary(self) -> bool:
        """True: the kernel depends on differences of inputs alone."""
        return True

    def forward(
        self, x1: Tensor, x2: Tensor, diag: bool = False, last_dim_is_batch: bool = False, **params: Any
    ) -> Tensor:
        """As :meth:`InfiniteWidthKernel.forward`."""
        if last_dim_is_batch or any(parameter.requires_grad for parameter in self._raw):
            return super().forward(x1, x2, diag, last_dim_is_batch, **params)
        layers = self._layers()
        scale = (layers.first / x1.shape[-1]).sqrt() / self.lengthscale
        equal = x1 is x2 or (x1.shape == x2.shape and torch.equal(x1, x2))
        if diag and not equal:
            return _covariance(((x1 - x2) * scale).square().sum(-1, keepdim=True), layers).squeeze(-1)
        diagonal = self._diagonal(layers.variance, x1) if equal else None
        if diag:
            assert diagonal is not None
            return diagonal

        def block(x1: Tensor, x2: Tensor, scale: Tensor) -> Tensor:
            return _covariance(_squared_distance(x1 * scale, x2 * scale), layers)

        return blockwise(block, x1, x2, scale, diagonal=diagonal)

    def _diagonal(self, variance: Tensor, x: Tensor) -> Tensor:
        """The variance, for each of x (*batch, n, d)."""
        batch = x.shape[:-2] if not self.batch_shape else torch.broadcast_shapes(x.shape[:-2], self.batch_shape)
        return variance.squeeze(-1).expand(*batch, x.shape[-2])

    def _layers(self) -> _Layers:
        """Of the variances as they are; computed when these have changed, since it costs as much as a small matrix."""
        variances = self.weight_var, self.bias_var
        key = [(values.tolist(), values.dtype, values.device) for values in variances]
        if self._known is None or self._known[0] != key:
            self._known = key, self._of_variances(*variances)
        return self._known[1]

    def _of_variances(self, weight_var: Tensor, bias_var: Tensor) -> _Layers:
        weights, biases = (
            list(values.expand(*values.shape[:-1], self.num_layers)[..., None, None].unbind(-3))
            for values in (weight_var, bias_var)
        )
        variances, variance = [], torch.ones_like(weights[0])  # the features'
        for weight, bias in zip(weights[1:-1], biases[1:-1], strict=True):
            variances.append(weight * variance + bias)
            variance = self.activation.diagonal(variances[-1]).kappa
        return _Layers(
            self.activation, weights[0], weights[1:], biases[1:], variances, weights[-1] * variance + biases[-1]
        )


class _Layers(NamedTuple):
    """What lies above the features, each (*batch, 1, 1).

    Fields:
        activation: of the hidden layers.
        first: the weights' variance below the features.
        weights: above them, of hidden layers and then the last one.
        biases: likewise.
        variances: of the hidden layers' inputs.
        variance: of the output.
    """

    activation: DualActivation
    first: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    variances: list[Tensor]
    variance: Tensor


def _squared_distance(x1: Tensor, x2: Tensor) -> Tensor:
    """(*batch, n, m); about the first rows' mean, where the products are small and round little."""
    centre = x1.detach().mean(-2, keepdim=True) if x1.shape[-2] else 0.0
    x1, x2 = x1 - centre, x2 - centre
    squares = x1.square().sum(-1, keepdim=True) + x2.square().sum(-1).unsqueeze(-2)
    return (squares - 2 * (x1 @ x2.mT)).clamp_min(0)


def _covariance(distance: Tensor, layers: _Layers) -> Tensor:
    values: Tensor = _OfDistance.apply(distance, layers)
    return values


class _OfDistance(torch.autograd.Function):
    """From squared distances to covariances, elementwise."""

    @staticmethod
    def forward(ctx: Any, distance: Tensor, layers: _Layers) -> Tensor:
        values = torch.exp(-distance)
        slope = -values if ctx.needs_input_grad[0] else None
        for weight, bias, variance in zip(layers.weights[:-1], layers.biases[:-1], layers.variances, strict=True):
            inputs = torch.addcmul(bias, weight, values)
            if slope is None:
                values = layers.activation.kappa(variance, variance, inputs)
            else:
                values, derivative = layers.activation.moments(variance, variance, inputs)
                slope = slope * (weight * derivative)
        if slope is not None:
            ctx.save_for_backward(slope * layers.weights[-1])
        return torch.addcmul(layers.biases[-1], layers.weights[-1], values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad * ctx.saved_tensors[0], None
