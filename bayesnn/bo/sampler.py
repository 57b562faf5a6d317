"""Bayesian optimisation with any model of this library, inside any Optuna study."""

from __future__ import annotations

import copy
import time
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from botorch.models.model import Model as BotorchModel
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.search_space import intersection_search_space
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from bayesnn.bo.acquisition import NAMES, Name
from bayesnn.bo.auto import AutoSurrogate
from bayesnn.bo.outcomes import Direction, Limit, outcomes_of
from bayesnn.bo.space import Space
from bayesnn.bo.suggest import propose
from bayesnn.data import BayesnnWarning
from bayesnn.model import Model
from bayesnn.registry import surrogate as surrogate_by_name

FitFunction = Callable[[Tensor, Tensor], BotorchModel]
Surrogate = str | Model | FitFunction


class Observations(NamedTuple):
    """A study's trials in a space, by what they tell a surrogate.

    Fields:
        codes: of the finished trials (n, d).
        values: their objectives, and then their constraints (n, m + c).
        constraints: the names of the constraints, which are kept where the value is at most 0.
        pending: codes of the running trials, and of the pruned ones: what is close to them promises nothing.
        failed: codes of the trials that failed, or whose value isn't finite.
    """

    codes: Tensor
    values: Tensor
    constraints: tuple[str, ...]
    pending: Tensor
    failed: Tensor


