"""What a study's trials have reported on the way: the rows of a joint model, and what is pending where."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from bayesnn.bo.fidelity import ENOUGH, Fidelity
from bayesnn.bo.observations import Observations, all_trials, code_of, common_constraints, cut_off, stack
from bayesnn.bo.space import Space

UNDER_WAY = (TrialState.RUNNING, TrialState.WAITING)


class Curves(NamedTuple):
    """A study's trials in a space and over resources.

    Fields:
        observations: as of finished trials, with codes (…, d + 1) whose last column is a resource: each row is a value that a
            trial, running, pruned or finished, has reported at a rung. Running trials are pending at their next rung.
        num_trials: how many trials the rows are of.
        left_out: codes (k, d + 1) of trials whose rows were too many.
        resource: at which an acquisition function should look: the highest rung with enough values.
    """

    observations: Observations
    num_trials: int
    left_out: Tensor
    resource: int


class _Curve(NamedTuple):
    trial: FrozenTrial
    code: Tensor
    values: dict[int, float]  # at the rungs, by resource


def observe_curves(study: Study, space: Space, fidelity: Fidelity, seed: int = 0, exclude: int | None = None) -> Curves:
    """What a study's trials say at the rungs, and where more is under way.

    A trial's value at a rung is the first that it reported there or later (as Optuna's pruners have it), and the last one's is
    the value that it ended with. Trials that failed, and pruned ones whose last value isn't finite, give no rows. What an
    evaluation reported before it was cut off holds until the trial that tries it again says the same.

    Args:
        study: the study, of one objective.
        space: of configurations.
        fidelity: the rungs, and how many rows there may be.
        seed: of the choice of trials, where there are more.
        exclude: the number of a trial to leave out, the one that is being started.
    """
    trials = all_trials(study)
    skipped = cut_off(trials) | {exclude}
    curves: list[_Curve] = []
    pending, failed, num_outside = list[Tensor](), list[Tensor](), 0
    for trial in trials:
        if trial.number in skipped:
            continue
        code = code_of(trial, space)
        reported = _reported(trial, trials)
        values = {} if _has_failed(trial, reported) else at_rungs(trial, reported, fidelity)
        if code is None:
            num_outside += bool(values)
            continue
        if _has_failed(trial, reported):
            failed.append(_at(code, fidelity, fidelity.max_resource))
        elif trial.state in UNDER_WAY or not values:
            pending.append(_at(code, fidelity, fidelity.next_rung(max(reported, default=0))))
        if values:
            curves.append(_Curve(trial, code, values))
    constraints, ignored = common_constraints([curve.trial for curve in curves if curve.trial.state not in UNDER_WAY])
    # A running trial may set its constraints later.
    curves = [curve for curve in curves if set(constraints) <= set(curve.trial.constraints)]
    kept, rest = _capped(curves, fidelity.max_rows, seed)
    codes = [_at(curve.code, fidelity, resource) for curve in kept for resource in curve.values]
    values = [
        [value, *(curve.trial.constraints[name] for name in constraints)]
        for curve in kept
        for value in curve.values.values()
    ]
    width = len(space.parameters) + 1
    observations = Observations(
        stack(codes, width),
        stack(values, 1 + len(constraints)),
        constraints,
        ignored,
        stack(pending, width),
        stack(failed, width),
        num_outside,
    )
    left_out = stack([_at(curve.code, fidelity, fidelity.max_resource) for curve in rest], width)
    return Curves(observations, len(kept), left_out, _resource(kept, fidelity))


def at_rungs(trial: FrozenTrial, reported: dict[int, float], fidelity: Fidelity) -> dict[int, float]:
    """A trial's finite values at the rungs that it has reached, by the resources at which they were reported."""
    steps, found = sorted(reported), dict[int, float]()
    for rung in fidelity.rungs:
        step = next((step for step in steps if step >= rung), None)
        if step is not None:
            found[min(step, fidelity.max_resource)] = reported[step]
    if trial.state is TrialState.COMPLETE:
        assert trial.value is not None
        found[fidelity.max_resource] = trial.value
    return {resource: value for resource, value in found.items() if math.isfinite(value)}


def _reported(trial: FrozenTrial, trials: list[FrozenTrial]) -> dict[int, float]:
    """By this trial and, before it, by those of the same configuration that were cut off."""
    attempts = [trials[number] for number in trial.system_attrs.get("retry_history", [])]
    return {step: value for each in (*attempts, trial) for step, value in each.intermediate_values.items()}


def _has_failed(trial: FrozenTrial, reported: dict[int, float]) -> bool:
    if trial.state is TrialState.PRUNED:
        return bool(reported) and not math.isfinite(reported[max(reported)])
    if trial.state is TrialState.COMPLETE:
        return not math.isfinite(trial.values[0])
    return trial.state is TrialState.FAIL


def _at(code: Tensor, fidelity: Fidelity, resource: int) -> Tensor:
    return torch.cat([code, code.new_tensor([fidelity.code(resource)])])


def _capped(curves: list[_Curve], max_rows: int, seed: int) -> tuple[list[_Curve], list[_Curve]]:
    """Whole curves of at most so many rows, in order, and the others."""
    chance = {curve.trial.number: np.random.default_rng((seed, curve.trial.number)).random() for curve in curves}
    kept, num_rows = set[int](), 0
    for curve in sorted(curves, key=lambda curve: (-max(curve.values), chance[curve.trial.number])):
        num_rows += len(curve.values)
        if num_rows > max_rows:
            break
        kept.add(curve.trial.number)
    return [c for c in curves if c.trial.number in kept], [c for c in curves if c.trial.number not in kept]


def _resource(curves: list[_Curve], fidelity: Fidelity) -> int:
    for rung in reversed(fidelity.rungs):
        if sum(max(curve.values) >= rung for curve in curves) >= ENOUGH:
            return rung
    return fidelity.rungs[0]
