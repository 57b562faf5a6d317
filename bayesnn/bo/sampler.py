"""What Optuna asks of a sampler: Bayesian optimisation with any model of this library, inside any Optuna study."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from botorch.models.model import Model as BotorchModel
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.search_space import intersection_search_space
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from bayesnn.bo.acquisition import Name
from bayesnn.bo.chain import Answer, Chain
from bayesnn.bo.fidelity import Fidelity
from bayesnn.bo.fitters import Surrogate
from bayesnn.bo.observations import all_trials
from bayesnn.bo.optimise import ONE_AT_A_TIME
from bayesnn.bo.space import Space
from bayesnn.bo.writing import write
from bayesnn.data import BayesnnWarning


class SurrogateSampler(BaseSampler):
    """An Optuna sampler that fits a surrogate model to the finished trials and tries what :func:`suggest` suggests.

    The first trials come from a scrambled Sobol sequence. Running trials count as pending. Trials that failed or returned an
    infinite value are left out of the fit and not tried again, and where there are some, what is suggested is weighed by the
    probability that it succeeds; pruned ones count as pending. Constraints that trials set (``trial.set_constraint``) are
    modelled beside the objectives, if all finished trials have them. Minimises or maximises, one objective or several.
    Values far worse than all others are drawn in before a fit, so that they don't make the others look alike. A
    parameter that isn't in all finished trials is drawn uniformly, by itself, and so is everything in the very
    first trial of a study whose space isn't given. Bayesian neural networks are fitted from scratch when there are 10, 15,
    22, 33, … trials, and in between go on from there (:meth:`bayesnn.BNN.refit`). The same seed and the same trials give the
    same next trial, also after a restart and in another process.

    What was done is kept with each trial, as user attributes: ``sampler`` ("sobol" or "surrogate"), ``surrogate`` (for
    "auto": the chosen one, with ``surrogate_scores`` and, of how many rows they are, ``surrogate_scored_on``),
    ``fit_seconds``, ``suggest_seconds``, ``acquisition`` and ``acquisition_value``, ``num_observed``, ``num_pending``,
    ``num_failed``, ``independent`` (the parameters drawn by themselves) and, where the surrogate couldn't answer and a
    Gaussian process or the Sobol sequence took its place, ``fallback`` with the reason; that is also a warning. So are
    ``constraints_ignored``, those that some finished trials lack, and ``num_outside``, how many finished trials aren't in the
    space, and ``num_drawn_in``, how many trials had outlying bad values.

    With a ``fidelity``, what trials report on the way (``trial.report(value, step)``) is modelled too, that of the running and
    the pruned ones included: one model over configurations and resources, fitted to the values at the rungs, which a pruner
    (``fidelity.pruner()``) needs as well. Each running trial is pending at its next rung. The acquisition function looks at
    the highest rung at which at least three trials have a value (BOHB's rule, as in MOBSTER; from memory), and compares all
    configurations there. The improvement expected at the running trials' next values, on average over these, is the same as
    if they were pending at that rung, and so it is computed; "mes" and "kg" count what the next values tell. The surrogate
    "gp" is then :class:`bayesnn.processes.LearningCurveProcess`, also where it takes another one's place; any other gets the
    resource on the log scale, 0 to 1, as one more input. For one objective. The record then has ``num_rows``, how many values
    were modelled (``num_observed`` is of how many trials), ``num_left_out``, the trials that were too many, and
    ``resource``, the rung that the acquisition function looked at. Trials count for ``num_startup`` when they have a value.

    Args:
        surrogate: a name among ``bayesnn.surrogates()``; or "auto", the one of several that predicts best
            (:class:`AutoSurrogate`); or an unfitted model, which is copied for each fit; or a function from features (n, d)
            and values (n, m) to a fitted BoTorch model.
        num_startup: how many trials must have finished before the surrogate is used.
        seed: of every random draw.
        space: the search space, if it is known beforehand; otherwise it is what the finished trials have in common.
        fidelity: the resources of trials that report values on the way and may be pruned; None: what trials end with is all.
        acquisition, reference_point, beta, num_restarts, raw_samples, num_samples, seconds: as in :func:`suggest`.

    Raises:
        TypeError, ValueError: for a surrogate that doesn't exist, and numbers that make no sense.

    Example:
        >>> study = optuna.create_study(sampler=SurrogateSampler("nngp", seed=0))
        >>> study.optimize(objective, n_trials=50)

        >>> fidelity = Fidelity(max_resource=81)
        >>> study = optuna.create_study(sampler=SurrogateSampler("gp", fidelity=fidelity), pruner=fidelity.pruner())

    Source, for the fidelity: Klein, Tiao, Lienart, Archambeau and Seeger, Model-based asynchronous hyperparameter and neural
    architecture search (2020), "MOBSTER".
    """

    def __init__(
        self,
        surrogate: Surrogate = "nngp",
        *,
        num_startup: int = 10,
        seed: int = 0,
        space: Space | Mapping[str, Any] | None = None,
        fidelity: Fidelity | None = None,
        acquisition: Name = "auto",
        reference_point: Sequence[float] | None = None,
        beta: float = 4.0,
        num_restarts: int = 8,
        raw_samples: int = 256,
        num_samples: int = 256,
        seconds: float | None = None,
    ) -> None:
        if fidelity is not None and not isinstance(fidelity, Fidelity):
            raise TypeError(f"fidelity must be a Fidelity, found {type(fidelity).__name__}")
        self.space = space if isinstance(space, Space) or space is None else Space(space)
        search: dict[str, Any] = {
            "acquisition": acquisition,
            "reference_point": reference_point,
            "beta": beta,
            "num_restarts": num_restarts,
            "raw_samples": raw_samples,
            "num_samples": num_samples,
            "seconds": seconds,
        }
        self.chain = Chain(surrogate, num_startup, seed, search, fidelity)
        self.num_startup, self.seed, self.surrogate_name = self.chain.num_startup, self.chain.seed, self.chain.name
        self._warned_of: set[str] = set()

    # What Optuna asks --------------------------------------------------------------------------------------------------

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The parameters that all finished trials have, or those of the given space."""
        if self.space is not None:
            return self.space.distributions()
        common = intersection_search_space(all_trials(study))
        return {name: distribution for name, distribution in common.items() if not distribution.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next configuration, jointly over the parameters of ``search_space``."""
        if not search_space or set(search_space) & set(trial.params):  # ``ask`` has chosen them
            return {}
        space = Space.from_distributions(search_space) if self.space is None else self.space
        (answer,) = self.answers(study, space, trial.number, 1)
        write(study._storage, trial._trial_id, answer.record)
        return answer.configuration

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A value drawn uniformly, for a parameter that not all finished trials have."""
        current = study._storage.get_trial(trial._trial_id)
        alone = [*current.user_attrs.get("independent", []), param_name]
        write(study._storage, trial._trial_id, {"independent": alone})
        num_finished = sum(each.state is TrialState.COMPLETE for each in all_trials(study))
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

    # What else is asked ------------------------------------------------------------------------------------------------

    def fit(self, study: Study, space: Space) -> BotorchModel:
        """The surrogate, fitted to all finished trials of a study.

        Raises:
            ValueError: if no trial has finished.
        """
        return self.chain.fit(study, space)

    def answers(self, study: Study, space: Space, number: int, q: int) -> list[Answer]:
        """What trial ``number`` and the q - 1 after it should try, jointly, and how that was found."""
        with ONE_AT_A_TIME:  # studies run in threads, too: ``n_jobs=2``
            return self.chain.answers(study, space, number, q)
