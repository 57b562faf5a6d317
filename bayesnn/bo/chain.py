"""A surrogate, then BoTorch's Gaussian process, then the Sobol sequence: whichever answers first, with a record of how."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from botorch.models.model import Model as BotorchModel
from optuna.study import Study, StudyDirection
from torch import Tensor

from bayesnn.bo.acquisition import check_acquisition
from bayesnn.bo.at_resource import AtResource, ModelAtResource
from bayesnn.bo.auto import AutoSurrogate
from bayesnn.bo.curves import observe_curves
from bayesnn.bo.fidelity import Fidelity
from bayesnn.bo.fitters import Fitter, GoingOn, Surrogate, fitter_of
from bayesnn.bo.observations import Observations, observe
from bayesnn.bo.optimise import SpaceExhaustedError, seen
from bayesnn.bo.outcomes import Direction, Limit, Outcomes, outcomes_of
from bayesnn.bo.outliers import drawn_in
from bayesnn.bo.space import Configuration, Space
from bayesnn.bo.suggest import Proposal, check_reference_point, check_search, propose
from bayesnn.checks import count
from bayesnn.data import BayesnnWarning

FALLBACK = "gp"  # where a surrogate can't answer


class Answer(NamedTuple):
    """What to try, and how that was found: the trial's record."""

    configuration: Configuration
    record: dict[str, Any]


class _Sight(NamedTuple):
    """What a study's trials say.

    Fields:
        space: that is searched.
        observations: with codes of that space.
        num_observed: how many trials have values.
        left_out: codes of trials whose values aren't modelled, because there are too many.
        record: what a trial's record says of it.
        undrawn: the values before outliers were drawn in; None: they are what they were.
    """

    space: Space
    observations: Observations
    num_observed: int
    left_out: Tensor
    record: dict[str, Any]
    undrawn: Tensor | None = None

    def drawn_in(self, outcomes: Outcomes) -> _Sight:
        """With outliers among the bad values drawn in; after each resource, its own: early values are worse as a rule."""
        codes, values = self.observations.codes, self.observations.values.clone()
        resources = codes[:, -1] if isinstance(self.space, AtResource) else torch.zeros(len(codes))
        for resource in resources.unique():
            values[resources == resource] = drawn_in(values[resources == resource], outcomes)
        return self._replace(observations=self.observations._replace(values=values), undrawn=self.observations.values)


