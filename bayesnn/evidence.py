r"""How well models predict rows that they haven't seen: the evidence by which one is chosen, or several are weighted.

The held-out score of model k is the mean of :math:`s_{ik} = \log p_k(y_i \mid x_i, D_{-I(i)})`, where :math:`I(i)` is the
fold that row i is in. Two models have seen the same folds, so that their difference is judged by the standard error of the
n paired differences (Vehtari, Gelman and Gabry 2017), which is far less than either score's own.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesnn.checks import count
from bayesnn.data import BayesnnWarning, check_inputs, check_targets
from bayesnn.model import Model


@dataclass(frozen=True)
class Scores:
    """Held-out log scores of several models on the same folds.

    Fields:
        by_row: by name, the log density of each row (n,), joint over its outputs and in the user's units; minus infinity in
            all rows for a model that failed.
        failures: by name, why a model failed.
    """

    by_row: dict[str, Tensor]
    failures: dict[str, str]

    def mean(self, name: str) -> float:
        """The mean over rows; minus infinity for a model that failed."""
        return float(self.by_row[name].mean())

    def standard_error(self, name: str) -> float:
        """Of the mean; infinite where it can't be told."""
        return _standard_error(self.by_row[name])

    def difference(self, name: str, other: str) -> tuple[float, float]:
        """By how much the first model's mean exceeds the other's, and the standard error of the paired difference."""
        differences = self.by_row[name] - self.by_row[other]
        return float(differences.mean()), _standard_error(differences)


def log_scores(
    models: Mapping[str, Model], X: Any, Y: Any, *, num_folds: int = 10, seed: int = 0, **options: Any
) -> Scores:
    """Log predictive densities of all rows by k-fold cross-validation, each row by models that haven't seen it.

    A model that fails in any fold (an exception, a density that isn't a number) has minus infinity everywhere, and the reason
    is kept: the others' scores don't suffer.

    Args:
        models: unfitted models by name; they are copied for each fit.
        X: inputs (n, d).
        Y: outcomes (n, m) or (n,), or class labels.
        num_folds: at most; with as many as rows, or more, it is leave-one-out. 10 is what Kohavi (1995) recommends.
        seed: of the folds and of every fit.
        options: of every fit, as in :meth:`Model.fit`: a ``time_budget``, say.

    Raises:
        TypeError, ValueError: for data that can't be used, fewer than two rows, fewer than two folds.
    """
    X = check_inputs(X).detach()
    Y = check_targets(Y, len(X), like=X).detach()
    if len(X) < 2:
        raise ValueError("X must have at least two rows, one to fit to and one to predict, found 1")
    held_out = folds(len(X), num_folds, seed)
    by_row, failures = {}, {}
    for name, model in models.items():
        scores = torch.full((len(X),), -torch.inf, dtype=torch.float64)
        try:
            for rows in held_out:
                scores[rows] = _held_out(model, X, Y, rows, {"seed": seed} | options)
        except Exception as error:  # whatever a model of anybody's raises
            failures[name] = f"{type(error).__name__}: {error}"
            scores = torch.full_like(scores, -torch.inf)
        by_row[name] = scores
    return Scores(by_row, failures)


def folds(num_rows: int, num_folds: int, seed: int) -> list[Tensor]:
    """Indices of the rows in each fold, at random, in ``min(num_folds, num_rows)`` folds whose sizes differ by 1 at most."""
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))
    return list(order.tensor_split(min(count("num_folds", num_folds, 2), num_rows)))


def choose(scores: Scores, prefer: str | None = None) -> str:
    """The model with the highest score, or the preferred one unless others are better by more than one standard error.

    Args:
        scores: what :func:`log_scores` found.
        prefer: a model to keep unless another one's paired difference to it exceeds its own standard error; the best of
            those is chosen then. None: the highest score.

    Raises:
        ValueError: if no model has that name.
        RuntimeError: if all models failed, with the reasons.
    """
    if prefer is not None and prefer not in scores.by_row:
        raise ValueError(f"prefer must be one of {', '.join(scores.by_row)}, found {prefer!r}")
    usable = [name for name in scores.by_row if scores.mean(name) > -torch.inf]
    if not usable:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in scores.failures.items())
        raise RuntimeError(f"no model could predict the rows that were held out: {reasons}")
    if prefer is not None and prefer in usable:
        differences = {name: scores.difference(name, prefer) for name in usable}
        usable = [name for name, (mean, error) in differences.items() if mean > error] or [prefer]
    return max(usable, key=scores.mean)


def _held_out(model: Model, X: Tensor, Y: Tensor, rows: Tensor, options: dict[str, Any]) -> Tensor:
    """Their log densities, by a model fitted to all the others."""
    kept = torch.ones(len(X), dtype=torch.bool)
    kept[rows] = False
    with warnings.catch_warnings():
        # A column that is constant but for the rows held out is nothing that the user could do anything about.
        warnings.simplefilter("ignore", BayesnnWarning)
        fitted = copy.deepcopy(model).fit(X[kept], Y[kept], **options)
    found = fitted.predict(X[rows]).log_prob(Y[rows]).double()
    if bool((torch.isnan(found) | (found == torch.inf)).any()):
        raise ValueError(f"the log density of a row is {float(found.max())}")
    return found


def _standard_error(values: Tensor) -> float:
    error = float(values.std() / len(values) ** 0.5)
    return error if error == error else torch.inf
