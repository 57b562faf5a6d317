"""Hyperparameters that maximise a density: quasi-Newton steps that never leave a model worse than it was."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from botorch.optim.core import OptimizationStatus, scipy_minimize
from gpytorch.constraints import Interval
from gpytorch.module import Module as GPyTorchModule
from linear_operator.utils.errors import NanError, NotPSDError
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor, nn

from bayesnn.data import BayesnnWarning

# SciPy's own tolerances stop nats before the maximum, where hyperparameters trade off against each other.
OPTIONS = {"ftol": 1e-11, "gtol": 1e-6, "maxcor": 30}
FAR = 1e3  # above the first value: where the line search is sent back from
LARGEST = 1e6  # that a positive hyperparameter may become, and the inverse of the smallest: the data are standardised
FARTHEST = 14.0  # from its start, for any other: a logarithm, or a mean of standardised outcomes
# Where the second search begins: log of a fifth of the outcomes' variance. On UCI's energy the likelihood has several maxima,
# 20 to 40 nats apart; of eleven fits that were looked at, this start and the usual one, a noise of e^-5, ended at different
# ones in eight.
LARGE_LOG_NOISE_VAR = -1.5

_Found = tuple[dict[str, Tensor], Tensor]  # values of parameters, and the losses there


def minimise(
    name: str,
    loss: Callable[[], Tensor],
    module: nn.Module,
    time_budget: float | None,
    other_starts: Sequence[dict[str, float]] = (),
    max_steps: int = 15_000,
) -> None:
    """L-BFGS-B in place, each output at the lowest value of all searches; never above the present ones.

    Where no search gets anywhere the present values stay, and a warning says so.

    Args:
        name: of the model, for the warning.
        loss: of each output, () or (m,), as a function of the module's present values; its sum is what is minimised. It may
            be infinite, or fail to be computed, in places.
        module: all its parameters that require gradients are found.
        time_budget: seconds in all.
        other_starts: where searches begin anew after the first, if there is time left: values of some parameters, by name;
            the others begin as the first did.
        max_steps: of each search; SciPy's default.
    """
    began = time.monotonic()
    parameters: dict[str, Tensor] = {key: value for key, value in module.named_parameters() if value.requires_grad}
    bounds = _bounds(module)
    first = _copied(parameters)
    best, lowest = first, _value(loss)
    far = float(lowest.nan_to_num(posinf=0.0).sum()) + FAR
    before, settled, message = lowest, False, ""
    for start in ({}, *other_starts):
        left = None if time_budget is None else time_budget - (time.monotonic() - began)
        if start and left is not None and left <= 0:
            break
        _set(parameters, first | {key: torch.full_like(first[key], value) for key, value in start.items()})
        message, converged = _search(loss, parameters, bounds, far, left, max_steps)
        settled |= converged
        best, lowest = _better(loss, parameters, (best, lowest), (_copied(parameters), _value(loss)))
    _set(parameters, best)
    if not settled and not bool((lowest < before).any()):
        message = f"{name}: log p(y) couldn't be maximised, defaults are used: {message}"
        warnings.warn(message, BayesnnWarning, stacklevel=5)


def _search(
    loss: Callable[[], Tensor],
    parameters: dict[str, Tensor],
    bounds: dict[str, tuple[Any, Any]],
    far: float,
    time_budget: float | None,
    max_steps: int,
) -> tuple[str, bool]:
    """One, in place; how it ended, and whether at a minimum."""

    def value_and_gradient() -> tuple[Tensor, Sequence[Tensor]]:
        # A step of the line search that went too far is a high place, from which it turns back.
        some = next(iter(parameters.values()))
        try:
            value = loss().sum()
            gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True, materialize_grads=True)
            if all(bool(torch.isfinite(each).all()) for each in (value, *gradients)):
                return value, gradients
        except (NotPSDError, NanError):
            pass
        return some.new_tensor(far), [torch.zeros_like(value) for value in parameters.values()]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)
        options = OPTIONS | {"maxiter": max_steps}
        found = scipy_minimize(value_and_gradient, parameters, bounds, timeout_sec=time_budget, options=options)
    return str(found.message), found.status == OptimizationStatus.SUCCESS and found.fval != far


def _bounds(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """From a millionth of 1, or of the start if that is less, to a million, or times the start if that is more.

    That is for what a constraint keeps positive: variances, lengthscales and the like. Anything else may move by
    ``FARTHEST``, within its constraint.
    """
    constraints: dict[Any, Interval | None] = {}
    for part in module.modules():
        if isinstance(part, GPyTorchModule):
            for key, parameter in part.named_parameters(recurse=False):
                constraints[parameter] = part.constraint_for_parameter_name(key)
    bounds = {}
    for key, parameter in module.named_parameters():
        constraint, raw = constraints.get(parameter), parameter.detach()
        low, high = raw - FARTHEST, raw + FARTHEST
        if constraint is not None and bool((constraint.lower_bound >= 0).all()):
            value = constraint.transform(raw)
            limits = value.clamp_max(1) / LARGEST, value.clamp_min(1) * LARGEST
            within = (limit.clamp(constraint.lower_bound, constraint.upper_bound) for limit in limits)
            low, high = (constraint.inverse_transform(limit) for limit in within)
        elif constraint is not None and not constraint.enforced:
            low, high = (limit.clamp(constraint.lower_bound, constraint.upper_bound) for limit in (low, high))
        bounds[key] = low.flatten(), high.flatten()
    return bounds


def _value(loss: Callable[[], Tensor]) -> Tensor:
    """Of each output, infinite where it can't be computed."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", NumericalWarning)
            return loss().detach().nan_to_num(nan=torch.inf)
    except (NotPSDError, NanError):
        return torch.tensor(torch.inf, dtype=torch.float64)


def _better(loss: Callable[[], Tensor], parameters: dict[str, Tensor], one: _Found, other: _Found) -> _Found:
    """Each output's lower of two, unless outputs share parameters: then the lower of two as a whole."""
    whole = other if bool(other[1].sum() < one[1].sum()) else one
    lower = other[1] < one[1]
    m = lower.numel()
    if lower.all() or not lower.any() or any(value.shape[:1] != (m,) for value in one[0].values()):
        return whole
    mixed = {
        key: torch.where(lower.reshape(-1, *[1] * (value.ndim - 1)), other[0][key], value)
        for key, value in one[0].items()
    }
    _set(parameters, mixed)
    value = _value(loss)  # not as expected where a shared parameter happens to have m entries
    return (mixed, value) if bool(value.sum() <= whole[1].sum()) else whole


def _copied(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in parameters.items()}


def _set(parameters: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for key, value in values.items():
            parameters[key].copy_(value)
