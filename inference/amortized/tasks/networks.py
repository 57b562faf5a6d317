"""Functions that random networks compute: a prior of steps, kinks and waves beside the smoothness of Gaussian processes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesnn.checks import check_fields, count, positive_range
from bayesnn.configured import Configured
from bayesnn.inference.amortized.tasks.base import Draws, Process, TaskBatch, draw_inputs
from bayesnn.inference.amortized.tasks.covariances import reference_inputs

ACTIVATIONS = (torch.tanh, torch.relu, torch.sin, torch.sign)


@dataclass(frozen=True)
class BNNTasks(Configured):
    r"""Regression on a random multilayer perceptron.

    The number of features is uniform in 1..``max_features``; inputs are those of ``draw_inputs``. A network has 1 to
    ``max_depth`` hidden layers of 2 to ``max_width`` units and one activation: tanh, ReLU, sine or sign. Weights are
    :math:`N(0, g^2 / \mathrm{fan\ in})` with a gain g, log-uniform over ``gain_range``, of each network, biases
    :math:`N(0, 1)`; in half of the networks each weight is absent with a probability uniform in (0, 0.8). The function is
    the network's, standardised over reference inputs (but its deviations are enlarged by 5 at most); the noise's standard
    deviation is log-uniform over ``noise_range``.

    Attributes:
        max_features: width of X.
        max_depth: most hidden layers.
        max_width: most units of a layer.
        gain_range: least and largest gain.
        noise_range: least and largest noise standard deviation.

    Depth, width and sparsity drawn anew for each task follow Müller et al., PFNs4BO (ICML 2023); the ranges are ours, of
    smaller networks.
    """

    max_features: int = 10
    max_depth: int = 3
    max_width: int = 48
    gain_range: tuple[float, float] = (0.8, 3.0)
    noise_range: tuple[float, float] = (0.01, 0.5)

    def __post_init__(self) -> None:
        check_fields(self, count, "max_features", "max_depth")
        check_fields(self, count, "max_width", least=2)
        check_fields(self, positive_range, "gain_range", "noise_range")

    def __call__(self, batch_size: int, num_points: int, generator: torch.Generator) -> TaskBatch:
        """Draw ``batch_size`` tasks of ``num_points`` points, in float64."""
        draw = Draws(batch_size, generator)
        num_features = 1 + draw.integers(self.max_features)
        used = (torch.arange(self.max_features, device=num_features.device) < num_features[:, None]).double()
        X = draw_inputs(draw, num_points, self.max_features) * used[:, None, :]
        reference = reference_inputs(self.max_features).to(X) * used[:, None, :]
        values = self._network(draw, torch.cat([X, reference], 1), num_features.double())
        at_reference = values[:, num_points:]
        spread = at_reference.std(1, correction=0, keepdim=True)
        f = (values[:, :num_points] - at_reference.mean(1, keepdim=True)) / spread.clamp_min(0.2)
        low, high = (math.log(bound) for bound in self.noise_range)
        noise_std = (low + (high - low) * draw.uniform(1, 1)).exp()
        process = Process(f, f.new_zeros(batch_size, num_points, num_points), noise_std[:, 0, 0])
        return TaskBatch(X, f + noise_std * draw.normal(num_points, 1), f, num_features, process)

    def _network(self, draw: Draws, X: Tensor, num_features: Tensor) -> Tensor:
        """Outputs (B, N, 1), all networks of a batch at once: missing units have no weight, missing layers are passed by."""
        width = 2 + draw.integers(self.max_width - 1)
        depth = 1 + draw.integers(self.max_depth)
        kind = draw.integers(len(ACTIVATIONS), 1, 1)
        low, high = (math.log(bound) for bound in self.gain_range)
        gain = (low + (high - low) * draw.uniform(1, 1)).exp()
        absent = torch.where(draw.uniform(1, 1) < 0.5, 0.8 * draw.uniform(1, 1), torch.zeros_like(gain))
        units = torch.arange(self.max_width, device=X.device) < width[:, None]
        hidden, fan_in, inputs = X, num_features, self.max_features
        for layer in range(self.max_depth):
            weights = draw.normal(inputs, self.max_width) * (draw.uniform(inputs, self.max_width) >= absent)
            scale = gain / (fan_in[:, None, None] * (1 - absent)).sqrt()
            pre = hidden @ (weights * scale) + draw.normal(1, self.max_width)
            new = torch.stack([activation(pre) for activation in ACTIVATIONS]).gather(0, kind.expand(pre.shape)[None])[
                0
            ]
            new = new * units[:, None, :]
            if layer == 0:
                hidden = new
            else:
                hidden = torch.where((layer < depth)[:, None, None], new, hidden)
            fan_in, inputs = width.double(), self.max_width
        return hidden @ draw.normal(self.max_width, 1) / width.double().sqrt()[:, None, None]
