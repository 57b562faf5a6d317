"""A study: opened or begun, for the goals and the space that are wanted."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.exceptions import ExperimentalWarning, OptunaError
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from bayesnn.bo.evaluations import is_evaluation
from bayesnn.bo.goals import Goals
from bayesnn.bo.parameters import Categorical, Ordinal
from bayesnn.bo.space import Configuration, Space
from bayesnn.bo.storage import open_storage
from bayesnn.bo.writing import write


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
    goals: Goals, space: Space, sampler: BaseSampler, storage: str | Path | BaseStorage | None, name: str
) -> Study:
    """Open the study of that name, or begin it.

    Raises:
        ValueError: if the storage can't be used, or the stored study has other goals or another space.
    """
    opened = open_storage(storage)
    try:
        study = optuna.create_study(
            storage=opened,
            study_name=name,
            sampler=sampler,
            directions=list(goals.directions.values()),
            load_if_exists=True,
        )
        _check_goals(study, goals)
        _check_space(study, space)
    except (SQLAlchemyError, OptunaError) as error:
        raise ValueError(f"storage {str(storage)!r} can't be read: {error}") from error
    return study


def _check_goals(study: Study, goals: Goals) -> None:
    """Whether a study has these goals; one that has none yet gets them."""
    name, wanted = study.study_name, list(goals.directions.values())
    found = [direction.name.lower() for direction in study.directions]
    if found != wanted:
        raise ValueError(
            f"the stored study {name!r} has the directions {', '.join(found)}, not {', '.join(wanted)}: give another "
            "study_name"
        )
    # Begun by this library: its names, or that it has none, are what was meant.
    begun = "constraints" in study.user_attrs
    if begun and goals.named != (study.metric_names is not None):
        raise ValueError(
            f"the stored study {name!r} has objectives {'without' if goals.named else 'with'} names: go on with these, or "
            "give another study_name"
        )
    if goals.named and study.metric_names != list(goals.directions):
        if study.metric_names is not None:
            raise ValueError(
                f"the stored study {name!r} is about {_quoted(study.metric_names)}, not {_quoted(goals.directions)}: "
                "give another study_name"
            )
        study.set_metric_names(list(goals.directions))
    # As JSON gives them back.
    limits = {limited: list(limit) for limited, limit in goals.limits.items()}
    stored = study.user_attrs.get("constraints")
    if stored is None and not study.get_trials(deepcopy=False):
        study.set_user_attr("constraints", limits)
    elif (stored or {}) != limits:
        raise ValueError(
            f"the stored study {name!r} has the constraints {stored or 'none'}, not {limits or 'none'}: give another "
            "study_name"
        )


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _check_space(study: Study, space: Space) -> None:
    """Whether a study has this space; one that has none yet gets it."""
    stored = study.user_attrs.get("space") or _space_of_trials(study)
    wanted = _describe(space.distributions())
    for parameter in space.conditions:
        wanted[parameter] += f" {space.described()[parameter]}"
    if stored is not None and stored != wanted:
        changed = sorted(key for key in stored | wanted if stored.get(key) != wanted.get(key))
        raise ValueError(
            f"the stored study {study.study_name!r} has another space, which differs in {', '.join(changed)}: go on with "
            "the old space, or give another study_name"
        )
    if "space" not in study.user_attrs:
        study.set_user_attr("space", wanted)


def _describe(distributions: Mapping[str, BaseDistribution]) -> dict[str, str]:
    return {name: distribution_to_json(distribution) for name, distribution in distributions.items()}


def _space_of_trials(study: Study) -> dict[str, str] | None:
    """The space of a study that something else has begun."""
    finished = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    return _describe(finished[0].distributions) if finished else None


def num_begun(trials: Iterable[FrozenTrial]) -> int:
    """How many of a study's trials are evaluations that are there, or under way."""
    return sum(trial.state is TrialState.RUNNING or is_evaluation(trial) for trial in trials)


def configuration_of(trial: optuna.Trial, space: Space) -> Configuration:
    """What a trial is to try: the parameters that exist, suggested by the study's sampler.

    Parameters that the trial has already, because it was queued with them or cut off before, are kept, without a suggestion.
    """
    if not trial.params and not trial._fixed_params:
        together = _suggested_together(trial, space)
        if together is not None:
            return together
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


def _suggested_together(trial: optuna.Trial, space: Space) -> Configuration | None:
    """A configuration that the sampler suggests as a whole, written down at once; None if it suggests parts of it."""
    relative, distributions = trial.relative_params, space.distributions()
    configuration: Configuration = {}
    for name in space.names:
        if space.exists(name, configuration):
            if name not in relative:
                return None
            configuration[name] = relative[name]
    write(trial.storage, trial._trial_id, {}, configuration, distributions)
    return configuration
