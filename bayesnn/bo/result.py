"""What an optimisation found."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from botorch.models.model import Model as BotorchModel
from botorch.utils.multi_objective.hypervolume import Hypervolume, infer_reference_point
from botorch.utils.multi_objective.pareto import is_non_dominated
from matplotlib.figure import Figure
from optuna.study import Study
from torch import Tensor

from bayesnn.bo.evaluations import Evaluation, history_of
from bayesnn.bo.goals import Goals
from bayesnn.bo.observations import observe
from bayesnn.bo.pictures import convergence, trade_offs
from bayesnn.bo.sampler import SurrogateSampler
from bayesnn.bo.space import Configuration, Space
from bayesnn.bo.surrogate_pictures import MAX_PAIRED, pairs, slices, view_of
from bayesnn.checks import count
from bayesnn.data import BayesnnWarning


@dataclass(frozen=True, repr=False)
class Result:
    """What an optimisation found.

    Fields:
        history: every evaluation, in order, the failed ones too.
        goals: the objectives and constraints.
        space: the search space.
        study: the Optuna study, for its plots and for going on.
        sampler: what chose the configurations.
    """

    history: tuple[Evaluation, ...]
    goals: Goals
    space: Space
    study: Study
    sampler: SurrogateSampler = field(compare=False)

    @property
    def best(self) -> Evaluation:
        """The best evaluation of one objective among those that keep the constraints.

        If none does, it is the one that breaks them least: with the smallest sum of excesses, each as a share of the largest
        excess found.

        Raises:
            ValueError: if there are several objectives: none need be the best at all of them, see :attr:`front`.
        """
        if len(self.goals.directions) > 1:
            raise ValueError(f"there is no single best for {', '.join(self.goals.directions)}: see the result's front")
        succeeded = [evaluation for evaluation in self.history if evaluation.outcomes]
        if self.feasible:
            kept = [evaluation for evaluation in succeeded if evaluation.feasible]
            return min(kept, key=lambda evaluation: -self._merits([evaluation]).item())
        excesses = np.array([list(self.goals.excesses(evaluation.outcomes).values()) for evaluation in succeeded])
        excesses = excesses.clip(min=0)
        largest = excesses.max(0)
        return succeeded[int((excesses / np.where(largest > 0, largest, 1)).sum(1).argmin())]

    @property
    def x(self) -> Configuration:
        """The configuration of :attr:`best`."""
        return self.best.x

    @property
    def value(self) -> float:
        """The value of :attr:`best`."""
        value = self.best.value
        assert value is not None
        return value

    @property
    def feasible(self) -> bool:
        """Whether any evaluation keeps all constraints."""
        return any(evaluation.feasible for evaluation in self.history)

    @property
    def front(self) -> tuple[Evaluation, ...]:
        """The Pareto front: feasible evaluations than which none is better at one objective and as good at all others.

        Of one objective, those with the best value. Empty if nothing is feasible.
        """
        kept = [evaluation for evaluation in self.history if evaluation.feasible]
        if not kept:
            return ()
        on_front = is_non_dominated(self._merits(kept), deduplicate=False).tolist()
        return tuple(evaluation for evaluation, best in zip(kept, on_front, strict=True) if best)

    @property
    def num_failed(self) -> int:
        """How many evaluations failed."""
        return sum(evaluation.failure is not None for evaluation in self.history)

    @property
    def num_pruned(self) -> int:
        """How many evaluations were ended early."""
        return sum(evaluation.pruned for evaluation in self.history)

    @property
    def best_so_far(self) -> np.ndarray:
        """The best feasible value of one objective after each evaluation, (n,); NaN before the first.

        Raises:
            ValueError: if there are several objectives: see :meth:`hypervolume_so_far`.
        """
        if len(self.goals.directions) > 1:
            raise ValueError(f"there is no single best for {', '.join(self.goals.directions)}: see hypervolume_so_far")
        best = np.fmax if "maximize" in self.goals.directions.values() else np.fmin
        values = [
            math.nan if evaluation.value is None or not evaluation.feasible else evaluation.value
            for evaluation in self.history
        ]
        return best.accumulate(np.array(values, dtype=float))

    def hypervolume_so_far(self, reference_point: Sequence[float] | None = None) -> np.ndarray:
        """How much of the space of outcomes is dominated by the feasible evaluations, after each evaluation, (n,).

        It is the volume of what is worse than an evaluation and better than the reference point, in the product of the
        objectives' units (computed by BoTorch).

        Args:
            reference_point: a value for each objective, in its own units; by default that of the search, else a tenth of
                the final front's range worse than its worst values. To compare two results, give both the same one.

        Raises:
            ValueError: if the reference point hasn't one finite value for each objective.
        """
        given = self.sampler.chain.search["reference_point"] if reference_point is None else reference_point
        if given is None:
            if not self.front:
                return np.zeros(len(self.history))
            reference = infer_reference_point(self._merits(self.front))
        else:
            if len(given) != len(self.goals.directions) or not np.isfinite(given).all():
                raise ValueError(
                    f"reference_point must have a finite value for each of {', '.join(self.goals.directions)}, found {given!r}"
                )
            reference = self._signs * torch.tensor(list(given), dtype=torch.float64)
        volume = Hypervolume(reference)
        found, merits = [], reference.new_empty(0, len(reference))
        for evaluation in self.history:
            if evaluation.feasible:
                merits = torch.cat([merits, self._merits([evaluation])])
                merits = merits[is_non_dominated(merits)]
            found.append(volume.compute(merits) if len(merits) else 0.0)
        return np.array(found)

    @cached_property
    def model(self) -> BotorchModel:
        """The surrogate, fitted to all evaluations: ``result.model.posterior(result.space.features([x]))``."""
        return self.sampler.fit(self.study, self.space)

    # Pictures: Matplotlib figures, which notebooks show and ``savefig`` writes ------------------------------------------

    def plot_convergence(self) -> Figure:
        """Each objective's values by trial, the best so far, and where trials failed."""
        return convergence(self.study)

    def plot_slices(self, objective: int | str = 0) -> Figure:
        """The surrogate along each parameter, the others at the best evaluation: its mean ± 2 standard deviations.

        The standard deviation is that of the function, without the noise of one evaluation.

        Args:
            objective: which one, its name or its number, counted from 0.

        Raises:
            TypeError, ValueError: if there is none such.
        """
        index = self._index(objective)
        view = view_of(self.model, self.study, self.space, observe(self.study, self.space), index)
        return slices(view, self.space.names, list(self.goals.directions)[index])

    def plot_pairs(self, objective: int | str = 0) -> Figure:
        """The surrogate over every two of the first five parameters: mean (below), standard deviation (above).

        Args:
            objective: which one, its name or its number, counted from 0.

        Raises:
            TypeError, ValueError: if there is none such, or there is only one parameter.
        """
        if len(self.space.names) == 1:
            raise ValueError("plot_pairs needs two parameters at least, found one: see plot_slices")
        view = view_of(self.model, self.study, self.space, observe(self.study, self.space), self._index(objective))
        return pairs(view, self.space.names[:MAX_PAIRED])

    def plot_front(self) -> Figure:
        """Every two objectives against each other, with the Pareto front.

        Raises:
            ValueError: if there is only one objective.
        """
        if len(self.goals.directions) == 1:
            raise ValueError("plot_front needs two objectives at least, found one: see plot_convergence")
        return trade_offs(self.study)

    def __repr__(self) -> str:
        failed = f", {self.num_failed} failed" if self.num_failed else ""
        pruned = f", {self.num_pruned} ended early" if self.num_pruned else ""
        evaluations = f"{len(self.history)} evaluations{failed}{pruned}"
        if len(self.goals.directions) > 1:
            return f"Result({len(self.front)} on the front of {', '.join(self.goals.directions)}, {evaluations})"
        infeasible = "" if self.feasible else ", no constraint-keeping one"
        return f"Result(value={self.value:.6g}, x={self.x}, {evaluations}{infeasible})"

    def _index(self, objective: int | str) -> int:
        names = list(self.goals.directions)
        index = names.index(objective) if objective in names else objective
        if isinstance(index, str) or count("objective", index, least=0) >= len(names):
            raise ValueError(f"objective must be one of {', '.join(names)}, or its number from 0, found {objective!r}")
        return int(index)

    @property
    def _signs(self) -> Tensor:
        signs = [1.0 if direction == "maximize" else -1.0 for direction in self.goals.directions.values()]
        return torch.tensor(signs, dtype=torch.float64)

    def _merits(self, evaluations: Sequence[Evaluation]) -> Tensor:
        """The objectives (n, m), signed so that more is better."""
        values = [self.goals.values(evaluation.outcomes) for evaluation in evaluations]
        return self._signs * torch.tensor(values, dtype=torch.float64)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during an optimisation; ``result`` is what had been found, None if nothing."""

    def __init__(self, message: str, result: Result | None) -> None:
        super().__init__(message)
        self.result = result


def result_of(study: Study, space: Space, sampler: SurrogateSampler, goals: Goals) -> Result:
    """A study's result; warns of failed evaluations, and if none keeps the constraints.

    Raises:
        RuntimeError: if no evaluation succeeded.
    """
    result = Result(history_of(study, space, goals), goals, space, study, sampler)
    failures = [evaluation.failure for evaluation in result.history if evaluation.failure is not None]
    if not any(evaluation.outcomes for evaluation in result.history):
        if not result.history:
            raise RuntimeError("nothing was evaluated: the timeout, or a callback that stops, came first")
        reason = f"; the last one: {failures[-1]}" if failures else ""
        raise RuntimeError(f"no evaluation succeeded, {len(failures)} failed{reason}")
    if failures:
        warnings.warn(
            f"{len(failures)} of {len(result.history)} evaluations failed; the last one: {failures[-1]}",
            BayesnnWarning,
            stacklevel=4,
        )
    if not result.feasible:
        limits = ", ".join(f"{name} {sign} {bound:g}" for name, (sign, bound) in goals.limits.items())
        warnings.warn(f"no evaluation keeps all constraints: {limits}", BayesnnWarning, stacklevel=4)
    return result
