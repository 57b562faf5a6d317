"""Targets with given initial points: where an earlier run ended, or anything else has led."""

from __future__ import annotations

from typing import Any

import torch

from bayesnn.files import fingerprint
from bayesnn.inference.flat import ravel, unravel
from bayesnn.inference.target import Parameters, Target


class StartingAt:
    """A target with given initial points.

    Args:
        target: any target.
        parameters: one point for each chain: tensors (C, *shape).
        variance: of each parameter in the posterior, (*shape), as far as it is known; it is the mass matrix that chains begin
            with, and stay with where warm-up is too short to learn one.

    Raises:
        ValueError: if a parameter is missing, has another shape or isn't the target's.
    """

    def __init__(self, target: Target, parameters: Parameters, variance: Parameters | None = None) -> None:
        self.target = target
        self._parameters = unravel(ravel(parameters, target.shapes()), target.shapes())
        self.variance = None if variance is None else ravel(_each_once(variance), target.shapes())
        known = [] if self.variance is None else [self.variance]
        self.fingerprint = fingerprint(getattr(target, "fingerprint", ""), *self._parameters.values(), *known)

    def __getattr__(self, name: str) -> Any:
        if name == "target":  # while being unpickled in another process
            raise AttributeError(name)
        return getattr(self.target, name)

    def initial(self, count: int, generator: torch.Generator) -> Parameters:
        """The given points.

        Raises:
            ValueError: if there are more or fewer of them than ``count``.
        """
        found = next(iter(self._parameters.values())).shape[0]
        if found != count:
            raise ValueError(f"initial points are given for {found} chains, but {count} are wanted")
        return self._parameters

    def sample_prior(self, count: int, generator: torch.Generator) -> Parameters:
        """The given points, for methods that begin at draws from a prior: they are what was known before."""
        return self.initial(count, generator)


def _each_once(parameters: Parameters) -> Parameters:
    return {name: value.unsqueeze(0) for name, value in parameters.items()}
