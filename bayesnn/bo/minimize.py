"""``minimize`` and ``maximize``: Bayesian optimisation of a function in one call, resumable."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.storages import BaseStorage

from bayesnn.bo.acquisition import Name
from bayesnn.bo.chain import Surrogate
from bayesnn.bo.fidelity import Fidelity
from bayesnn.bo.outcomes import Direction
from bayesnn.bo.result import Interrupted, Result, history_of, result_of
from bayesnn.bo.sampler import SurrogateSampler
from bayesnn.bo.space import Space
from bayesnn.bo.study import Callback, Objective, open_study, quiet_optuna, run_trials


def minimize(
    f: Objective,
    space: Space | Mapping[str, Any],
    *,
    fidelity: Fidelity | None = None,
    surrogate: Surrogate = "nngp",
    acquisition: Name = "auto",
    num_trials: int = 30,
    seed: int = 0,
    storage: str | Path | BaseStorage | None = None,
    study_name: str = "bayesnn",
    num_startup: int | None = None,
    progress: bool = False,
    timeout: float | None = None,
    callbacks: Sequence[Callback] = (),
    catch: tuple[type[Exception], ...] = (Exception,),
) -> Result:
    """Look for the configuration with the lowest value of an expensive function.

    An evaluation fails if f raises, or returns anything but a finite number. It is reported, never fitted, never repeated;
    it counts as a trial. With ``storage``, every evaluation is kept as soon as it is there, and the same call goes on
    where an earlier one stopped or was killed: it runs what is missing to ``num_trials`` in total, and evaluations that
    were cut off once more (each at most three times more). The same call in several processes at once shares the work;
    the last trials of each may then exceed the number.

    Args:
        f: the objective, called with one dict, the configuration: ``f({"x": 0.3, "n": 4, "kind": "a"})``.
        space: the search space, see :class:`Space`.
        fidelity: for an f that yields its value after each unit of resource, how many there are, and when it is asked no
            more: ``Fidelity(max_resource=81)``. The last value of those that get to the end is what counts. Evaluations
            that are ended early are trials, too; what they yielded is modelled, see :class:`SurrogateSampler`.
        surrogate: a name among ``bayesnn.surrogates()``, "auto" for the one of several that predicts best, an unfitted
            model, or a function from features and values to a fitted BoTorch model.
        acquisition: as in :func:`suggest`.
        num_trials: how many evaluations in total, with those already in the storage. A finite space has no more than its
            configurations.
        seed: of every random draw; the same seed and values give the same configurations.
        storage: a path for one SQLite file, a database URL, or an Optuna storage; None keeps nothing.
        study_name: the study's name in the storage.
        num_startup: evaluations of a Sobol sequence before the surrogate; by default a third of the trials, at least
            3, at most 10.
        progress: show a progress bar.
        timeout: start no evaluation after so many seconds.
        callbacks: called as ``callback(study, trial)`` after every evaluation; ``study.stop()`` stops.
        catch: exceptions of f that count as a failed evaluation; others end the optimisation.

    Returns:
        The result.

    Raises:
        TypeError, ValueError: for arguments that make no sense, before anything is evaluated; also for a storage that
            can't be used and for a stored study with another space or direction.
        RuntimeError: if no evaluation succeeded.
        Interrupted: a KeyboardInterrupt with the result so far.

    Example:
        >>> def f(x):
        ...     return (x["u"] - 0.3) ** 2 + x["n"]
        >>> result = minimize(f, {"u": (0.0, 1.0), "n": (1, 10)}, num_trials=30, seed=0, storage="study.db")
        >>> result.x, result.value

        >>> def f(x):
        ...     for epoch in range(81):
        ...         yield loss_after_one_more_epoch(x)
        >>> minimize(f, {"rate": (1e-5, 1e-1, "log")}, fidelity=Fidelity(81), num_trials=100)
    """
    search = {"surrogate": surrogate, "acquisition": acquisition, "num_startup": num_startup, "seed": seed}
    search["fidelity"] = fidelity
    trials = {"progress": progress, "timeout": timeout, "callbacks": callbacks, "catch": catch, "fidelity": fidelity}
    return _optimize("minimize", f, space, num_trials, search, (storage, study_name), trials)


def maximize(
    f: Objective,
    space: Space | Mapping[str, Any],
    *,
    fidelity: Fidelity | None = None,
    surrogate: Surrogate = "nngp",
    acquisition: Name = "auto",
    num_trials: int = 30,
    seed: int = 0,
    storage: str | Path | BaseStorage | None = None,
    study_name: str = "bayesnn",
    num_startup: int | None = None,
    progress: bool = False,
    timeout: float | None = None,
    callbacks: Sequence[Callback] = (),
    catch: tuple[type[Exception], ...] = (Exception,),
) -> Result:
    """Look for the configuration with the highest value; everything else as in :func:`minimize`."""
    search = {"surrogate": surrogate, "acquisition": acquisition, "num_startup": num_startup, "seed": seed}
    search["fidelity"] = fidelity
    trials = {"progress": progress, "timeout": timeout, "callbacks": callbacks, "catch": catch, "fidelity": fidelity}
    return _optimize("maximize", f, space, num_trials, search, (storage, study_name), trials)


def startup_for(num_trials: int) -> int:
    """How many of so many trials come before the surrogate, by default."""
    return min(10, max(3, num_trials // 3))


def _optimize(
    direction: Direction,
    f: Objective,
    space: Space | Mapping[str, Any],
    num_trials: int,
    search: dict[str, Any],
    kept: tuple[str | Path | BaseStorage | None, str],
    trials: dict[str, Any],
) -> Result:
    if not callable(f):
        raise TypeError(f"f must be a function of a configuration, found {type(f).__name__}")
    if inspect.isgeneratorfunction(f) and trials["fidelity"] is None:
        raise TypeError("f yields values: say with fidelity=Fidelity(max_resource=…) how many there are")
    space = space if isinstance(space, Space) else Space(space)
    if not isinstance(num_trials, int) or num_trials < 1:
        raise ValueError(f"num_trials must be a whole number, at least 1, found {num_trials!r}")
    if trials["timeout"] is not None and not trials["timeout"] > 0:
        raise ValueError(f"timeout must be positive, found {trials['timeout']}")
    catch = trials["catch"]
    if not isinstance(catch, tuple) or not all(isinstance(e, type) and issubclass(e, Exception) for e in catch):
        raise TypeError(f"catch must be a tuple of exception classes, found {catch!r}")
    if search["num_startup"] is None:
        search["num_startup"] = startup_for(num_trials)
    sampler = SurrogateSampler(space=space, **search)
    with quiet_optuna():
        study = open_study(direction, space, sampler, *kept)
        if trials["fidelity"] is not None:
            trials["fidelity"].attach(study)
        try:
            run_trials(study, f, space, num_trials, **trials)
        except KeyboardInterrupt as interrupt:
            history = history_of(study, space)
            succeeded = any(evaluation.value is not None for evaluation in history)
            raise Interrupted(
                f"stopped after {len(history)} of {num_trials} evaluations; what was found is this exception's result",
                result_of(study, space, sampler) if succeeded else None,
            ) from interrupt
        return result_of(study, space, sampler)
