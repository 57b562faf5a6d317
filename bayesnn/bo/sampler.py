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

from bayesnn.bo.acquisition import Name, check_acquisition
from bayesnn.bo.auto import AutoSurrogate
from bayesnn.bo.observations import Observations, observe
from bayesnn.bo.optimise import SpaceExhaustedError, seen
from bayesnn.bo.outcomes import Direction, Limit, Outcomes, outcomes_of
from bayesnn.bo.space import Configuration, Space
from bayesnn.bo.suggest import Proposal, check_reference_point, check_search, propose
from bayesnn.data import BayesnnWarning
from bayesnn.model import Model
from bayesnn.registry import surrogate as surrogate_by_name

FitFunction = Callable[[Tensor, Tensor], BotorchModel]
Surrogate = str | Model | FitFunction


FALLBACK = "gp"  # where a surrogate can't answer


class Answer(NamedTuple):
    """What to try, and how that was found: the trial's record."""

    configuration: Configuration
    record: dict[str, Any]


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
    ``num_failed``, ``independent`` (the parameters drawn by themselves) and, where the surrogate couldn't answer and a
    Gaussian process or the Sobol sequence took its place, ``fallback`` with the reason; that is also a warning. So are
    ``constraints_ignored``, those that some finished trials lack, and ``num_outside``, how many finished trials aren't in the
    space.

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
        self.search: dict[str, Any] = {
            "acquisition": acquisition,
            "reference_point": reference_point,
            "beta": beta,
            "num_restarts": num_restarts,
            "raw_samples": raw_samples,
            "num_samples": num_samples,
            "seconds": seconds,
        }
        check_search(**self.search)
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
        if not search_space or set(search_space) & set(trial.params):  # ``ask`` has chosen them
            return {}
        space = Space.from_distributions(search_space) if self.space is None else self.space
        (answer,) = self.answers(study, space, trial.number, 1)
        _write(study, trial, answer.record)
        return answer.configuration

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
        return self._fitted(space, observations, self.seed, self._fit)

    def _fitted(
        self,
        space: Space,
        observations: Observations,
        seed: int,
        fit: Callable[[Tensor, Tensor, int], BotorchModel],
    ) -> BotorchModel:
        with warnings.catch_warnings():
            # A category that hasn't been tried yet is a constant column, nothing to tell the user about at each trial.
            warnings.filterwarnings("ignore", message="X: column", category=BayesnnWarning)
            return fit(space.encode(observations.codes), observations.values, seed)

    def answers(self, study: Study, space: Space, number: int, q: int) -> list[Answer]:
        """What trial ``number`` and the q - 1 after it should try, jointly, and how that was found.

        The surrogate is asked first, then BoTorch's Gaussian process, then the Sobol sequence.
        """
        start = time.perf_counter()
        observations = observe(study, space, exclude=number)
        record: dict[str, Any] = {
            "num_observed": len(observations.codes),
            "num_pending": len(observations.pending),
            "num_failed": len(observations.failed),
        }
        self._tell_what_is_left_out(observations, record)
        outcomes = _outcomes(study, observations)
        # What the caller got wrong is the caller's to mend; only what a surrogate can't do is made up for.
        check_acquisition(self.search["acquisition"], outcomes)
        check_reference_point(self.search["reference_point"], outcomes)
        found = None
        if len(observations.codes) >= self.num_startup:
            found = self._by_surrogate(space, observations, outcomes, number, q, record)
        if found is None:
            record["sampler"] = "sobol"
            codes, records = self._sobol(space, observations, number, q), [dict(record) for _ in range(q)]
        else:
            record["sampler"] = "surrogate"
            codes = found.codes
            records = [
                record | {"acquisition": found.acquisition, "acquisition_value": value} for value in found.values
            ]
        seconds = round((time.perf_counter() - start) / q, 6)
        configurations = space.configurations(codes)
        return [
            Answer(configuration, each | {"suggest_seconds": seconds})
            for configuration, each in zip(configurations, records, strict=True)
        ]

    def _by_surrogate(
        self, space: Space, observations: Observations, outcomes: Outcomes, number: int, q: int, record: dict[str, Any]
    ) -> Proposal | None:
        fitters = [(self.surrogate_name, self._fit)]
        if self.surrogate != FALLBACK:
            fitters.append((FALLBACK, _fitter(FALLBACK)[1]))
        for name, fit in fitters:
            record["surrogate"] = name
            try:
                return self._propose(fit, space, observations, outcomes, number, q, record)
            except SpaceExhaustedError as error:  # another surrogate won't find more
                reason = _note_fallback(record, name, error)
                message = f"trial {number} repeats an earlier configuration: {reason}"
                warnings.warn(message, BayesnnWarning, stacklevel=2)
                return None
            except Exception as error:
                self._give_up(number, name, error, record)
        return None

    def _tell_what_is_left_out(self, observations: Observations, record: dict[str, Any]) -> None:
        """In the record, and once as a warning."""
        told: dict[str, tuple[Any, str]] = {}
        if observations.ignored:
            names = list(observations.ignored)
            message = f"not all finished trials have the constraint(s) {', '.join(names)}: no suggestion looks at them"
            told["constraints_ignored"] = (names, message)
        if observations.num_outside:
            message = f"finished trials outside the space, which are left out: {observations.num_outside}"
            told["num_outside"] = (observations.num_outside, message)
        for name, (value, message) in told.items():
            record[name] = value
            if name not in self._warned_of:
                self._warned_of.add(name)
                warnings.warn(message, BayesnnWarning, stacklevel=2)

    def _give_up(self, number: int, name: str, error: Exception, record: dict[str, Any]) -> None:
        reason = _note_fallback(record, name, error)
        warnings.warn(
            f"trial {number} is suggested by something simpler, because the surrogate {name!r} couldn't answer: {reason}",
            BayesnnWarning,
            stacklevel=2,
        )

    def _propose(
        self,
        fit: Callable[[Tensor, Tensor, int], BotorchModel],
        space: Space,
        observations: Observations,
        outcomes: Outcomes,
        number: int,
        q: int,
        record: dict[str, Any],
    ) -> Proposal:
        seed = _seed(self.seed, number)
        start = time.perf_counter()
        model = self._fitted(space, observations, seed, fit)
        record["fit_seconds"] = round(time.perf_counter() - start, 6)
        if isinstance(fit, AutoSurrogate):
            record |= fit.record(space.encode(observations.codes), observations.values)
        return propose(
            model,
            space,
            q,
            outcomes=outcomes,
            pending=observations.pending,
            failed=observations.failed,
            seed=seed,
            **self.search,
        )

    def _sobol(self, space: Space, observations: Observations, number: int, q: int) -> Tensor:
        """Each trial's own point of the sequence or, where that is known already, the first later one that isn't."""
        known = torch.cat([observations.codes, observations.pending, observations.failed])
        chosen = known[:0]
        for index in range(q):
            taken = torch.cat([known, chosen])
            points = space.sobol(64 if space.size < float("inf") else 1, self.seed, skip=number + index)
            new = points[~seen(points, taken)] if len(taken) else points
            chosen = torch.cat([chosen, (new if len(new) else points)[:1]])
        return chosen


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


def _note_fallback(record: dict[str, Any], name: str, error: Exception) -> str:
    """Why a surrogate couldn't answer, after what is noted of those before it."""
    reason = f"{type(error).__name__}: {error}"
    record["fallback"] = f"{record['fallback']}; {name}: {reason}" if "fallback" in record else f"{name}: {reason}"
    return reason


def _outcomes(study: Study, observations: Observations) -> Outcomes:
    num_objectives, num_limits = len(study.directions), len(observations.constraints)
    limits: dict[int, Limit] = {num_objectives + k: ("<=", 0.0) for k in range(num_limits)}
    directions: list[Direction] = [
        "maximize" if direction is StudyDirection.MAXIMIZE else "minimize" for direction in study.directions
    ]
    return outcomes_of(num_objectives + num_limits, directions, limits)


def _seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


def _write(study: Study, trial: FrozenTrial, attributes: Mapping[str, Any]) -> None:
    for name, value in attributes.items():
        study._storage.set_trial_user_attr(trial._trial_id, name, value)
