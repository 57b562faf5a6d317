"""Warm starts: one ensemble member for each chain, then a sampler.

From a random start a chain of a network spends most of its warm-up on finding weights that fit at all, and the step size
and mass matrix that it learns on the way are those of the wrong place. Trained members lie in the posterior's bulk, or close
to it, each in a mode of its own: this is the start we recommend for networks. The sampler's stationary law is unchanged.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from bayesnn.configured import Configured
from bayesnn.inference.ensembles.deep import DeepEnsemble, DeepEnsembleState
from bayesnn.inference.network_target import NetworkTarget
from bayesnn.inference.run import Method
from bayesnn.inference.starting_at import StartingAt


class Sampler(Method, Protocol):
    """A method whose chains begin at the target's initial points."""

    @property
    def num_chains(self) -> int:
        """Chains."""
        ...


class WarmStartedState(NamedTuple):
    """The ensemble's state, and the sampler's."""

    ensemble: DeepEnsembleState
    sampler: Any


@dataclass(frozen=True)
class WarmStarted(Configured):
    """A sampler whose chains begin at the members of a deep ensemble.

    Args:
        sampler: HMC, NUTS, SGHMC … : any method with chains. The ensemble has as many members.
        ensemble: how the members are trained; its own number of members is ignored. By default they train on all rows,
            for 1000 steps.

    Raises:
        TypeError: if the sampler isn't a method with chains, or the ensemble no deep ensemble; at the start of a run, if the
            target isn't a network's.
    """

    sampler: Sampler
    ensemble: DeepEnsemble = field(default_factory=lambda: DeepEnsemble(held_out=0.0))

    def __post_init__(self) -> None:
        if isinstance(self.sampler, type) or not hasattr(self.sampler, "num_chains"):
            raise TypeError(f"sampler must be a method with chains (HMC(), NUTS(), SGHMC() …), found {self.sampler!r}")
        if not isinstance(self.ensemble, DeepEnsemble):
            raise TypeError(f"ensemble must be a DeepEnsemble(), found {self.ensemble!r}")

    @property
    def num_chains(self) -> int:
        """The sampler's."""
        return self.sampler.num_chains

    @cached_property
    def _members(self) -> DeepEnsemble:
        return dataclasses.replace(self.ensemble, num_members=self.num_chains)

    @property
    def num_steps(self) -> int:
        """The ensemble's, then the sampler's."""
        return self.ensemble.num_steps + self.sampler.num_steps

    def init(self, target: NetworkTarget, generator: torch.Generator) -> WarmStartedState:
        """The ensemble before its first step; the sampler waits."""
        if not hasattr(target, "pointwise_log_likelihood"):
            raise TypeError(
                f"WarmStarted trains networks: it needs a NetworkTarget, found {type(target).__name__}. Give any other target "
                "its starting points by StartingAt"
            )
        ensemble = self._members.init(target, generator)
        return WarmStartedState(ensemble, self.sampler.init(target, generator))

    def step(
        self, target: NetworkTarget, state: WarmStartedState, generator: torch.Generator
    ) -> tuple[WarmStartedState, Any]:
        """A step of the ensemble, or when it's trained, of the sampler."""
        if int(state.ensemble.adam.step) >= self.ensemble.num_steps:
            sampler, info = self.sampler.step(target, state.sampler, generator)
            return state._replace(sampler=sampler), info
        ensemble, info = self._members.step(target, state.ensemble, generator)
        state = state._replace(ensemble=ensemble)
        if int(ensemble.adam.step) == self.ensemble.num_steps:
            members = self._members.result(target, ensemble, {}, {}).parameters
            state = state._replace(sampler=self.sampler.init(StartingAt(target, members), generator))
        return state, info

    def keep(self, state: WarmStartedState, index: int) -> dict[str, Tensor] | None:
        """The sampler's draws."""
        index -= self.ensemble.num_steps
        return self.sampler.keep(state.sampler, index) if index >= 0 else None

    def result(
        self, target: NetworkTarget, state: WarmStartedState, draws: dict[str, Tensor], infos: dict[str, Tensor]
    ) -> Any:
        """The sampler's."""
        return self.sampler.result(target, state.sampler, draws, infos)
