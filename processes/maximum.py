"""Hyperparameters that maximise a density: quasi-Newton steps that never leave a model worse than it was."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from botorch.optim.core import scipy_minimize
from gpytorch.constraints import Interval
from gpytorch.module import Module as GPyTorchModule
from linear_operator.utils.errors import NanError, NotPSDError
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor, nn

from bayesnn.data import BayesnnWarning

# SciPy's own tolerances stop nats before the maximum, where hyperparameters trade off against each other.
OPTIONS = {"ftol": 1e-11, "gtol": 1e-6, "maxcor": 30}
FAR = 1e3  # above the first value: where the line search is sent back from
LARGEST = 1e6  # that a hyperparameter may become, and the inverse of the smallest: standardised data tell no more
FARTHEST = 14.0  # from its start, for one without a constraint: a logarithm, or a mean of standardised outcomes
# Where the second search begins: log of a fifth of the outcomes' variance. On UCI's energy the likelihood has several maxima,
# 20 to 40 nats apart; of eleven fits that were looked at, this start and the usual one, a noise of e^-5, ended at different
# ones in eight.
LARGE_LOG_NOISE_VAR = -1.5


def minimise(
    name: str,
    loss: Callable[[], Tensor],
    module: nn.Module,
    time_budget: float | None,
    other_starts: Sequence[dict[str, float]] = (),
) -> None:
    """L-BFGS-B in place, each output at the lowest value of all searches.

    Where none finds anything better than the present values, they stay, and a warning says so.

    Args:
        name: of the model, for the warning.
        loss: of each output, () or (m,), as a function of the module's present values; independent of each other. It may fail
            far from the start.
        module: all its parameters that require gradients are found.
        time_budget: seconds in all.
        other_starts: where searches begin anew after the first: values of some parameters, by name; the others begin as the
            first did.
    """
    began = time.monotonic()
    parameters: dict[str, Tensor] = {key: value for key, value in module.named_parameters() if value.requires_grad}
    bounds = _bounds(module)
    first = {key: value.detach().clone() for key, value in parameters.items()}
    with torch.no_grad():
        before = loss().detach().clone()
    best, best_loss, lost = first, before, True
    for start in ({}, *other_starts):
        left = None if time_budget is None else time_budget - (time.monotonic() - began)
        if start and left is not None and left <= 0:
            break
        _set(parameters, first)
        with torch.no_grad():
            for key, value in start.items():
                parameters[key].fill_(value)
        message = _search(loss, parameters, bounds, before.sum(), left)
        found = {key: value.detach().clone() for key, value in parameters.items()}
        found_loss = _value(loss, before)
        lost &= not bool(found_loss.sum() <= before.sum())
        best, best_loss = _better(best, best_loss, found, found_loss)
    _set(parameters, best)
    if lost:
        message = f"{name}: log p(y) couldn't be maximised, defaults are used: {message}"
        warnings.warn(message, BayesnnWarning, stacklevel=5)


def _search(
    loss: Callable[[], Tensor],
    parameters: dict[str, Tensor],
    bounds: dict[str, tuple[Any, Any]],
    before: Tensor,
    time_budget: float | None,
) -> str:
    """One, in place; how it ended."""

    def value_and_gradient() -> tuple[Tensor, Sequence[Tensor]]:
        # A step of the line search that went too far is a high place, from which it turns back.
        try:
            value = loss().sum()
            gradients = torch.autograd.grad(value, list(parameters.values()))
            if all(bool(torch.isfinite(found).all()) for found in (value, *gradients)):
                return value, gradients
        except (NotPSDError, NanError):
            pass
        return before + FAR, [torch.zeros_like(value) for value in parameters.values()]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)
        found = scipy_minimize(value_and_gradient, parameters, bounds, timeout_sec=time_budget, options=OPTIONS)
    return str(found.message)


def _bounds(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Where all variances, lengthscales and the like are within a factor of a million of 1 and of where they begin."""
    constraints = {}
    for part in module.modules():
        if isinstance(part, GPyTorchModule):
            for key, parameter in part.named_parameters(recurse=False):
                constraint: Interval | None = part.constraint_for_parameter_name(key)
                constraints[parameter] = constraint
    bounds = {}
    for key, parameter in module.named_parameters():
        constraint, raw = constraints.get(parameter), parameter.detach()
        if constraint is None:
            bounds[key] = (raw - FARTHEST).flatten(), (raw + FARTHEST).flatten()
        else:
            value = constraint.transform(raw)
            limits = value.clamp_max(1) / LARGEST, value.clamp_min(1) * LARGEST
            within = (limit.clamp(constraint.lower_bound, constraint.upper_bound) for limit in limits)
            low, high = (constraint.inverse_transform(limit).flatten() for limit in within)
            bounds[key] = low, high
    return bounds


def _value(loss: Callable[[], Tensor], like: Tensor) -> Tensor:
    """Of each output; infinite where it can't be computed, since another start may be such a place."""
    try:
        with torch.no_grad():
            return loss().detach().clone()
    except (NotPSDError, NanError):
        return torch.full_like(like, torch.inf)


def _better(
    best: dict[str, Tensor], best_loss: Tensor, found: dict[str, Tensor], found_loss: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """For each output the lower of two; for all together where outputs share parameters."""
    m = best_loss.numel()
    if m == 1 or any(value.shape[:1] != (m,) for value in best.values()):
        return (found, found_loss) if bool(found_loss.sum() < best_loss.sum()) else (best, best_loss)
    lower = found_loss < best_loss
    chosen = {
        key: torch.where(lower.reshape(-1, *[1] * (value.ndim - 1)), found[key], value) for key, value in best.items()
    }
    return chosen, torch.where(lower, found_loss, best_loss)


def _set(parameters: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for key, value in values.items():
            parameters[key].copy_(value)
