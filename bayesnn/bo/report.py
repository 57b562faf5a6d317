"""A study as one HTML page: its trials, how it went, and what a surrogate has learned from it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import optuna
from matplotlib.figure import Figure
from optuna.exceptions import OptunaError
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.search_space import intersection_search_space
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from bayesnn.bo.evaluations import failure_of
from bayesnn.bo.observations import Observations, observe
from bayesnn.bo.pictures import convergence, importances, objective_names, parallel_coordinates, trade_offs
from bayesnn.bo.sampler import SurrogateSampler
from bayesnn.bo.space import Space
from bayesnn.bo.storage import open_storage
from bayesnn.bo.study import quiet_optuna
from bayesnn.bo.surrogate_pictures import MAX_PAIRED, pairs, slices, view_of
from bayesnn.data import BayesnnWarning
from bayesnn.report import Rows, html

SURROGATE = "nngp"

Tables = dict[str, tuple[Rows, list[str]]]


def load_study(storage: str, study_name: str | None = None) -> Study:
    """A stored study, also one that Optuna made by itself.

    Args:
        storage: an SQLite file, or a database URL.
        study_name: which one; None: the only one.

    Raises:
        ValueError: if there is no such file or study, or several to choose from.
    """
    if "://" not in storage and not Path(storage).is_file():
        raise ValueError(f"storage {storage!r} is no file")
    try:
        opened = open_storage(storage)
        names = optuna.get_all_study_names(opened)
        if study_name is None and len(names) == 1:
            study_name = names[0]
        if study_name not in names:
            found = f"it has {', '.join(map(repr, names))}" if names else "it has none"
            raise ValueError(f"study_name must be a study of {storage!r}, found {study_name!r}; {found}")
        return optuna.load_study(study_name=study_name, storage=opened)
    except (SQLAlchemyError, OptunaError) as error:
        raise ValueError(f"storage {storage!r} can't be read: {error}") from error


def study_page(study: Study) -> str:
    """One HTML page about a study, without any reference outside itself.

    What its trials don't suffice for is left out, and the page says so.

    Args:
        study: any Optuna study, of one or several objectives.
    """
    with quiet_optuna(), warnings.catch_warnings():
        # Matplotlib's, of letters that its font doesn't have: the tables have them all.
        warnings.filterwarnings("ignore", message="Glyph")
        # The surrogate's, of an objective that never changes: the pictures show it.
        warnings.filterwarnings("ignore", message="Y: column", category=BayesnnWarning)
        remarks: list[str] = []
        figures = _figures(study, remarks)
        tables: Tables = {"Summary": ([_summary(study)], remarks)} | _best(study)
        trials = study.get_trials(deepcopy=False)
        appendix: Tables = {"Trials": (_trial_rows(study, trials), [])} if trials else {}
        return html(f"Study {study.study_name}", tables, figures, appendix)


def _summary(study: Study) -> dict[str, Any]:
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    goals = [
        f"{'maximize' if direction is StudyDirection.MAXIMIZE else 'minimize'} {name}"
        for name, direction in zip(objective_names(study), study.directions, strict=True)
    ]
    return {"goal": ", ".join(goals)} | {
        name: sum(state is wanted for state in states)
        for name, wanted in (
            ("finished", TrialState.COMPLETE),
            ("failed", TrialState.FAIL),
            ("pruned", TrialState.PRUNED),
            ("running", TrialState.RUNNING),
            ("waiting", TrialState.WAITING),
        )
    }


def _best(study: Study) -> Tables:
    if len(study.directions) > 1:
        heading, best = "Pareto front", study.best_trials
    else:
        heading, best = "Best trial", []
        with suppress(ValueError):  # nothing has finished, or nothing that satisfies the study's constraints
            best = [study.best_trial]
    return {heading: (_trial_rows(study, best), [])} if best else {}


def _trial_rows(study: Study, trials: list[FrozenTrial]) -> list[dict[str, Any]]:
    """A row for each trial; every row has the same columns, marked so that no two names can be the same."""
    everything = study.get_trials(deepcopy=False)
    parameters = list(dict.fromkeys(name for trial in everything for name in trial.params))
    constraints = list(dict.fromkeys(name for trial in everything for name in trial.constraints))
    retried = {number for trial in everything for number in trial.system_attrs.get("retry_history", [])}
    rows = []
    for trial in trials:
        values = trial.values or [None] * len(study.directions)
        row: dict[str, Any] = {"trial": str(trial.number), "state": trial.state.name.lower()}
        row |= {f"→ {name}": value for name, value in zip(objective_names(study), values, strict=True)}
        row |= {f"{name} ≤ 0": trial.constraints.get(name) for name in constraints}
        row |= {f"{name} =": trial.params.get(name) for name in parameters}
        row["seconds"] = trial.user_attrs.get("seconds", trial.duration and trial.duration / timedelta(seconds=1))
        row["failure"] = failure_of(trial) or ("cut off, run again later" if trial.number in retried else "")
        rows.append(row)
    return rows


def _figures(study: Study, remarks: list[str]) -> dict[str, Figure]:
    trials = study.get_trials(deepcopy=False)
    finished = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    if not finished:
        remarks.append("No trial has finished yet, so there is nothing to draw.")
        return {}
    figures = {"Convergence": convergence(study)}
    if len(study.directions) > 1:
        figures["Pareto front of the objectives"] = trade_offs(study)
    common = intersection_search_space(trials)
    # In the order in which the objective asked for them.
    distributions = {name: common[name] for name in finished[0].params if name in common and not common[name].single()}
    left_out = sorted({name for trial in trials for name in trial.params} - set(distributions))
    if left_out:
        remarks.append(
            f"Left out of the pictures of parameters, because they don't vary or not all finished trials have them with "
            f"the same range: {', '.join(left_out)}."
        )
    if not distributions:
        return figures
    space = Space.from_distributions(distributions)
    observations = observe(study, space)
    if len(observations.codes):
        names = objective_names(study)
        figures["Parallel coordinates of the finished trials"] = parallel_coordinates(space, observations, names)
    shares = _importances(study, space, remarks)
    if shares:
        figures["Importance of the parameters: shares of the variance (fANOVA of Optuna)"] = importances(shares)
    return figures | _surrogate_figures(study, space, observations, shares, remarks)


def _importances(study: Study, space: Space, remarks: list[str]) -> dict[str, dict[str, float]]:
    found = {}
    for k, name in enumerate(objective_names(study)):
        try:
            found[name] = get_param_importances(
                study,
                evaluator=FanovaImportanceEvaluator(seed=0),
                params=space.names,
                target=lambda trial, k=k: trial.values[k],  # type: ignore[misc]
            )
        except (ValueError, RuntimeError) as error:
            remarks.append(f"Importances for {name} can't be told: {error}")
    return found


def _surrogate_figures(
    study: Study,
    space: Space,
    observations: Observations,
    shares: Mapping[str, Mapping[str, float]],
    remarks: list[str],
) -> dict[str, Figure]:
    if len(observations.codes) < 3:
        remarks.append("A surrogate needs at least 3 finished trials.")
        return {}
    try:
        model = SurrogateSampler(SURROGATE, space=space).fit(study, space)
    except (ValueError, RuntimeError) as error:
        remarks.append(f"The surrogate {SURROGATE!r} can't be fitted: {error}")
        return {}
    remarks.append(
        f"The surrogate in the pictures is {SURROGATE!r}, fitted to the {len(observations.codes)} finished trials; what "
        "doesn't vary stays at the best configuration, which is marked. Its standard deviation is that of the "
        "function, without the noise of one evaluation."
    )
    figures = {}
    for k, name in enumerate(objective_names(study)):
        view = view_of(model, study, space, observations, k)
        by_importance = list(shares.get(name, space.names))
        figures[f"Surrogate of {name} along each parameter: mean ± 2 standard deviations"] = slices(
            view, space.names, name
        )
        if len(space.names) > 1:
            heading = f"Surrogate of {name} over every two of the parameters: mean (below), standard deviation (above)"
            figures[heading] = pairs(view, by_importance[:MAX_PAIRED])
    return figures
