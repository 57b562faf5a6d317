"""Tables whose columns and classes are nodes of one random causal network."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesnn.checks import check_fields, count
from bayesnn.configured import Configured
from bayesnn.inference.amortized.tasks.base import Draws, TaskBatch

ACTIVATIONS = (torch.tanh, torch.relu, torch.sin, torch.abs, torch.sign)


@dataclass(frozen=True)
class CausalTasks(Configured):
    r"""Classification of rows that a structural causal model generates.

    Causes :math:`z \sim N(0, 1)`, mostly few of them, feed a random network of 1 to ``max_depth`` layers of 2 to ``max_width``
    nodes. Each node is an activation (tanh, ReLU, sine, absolute value or sign, one for each layer) of a weighted sum of the
    nodes before, with a gain log-uniform over (1, 4), plus noise of a standard deviation log-uniform over (0.001, 0.3); in
    half of the tasks each edge is absent with a probability uniform in (0, 0.8). The features are nodes anywhere in
    the network, drawn without replacement, so that they may be causes or effects of the class, or neither; the class is a
    node of the last layer, cut into 2 to ``max_classes`` intervals at random ranks, whose labels are then shuffled. A fifth of
    the features are cut into 2 to 9 steps, as categories are.

    X is standardised over the task. ``TaskBatch.f`` is None.

    Attributes:
        max_features: width of X; the number of features is uniform in 1..``max_features``.
        max_classes: most classes.
        max_depth: most layers.
        max_width: most nodes of a layer.

    Source: the idea is that of Hollmann et al., TabPFN (ICLR 2023), section 4; the ranges are ours, of smaller networks.
    """

    max_features: int = 20
    max_classes: int = 5
    max_depth: int = 3
    max_width: int = 12

    def __post_init__(self) -> None:
        check_fields(self, count, "max_features", "max_depth")
        check_fields(self, count, "max_classes", "max_width", least=2)
        most = (1 + self.max_depth) * self.max_width - 1
        if self.max_features > most:
            raise ValueError(f"max_features must be at most {most}, the number of nodes, got {self.max_features}")

    def __call__(self, batch_size: int, num_points: int, generator: torch.Generator) -> TaskBatch:
        """Draw ``batch_size`` tasks of ``num_points`` rows; X in float64, labels as whole numbers in float64."""
        draw = Draws(batch_size, generator)
        nodes, real, last = self._nodes(draw, num_points)
        # The class's node is taken from the last layer; features are drawn from all others.
        order = torch.where(real, draw.uniform(real.shape[-1]), torch.full_like(real, 2, dtype=nodes.dtype))
        target = torch.where(last, order, torch.full_like(order, 3)).argmin(-1, keepdim=True)
        columns = order.scatter(-1, target, 4.0).argsort(-1)[:, : self.max_features]
        available = (real.sum(-1) - 1).clamp(1, self.max_features)
        num_features = 1 + (draw.uniform() * available).long().clamp_max(available - 1)
        used = torch.arange(self.max_features, device=nodes.device) < num_features[:, None]
        X = nodes.gather(-1, columns[:, None, :].expand(-1, num_points, -1))
        X = self._steps(draw, X)
        X = (X - X.mean(1, keepdim=True)) / X.std(1, correction=0, keepdim=True).clamp_min(1e-6)
        score = nodes.gather(-1, target[:, None, :].expand(-1, num_points, -1))[..., 0]
        y = self._labels(draw, score)
        return TaskBatch(X * used[:, None, :], y.unsqueeze(-1), None, num_features)

    def _nodes(self, draw: Draws, num_points: int) -> tuple[Tensor, Tensor, Tensor]:
        """Values (B, N, (1 + L) W) of all nodes, which of them exist, and which are of the last layer."""
        W, L = self.max_width, self.max_depth
        width = 2 + draw.integers(W - 1)
        depth = 1 + draw.integers(L)
        exists = torch.arange(W, device=width.device) < width[:, None]
        low, high = math.log(0.001), math.log(0.3)
        noise_std = (low + (high - low) * draw.uniform(1, 1)).exp()
        absent = torch.where(draw.uniform(1, 1) < 0.5, 0.8 * draw.uniform(1, 1), torch.zeros_like(noise_std))
        gain = torch.exp(math.log(4.0) * draw.uniform(1, 1))
        # The square prefers few causes, on which the nodes then share more.
        num_causes = 1 + (width * draw.uniform().square()).long()
        causes = torch.arange(W, device=width.device) < num_causes[:, None]
        values = draw.normal(num_points, W) * causes[:, None, :]
        layers, real, last = [values], [causes], [torch.zeros_like(exists)]
        fan_in = num_causes.double()
        for layer in range(L):
            weights = draw.normal(W, W) * (draw.uniform(W, W) >= absent)
            scale = gain / (fan_in[:, None, None] * (1 - absent)).sqrt()
            kind = draw.integers(len(ACTIVATIONS), 1, 1)
            pre = values @ (weights * scale) + 0.5 * draw.normal(1, W)
            found = torch.stack([activation(pre) for activation in ACTIVATIONS])
            values = found.gather(0, kind.expand(pre.shape)[None])[0] + noise_std * draw.normal(num_points, W)
            values, fan_in = values * exists[:, None, :], width.double()
            layers.append(values)
            real.append(exists & (depth > layer)[:, None])
            last.append(exists & (depth == layer + 1)[:, None])
        return torch.cat(layers, -1), torch.cat(real, -1), torch.cat(last, -1)

    def _steps(self, draw: Draws, X: Tensor) -> Tensor:
        """A fifth of the columns rounded to 2 to 9 values, at equal distances between the least and the largest."""
        steps = (1 + draw.integers(8, 1, X.shape[-1])).double()
        least, largest = X.amin(1, keepdim=True), X.amax(1, keepdim=True)
        span = (largest - least).clamp_min(1e-9)
        stepped = least + span * ((X - least) / span * steps).round() / steps
        return torch.where(draw.uniform(1, X.shape[-1]) < 0.2, stepped, X)

    def _labels(self, draw: Draws, score: Tensor) -> Tensor:
        """Labels (B, N) by intervals of the score's ranks."""
        C, num_points = self.max_classes, score.shape[-1]
        num_classes = 2 + draw.integers(C - 1)
        rank = (score.argsort(-1).argsort(-1).double() + 0.5) / num_points
        # Cuts at the cumulative shares of random weights: classes of unequal size.
        weights = -(draw.uniform(C).log()) * (torch.arange(C, device=score.device) < num_classes[:, None])
        cuts = (weights + 0.3 * (weights > 0)).cumsum(-1)
        cuts = cuts / cuts[:, -1:]
        interval = (rank[..., None] > cuts[:, None, :-1]).sum(-1)
        shuffled = draw.uniform(C) + 2.0 * (torch.arange(C, device=score.device) >= num_classes[:, None])
        return shuffled.argsort(-1).gather(-1, interval).double()
