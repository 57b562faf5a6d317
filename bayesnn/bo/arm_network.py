r"""A small network from contexts to the arms' values that gives each arm's gradient without building it.

Rows are contexts with a 1 appended. With :math:`n_l` inputs of layer l,

.. math:: f(\theta; x) = \frac{1}{\sqrt{n_L}} W_L\, a_L, \qquad
    a_{l+1} = \tanh\!\big(\tfrac{1}{\sqrt{n_l}} W_l a_l\big), \qquad a_0 = (x, 1),

the scaling of the theory of wide networks, so that step sizes and distances don't depend on the width. The weights are
one vector :math:`\theta`. The gradient of an output by a weight matrix is an outer product
:math:`s_l a_l^\top / \sqrt{n_l}`; its elementwise square is one too, so that sums over all weights cost no more than a
pass through the network.

tanh is smooth, which Deb et al. ask for. Hidden layers have no biases, as theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Pass(NamedTuple):
    """Outputs (N, out), layers' inputs (N, in) divided by sqrt(in), and the hidden layers' derivatives (N, width)."""

    outputs: Tensor
    inputs: list[Tensor]
    slopes: list[Tensor]


class ArmNetwork:
    """The network's shape; its weights are an argument.

    Args:
        in_features: columns of a row.
        out_features: values of a row.
        hidden: widths of the hidden layers, the last one even (see :meth:`initial`); () for a linear model.
    """

    def __init__(self, in_features: int, out_features: int, hidden: Sequence[int]) -> None:
        self.shapes = [(fan_out, fan_in) for fan_in, fan_out in pairwise([in_features + 1, *hidden, out_features])]
        self.sizes = [fan_out * fan_in for fan_out, fan_in in self.shapes]
        self.num_parameters, self.width = sum(self.sizes), self.shapes[-1][1]

    def initial(self, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """Standard normal weights (p,) with which every output is 0.

        The last hidden units come in pairs of the same weights, and go out with opposite signs: all of the network's
        gradient at no prediction yet (Zhou et al. 2020, section 3). A linear model starts at 0.
        """
        if len(self.shapes) == 1:
            return torch.zeros(self.num_parameters, dtype=dtype)
        *lower, before, last = [torch.randn(shape, generator=generator, dtype=dtype) for shape in self.shapes]
        half = before.shape[0] // 2
        before[half:], last[:, half:] = before[:half], -last[:, :half]
        return torch.cat([weight.flatten() for weight in (*lower, before, last)])

    def weights(self, theta: Tensor) -> list[Tensor]:
        """Views of the vector as matrices."""
        return [part.view(shape) for part, shape in zip(theta.split(self.sizes), self.shapes, strict=True)]

    def run(self, theta: Tensor, X: Tensor) -> Pass:
        """Rows (N, in_features) through the network."""
        value, inputs, slopes = torch.cat([X, X.new_ones(X.shape[0], 1)], -1), [], []
        weights = self.weights(theta)
        for index, weight in enumerate(weights):
            inputs.append(value / weight.shape[1] ** 0.5)
            value = inputs[-1] @ weight.T
            if index < len(weights) - 1:
                value = value.tanh()
                slopes.append(1 - value.square())
        return Pass(value, inputs, slopes)

    def signals(self, theta: Tensor, passed: Pass, cotangents: Tensor) -> list[Tensor]:
        """The derivatives of weighted outputs by each layer's values: cotangents (N, C, out) -> [(N, C, width)]."""
        found = [cotangents]
        for weight, slope in zip(reversed(self.weights(theta)[1:]), reversed(passed.slopes), strict=True):
            found.append((found[-1] @ weight) / weight.shape[1] ** 0.5 * slope.unsqueeze(-2))
        return found[::-1]

    def gradient(self, theta: Tensor, passed: Pass, cotangents: Tensor) -> Tensor:
        """The gradient (p,) of the outputs weighted by cotangents (N, out) and summed."""
        signals = self.signals(theta, passed, cotangents.unsqueeze(-2))
        pairs = zip(signals, passed.inputs, strict=True)
        return torch.cat([(signal.squeeze(-2).T @ value).flatten() for signal, value in pairs])

    def squared_gradient(self, theta: Tensor, passed: Pass, cotangents: Tensor) -> Tensor:
        """The elementwise square (p,) of each row's gradient of its weighted outputs (N, out), summed over rows."""
        signals = self.signals(theta, passed, cotangents.unsqueeze(-2))
        pairs = zip(signals, passed.inputs, strict=True)
        return torch.cat([(signal.squeeze(-2).square().T @ value.square()).flatten() for signal, value in pairs])

    def weighted_norms(self, theta: Tensor, passed: Pass, cotangents: Tensor, scales: Tensor) -> Tensor:
        """The sums over weights j of scale_j g_j^2 for gradients g of weighted outputs: (N, C, out), (p,) -> (N, C)."""
        signals = self.signals(theta, passed, cotangents)
        terms = [
            ((signal.square() @ scale) * value.square().unsqueeze(-2)).sum(-1)
            for signal, scale, value in zip(signals, self.weights(scales), passed.inputs, strict=True)
        ]
        return torch.stack(terms).sum(0)
