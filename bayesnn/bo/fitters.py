"""A surrogate by name, a model or a function: how it is fitted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from botorch.models.model import Model as BotorchModel
from torch import Tensor

from bayesnn.bo.auto import AutoSurrogate
from bayesnn.bo.fidelity import Fidelity
from bayesnn.model import Model
from bayesnn.processes import LearningCurveProcess
from bayesnn.registry import surrogate as surrogate_by_name

FitFunction = Callable[[Tensor, Tensor], BotorchModel]
Surrogate = str | Model | FitFunction

Fitter = Callable[[Tensor, Tensor, int], BotorchModel]
"""From features (n, d), values (n, m) and a seed to a fitted model."""


def fitter_of(surrogate: Any, fidelity: Fidelity | None) -> tuple[str, Fitter]:
    """A surrogate's name, and how it is fitted.

    Raises:
        TypeError, ValueError: if there is no such surrogate.
    """
    if surrogate == "auto":
        surrogate = AutoSurrogate()
    if isinstance(surrogate, AutoSurrogate):
        return "auto", surrogate
    model: Any
    if surrogate == "gp" and fidelity is not None:
        model, name = LearningCurveProcess(fidelity.max_resource / fidelity.min_resource, bounds=(0.0, 1.0)), surrogate
    elif isinstance(surrogate, str):
        model, name = surrogate_by_name(surrogate), surrogate
    elif isinstance(surrogate, Model):
        model, name = surrogate, type(surrogate).__name__
    elif callable(surrogate) and not isinstance(surrogate, BotorchModel):
        return getattr(surrogate, "__name__", repr(surrogate)), partial(_fit_by_function, surrogate)
    else:
        raise TypeError(
            "surrogate must be a name, an unfitted bayesnn model or a function (X, Y) -> fitted BoTorch model, "
            f"found {type(surrogate).__name__}"
        )
    return name, partial(_fit_copy, model)


# By name, not as lambdas: Optuna's users pickle samplers.
def _fit_copy(model: Model, X: Tensor, Y: Tensor, seed: int) -> BotorchModel:
    return copy.deepcopy(model).fit(X, Y, seed=seed)


def _fit_by_function(function: FitFunction, X: Tensor, Y: Tensor, seed: int) -> BotorchModel:
    return function(X, Y)
