"""Several priors over tasks as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from bayesnn.checks import positives
from bayesnn.configured import Configured
from bayesnn.inference.amortized.tasks.base import Process, TaskBatch, TaskPrior


class MixtureTasks(Configured):
    """Each task comes from one of several priors, drawn anew.

    Args:
        priors: all of regression, or all of classes; narrower inputs are padded with zeros.
        weights: their probabilities, up to a factor; equal by default.

    Raises:
        ValueError: for no prior, or weights that aren't one positive number for each.
    """

    def __init__(self, priors: Sequence[TaskPrior], weights: Sequence[float] | None = None) -> None:
        if not priors or not all(callable(prior) for prior in priors):
            raise ValueError(f"priors must have at least one prior, all of them callable, found {priors!r}")
        weights = [1.0] * len(priors) if weights is None else list(positives("weights", weights))
        if len(weights) != len(priors):
            raise ValueError(f"weights must be {len(priors)} positive numbers, one for each prior, got {weights}")
        self.priors, self.weights = list(priors), weights

    @property
    def max_features(self) -> int:
        """Width of X."""
        return max(prior.max_features for prior in self.priors)  # type: ignore[attr-defined]

    def __call__(self, batch_size: int, num_points: int, generator: torch.Generator) -> TaskBatch:
        """Draw ``batch_size`` tasks of ``num_points`` points."""
        weights = torch.tensor(self.weights, dtype=torch.float64, device=generator.device)
        chosen = torch.multinomial(weights, batch_size, replacement=True, generator=generator)
        parts, places = [], []
        for index, prior in enumerate(self.priors):
            place = (chosen == index).nonzero()[:, 0]
            if len(place):
                parts.append(prior(len(place), num_points, generator))
                places.append(place)
        order = torch.cat(places).argsort()
        width = max(part.X.shape[-1] for part in parts)

        def joined(values: list[Any]) -> Any:
            return torch.cat(values)[order]

        def number(part: TaskBatch) -> torch.Tensor:
            full = torch.full((len(part.X),), part.X.shape[-1], device=part.X.device)
            return full if part.num_features is None else part.num_features

        known = [part.process for part in parts if part.process is not None]
        process = (
            Process(*(joined(list(values)) for values in zip(*known, strict=True)))
            if len(known) == len(parts)
            else None
        )
        return TaskBatch(
            joined([F.pad(part.X, (0, width - part.X.shape[-1])) for part in parts]),
            joined([part.y for part in parts]),
            None if any(part.f is None for part in parts) else joined([part.f for part in parts]),
            joined([number(part) for part in parts]),
            process,
        )
