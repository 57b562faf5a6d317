"""Metropolis–Hastings chains: what all samplers with an acceptance step share.

A sampler is one function, its *move*: from points of the chains to new ones, leaving the density invariant. Moves are plain
functions of a density, so that tempering, SMC and learned proposals can use them too. :class:`MarkovChain` makes a method
of a move: in its warm-up each chain adapts its own step size by dual averaging, and all share a mass matrix from the pooled
deviations within chains; then both are frozen, so that the stationary law is exactly the target.
"""

from __future__ import annotations

import dataclasses
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bayesnn.checks import check_fields, count, fraction, positive
from bayesnn.configured import Configured
from bayesnn.data import BayesnnWarning
from bayesnn.inference.draws import WeightPosterior
from bayesnn.inference.flat import Density, density_of, ravel, unravel
from bayesnn.inference.mcmc.adaptation import (
    FEWEST_TO_LEARN_FROM,
    DualAveraging,
    Welford,
    reasonable_step_size,
    window_ends,
)
from bayesnn.inference.mcmc.low_rank import MAX_RANK, Window
from bayesnn.inference.mcmc.mass import Diagonal, LowRank, Mass, identity_low_rank, identity_mass
from bayesnn.inference.starting_at import StartingAt
from bayesnn.inference.target import Target

MAX_ENERGY_ERROR = 1000.0  # Stan's threshold for a divergence
MASSES = ("diagonal", "low-rank", "identity")
COLLAPSED = 1e-6
"""A step size that warm-up has brought below this share of the one it began with can't be adapted."""


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
    mass: Diagonal | LowRank
    step_size: DualAveraging
    window: Welford | Window
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
    mass: str = "diagonal"

    def __post_init__(self) -> None:
        check_fields(self, count, "num_chains", "num_draws")
        check_fields(self, count, "num_warmup", least=0)
        check_fields(self, fraction, "target_acceptance")
        check_fields(self, positive, "initial_step_size")
        if self.mass not in MASSES:
            raise ValueError(f"mass must be one of {', '.join(map(repr, MASSES))}, found {self.mass!r}")

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
        """Chains at the target's initial points, with step sizes that are about right there."""
        density = density_of(target)
        point = start(density, ravel(target.initial(self.num_chains, generator), target.shapes()))
        low_rank = self.mass == "low-rank"
        mass = identity_low_rank(point.position, MAX_RANK) if low_rank else identity_mass(point.position)
        variance = getattr(target, "variance", None)
        if variance is not None:
            mass = mass._replace(**{mass._fields[0]: variance.to(point.position)})
        step_size = self._first_step_size(density, point, mass, generator)
        window = Window.start(point.position) if low_rank else Welford.start(point.position)
        return ChainState(point, mass, DualAveraging.start(step_size), window, torch.zeros((), dtype=torch.long))

    def continued(self, target: Target, earlier: WeightPosterior, parts: tuple[int, ...]) -> tuple[MarkovChain, Target]:
        """A shorter run from where one on fewer data ended: its last points, its draws' variance, its mean step size.

        Warm-up is too short to learn a mass matrix anew, and there is a fifth of the draws (our choice: of four chains, about
        as many as a network answers with). Where an earlier run has too few draws to tell a variance, warm-up is what it was.
        """
        few = len(earlier) < FEWEST_TO_LEARN_FROM * earlier.num_chains
        last = {name: earlier.by_chain(values)[:, -1] for name, values in earlier.sampled.items()}
        variance = None if few else {name: _within_chains(earlier, values) for name, values in earlier.sampled.items()}
        shorter = dataclasses.replace(
            self,
            num_warmup=self.num_warmup if few else min(self.num_warmup, FEWEST_TO_LEARN_FROM - 1),
            num_draws=-(-self.num_draws // 5),
            initial_step_size=float(earlier.statistics["step_size"].mean()),
        )
        return shorter, StartingAt(target, last, variance)

    def step(self, target: Target, state: ChainState, generator: torch.Generator) -> tuple[ChainState, ChainInfo]:
        """One move of every chain, and while warming up one step of adaptation."""
        index = int(state.num_moves)
        adapting = index < self.num_warmup
        log_step_size = state.step_size.log_step_size if adapting else state.step_size.log_average
        step_size = log_step_size.exp() if self.num_warmup else torch.full_like(log_step_size, self.initial_step_size)
        density = density_of(target)
        point, info = self.move(density, state.point, step_size, state.mass, generator)
        state = state._replace(point=point, num_moves=state.num_moves + 1)
        state = self._adapt(density, state, info.acceptance, index, generator) if adapting else state
        return state, ChainInfo(*info, step_size)

    def _adapt(
        self, density: Density, state: ChainState, acceptance: Tensor, index: int, generator: torch.Generator
    ) -> ChainState:
        point, window, mass = state.point, state.window, state.mass
        step_size = state.step_size.update(acceptance.to(point.position), self.target_acceptance)
        if index + 1 == self.num_warmup:
            self._require_adapted(step_size)
        ends = window_ends(self.num_warmup) if self.mass != "identity" else []
        if ends and index >= int(0.15 * self.num_warmup) and index < ends[-1]:
            seen = (point.position, point.gradient) if isinstance(window, Window) else (point.position,)
            window = window.update(*seen)
        if index + 1 in ends:
            mass = window.mass() if isinstance(window, Window) else Diagonal(window.variance())
            window = type(window).start(point.position)
            step_size = DualAveraging.start(self._first_step_size(density, point, mass, generator))
        return state._replace(step_size=step_size, window=window, mass=mass)

    def _first_step_size(self, density: Density, point: Point, mass: Mass, generator: torch.Generator) -> Tensor:
        step_size = point.position.new_full((self.num_chains,), self.initial_step_size)
        return reasonable_step_size(density, point, step_size, mass, generator) if self.num_warmup else step_size

    def _require_adapted(self, step_size: DualAveraging) -> None:
        """Warn of chains that reject whatever they propose; raise ValueError if it's all of them."""
        collapsed = step_size.log_average.exp() < COLLAPSED * step_size.centre.exp()
        if not bool(collapsed.any()):
            return
        message = (
            f"{type(self).__name__}: {int(collapsed.sum())} of {self.num_chains} chains have rejected their moves until their "
            "step sizes collapsed. The log density isn't smooth where they are, or its gradient isn't its own: begin "
            "elsewhere, change the model, or use float64"
        )
        if bool(collapsed.all()):
            raise ValueError(message)
        warnings.warn(message, BayesnnWarning, stacklevel=3)

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


def _within_chains(draws: WeightPosterior, values: Tensor) -> Tensor:
    """The variance of values (S, *shape) within the chains, pooled over them."""
    return draws.by_chain(values).var(1).mean(0).clamp_min(torch.finfo(values.dtype).tiny)


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
