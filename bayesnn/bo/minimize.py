"""``minimize`` and ``maximize``: Bayesian optimisation of a function in one call, resumable."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from optuna.storages import BaseStorage

from bayesnn.bo.acquisition import Name, check_acquisition
from bayesnn.bo.attempt import Call, Objective
from bayesnn.bo.children import Children
from bayesnn.bo.evaluations import history_of
from bayesnn.bo.executors import Here, OnExecutor
from bayesnn.bo.fidelity import Fidelity
from bayesnn.bo.fitters import Surrogate
from bayesnn.bo.goals import Goals, Objectives
from bayesnn.bo.loop import Callback, Workers, run_trials
from bayesnn.bo.outcomes import Direction, Limit, outcomes_of
from bayesnn.bo.result import Interrupted, Result, result_of
from bayesnn.bo.sampler import SurrogateSampler
from bayesnn.bo.space import Space
from bayesnn.bo.study import open_study, quiet_optuna
from bayesnn.bo.suggest import check_reference_point
from bayesnn.checks import count, positive


def minimize(
    f: Objective,
    space: Space | Mapping[str, Any],
    *,
    objectives: Objectives | None = None,
    constraints: Mapping[str, Limit] | None = None,
    fidelity: Fidelity | None = None,
    surrogate: Surrogate = "nngp",
    acquisition: Name = "auto",
    reference_point: Sequence[float] | None = None,
    num_trials: int = 30,
    seed: int = 0,
    storage: str | Path | BaseStorage | None = None,
    study_name: str = "bayesnn",
    num_startup: int | None = None,
    num_workers: int | None = None,
    executor: Executor | Any = None,
    evaluation_timeout: float | None = None,
    progress: bool = False,
    timeout: float | None = None,
    callbacks: Sequence[Callback] = (),
    catch: tuple[type[Exception], ...] = (Exception,),
) -> Result:
    """Look for the configuration with the lowest value of an expensive function.

    An evaluation fails if f raises, takes too long, or returns anything but what is wanted: a finite number, or with
    ``objectives`` finite numbers by name or in order (other numbers by name are kept with the trial). It is reported, never
    fitted, never repeated; it counts as a trial. With ``storage``, every evaluation is kept as soon as it is there, and the
    same call goes on where an earlier one stopped or was killed: it runs what is missing to ``num_trials`` in total, and
    evaluations that were cut off once more (each at most three times more). The same call in several processes at once shares
    the work; the last trials of each may then exceed the number.

    Several evaluations run at once with ``num_workers``: a new one is suggested as soon as one ends, with those still running
    as pending. By default each worker is a process of this machine; with ``executor`` they run there. A worker that dies
    costs one trial, which is tried again. Which trials are suggested then depends on which evaluations end first.

    Args:
        f: the objective, called with one dict, the configuration: ``f({"x": 0.3, "n": 4, "kind": "a"})``.
        space: the search space, see :class:`Space`.
        objectives: several, or one with a name: ``{"loss": "minimize", "accuracy": "maximize"}``, where f returns a dict with
            these names; or a list of directions, where f returns a sequence.
        constraints: limits that other entries of that dict must keep, ``{"memory": ("<=", 4.0)}``; they are modelled too.
        fidelity: for an f that yields its value after each unit of resource, how many there are, and when it is asked no
            more: ``Fidelity(max_resource=81)``. The last value of those that get to their end is what counts. Evaluations
            that are ended early are trials, too; what they yielded is modelled, see :class:`SurrogateSampler`. For one
            objective, in this process or ``num_workers`` of this machine (others may share the study).
        surrogate: a name among ``bayesnn.surrogates()``, "auto" for the one of several that predicts best, an unfitted
            model, or a function from features and values to a fitted BoTorch model.
        acquisition, reference_point: as in :func:`suggest`.
        num_trials: how many evaluations in total, with those already in the storage. A finite space has no more than its
            configurations.
        seed: of every random draw; the same seed and values give the same configurations.
        storage: a path for one SQLite file, a database URL, or an Optuna storage; None keeps nothing.
        study_name: the study's name in the storage.
        num_startup: evaluations of a Sobol sequence before the surrogate; by default a third of the trials, at least
            3, at most 10.
        num_workers: how many evaluations at once; by default one, or as many as the executor has workers.
        executor: of ``concurrent.futures``, a Dask client or a :class:`RayExecutor`.
        evaluation_timeout: seconds after which an evaluation is killed, and has failed. It then runs in a process of its own.
        progress: show a progress bar, with the best value.
        timeout: start no evaluation after so many seconds.
        callbacks: called as ``callback(study, trial)`` after every evaluation; ``study.stop()`` stops. :func:`no_improvement`
            and :func:`little_expected` make such.
        catch: exceptions of f that count as a failed evaluation; others end the optimisation.

    Returns:
        The result.

    Raises:
        TypeError, ValueError: for arguments that make no sense, before anything is evaluated; also for a storage that
            can't be used, for a stored study with another space or other goals, and for a function that can't be sent
            to other processes.
        RuntimeError: if no evaluation succeeded, or workers die again and again.
        Interrupted: a KeyboardInterrupt with the result so far. What was running will be run again.

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
    return _optimize("minimize", **locals())


