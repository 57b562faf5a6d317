r"""Microcanonical Langevin Monte Carlo (Robnik, De Luca, Silverstein and Seljak 2023; Robnik and Seljak 2024), unadjusted.

The isokinetic dynamics (:mod:`bayesnn.inference.mcmc.isokinetic`), whose direction forgets itself over a time L: after each
step of size :math:`\epsilon`

.. math:: u \leftarrow (u + \nu z) / |u + \nu z|, \qquad \nu^2 = (e^{2\epsilon / L} - 1) / P,

with standard normal z. Exact dynamics would have :math:`\pi` as their stationary law. Steps of a finite size are not
corrected, so that the law is biased, by an order of :math:`\epsilon^2`; the step size is such that the variance of a step's
energy error is a given one for each parameter. For an exact law use :class:`AdjustedMCLMC`.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bayesnn.checks import check_fields, count, positive
from bayesnn.configured import Configured
from bayesnn.data import BayesnnWarning
from bayesnn.inference.draws import WeightPosterior
from bayesnn.inference.flat import density_of, fused, ravel, unravel
from bayesnn.inference.mcmc.adaptation import Welford, window_ends
from bayesnn.inference.mcmc.adjusted_mclmc import check_directions
from bayesnn.inference.mcmc.chain import MAX_ENERGY_ERROR, Point, start, warn_of_divergences
from bayesnn.inference.mcmc.isokinetic import isokinetic_step, random_direction, refresh
from bayesnn.inference.mcmc.mass import Diagonal
from bayesnn.inference.target import Target

MAX_CHANGE = 1e10  # of a step size during warm-up, in either direction


class EnergyErrors(NamedTuple):
    """Step sizes, one for each chain, that bring the energy's errors to a wanted variance; every field is (C,)."""

    step_size: Tensor
    weighted_sum: Tensor
    weights: Tensor

    @classmethod
    def start(cls, step_size: Tensor) -> EnergyErrors:
        """Begin at these step sizes."""
        return cls(step_size, torch.zeros_like(step_size), torch.zeros_like(step_size))

    def update(self, variance_ratio: Tensor) -> EnergyErrors:
        """One step whose squared energy error was this multiple of the wanted variance.

        Errors grow with the cube of the step size, so that each step estimates the right size as epsilon ratio^(-1/6);
        estimates are averaged with weights that fall for ratios far from 1, and are forgotten over 150 steps (Robnik et
        al. 2023, section 3.2.3). The size at most doubles at once; a step that failed (a ratio that isn't finite) takes a
        fifth off it.
        """
        failed = ~torch.isfinite(variance_ratio)
        ratio = torch.where(failed, 1.0, variance_ratio).clamp(1e-8, 1e8)
        weight = (-0.5 * (ratio.log() / (6 * 1.5)).square()).exp().to(self.step_size)
        estimate = ratio.to(self.step_size) / self.step_size**6
        decay = 149 / 151
        weighted_sum = torch.where(failed, self.weighted_sum, decay * self.weighted_sum + weight * estimate)
        weights = torch.where(failed, self.weights, decay * self.weights + weight)
        proposed = (weighted_sum / weights) ** (-1 / 6)
        step_size = torch.where(failed, 0.8 * self.step_size, torch.minimum(proposed, 2 * self.step_size))
        return EnergyErrors(step_size, weighted_sum, weights)


class MCLMCState(NamedTuple):
    """The chains' points and directions, and what warm-up has learned."""

    point: Point
    direction: Tensor
    mass: Diagonal
    tuning: EnergyErrors
    variance: Welford
    num_moves: Tensor


class MCLMCInfo(NamedTuple):
    """Of the steps since the last draw, each (C,): mean squared energy error / P, share that diverged, energy, step size."""

    energy_error_variance: Tensor
    diverging: Tensor
    energy: Tensor
    num_gradients: Tensor
    step_size: Tensor


