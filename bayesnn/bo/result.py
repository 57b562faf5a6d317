"""What an optimisation found."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from botorch.models.model import Model as BotorchModel
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from bayesnn.bo.sampler import SurrogateSampler
from bayesnn.bo.space import Configuration, Space
from bayesnn.bo.storage import MAX_RETRIES, num_retries
from bayesnn.data import BayesnnWarning


@dataclass(frozen=True)
class Evaluation:
    """One call of the objective.

    Fields:
        number: the trial's.
        x: the configuration.
        value: what the objective returned; None if it failed, or was ended early.
        seconds: how long it took, without the choice of the configuration.
        failure: why it failed; None if it didn't.
        pruned: whether it was ended early, because what it had reported didn't promise enough.
        curve: what it reported on the way, by the resource spent until then.
    """

    number: int
    x: Configuration
    value: float | None
    seconds: float
    failure: str | None
    pruned: bool = False
    curve: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class Result:
    """What an optimisation found.

    Fields:
        x: the best configuration.
        value: its value.
        history: every evaluation, in order, the failed ones too.
        space: the search space.
        study: the Optuna study, for its plots and for going on.
        sampler: what chose the configurations.
    """

    x: Configuration
    value: float
    history: tuple[Evaluation, ...]
    space: Space
    study: Study
    sampler: SurrogateSampler = field(compare=False)

    @property
    def num_failed(self) -> int:
        """How many evaluations failed."""
        return sum(evaluation.failure is not None for evaluation in self.history)

    @property
    def num_pruned(self) -> int:
        """How many evaluations were ended early."""
        return sum(evaluation.pruned for evaluation in self.history)

    @property
    def best_so_far(self) -> np.ndarray:
        """The best value after each evaluation, (n,); NaN before the first with a value."""
        best = np.fmax if self.study.direction is StudyDirection.MAXIMIZE else np.fmin
        values = [math.nan if evaluation.value is None else evaluation.value for evaluation in self.history]
        return best.accumulate(np.array(values, dtype=float))

    @cached_property
    def model(self) -> BotorchModel:
        """The surrogate, fitted to all evaluations: ``result.model.posterior(result.space.features([x]))``."""
        return self.sampler.fit(self.study, self.space)

    def __repr__(self) -> str:
        failed = f", {self.num_failed} failed" if self.num_failed else ""
        pruned = f", {self.num_pruned} ended early" if self.num_pruned else ""
        return f"Result(value={self.value:.6g}, x={self.x}, {len(self.history)} evaluations{failed}{pruned})"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during an optimisation; ``result`` is what had been found, None if nothing."""

    def __init__(self, message: str, result: Result | None) -> None:
        super().__init__(message)
        self.result = result


def failure_of(trial: FrozenTrial) -> str | None:
    """Why a trial failed, if it did and that was the objective's doing."""
    if trial.state is not TrialState.FAIL:
        return None
    if num_retries(trial) >= MAX_RETRIES:
        return f"the process was killed each of the {MAX_RETRIES + 1} times"
    return trial.user_attrs.get("failure")


def is_evaluation(trial: FrozenTrial) -> bool:
    """Whether the objective has answered, with a value or by failing, or was ended early."""
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or failure_of(trial) is not None


def history_of(study: Study, space: Space) -> tuple[Evaluation, ...]:
    """A study's evaluations, in order."""
    return tuple(
        Evaluation(
            number=trial.number,
            x={name: trial.params[name] for name in space.names if name in trial.params},
            value=trial.value if trial.state is TrialState.COMPLETE else None,
            seconds=trial.user_attrs.get("seconds", trial.duration.total_seconds() if trial.duration else math.nan),
            failure=failure_of(trial),
            pruned=trial.state is TrialState.PRUNED,
            curve=dict(sorted(trial.intermediate_values.items())),
        )
        for trial in study.get_trials(deepcopy=False)
        if is_evaluation(trial)
    )


def result_of(study: Study, space: Space, sampler: SurrogateSampler) -> Result:
    """A study's result; warns of failed evaluations.

    Raises:
        RuntimeError: if no evaluation succeeded.
    """
    history = history_of(study, space)
    failures = [evaluation.failure for evaluation in history if evaluation.failure is not None]
    if all(evaluation.value is None for evaluation in history):
        reason = f"; the last one: {failures[-1]}" if failures else ""
        raise RuntimeError(f"no evaluation succeeded, {len(failures)} failed{reason}")
    if failures:
        warnings.warn(
            f"{len(failures)} of {len(history)} evaluations failed; the last one: {failures[-1]}",
            BayesnnWarning,
            stacklevel=4,
        )
    best = study.best_trial
    assert best.value is not None
    return Result(
        {name: best.params[name] for name in space.names if name in best.params},
        best.value,
        history,
        space,
        study,
        sampler,
    )
