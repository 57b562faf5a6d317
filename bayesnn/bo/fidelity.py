"""How much of an experiment is run before what it shows so far decides whether it goes on: resources and rungs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from optuna.pruners import BasePruner, HyperbandPruner, SuccessiveHalvingPruner
from optuna.study import Study

from bayesnn.checks import count, flag

ENOUGH = 3  # values at a rung, before an acquisition function looks at it


@dataclass(frozen=True)
class Fidelity:
    r"""Trials that report values on the way, and end early where these don't promise enough.

    A trial spends resource (epochs, say) one unit after the other, and ``trial.report(value, step)`` says what it is worth
    after ``step`` units, 1 being the first. At the rungs :math:`r, r \eta, r \eta^2, \dots, R` it goes on if its value is in
    the best :math:`1/\eta` of all that have got there so far (asynchronous successive halving: nobody waits for anybody).
    What all trials have reported at the rungs is modelled together, see :class:`SurrogateSampler`.

    Args:
        max_resource: R, what a whole trial spends.
        min_resource: r, before which nothing ends a trial; 1 (Li et al. and Syne Tune).
        reduction_factor: :math:`\eta`; 3 (Hyperband's and Syne Tune's).
        hyperband: whether trials take turns at where the first rung is (Hyperband's brackets), for values that say little
            early on.
        max_rows: values that are modelled at most; 300 (our choice: an exact Gaussian process is fitted in seconds). Of more,
            those of the trials that have got furthest are kept, and a random choice of the others, each trial's all together.

    Raises:
        TypeError, ValueError: for numbers that make no sense.

    Example:
        >>> Fidelity(81).rungs
        (1, 3, 9, 27, 81)

    Source: Li, Jamieson, Rostamizadeh, Gonina, Ben-tzur, Hardt, Recht and Talwalkar, A system for massively parallel
    hyperparameter tuning (MLSys 2020), algorithm 2, as Optuna's pruners do it; Li et al., Hyperband (JMLR 2018).
    """

    max_resource: int
    min_resource: int = 1
    reduction_factor: int = 3
    hyperband: bool = False
    max_rows: int = 300

    def __post_init__(self) -> None:
        count("max_resource", self.max_resource)
        count("min_resource", self.min_resource)
        count("reduction_factor", self.reduction_factor, least=2)
        flag("hyperband", self.hyperband)
        count("max_rows", self.max_rows)
        if self.max_rows < len(self.rungs):
            raise ValueError(f"max_rows must be at least {len(self.rungs)}, one for each rung, found {self.max_rows}")
        if self.min_resource > self.max_resource:
            raise ValueError(
                f"min_resource must be at most max_resource {self.max_resource}, found {self.min_resource}"
            )

    @property
    def rungs(self) -> tuple[int, ...]:
        """The resources at which trials are judged, and the whole one."""
        rungs, resource = [], self.min_resource
        while resource < self.max_resource:
            rungs.append(resource)
            resource *= self.reduction_factor
        return (*rungs, self.max_resource)

    def code(self, resource: float) -> float:
        """A resource on the log scale: 0 at the least, 1 at the whole one.

        Raises:
            ValueError: where there is one rung alone.
        """
        if self.min_resource == self.max_resource:
            raise ValueError("a fidelity with one rung has no scale of resources")
        return math.log(resource / self.min_resource) / math.log(self.max_resource / self.min_resource)

    def next_rung(self, resource: int) -> int:
        """The first rung above a resource, the last one where there is none."""
        return next((rung for rung in self.rungs if rung > resource), self.max_resource)

    def pruner(self) -> BasePruner:
        """The Optuna pruner that ends trials at the rungs: ``optuna.create_study(pruner=…)``."""
        if self.hyperband:
            return HyperbandPruner(self.min_resource, self.max_resource, self.reduction_factor)
        return SuccessiveHalvingPruner(self.min_resource, self.reduction_factor)

    def attach(self, study: Study) -> None:
        """Let a study prune by this, the same whenever it goes on.

        Raises:
            ValueError: if the study has had other rungs, or has pruned otherwise.
        """
        for name, wanted in {"rungs": list(self.rungs), "hyperband": self.hyperband}.items():
            stored = study.user_attrs.get(name)
            if stored is None:
                study.set_user_attr(name, wanted)
            elif stored != wanted:
                raise ValueError(
                    f"fidelity has {name} = {wanted}, but the stored study {study.study_name!r} has {stored}: go on with "
                    "that, or give another study_name"
                )
        study.pruner = self.pruner()
