"""A study of one objective: opened or begun, and run until it has the trials that are wanted."""

from __future__ import annotations

import math
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.exceptions import ExperimentalWarning, OptunaError, TrialPruned
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError
from tqdm.auto import tqdm

from bayesnn.bo.fidelity import Fidelity
from bayesnn.bo.follow import finite, follow
from bayesnn.bo.outcomes import Direction
from bayesnn.bo.parameters import Categorical, Ordinal
from bayesnn.bo.result import is_evaluation
from bayesnn.bo.space import Configuration, Space
from bayesnn.bo.storage import open_storage, release, requeue_orphans, sign
from bayesnn.data import BayesnnWarning

Objective = Callable[[Configuration], Any]
Callback = Callable[[Study, FrozenTrial], None]


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Without Optuna's log lines: what they say is in the result."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def open_study(
    direction: Direction, space: Space, sampler: BaseSampler, storage: str | Path | BaseStorage | None, name: str
) -> Study:
    """Open the study of that name, or begin it.

    Raises:
        ValueError: if the storage can't be used, or the stored study has another direction or another space.
    """
    opened = open_storage(storage)
    try:
        study = optuna.create_study(
            storage=opened, study_name=name, sampler=sampler, direction=direction, load_if_exists=True
        )
        stored = study.user_attrs.get("space") or _space_of_trials(study)
    except (SQLAlchemyError, OptunaError) as error:
        raise ValueError(f"storage {str(storage)!r} can't be read: {error}") from error
    found = [stored_direction.name.lower() for stored_direction in study.directions]
    if found != [direction]:
        raise ValueError(
            f"the stored study {name!r} is to {', '.join(found)}, not to {direction}: give another study_name"
        )
    wanted = _describe(space.distributions())
    for parameter in space.conditions:
        wanted[parameter] += f" {space.described()[parameter]}"
    if stored is not None and stored != wanted:
        changed = sorted(key for key in stored | wanted if stored.get(key) != wanted.get(key))
        raise ValueError(
            f"the stored study {name!r} has another space, which differs in {', '.join(changed)}: go on with the old "
            "space, or give another study_name"
        )
    if "space" not in study.user_attrs:
        study.set_user_attr("space", wanted)
    return study


def _describe(distributions: Mapping[str, BaseDistribution]) -> dict[str, str]:
    return {name: distribution_to_json(distribution) for name, distribution in distributions.items()}


def _space_of_trials(study: Study) -> dict[str, str] | None:
    """The space of a study that something else has begun."""
    finished = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    return _describe(finished[0].distributions) if finished else None


def run_trials(
    study: Study,
    f: Objective,
    space: Space,
    num_trials: int,
    *,
    progress: bool = False,
    timeout: float | None = None,
    callbacks: Sequence[Callback] = (),
    catch: tuple[type[Exception], ...] = (Exception,),
    fidelity: Fidelity | None = None,
) -> None:
    """Evaluate f until the study has ``num_trials`` evaluations, those that other processes are at included.

    What a process that is gone has left behind is run again first.
    """
    requeue_orphans(study)
    wanted = int(min(num_trials, space.size))
    if wanted < num_trials:
        message = f"the space has only {wanted} configurations: there will be no {num_trials} trials"
        warnings.warn(message, BayesnnWarning, stacklevel=4)
    begun = num_begun(study)
    if begun >= wanted:
        return
    bar = tqdm(total=wanted, initial=begun, disable=not progress, unit="trial")
    running: list[int] = []

    def objective(trial: optuna.Trial) -> float:
        running[:] = [trial.number]
        sign(trial)
        return _evaluate(f, configuration_of(trial, space), trial, catch, fidelity)

    def after(study: Study, trial: FrozenTrial) -> None:
        bar.update()
        if trial.state is TrialState.COMPLETE:
            bar.set_postfix(best=f"{study.best_value:.6g}")
        if num_begun(study) >= wanted:
            study.stop()

    try:
        with bar:
            study.optimize(objective, timeout=timeout, callbacks=[*callbacks, after])
    except KeyboardInterrupt:
        for number in running:
            release(study, number)
        raise


def num_begun(study: Study) -> int:
    """Evaluations that are there, or under way."""
    return sum(trial.state is TrialState.RUNNING or is_evaluation(trial) for trial in study.get_trials(deepcopy=False))


def configuration_of(trial: optuna.Trial, space: Space) -> Configuration:
    """What a trial is to try: the parameters that exist, suggested by the study's sampler."""
    configuration: Configuration = {}
    for name, parameter in space.parameters.items():
        if not space.exists(name, configuration):
            continue
        if isinstance(parameter, Categorical | Ordinal):
            configuration[name] = trial.suggest_categorical(name, parameter.choices)
        elif parameter.integer:
            low, high = int(parameter.low), int(parameter.high)
            configuration[name] = trial.suggest_int(name, low, high, log=parameter.log, step=int(parameter.step or 1))
        else:
            configuration[name] = trial.suggest_float(
                name, parameter.low, parameter.high, log=parameter.log, step=parameter.step
            )
    return configuration


def _evaluate(
    f: Objective,
    x: Configuration,
    trial: optuna.Trial,
    catch: tuple[type[Exception], ...],
    fidelity: Fidelity | None,
) -> float:
    """f(x), or the last value that it yields; a failure leaves its reason in the trial and becomes NaN, Optuna's failure."""
    start = time.perf_counter()
    try:
        returned = f(x)
        if fidelity is not None and isinstance(returned, Generator):
            returned = follow(returned, trial, fidelity)
    except TrialPruned:
        raise
    except Exception as error:
        trial.set_user_attr("failure", "".join(traceback.format_exception_only(error)).strip()[:2000])
        if not isinstance(error, catch):
            raise
        return math.nan
    finally:
        trial.set_user_attr("seconds", time.perf_counter() - start)
    value = finite(returned)
    if value is None:
        trial.set_user_attr("failure", f"the objective returned {returned!r:.200}, not a finite number")
        return math.nan
    return value
