"""Hyperparameters that maximise a density: quasi-Newton steps that never leave a model worse than it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from botorch.optim.core import scipy_minimize
from linear_operator.utils.errors import NanError, NotPSDError
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

from bayesnn.data import BayesnnWarning

# SciPy's own tolerances stop nats before the maximum, where hyperparameters trade off against each other.
OPTIONS = {"ftol": 1e-11, "gtol": 1e-6, "maxcor": 30}
FAR = 1e3  # above the first value: where the line search is sent back from


def minimise(
    name: str,
    loss: Callable[[], Tensor],
    parameters: dict[str, Tensor],
    bounds: dict[str, tuple[Any, Any]],
    time_budget: float | None,
) -> None:
    """L-BFGS-B from the present values, in place; where it finds nothing better they stay, and a warning says so.

    Args:
        name: of the model, for the warning.
        loss: as a function of the parameters' present values, per row of data; it may fail far from the start.
        parameters: all that are to be found.
        bounds: (lower, upper) of some of them.
        time_budget: seconds.
    """
    start = {key: value.detach().clone() for key, value in parameters.items()}
    with torch.no_grad():
        before = loss()

    def value_and_gradient() -> tuple[Tensor, Sequence[Tensor]]:
        # A step of the line search that went too far is a high place, from which it turns back.
        try:
            value = loss()
            gradients = torch.autograd.grad(value, list(parameters.values()))
            if all(bool(torch.isfinite(found).all()) for found in (value, *gradients)):
                return value, gradients
        except (NotPSDError, NanError, ValueError):  # the last of priors, where a variance underflows
            pass
        return before + FAR, [torch.zeros_like(value) for value in parameters.values()]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)
        found = scipy_minimize(value_and_gradient, parameters, bounds, timeout_sec=time_budget, options=OPTIONS)
    if found.fval is None or not float(found.fval) <= float(before):
        with torch.no_grad():
            for key, value in start.items():
                parameters[key].copy_(value)
        message = f"{name}: log p(y) couldn't be maximised, defaults are used: {found.message}"
        warnings.warn(message, BayesnnWarning, stacklevel=5)