class SurrogateSampler(BaseSampler):
    """An Optuna sampler that fits a surrogate model to the finished trials and tries what :func:`suggest` suggests.

    The first trials come from a scrambled Sobol sequence. Running trials count as pending. Trials that failed or returned an
    infinite value are left out of the fit and not tried again, and where there are some, what is suggested is weighed by the
    probability that it succeeds; pruned ones count as pending. Constraints that trials set (``trial.set_constraint``) are
    modelled beside the objectives, if all finished trials have them. Minimises or maximises, one objective or several. A
    parameter that isn't in all finished trials is drawn uniformly, by itself, and so is everything in the very
    first trial of a study whose space isn't given. The same seed and the same trials give the
    same next trial, also after a restart and in another process.

    What was done is kept with each trial, as user attributes: ``sampler`` ("sobol" or "surrogate"), ``surrogate`` (for
    "auto": the chosen one, with ``surrogate_scores`` and, of how many rows they are, ``surrogate_scored_on``),
    ``fit_seconds``, ``suggest_seconds``, ``acquisition`` and ``acquisition_value``, ``num_observed``, ``num_pending``,
    ``num_failed``, ``independent`` (the parameters drawn by themselves) and, where the surrogate couldn't answer,
    ``fallback`` with the reason; that is also a warning.

    Args:
        surrogate: a name among ``bayesnn.surrogates()``; or "auto", the one of several that predicts best
            (:class:`AutoSurrogate`); or an unfitted model, which is copied for each fit; or a function from features (n, d)
            and values (n, m) to a fitted BoTorch model.
        num_startup: how many trials must have finished before the surrogate is used.
        seed: of every random draw.
        space: the search space, if it is known beforehand; otherwise it is what the finished trials have in common.
        acquisition, reference_point, beta, num_restarts, raw_samples, num_samples, seconds: as in :func:`suggest`.

    Raises:
        TypeError, ValueError: for a surrogate that doesn't exist, and numbers that make no sense.

    Example:
        >>> study = optuna.create_study(sampler=SurrogateSampler("nngp", seed=0))
        >>> study.optimize(objective, n_trials=50)
    """

    def __init__(
        self,
        surrogate: Surrogate = "nngp",
        *,
        num_startup: int = 10,
        seed: int = 0,
        space: Space | Mapping[str, Any] | None = None,
        acquisition: Name = "auto",
        reference_point: Sequence[float] | None = None,
        beta: float = 4.0,
        num_restarts: int = 8,
        raw_samples: int = 256,
        num_samples: int = 256,
        seconds: float | None = None,
    ) -> None:
        if num_startup < 1:
            raise ValueError(f"num_startup must be at least 1, found {num_startup}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, found {seed}")
        self.surrogate, self.num_startup, self.seed = surrogate, num_startup, seed
        self.space = space if isinstance(space, Space) or space is None else Space(space)
        if acquisition not in NAMES:
            raise ValueError(f"acquisition must be one of {', '.join(NAMES)}, found {acquisition!r}")
        self.search: dict[str, Any] = {
            "acquisition": acquisition,
            "reference_point": reference_point,
            "beta": beta,
            "num_restarts": num_restarts,
            "raw_samples": raw_samples,
            "num_samples": num_samples,
            "seconds": seconds,
        }
        self.surrogate_name, self._fit = _fitter(surrogate)
        self._warned_of: set[str] = set()

    # What Optuna asks --------------------------------------------------------------------------------------------------

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The parameters that all finished trials have, or those of the given space."""
        if self.space is not None:
            return self.space.distributions()
        common = intersection_search_space(study.get_trials(deepcopy=False))
        return {name: distribution for name, distribution in common.items() if not distribution.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next configuration, jointly over the parameters of ``search_space``."""
        if not search_space:
            return {}
        start = time.perf_counter()
        space = Space.from_distributions(search_space) if self.space is None else self.space
        observations = observe(study, space, exclude=trial.number)
        record: dict[str, Any] = {
            "sampler": "surrogate",
            "num_observed": len(observations.codes),
            "num_pending": len(observations.pending),
            "num_failed": len(observations.failed),
        }
        if len(observations.codes) < self.num_startup:
            record["sampler"], code = "sobol", self._sobol(space, observations, trial)
        else:
            try:
                code = self._propose(study, trial, space, observations, record)
                if isinstance(self._fit, AutoSurrogate):
                    record |= self._fit.record(space.encode(observations.codes), observations.values)
            except Exception as error:
                record |= {"sampler": "sobol", "fallback": f"{type(error).__name__}: {error}"}
                warnings.warn(
                    f"trial {trial.number} comes from a Sobol sequence, because the surrogate {self.surrogate_name!r} "
                    f"couldn't answer: {record['fallback']}",
                    BayesnnWarning,
                    stacklevel=2,
                )
                code = self._sobol(space, observations, trial)
        record["suggest_seconds"] = round(time.perf_counter() - start, 6)
        _write(study, trial, record)
        return space.configurations(code)[0]

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A value drawn uniformly, for a parameter that not all finished trials have."""
        current = study._storage.get_trial(trial._trial_id)
        alone = [*current.user_attrs.get("independent", []), param_name]
        _write(study, trial, {"independent": alone})
        num_finished = len(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]))
        if num_finished >= self.num_startup and param_name not in self._warned_of:
            self._warned_of.add(param_name)
            warnings.warn(
                f"{param_name!r} of trial {trial.number} is drawn uniformly: not all finished trials have it, with the same "
                "range, so that the surrogate can't model it",
                BayesnnWarning,
                stacklevel=2,
            )
        space = Space.from_distributions({param_name: param_distribution})
        seed = (self.seed, trial.number, zlib.crc32(param_name.encode()))
        uniform = np.random.default_rng(seed).random()
        code = torch.tensor([[space.parameters[param_name].spread(uniform)]], dtype=torch.float64)
        return space.configurations(code)[0][param_name]

    # How it answers ----------------------------------------------------------------------------------------------------

    def fit(self, study: Study, space: Space) -> BotorchModel:
        """The surrogate, fitted to all finished trials of a study.

        Raises:
            ValueError: if no trial has finished.
        """
        observations = observe(study, space)
        if not len(observations.codes):
            raise ValueError("no trial of this study has finished with a finite value, so there is nothing to fit")
        return self._fitted(space, observations, self.seed)

    def _fitted(self, space: Space, observations: Observations, seed: int) -> BotorchModel:
        with warnings.catch_warnings():
            # A category that hasn't been tried yet is a constant column, nothing to tell the user about at each trial.
            warnings.filterwarnings("ignore", message="X: column", category=BayesnnWarning)
            return self._fit(space.encode(observations.codes), observations.values, seed)

    def _propose(
        self, study: Study, trial: FrozenTrial, space: Space, observations: Observations, record: dict[str, Any]
    ) -> Tensor:
        seed = _seed(self.seed, trial.number)
        record["surrogate"] = self.surrogate_name
        start = time.perf_counter()
        model = self._fitted(space, observations, seed)
        record["fit_seconds"] = round(time.perf_counter() - start, 6)
        num_objectives = len(study.directions)
        limits: dict[int, Limit] = {num_objectives + k: ("<=", 0.0) for k in range(len(observations.constraints))}
        directions: list[Direction] = [
            "maximize" if direction is StudyDirection.MAXIMIZE else "minimize" for direction in study.directions
        ]
        proposal = propose(
            model,
            space,
            1,
            outcomes=outcomes_of(model.num_outputs, directions, limits),
            pending=observations.pending,
            failed=observations.failed,
            seed=seed,
            **self.search,
        )
        record |= {"acquisition": proposal.acquisition, "acquisition_value": proposal.values[0]}
        return proposal.codes

    def _sobol(self, space: Space, observations: Observations, trial: FrozenTrial) -> Tensor:
        """The trial's own point of the sequence or, where that is known already, the first later one that isn't."""
        known = torch.cat([observations.codes, observations.pending, observations.failed])
        points = space.sobol(64 if space.size < float("inf") else 1, self.seed, skip=trial.number)
        distance = (points.unsqueeze(1) - known).abs().amax(-1)
        new = points[(distance > 1e-9).all(-1)] if len(known) else points
        return new[:1] if len(new) else points[:1]


def observe(study: Study, space: Space, exclude: int | None = None) -> Observations:
    """What a study's trials say about a space; trials that lie outside it are left out.

    Args:
        study: the study.
        space: the space.
        exclude: the number of a trial to leave out, the one that is being started.
    """
    trials = study.get_trials(deepcopy=False)
    succeeded = [trial for trial in trials if _has_values(trial)]
    constraints = tuple(sorted(set.intersection(*(set(trial.constraints) for trial in succeeded)) if succeeded else ()))
    # A trial that was cut off failed by no fault of its configuration, which has been queued again.
    cut_off = {number for trial in trials for number in trial.system_attrs.get("retry_history", [])}
    rows: dict[str, list[Tensor]] = {"finished": [], "pending": [], "failed": []}
    values: list[Sequence[float]] = []
    for trial in trials:
        code = _code(trial, space)
        if trial.number == exclude or code is None or trial.number in cut_off:
            continue
        if trial.state in (TrialState.RUNNING, TrialState.WAITING, TrialState.PRUNED):
            rows["pending"].append(code)
        elif _has_values(trial):
            rows["finished"].append(code)
            values.append([*trial.values, *(trial.constraints[name] for name in constraints)])
        else:
            rows["failed"].append(code)
    finished, pending, failed = (_stack(rows[kind], len(space.parameters)) for kind in rows)
    width = len(study.directions) + len(constraints)
    return Observations(finished, _stack(values, width), constraints, pending, failed)


def _has_values(trial: FrozenTrial) -> bool:
    return trial.state is TrialState.COMPLETE and bool(np.isfinite(trial.values).all())


def _code(trial: FrozenTrial, space: Space) -> Tensor | None:
    try:
        return space.codes([{name: value for name, value in trial.params.items() if name in space.parameters}])[0]
    except ValueError:  # a parameter is missing, or the trial's own range was another one
        return None


def _stack(rows: Sequence[Any], width: int) -> Tensor:
    tensors = [torch.as_tensor(row, dtype=torch.float64) for row in rows]
    return torch.stack(tensors) if tensors else torch.empty(0, width, dtype=torch.float64)


def _fitter(surrogate: Any) -> tuple[str, Callable[[Tensor, Tensor, int], BotorchModel]]:
    """A surrogate's name, and how it is fitted to features, values and a seed."""
    if surrogate == "auto":
        surrogate = AutoSurrogate()
    if isinstance(surrogate, AutoSurrogate):
        return "auto", surrogate
    if isinstance(surrogate, str):
        model, name = surrogate_by_name(surrogate), surrogate
    elif isinstance(surrogate, Model):
        model, name = surrogate, type(surrogate).__name__
    elif callable(surrogate) and not isinstance(surrogate, BotorchModel):
        return getattr(surrogate, "__name__", repr(surrogate)), lambda X, Y, seed: surrogate(X, Y)
    else:
        raise TypeError(
            "surrogate must be a name, an unfitted bayesnn model or a function (X, Y) -> fitted BoTorch model, "
            f"found {type(surrogate).__name__}"
        )
    return name, lambda X, Y, seed: copy.deepcopy(model).fit(X, Y, seed=seed)


def _seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


def _write(study: Study, trial: FrozenTrial, attributes: Mapping[str, Any]) -> None:
    for name, value in attributes.items():
        study._storage.set_trial_user_attr(trial._trial_id, name, value)
