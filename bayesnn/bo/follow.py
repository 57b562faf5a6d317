"""An objective that yields its value again and again while it spends resource: followed until it is pruned."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import Any

from optuna.trial import Trial

from bayesnn.bo.attempt import Call, EndedEarly
from bayesnn.bo.fidelity import Fidelity
from bayesnn.bo.goals import Goals
from bayesnn.bo.space import Configuration


def followed(call: Call, trial: Trial, fidelity: Fidelity) -> Call:
    """The call of a function that may yield, as one of a function that returns, see :func:`follow`."""

    def f(x: Configuration) -> Any:
        returned = call.f(x)
        return follow(returned, trial, fidelity, call.goals) if isinstance(returned, Generator) else returned

    return call._replace(f=f)


def follow(curve: Generator[Any, None, Any], trial: Trial, fidelity: Fidelity, goals: Goals) -> Any:
    """Report each value that a generator yields, the first at resource 1, and stop drawing where the trial is pruned.

    The generator is closed in any case, so that its ``finally`` blocks run. What it has yielded stays in the study's storage.

    Args:
        curve: yields the objective after each unit of resource, as a function returns it.
        trial: that reports it.
        fidelity: after whose whole resource nothing more is drawn.
        goals: one objective, and perhaps limits.

    Returns:
        What was yielded last, also where that is before the whole resource, or :class:`EndedEarly`. What isn't what the goals
        want is returned at once, unreported.

    Raises:
        ValueError: if nothing was yielded.
    """
    resource, value = 0, None
    with closing(curve):
        for resource, value in enumerate(curve, 1):
            try:
                (number,) = goals.values(goals.read(value))
            except ValueError:
                return value
            trial.report(number, resource)
            if resource == fidelity.max_resource:
                return value
            if trial.should_prune():
                return EndedEarly(value)
    if not resource:
        raise ValueError("the objective yielded nothing")
    return value
