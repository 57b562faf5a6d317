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
        pending: codes of the running trials, and of the pruned ones: what is close to them promises nothing.
        failed: codes of the trials that failed, or whose value isn't finite.
    """

    codes: Tensor
    values: Tensor
    constraints: tuple[str, ...]
    pending: Tensor
    failed: Tensor


def observe(study: Study, space: Space, exclude: int | None = None) -> Observations:
    """What a study's trials say about a space; trials that lie outside it are left out.

    Args:
        study: the study.
        space: the space.
        exclude: the number of a trial to leave out, the one that is being started.
    """
    trials = study.get_trials(deepcopy=False)
    succeeded = [trial for trial in trials if _has_values(trial)]
    constraints = tuple(sorted(set.intersection(*(set(trial.constraints) for trial in succeeded)) if succeeded else ()))
    # A trial that was cut off failed by no fault of its configuration, which has been queued again.
    cut_off = {number for trial in trials for number in trial.system_attrs.get("retry_history", [])}
    rows: dict[str, list[Tensor]] = {"finished": [], "pending": [], "failed": []}
    values: list[Sequence[float]] = []
    for trial in trials:
        code = _code(trial, space)
        if trial.number == exclude or code is None or trial.number in cut_off:
            continue
        if trial.state in (TrialState.RUNNING, TrialState.WAITING, TrialState.PRUNED):
            rows["pending"].append(code)
        elif _has_values(trial):
            rows["finished"].append(code)
            values.append([*trial.values, *(trial.constraints[name] for name in constraints)])
        else:
            rows["failed"].append(code)
    finished, pending, failed = (_stack(rows[kind], len(space.parameters)) for kind in rows)
    width = len(study.directions) + len(constraints)
    return Observations(finished, _stack(values, width), constraints, pending, failed)


def _has_values(trial: FrozenTrial) -> bool:
    return trial.state is TrialState.COMPLETE and bool(np.isfinite(trial.values).all())


def _code(trial: FrozenTrial, space: Space) -> Tensor | None:
    try:
        return space.codes([{name: value for name, value in trial.params.items() if name in space.parameters}])[0]
    except ValueError:  # a parameter is missing, or the trial's own range was another one
        return None


def _stack(rows: Sequence[Any], width: int) -> Tensor:
    tensors = [torch.as_tensor(row, dtype=torch.float64) for row in rows]
    return torch.stack(tensors) if tensors else torch.empty(0, width, dtype=torch.float64)
