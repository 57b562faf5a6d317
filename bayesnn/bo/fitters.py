"""A surrogate by name, a model or a function: how it is fitted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from botorch.models.model import Model as BotorchModel
from torch import Tensor

from bayesnn.bnn import BNN
from bayesnn.bo.auto import AutoSurrogate, num_scored
from bayesnn.bo.fidelity import Fidelity
from bayesnn.files import fingerprint
from bayesnn.model import Model
from bayesnn.processes import LearningCurveProcess
from bayesnn.registry import surrogate as surrogate_by_name

FitFunction = Callable[[Tensor, Tensor], BotorchModel]
Surrogate = str | Model | FitFunction

Fitter = Callable[[Tensor, Tensor, int], BotorchModel]
"""From features (n, d), values (n, m) and a seed to a fitted model."""


class GoingOn:
    """Fits a Bayesian neural network from scratch at 10, 15, 22, 33, … rows, and in between goes on from the last such fit.

    What is fitted is a function of the rows and the seed alone, so that a search that was killed and goes on suggests what it
    would have; the last fit from scratch is remembered.

    Args:
        model: unfitted.
        seed: of the fits.
    """

    def __init__(self, model: BNN, seed: int) -> None:
        self.model, self.seed = model, seed
        self._last: tuple[str, BNN] | None = None

    def __call__(self, X: Tensor, Y: Tensor, seed: int, of_first: Callable[[int], Tensor] | None = None) -> BNN:
        """Fitted to features X (n, d) and values Y (n, m).

        Args:
            X: features.
            Y: values.
            seed: counts where there are fewer than 10 rows.
            of_first: the values of so many first rows as they were when there were no others, if these have changed them.
        """
        num_rows = num_scored(len(X))
        if num_rows == 0:
            return copy.deepcopy(self.model).fit(X, Y, seed=seed)
        first = X[:num_rows], Y[:num_rows] if of_first is None else of_first(num_rows)
        last = self._last
        key = fingerprint(*first)
        if last is None or last[0] != key:
            last = self._last = key, copy.deepcopy(self.model).fit(*first, seed=self.seed)
        return last[1] if num_rows == len(X) else last[1].refit(X, Y)


def fitter_of(surrogate: Any, fidelity: Fidelity | None, seed: int) -> tuple[str, Fitter]:
    """A surrogate's name, and how it is fitted; the seed is that of fits that several trials share.

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
    # With a fidelity the first rows change as trials go on.
    return name, GoingOn(model, seed) if isinstance(model, BNN) and fidelity is None else partial(_fit_copy, model)


# By name, not as lambdas: Optuna's users pickle samplers.
def _fit_copy(model: Model, X: Tensor, Y: Tensor, seed: int) -> BotorchModel:
    return copy.deepcopy(model).fit(X, Y, seed=seed)


def _fit_by_function(function: FitFunction, X: Tensor, Y: Tensor, seed: int) -> BotorchModel:
    return function(X, Y)