@dataclass(frozen=True)
class MCLMC(Configured):
    r"""Unadjusted microcanonical Langevin Monte Carlo.

    Its stationary law is the target's up to a bias that falls with ``energy_error_variance``.

    Args:
        num_chains: chains, vectorised; 4 so that R-hat can be trusted.
        num_warmup: draws that adapt and are thrown away.
        num_draws: draws kept, for each chain.
        thinning: steps (and gradients) between two draws.
        energy_error_variance: wanted variance of a step's energy error, for each parameter; 5e-4, the paper's. The bias
            falls with it.
        decoherence: L, the time over which a direction is forgotten, in units of the posterior's standard deviations after
            preconditioning; 1, the paper's :math:`\sqrt P` in its units.
        initial_step_size: where the tuning begins; with no warm-up, the step size.

    Raises:
        ValueError: if a count or size isn't positive; at the start of a run, if the target has a single parameter; after
            warm-up, if no step size has the wanted energy error.
    """

    num_chains: int = 4
    num_warmup: int = 300
    num_draws: int = 300
    thinning: int = 10
    energy_error_variance: float = 5e-4
    decoherence: float = 1.0
    initial_step_size: float = 0.01

    def __post_init__(self) -> None:
        check_fields(self, count, "num_chains", "num_draws", "thinning")
        check_fields(self, count, "num_warmup", least=0)
        check_fields(self, positive, "energy_error_variance", "decoherence", "initial_step_size")

    @property
    def num_steps(self) -> int:
        """Draws of warm-up, and draws kept."""
        return self.num_warmup + self.num_draws

    def init(self, target: Target, generator: torch.Generator) -> MCLMCState:
        """Chains at the target's initial points, going anywhere."""
        point = start(density_of(target), ravel(target.initial(self.num_chains, generator), target.shapes()))
        check_directions(point.position)
        return MCLMCState(
            point,
            random_direction(point.position, generator),
            Diagonal(torch.ones_like(point.position[:1])),
            EnergyErrors.start(point.position.new_full((self.num_chains,), self.initial_step_size)),
            Welford.start(point.position),
            torch.zeros((), dtype=torch.long),
        )

    def step(self, target: Target, state: MCLMCState, generator: torch.Generator) -> tuple[MCLMCState, MCLMCInfo]:
        """``thinning`` steps of every chain."""
        index = int(state.num_moves)
        adapting = index < self.num_warmup
        one_step, num_parameters = fused(density_of(target), isokinetic_step), state.point.position.shape[-1]
        point, direction, tuning = state.point, state.direction, state.tuning
        squares = torch.zeros_like(point.log_density, dtype=torch.float64)
        diverged = torch.zeros_like(squares)
        for _ in range(self.thinning):
            step = tuning.step_size.unsqueeze(-1)
            new, turned, change = one_step(point, direction, step, state.mass)
            turned = refresh(turned, (torch.expm1(2 * step / self.decoherence) / num_parameters).sqrt(), generator)
            # A step that left the finite numbers, or nearly so, isn't made; the chain goes back where it came from.
            failed = ~(change.abs() <= MAX_ENERGY_ERROR)
            column = failed.unsqueeze(-1)
            point = Point(
                torch.where(column, point.position, new.position),
                torch.where(failed, point.log_density, new.log_density),
                torch.where(column, point.gradient, new.gradient),
            )
            direction = torch.where(column, -direction, turned)
            error = change.square() / num_parameters
            if adapting:
                tuning = tuning.update(torch.where(failed, torch.inf, error / self.energy_error_variance))
            squares, diverged = squares + torch.where(failed, 0.0, error), diverged + failed
        state = state._replace(point=point, direction=direction, tuning=tuning, num_moves=state.num_moves + 1)
        info = MCLMCInfo(
            squares / self.thinning,
            diverged / self.thinning,
            -point.log_density.double(),
            torch.full_like(squares, self.thinning),
            tuning.step_size,
        )
        if index + 1 == self.num_warmup:
            self._require_adapted(tuning.step_size)
        return (self._adapt_mass(state, index) if adapting else state), info

    def _require_adapted(self, step_size: Tensor) -> None:
        """Warn of chains whose step sizes went out of all bounds; raise ValueError if it's all of them."""
        ratio = step_size / self.initial_step_size
        lost = ~((ratio > 1 / MAX_CHANGE) & (ratio < MAX_CHANGE))
        if not bool(lost.any()):
            return
        message = (
            f"{type(self).__name__}: no step size has the wanted energy error in {int(lost.sum())} of {self.num_chains} "
            f"chains (found {float(step_size[lost][0]):.3g} after warm-up). The log density is flat or linear there (is it "
            "proper?), or isn't smooth: change the model, or begin elsewhere"
        )
        if bool(lost.all()):
            raise ValueError(message)
        warnings.warn(message, BayesnnWarning, stacklevel=3)

    def _adapt_mass(self, state: MCLMCState, index: int) -> MCLMCState:
        ends, position = window_ends(self.num_warmup), state.point.position
        variance = state.variance
        if ends and index >= int(0.15 * self.num_warmup) and index < ends[-1]:
            variance = variance.update(position)
        if index + 1 not in ends:
            return state._replace(variance=variance)
        return state._replace(
            mass=Diagonal(variance.variance()),
            variance=Welford.start(position),
            tuning=EnergyErrors.start(state.tuning.step_size / math.sqrt(2)),
        )

    def keep(self, state: MCLMCState, index: int) -> dict[str, Tensor] | None:
        """The positions after warm-up."""
        return {"position": state.point.position} if index >= self.num_warmup else None

    def result(
        self, target: Target, state: MCLMCState, draws: dict[str, Tensor], infos: dict[str, Tensor]
    ) -> WeightPosterior:
        """The draws of all chains, chain by chain; warns if more than 1 % of the steps diverged."""
        warn_of_divergences(type(self).__name__, infos["diverging"], "Lower energy_error_variance or raise num_warmup")
        position = draws["position"].transpose(0, 1).flatten(0, 1)
        return WeightPosterior(unravel(position, target.shapes()), self.num_chains, statistics=infos)
