"""What a study's trials say of the evaluations behind them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from bayesnn.bo.goals import Goals
from bayesnn.bo.pictures import is_feasible
from bayesnn.bo.recovery import MAX_RETRIES, num_retries
from bayesnn.bo.space import Configuration, Space


@dataclass(frozen=True)
class Evaluation:
    """One call of the objective.

    Fields:
        number: the trial's.
        x: the configuration.
        value: what the objective returned; None if it failed or was ended early, and where there are several objectives.
        seconds: how long it took, without the choice of the configuration.
        failure: why it failed; None if it didn't.
        outcomes: every objective and every limited outcome by name; empty if there is no value.
        feasible: whether it has values and keeps all constraints.
        pruned: whether it was ended early, because what it had reported didn't promise enough.
        curve: what it reported on the way, by the resource spent until then.
    """

    number: int
    x: Configuration
    value: float | None
    seconds: float
    failure: str | None
    outcomes: dict[str, float] = field(default_factory=dict)
    feasible: bool = True
    pruned: bool = False
    curve: Mapping[int, float] = field(default_factory=dict)


def failure_of(trial: FrozenTrial) -> str | None:
    """Why a trial failed, if it did and that was the objective's doing."""
    if trial.state is not TrialState.FAIL:
        return None
    if "failure" not in trial.user_attrs and num_retries(trial) >= MAX_RETRIES:
        return f"the process was killed each of the {MAX_RETRIES + 1} times"
    return trial.user_attrs.get("failure")


def is_evaluation(trial: FrozenTrial) -> bool:
    """Whether the objective has answered, with a value or by failing, or was ended early."""
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or failure_of(trial) is not None


def history_of(study: Study, space: Space, goals: Goals) -> tuple[Evaluation, ...]:
    """A study's evaluations, in order."""
    trials = study.get_trials(deepcopy=False)
    return tuple(_evaluation(trial, space, goals) for trial in trials if is_evaluation(trial))


def _evaluation(trial: FrozenTrial, space: Space, goals: Goals) -> Evaluation:
    outcomes: dict[str, float] = {}
    if trial.state is TrialState.COMPLETE:
        outcomes = dict(zip(goals.directions, trial.values, strict=True))
        outcomes |= {name: trial.user_attrs.get(f"metric:{name[:200]}", math.nan) for name in goals.limits}
    return Evaluation(
        number=trial.number,
        x={name: trial.params[name] for name in space.names if name in trial.params},
        value=outcomes[next(iter(goals.directions))] if outcomes and len(goals.directions) == 1 else None,
        seconds=trial.user_attrs.get("seconds", trial.duration.total_seconds() if trial.duration else math.nan),
        failure=failure_of(trial),
        outcomes=outcomes,
        feasible=bool(outcomes) and is_feasible(trial),
        pruned=trial.state is TrialState.PRUNED,
        curve=dict(sorted(trial.intermediate_values.items())),
    )
