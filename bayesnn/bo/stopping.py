"""Early stopping: callbacks that end an optimisation when there is little left to gain."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from botorch.utils.multi_objective.pareto import is_non_dominated
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from bayesnn.bo.evaluations import is_evaluation
from bayesnn.bo.pictures import is_feasible
from bayesnn.checks import count, nonnegative, positive

# Their acquisition value is the logarithm of an expected improvement, in units of the spread of the surrogate's means.
_LOG_IMPROVEMENTS = ("logei", "lognei")


def no_improvement(num_trials: int = 10, tolerance: float = 0.0) -> Callable[[Study, FrozenTrial], None]:
    """Stop when so many evaluations in a row have brought nothing better.

    Of one objective, something better is a feasible value that is better than the best one before by more than the
    tolerance; of several, a feasible evaluation that isn't dominated by those before. Failed evaluations count as having
    brought nothing, and before the first feasible one nothing stops. It looks at the study alone, so that a search which
    goes on from a storage stops as it would have.

    Args:
        num_trials: how many.
        tolerance: of one objective, in its own units.

    Raises:
        TypeError, ValueError: for numbers that make no sense.

    Example:
        >>> minimize(f, space, num_trials=200, callbacks=[no_improvement(20)])
    """
    count("num_trials", num_trials)
    nonnegative("tolerance", tolerance)

    def callback(study: Study, trial: FrozenTrial) -> None:
        evaluations = [each for each in study.get_trials(deepcopy=False) if is_evaluation(each)]
        before, recent = evaluations[:-num_trials], evaluations[-num_trials:]
        if any(map(_succeeded, before)) and not any(_better(study, each, before, tolerance) for each in recent):
            study.stop()

    return callback


def _better(study: Study, trial: FrozenTrial, before: list[FrozenTrial], tolerance: float) -> bool:
    """Whether a trial is better than all of some earlier ones."""
    if not _succeeded(trial):
        return False
    signs = torch.tensor([1.0 if d is StudyDirection.MAXIMIZE else -1.0 for d in study.directions], dtype=torch.float64)
    known = signs * torch.tensor([each.values for each in before if _succeeded(each)], dtype=torch.float64)
    merit = signs * torch.tensor(trial.values, dtype=torch.float64)
    if len(signs) == 1:
        return bool(merit > known.max() + tolerance)
    return bool(is_non_dominated(torch.cat([known, merit.unsqueeze(0)]))[-1])  # of equal ones, the first counts


def _succeeded(trial: FrozenTrial) -> bool:
    return trial.state is TrialState.COMPLETE and is_feasible(trial)


def little_expected(fraction: float = 0.001, num_trials: int = 3) -> Callable[[Study, FrozenTrial], None]:
    """Stop when the surrogate expects next to nothing: so many suggestions in a row with a small expected improvement.

    The expected improvement is that with which a suggestion was chosen, as a fraction of the spread of the values (the
    standard deviation of the surrogate's means at the tried configurations). Suggestions by another acquisition function
    than "logei" and "lognei", what "auto" is for one objective, never stop anything: a closed-form one isn't in these
    units.

    Args:
        fraction: what is small; 0.001 is our choice.
        num_trials: how many, since one suggestion may be unlucky.

    Raises:
        TypeError, ValueError: for numbers that make no sense.

    Source: Nguyen et al. (2017), "Regret for expected improvement over the best-observed value and stopping condition" (from
    memory; there the threshold is an absolute one).
    """
    count("num_trials", num_trials)
    positive("fraction", fraction)

    def callback(study: Study, trial: FrozenTrial) -> None:
        evaluations = [each for each in study.get_trials(deepcopy=False) if is_evaluation(each)]
        recent = evaluations[-num_trials:]
        if len(recent) == num_trials and all(_expected(each) < math.log(fraction) for each in recent):
            study.stop()

    return callback


def _expected(trial: FrozenTrial) -> float:
    """The logarithm of the improvement that a suggestion promised; infinity where that isn't known."""
    if trial.user_attrs.get("acquisition") not in _LOG_IMPROVEMENTS:
        return math.inf
    return float(trial.user_attrs["acquisition_value"])