class Chain:
    """What answers for the trials of a study, from those before them.

    Args:
        surrogate, num_startup, seed, fidelity: as in :class:`SurrogateSampler`.
        search: the settings of :func:`suggest`, by name.

    Raises:
        TypeError, ValueError: for a surrogate that doesn't exist, and numbers that make no sense.
    """

    def __init__(
        self, surrogate: Surrogate, num_startup: int, seed: int, search: Mapping[str, Any], fidelity: Fidelity | None
    ) -> None:
        num_startup, seed = count("num_startup", num_startup), count("seed", seed, least=0)
        check_search(**search)
        self.surrogate, self.num_startup, self.seed, self.search = surrogate, num_startup, seed, search
        # With one rung, there is nothing to model but what trials end with.
        self.fidelity = None if fidelity is None or len(fidelity.rungs) == 1 else fidelity
        self.name, self._fit = fitter_of(surrogate, self.fidelity, seed)
        self._warned_of: set[str] = set()

    def fit(self, study: Study, space: Space) -> BotorchModel:
        """The surrogate, fitted to all finished trials of a study, outliers among the bad values drawn in.

        With a fidelity, it is of outcomes after the whole resource.

        Raises:
            ValueError: if no trial has finished.
        """
        sight = self._look(study, space)
        if not sight.num_observed:
            raise ValueError("no trial of this study has finished with a finite value, so there is nothing to fit")
        outcomes = _outcomes(study, sight.observations)
        model = self._fitted(sight.drawn_in(outcomes), outcomes, self.seed, self._fit)
        if self.fidelity is None:
            return model
        return ModelAtResource(model, self.fidelity.code(self.fidelity.max_resource))

    def _look(self, study: Study, space: Space, number: int | None = None) -> _Sight:
        """At all trials but the one of that number."""
        if self.fidelity is None:
            observations = observe(study, space, exclude=number)
            return _Sight(space, observations, len(observations.codes), observations.codes[:0], {})
        if len(study.directions) > 1:
            raise ValueError(f"fidelity must be None for several objectives, found {len(study.directions)} of them")
        curves = observe_curves(study, space, self.fidelity, self.seed, exclude=number)
        resource, first = (self.fidelity.code(each) for each in (curves.resource, self.fidelity.rungs[0]))
        observations, left_out = curves.observations, curves.left_out
        record = {"num_rows": len(observations.codes), "num_left_out": len(left_out), "resource": curves.resource}
        return _Sight(AtResource(space, resource, first), observations, curves.num_trials, left_out, record)

    def _fitted(self, sight: _Sight, outcomes: Outcomes, seed: int, fit: Fitter) -> BotorchModel:
        X, Y = sight.space.encode(sight.observations.codes), sight.observations.values
        undrawn = Y if sight.undrawn is None else sight.undrawn
        first = (
            {"of_first": lambda num_rows: drawn_in(undrawn[:num_rows], outcomes)} if isinstance(fit, GoingOn) else {}
        )
        with warnings.catch_warnings():
            # A category that hasn't been tried yet is a constant column, nothing to tell the user about at each trial.
            warnings.filterwarnings("ignore", message="X: column", category=BayesnnWarning)
            return fit(X, Y, seed, **first)

    def answers(self, study: Study, space: Space, number: int, q: int) -> list[Answer]:
        """What trial ``number`` and the q - 1 after it should try, jointly, and how that was found.

        The surrogate is asked first, then BoTorch's Gaussian process, then the Sobol sequence.
        """
        start = time.perf_counter()
        sight = self._look(study, space, number)
        observations = sight.observations
        record: dict[str, Any] = {
            "num_observed": sight.num_observed,
            "num_pending": len(observations.pending),
            "num_failed": len(observations.failed),
            **sight.record,
        }
        self._tell_what_is_left_out(observations, record)
        outcomes = _outcomes(study, observations)
        # What the caller got wrong is the caller's to mend; only what a surrogate can't do is made up for.
        check_acquisition(self.search["acquisition"], outcomes)
        check_reference_point(self.search["reference_point"], outcomes)
        drawn = sight.drawn_in(outcomes)
        num_drawn_in = int((drawn.observations.values != observations.values).any(-1).sum())
        if num_drawn_in:
            record["num_drawn_in"] = num_drawn_in
        found = None
        if sight.num_observed >= self.num_startup:
            found = self._by_surrogate(drawn, outcomes, number, q, record)
        if found is None:
            record["sampler"] = "sobol"
            codes, records = self._sobol(sight, number, q), [dict(record) for _ in range(q)]
        else:
            record["sampler"] = "surrogate"
            codes = found.codes
            records = [
                record | {"acquisition": found.acquisition, "acquisition_value": value} for value in found.values
            ]
        seconds = round((time.perf_counter() - start) / q, 6)
        configurations = sight.space.configurations(codes)
        return [
            Answer(configuration, each | {"suggest_seconds": seconds})
            for configuration, each in zip(configurations, records, strict=True)
        ]

    def _by_surrogate(
        self, sight: _Sight, outcomes: Outcomes, number: int, q: int, record: dict[str, Any]
    ) -> Proposal | None:
        fitters = [(self.name, self._fit)]
        if self.surrogate != FALLBACK:
            fitters.append((FALLBACK, fitter_of(FALLBACK, self.fidelity, self.seed)[1]))
        for name, fit in fitters:
            record["surrogate"] = name
            try:
                return self._propose(fit, sight, outcomes, number, q, record)
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
        fit: Fitter,
        sight: _Sight,
        outcomes: Outcomes,
        number: int,
        q: int,
        record: dict[str, Any],
    ) -> Proposal:
        seed = _seed(self.seed, number)
        start = time.perf_counter()
        model = self._fitted(sight, outcomes, seed, fit)
        record["fit_seconds"] = round(time.perf_counter() - start, 6)
        if isinstance(fit, AutoSurrogate):
            record |= fit.record(sight.space.encode(sight.observations.codes), sight.observations.values)
        return propose(
            model,
            sight.space,
            q,
            outcomes=outcomes,
            pending=sight.observations.pending,
            failed=sight.observations.failed,
            others=sight.left_out,
            seed=seed,
            **self.search,
        )

    def _sobol(self, sight: _Sight, number: int, q: int) -> Tensor:
        """Each trial's own point of the sequence or, where that is known already, the first later one that isn't."""
        space, observations = sight.space, sight.observations
        codes = [observations.codes, observations.pending, observations.failed, sight.left_out]
        known = space.compared(torch.cat(codes))
        chosen = known[:0]
        for index in range(q):
            taken = torch.cat([known, chosen])
            points = space.sobol(64 if space.size < float("inf") else 1, self.seed, skip=number + index)
            new = points[~seen(points, taken)] if len(taken) else points
            chosen = torch.cat([chosen, (new if len(new) else points)[:1]])
        return chosen


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
