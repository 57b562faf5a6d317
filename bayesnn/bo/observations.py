"""A study's trials, by what they tell a surrogate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from bayesnn.bo.space import Space


class Observations(NamedTuple):
    """A study's trials in a space, by what they tell a surrogate.

    Fields:
        codes: of the finished trials (n, d).
        values: their objectives, and then their constraints (n, m + c).
        constraints: the names of the constraints, which are kept where the value is at most 0.
        ignored: the names of those that some of the finished trials don't have.
        pending: codes of the running trials, and of the pruned ones: what is close to them promises nothing.
        failed: codes of the trials that failed, or whose value isn't finite.
        num_outside: how many finished trials lie outside the space.
    """

    codes: Tensor
    values: Tensor
    constraints: tuple[str, ...]
    ignored: tuple[str, ...]
    pending: Tensor
    failed: Tensor
    num_outside: int


def observe(study: Study, space: Space, exclude: int | None = None) -> Observations:
    """What a study's trials say about a space; trials that lie outside it are left out.

    Args:
        study: the study.
        space: the space.
        exclude: the number of a trial to leave out, the one that is being started.
    """
    trials = all_trials(study)
    skipped = cut_off(trials) | {exclude}
    rows: dict[str, list[Tensor]] = {"finished": [], "pending": [], "failed": []}
    finished, num_outside = [], 0
    for trial in trials:
        if trial.number in skipped:
            continue
        code = code_of(trial, space)
        if code is None:
            num_outside += _has_values(trial)
        elif trial.state in (TrialState.RUNNING, TrialState.WAITING, TrialState.PRUNED):
            rows["pending"].append(code)
        elif _has_values(trial):
            rows["finished"].append(code)
            finished.append(trial)
        else:
            rows["failed"].append(code)
    constraints, ignored = common_constraints(finished)
    values = [[*trial.values, *(trial.constraints[name] for name in constraints)] for trial in finished]
    codes, pending, failed = (stack(rows[kind], len(space.parameters)) for kind in rows)
    width = len(study.directions) + len(constraints)
    return Observations(codes, stack(values, width), constraints, ignored, pending, failed, num_outside)


def all_trials(study: Study) -> list[FrozenTrial]:
    """A study's trials, of all brackets: Hyperband's pruner shows a sampler those of one alone."""
    return study._storage.get_all_trials(study._study_id, deepcopy=False)


def cut_off(trials: Sequence[FrozenTrial]) -> set[int | None]:
    """The numbers of those that failed by no fault of their configuration, which has been queued again."""
    return {number for trial in trials for number in trial.system_attrs.get("retry_history", [])}


def common_constraints(trials: Sequence[FrozenTrial]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the constraints that all of the trials have, and of those that only some have."""
    named = [set(trial.constraints) for trial in trials] or [set[str]()]
    common = set.intersection(*named)
    return tuple(sorted(common)), tuple(sorted(set.union(*named) - common))


def _has_values(trial: FrozenTrial) -> bool:
    return trial.state is TrialState.COMPLETE and bool(np.isfinite(trial.values).all())


def code_of(trial: FrozenTrial, space: Space) -> Tensor | None:
    """The code of a trial's configuration, (d,); None if it lies outside the space."""
    configuration: dict[str, Any] = {}
    for name in space.names:  # what doesn't exist under the condition doesn't count, though the trial may have it
        if name in trial.params and space.exists(name, configuration):
            configuration[name] = trial.params[name]
    try:
        return space.codes([configuration])[0]
    except ValueError:  # a parameter is missing, or the trial's own range was another one
        return None


def stack(rows: Sequence[Any], width: int) -> Tensor:
    """Rows as a matrix (n, width), which may have none."""
    tensors = [torch.as_tensor(row, dtype=torch.float64) for row in rows]
    return torch.stack(tensors) if tensors else torch.empty(0, width, dtype=torch.float64)