def maximize(
    f: Objective,
    space: Space | Mapping[str, Any],
    *,
    objectives: Objectives | None = None,
    constraints: Mapping[str, Limit] | None = None,
    fidelity: Fidelity | None = None,
    surrogate: Surrogate = "nngp",
    acquisition: Name = "auto",
    reference_point: Sequence[float] | None = None,
    num_trials: int = 30,
    seed: int = 0,
    storage: str | Path | BaseStorage | None = None,
    study_name: str = "bayesnn",
    num_startup: int | None = None,
    num_workers: int | None = None,
    executor: Executor | Any = None,
    evaluation_timeout: float | None = None,
    progress: bool = False,
    timeout: float | None = None,
    callbacks: Sequence[Callback] = (),
    catch: tuple[type[Exception], ...] = (Exception,),
) -> Result:
    """Look for the configuration with the highest value; everything else as in :func:`minimize`.

    ``objectives`` have directions of their own, the same in both.
    """
    return _optimize("maximize", **locals())


def startup_for(num_trials: int) -> int:
    """How many of so many trials come before the surrogate, by default."""
    return min(10, max(3, num_trials // 3))


def _optimize(
    direction: Direction,
    f: Objective,
    space: Space | Mapping[str, Any],
    objectives: Objectives | None,
    constraints: Mapping[str, Limit] | None,
    fidelity: Fidelity | None,
    num_trials: int,
    num_startup: int | None,
    storage: str | Path | BaseStorage | None,
    study_name: str,
    num_workers: int | None,
    executor: Any,
    evaluation_timeout: float | None,
    progress: bool,
    timeout: float | None,
    callbacks: Sequence[Callback],
    catch: tuple[type[Exception], ...],
    **search: Any,
) -> Result:
    goals = Goals.of(direction, objectives, constraints)
    if not callable(f):
        raise TypeError(f"f must be a function of a configuration, found {type(f).__name__}")
    if fidelity is None and any(map(inspect.isgeneratorfunction, (f, getattr(f, "__call__", None)))):  # noqa: B004
        raise TypeError("f yields values: say with fidelity=Fidelity(max_resource=…) how many there are")
    space = space if isinstance(space, Space) else Space(space)
    num_trials = count("num_trials", num_trials)
    num_startup = startup_for(num_trials) if num_startup is None else num_startup
    if timeout is not None:
        positive("timeout", timeout)
    for callback in callbacks if isinstance(callbacks, Sequence) else [None]:
        if not callable(callback):
            raise TypeError(f"callbacks must be a list of functions (study, trial), found {callbacks!r}")
    if not isinstance(catch, tuple) or not all(isinstance(e, type) and issubclass(e, Exception) for e in catch):
        raise TypeError(f"catch must be a tuple of exception classes, found {catch!r}")
    sampler = SurrogateSampler(space=space, fidelity=fidelity, num_startup=num_startup, **search)
    _check_search(goals, sampler)
    workers = _workers(Call(f, goals, catch), fidelity, num_workers, executor, evaluation_timeout)
    with quiet_optuna():
        study = open_study(goals, space, sampler, storage, study_name)
        if fidelity is not None:
            fidelity.attach(study)
        try:
            run_trials(
                study, space, goals, workers, num_trials, progress=progress, timeout=timeout, callbacks=callbacks
            )
        except KeyboardInterrupt as interrupt:
            history = history_of(study, space, goals)
            succeeded = any(evaluation.outcomes for evaluation in history)
            raise Interrupted(
                f"stopped after {len(history)} of {num_trials} evaluations; what was found is this exception's result",
                result_of(study, space, sampler, goals) if succeeded else None,
            ) from interrupt
        return result_of(study, space, sampler, goals)


def _check_search(goals: Goals, sampler: SurrogateSampler) -> None:
    """Whether the acquisition function and the reference point are right for the goals."""
    directions = list(goals.directions.values())
    limits = {len(directions) + k: limit for k, limit in enumerate(goals.limits.values())}
    outcomes = outcomes_of(len(goals.names), directions, limits)
    check_acquisition(sampler.chain.search["acquisition"], outcomes)
    check_reference_point(sampler.chain.search["reference_point"], outcomes)


def _workers(
    call: Call, fidelity: Fidelity | None, num_workers: int | None, executor: Any, timeout: float | None
) -> Workers:
    """Where evaluations happen."""
    if num_workers is not None:
        num_workers = count("num_workers", num_workers)
    if timeout is not None:
        positive("evaluation_timeout", timeout)
    if fidelity is not None:
        if executor is not None:
            raise ValueError(
                "fidelity follows evaluations on this machine, without executor: to run several at once, give num_workers, or "
                "make the same call on several machines, with one storage"
            )
        if len(call.goals.directions) > 1:
            raise ValueError(f"fidelity is for one objective, found {', '.join(call.goals.directions)}")
    if executor is not None:
        return OnExecutor(call, executor, num_workers, timeout)
    if num_workers in (None, 1) and timeout is None:
        return Here(call, fidelity)
    return Children(call, num_workers or 1, timeout, fidelity)
