"""Plain log densities as targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from bayesnn.data import Data
from bayesnn.inference.target import FlatGaussian, Parameters

POSITION = "position"
"""The one parameter's name where points are plain tensors."""
Points = Parameters | Tensor


class FunctionTarget:
    """A plain log density as a target.

    Points are dicts of tensors (C, …), or plain tensors (C, …); then the draws are ``parameters["position"]``. What a
    function computes can't be told from outside: a checkpoint knows it by its values at two points.

    Args:
        log_density: from C points to (C,). With ``sample_prior``, the log-likelihood alone.
        initial: from (count, generator) to starting points.
        log_prior: for methods that begin at the prior (SMC), its log density, from C points to (C,).
        sample_prior: from (count, generator) to draws of it.
        batched: False: the densities take one point, without the leading dimension, and give one number; they are vectorised
            by ``torch.func.vmap``.

    Raises:
        ValueError: if only one of log_prior and sample_prior is given; or a density doesn't give one number for each point, or
            NaN at an initial point, or has no gradient there.
    """

    def __init__(
        self,
        log_density: Callable[[Any], Tensor],
        initial: Callable[[int, torch.Generator], Points],
        log_prior: Callable[[Any], Tensor] | None = None,
        sample_prior: Callable[[int, torch.Generator], Points] | None = None,
        batched: bool = True,
    ) -> None:
        if (log_prior is None) != (sample_prior is None):
            raise ValueError("log_prior and sample_prior must be given together, or not at all")
        self._initial, self._batched = initial, batched
        example = initial(2, torch.Generator())
        self._plain = isinstance(example, Tensor)
        parameters = _named(example)
        if not parameters or any(values.dim() == 0 or values.shape[0] != 2 for values in parameters.values()):
            found = {name: tuple(values.shape) for name, values in parameters.items()}
            raise ValueError(f"initial(2, generator) must give two points, tensors of shape (2, …), found {found}")
        self._shapes = {name: values.shape[1:] for name, values in parameters.items()}
        self._log_density, self._log_prior = self._vectorised(log_density), None
        if log_prior is not None and sample_prior is not None:
            self._log_prior = self._vectorised(log_prior)
            self.sample_prior = lambda count, generator: _named(sample_prior(count, generator))
        first = next(iter(parameters.values()))
        self.data, self.temperature = Data(first.new_empty(0, 0), first.new_empty(0, 0)), 1.0
        self.flat_gaussian_prior: FlatGaussian | None = None
        self._check(parameters)

    def _vectorised(self, function: Callable[[Any], Tensor]) -> Callable[[Parameters], Tensor]:
        per_point = function if self._batched else vmap(function)
        return (lambda parameters: per_point(parameters[POSITION])) if self._plain else per_point

    def _check(self, parameters: Parameters) -> None:
        densities = {"log_density": self._log_density} | ({"log_prior": self._log_prior} if self._log_prior else {})
        for name, function in densities.items():
            leaves = {own: values.detach().clone().requires_grad_() for own, values in parameters.items()}
            try:
                with torch.enable_grad():
                    found = function(leaves)
            except RuntimeError as error:
                raise ValueError(f"{name} can't be evaluated at two initial points: {error}") from error
            if not isinstance(found, Tensor) or found.shape != (2,):
                shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                wanted = "one number for each of its points, (C,)" if self._batched else "one number for one point, ()"
                shape = shape if self._batched or not isinstance(shape, tuple) else shape[1:]
                raise ValueError(
                    f"{name} must give {wanted}: found shape {shape}" + (" for C = 2" if self._batched else "")
                )
            if bool(found.isnan().any()):
                raise ValueError(f"{name} is NaN at an initial point: {found.tolist()} for {parameters}")
            if not found.requires_grad and self._log_prior is None:
                raise ValueError(f"{name} has no gradient: it must be made of differentiable torch operations")

    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every parameter, without the leading dimension."""
        return self._shapes

    def initial(self, count: int, generator: torch.Generator) -> Parameters:
        """Starting points."""
        return _named(self._initial(count, generator))

    def log_prior(self, parameters: Parameters) -> Tensor:
        """The given log prior; else the whole log density."""
        return (self._log_prior or self._log_density)(parameters)

    def log_likelihood(self, parameters: Parameters, batch: Data | None = None) -> Tensor:
        """What the log prior leaves of the density: zero if none is given. There are no data but those inside it."""
        if self._log_prior is not None:
            return self._log_density(parameters)
        first = next(iter(parameters.values()))
        return first.new_zeros(first.shape[0])


def _named(points: Points) -> Parameters:
    return {POSITION: points} if isinstance(points, Tensor) else dict(points)
