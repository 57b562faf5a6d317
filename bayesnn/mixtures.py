"""Predictions of several models in one: a mixture of their mixtures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from bayesnn.distributions import cdf, outputs, sample
from bayesnn.predictive import Predictive


class _Part(NamedTuple):
    """A distribution of batch shape (*batch, S, q, m) and its units: ``loc + scale * value``, both (1, m) or ()."""

    distribution: Any
    loc: Tensor
    scale: Tensor


class Joined(Distribution):
    """Distributions of any kinds side by side along the third-last batch dimension, where predictions have functions.

    Args:
        parts: distributions of batch shapes (*batch, S_k, q, m), each with its units ``loc + scale * value``.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (as torch declares it)

    def __init__(self, parts: Sequence[tuple[Distribution, Tensor, Tensor]]) -> None:
        self.parts = [_Part(*part) for part in parts]
        *batch, _, q, m = self.parts[0].distribution.batch_shape
        total = sum(part.distribution.batch_shape[-3] for part in self.parts)
        super().__init__(torch.Size((*batch, total, q, m)), validate_args=False)

    @property
    def mean(self) -> Tensor:
        return torch.cat([loc + scale * own.mean for own, loc, scale in self.parts], -3)

    @property
    def variance(self) -> Tensor:
        return torch.cat([scale.square() * own.variance for own, _, scale in self.parts], -3)

    def log_prob(self, value: Tensor) -> Tensor:
        """Of one value for all of the side-by-side distributions, (*batch, 1, q, m) -> (*batch, S, q, m)."""
        logs = [own.log_prob((value - loc) / scale) - scale.log() for own, loc, scale in self.parts]
        return torch.cat(logs, -3)

    def cdf(self, value: Tensor) -> Tensor:
        """Likewise, P(y <= value)."""
        return torch.cat([cdf(own, (value - loc) / scale) for own, loc, scale in self.parts], -3)


@sample.register
def _(distribution: Joined, sample_shape: torch.Size, generator: torch.Generator, num_shared: int = 0) -> Tensor:
    parts = distribution.parts
    return torch.cat([loc + scale * sample(own, sample_shape, generator, num_shared) for own, loc, scale in parts], -3)


@outputs.register
def _(distribution: Joined, indices: list[int]) -> Distribution:
    m = distribution.batch_shape[-1]

    def chosen(values: Tensor) -> Tensor:
        return values.expand(1, m)[:, indices]

    return Joined([(outputs(own, indices), chosen(loc), chosen(scale)) for own, loc, scale in distribution.parts])


def mixture(predictions: Sequence[Predictive], log_weights: Tensor) -> Predictive:
    r"""The prediction :math:`p(y) = \sum_k w_k\, p_k(y)` of real-valued outcomes, all of its answers exact.

    What is ignorance of the function in a model's own prediction stays so, and that the models disagree counts as such too.

    Args:
        predictions: of K models at the same points, each of shape (*batch, q, m).
        log_weights: (K,), normalised.
    """
    batch = torch.broadcast_shapes(*(own.log_weights.shape[:-1] for own in predictions))
    weights, function_vars = [], []
    for own, log_weight in zip(predictions, log_weights, strict=True):
        logs = log_weight.to(own.log_weights) + own.log_weights
        weights.append(logs.expand(*batch, logs.shape[-1]))
        function_vars.append((own._scale.square() * own._function_var).expand(own.components.batch_shape))
    joined = Joined([(own.components, own._loc, own._scale) for own in predictions])
    return Predictive(joined, torch.cat(weights, -1), torch.cat(function_vars, -3))
