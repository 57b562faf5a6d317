"""Metropolis–Hastings chains: what all samplers with an acceptance step share.

A sampler is one function, its *move*: from points of the chains to new ones, leaving the density invariant. Moves are plain
functions of a density, so that tempering, SMC and learned proposals can use them too. :class:`MarkovChain` makes a method
of a move: in its warm-up each chain adapts its own step size by dual averaging, and all share a mass matrix from the pooled
variance within chains; then both are frozen, so that the stationary law is exactly the target.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bayesnn.configured import Configured
from bayesnn.data import BayesnnWarning
from bayesnn.inference.draws import WeightPosterior
from bayesnn.inference.flat import Density, density_of, ravel, unravel
from bayesnn.inference.mcmc.adaptation import DualAveraging, Welford, window_ends
from bayesnn.inference.mcmc.mass import Diagonal, Mass
from bayesnn.inference.target import Target

MAX_ENERGY_ERROR = 1000.0  # Stan's threshold for a divergence


class Point(NamedTuple):
    """Where the chains are: positions (C, P) with their log density (C,) and its gradient (C, P)."""

    position: Tensor
    log_density: Tensor
    gradient: Tensor


class MoveInfo(NamedTuple):
    """Of one move, each (C,): acceptance probability, whether it diverged (0 or 1), energy, gradients it took."""

    acceptance: Tensor
    diverging: Tensor
    energy: Tensor
    num_gradients: Tensor


class ChainState(NamedTuple):
    """The chains' points, and what warm-up has learned."""

    point: Point
    mass: Diagonal
    step_size: DualAveraging
    variance: Welford
    num_moves: Tensor


class ChainInfo(NamedTuple):
    """Of one step, each (C,): acceptance probability, divergence, energy, gradients taken, step size."""

    acceptance: Tensor
    diverging: Tensor
    energy: Tensor
    num_gradients: Tensor
    step_size: Tensor


@dataclass(frozen=True)
class MarkovChain(Configured, ABC):
    """A method made of a move; see the samplers for the arguments."""

    num_chains: int = 4
    num_warmup: int = 300
    num_draws: int = 300
    target_acceptance: float = 0.8
    initial_step_size: float = 0.01

    def __post_init__(self) -> None:
        for name in ("num_chains", "num_draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.num_warmup < 0:
            raise ValueError(f"num_warmup must be at least 0, found {self.num_warmup}")
        if not 0 < self.target_acceptance < 1:
            raise ValueError(f"target_acceptance must lie in (0, 1), found {self.target_acceptance}")
        if not self.initial_step_size > 0:
            raise ValueError(f"initial_step_size must be positive, found {self.initial_step_size}")

    @abstractmethod
    def move(
        self, density: Density, point: Point, step_size: Tensor, mass: Mass, generator: torch.Generator
    ) -> tuple[Point, MoveInfo]:
        """One move of every chain, leaving the density invariant; step_size is (C,)."""

    @property
    def num_steps(self) -> int:
        """Warm-up and draws."""
        return self.num_warmup + self.num_draws

    def init(self, target: Target, generator: torch.Generator) -> ChainState:
        """Chains at the target's initial points."""
        point = start(density_of(target), ravel(target.initial(self.num_chains, generator)))
        return ChainState(
            point,
            Diagonal(torch.ones_like(point.position[:1])),
            DualAveraging.start(point.position.new_full((self.num_chains,), self.initial_step_size)),
            Welford.start(point.position),
            torch.zeros((), dtype=torch.long),
        )

    def step(self, target: Target, state: ChainState, generator: torch.Generator) -> tuple[ChainState, ChainInfo]:
        """One move of every chain, and while warming up one step of adaptation."""
        index = int(state.num_moves)
        adapting = index < self.num_warmup
        log_step_size = state.step_size.log_step_size if adapting else state.step_size.log_average
        step_size = log_step_size.exp() if self.num_warmup else torch.full_like(log_step_size, self.initial_step_size)
        point, info = self.move(density_of(target), state.point, step_size, state.mass, generator)
        state = state._replace(point=point, num_moves=state.num_moves + 1)
        state = self._adapt(state, info.acceptance, index) if adapting else state
        return state, ChainInfo(*info, step_size)

    def _adapt(self, state: ChainState, acceptance: Tensor, index: int) -> ChainState:
        position = state.point.position
        step_size = state.step_size.update(acceptance.to(position), self.target_acceptance)
        ends = window_ends(self.num_warmup)
        variance, mass = state.variance, state.mass
        if ends and index >= int(0.15 * self.num_warmup) and index < ends[-1]:
            variance = variance.update(position)
        if index + 1 in ends:
            mass = Diagonal(variance.variance())
            variance = Welford.start(position)
            step_size = DualAveraging.start(step_size.log_average.exp())
        return state._replace(step_size=step_size, variance=variance, mass=mass)

    def keep(self, state: ChainState, index: int) -> dict[str, Tensor] | None:
        """The positions after warm-up."""
        return {"position": state.point.position} if index >= self.num_warmup else None

    def result(
        self, target: Target, state: ChainState, draws: dict[str, Tensor], infos: dict[str, Tensor]
    ) -> WeightPosterior:
        """The draws of all chains, chain by chain; warns if more than 1 % of them diverged."""
        position = draws["position"].transpose(0, 1).flatten(0, 1)
        warn_of_divergences(type(self).__name__, infos["diverging"], "Raise target_acceptance or num_warmup")
        return WeightPosterior(unravel(position, target.shapes()), self.num_chains, statistics=infos)


def warn_of_divergences(name: str, diverging: Tensor, advice: str) -> None:
    """Warn if more than 1 % of the trajectories diverged."""
    share = float(diverging.mean())
    if share > 0.01:
        warnings.warn(
            f"{name}: {share:.1%} of the trajectories after warm-up diverged; the draws may miss parts of the posterior. "
            f"{advice}, or use a prior with lighter tails",
            BayesnnWarning,
            stacklevel=3,
        )


def start(density: Density, position: Tensor) -> Point:
    """The point at a position (C, P).

    Raises:
        ValueError: if the log density or its gradient isn't finite there.
    """
    point = Point(position, *density(position))
    if not bool(torch.isfinite(point.log_density).all() and torch.isfinite(point.gradient).all()):
        raise ValueError("the log density or its gradient isn't finite at the initial points")
    return point


def accept(
    old: Point, new: Point, energy: Tensor, new_energy: Tensor, generator: torch.Generator, num_gradients: int
) -> tuple[Point, MoveInfo]:
    """The Metropolis–Hastings choice between two points by their energies, (C,) in float64.

    A NaN energy (an overflow on the way) counts as infinite: the new point is rejected and reported as a divergence.
    """
    error = (new_energy - energy).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf)
    acceptance = (-error).clamp_max(0).exp()
    accepted = torch.rand(len(energy), generator=generator, dtype=torch.float64) < acceptance
    column = accepted.unsqueeze(-1)
    point = Point(
        torch.where(column, new.position, old.position),
        torch.where(accepted, new.log_density, old.log_density),
        torch.where(column, new.gradient, old.gradient),
    )
    diverging = (error > MAX_ENERGY_ERROR).double()
    energy = torch.where(accepted, new_energy, energy)
    return point, MoveInfo(acceptance, diverging, energy, torch.full_like(acceptance, num_gradients))
