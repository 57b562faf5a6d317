"""An objective that yields its value again and again while it spends resource: followed until it is pruned."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import closing
from typing import Any

from optuna.exceptions import TrialPruned
from optuna.trial import Trial

from bayesnn.bo.fidelity import Fidelity


def follow(curve: Generator[Any, None, Any], trial: Trial, fidelity: Fidelity) -> Any:
    """Report each value that a generator yields, the first at resource 1, and stop drawing where the trial is pruned.

    The generator is closed in any case, so that its ``finally`` blocks run. What it has yielded stays in the study's storage.

    Args:
        curve: yields one value after each unit of resource.
        trial: that reports them.
        fidelity: after whose whole resource nothing more is drawn.

    Returns:
        The last value; None if there was none. One that isn't a finite number is returned at once, unreported.

    Raises:
        TrialPruned: if the pruner says so.
    """
    value: Any = None
    with closing(curve):
        for resource, value in enumerate(curve, 1):
            number = finite(value)
            if number is None:
                return value
            trial.report(number, resource)
            if resource == fidelity.max_resource:
                return value
            if trial.should_prune():
                raise TrialPruned(f"after {resource} of {fidelity.max_resource}")
    return value


def finite(returned: Any) -> float | None:
    """A number, or an array or tensor of one, as a float; None for anything else."""
    if isinstance(returned, (str, bytes, bytearray)) or returned is None:
        return None
    try:
        value = float(returned.item() if hasattr(returned, "item") else returned)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return value if math.isfinite(value) else None
