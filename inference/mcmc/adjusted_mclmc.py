r"""Microcanonical dynamics with a Metropolis–Hastings correction (Robnik, Cohn-Gordon and Seljak 2025, "MAMS").

Each move draws a direction, follows L steps of the isokinetic dynamics (:mod:`bayesnn.inference.mcmc.isokinetic`), and accepts
the end with probability :math:`\min(1, e^{-\Delta E})`. The stationary law is exactly :math:`\pi`. As in our HMC, L is drawn
afresh for every move, uniformly from 1 … 2 ``num_leapfrog`` - 1. Large gradients turn a path but never speed it up, which
keeps long steps stable.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesnn.checks import check_fields, count
from bayesnn.inference.flat import Density, fused
from bayesnn.inference.mcmc.chain import ChainState, MarkovChain, MoveInfo, Point, accept
from bayesnn.inference.mcmc.isokinetic import isokinetic_step, random_direction
from bayesnn.inference.mcmc.mass import Mass
from bayesnn.inference.target import Target


@dataclass(frozen=True)
class AdjustedMCLMC(MarkovChain):
    """Metropolis-adjusted microcanonical dynamics.

    Its stationary law is exactly the target's: an error in the energy is corrected by rejections.

    Args:
        num_chains: chains, vectorised; 4 so that R-hat can be trusted.
        num_warmup: steps that adapt and are thrown away.
        num_draws: steps kept, for each chain.
        target_acceptance: what dual averaging aims at; 0.9, the paper's.
        initial_step_size: where warm-up's search for a step size begins; with no warm-up, the step size.
        mass: the mass matrix that warm-up learns: "diagonal", "low-rank" (for correlated posteriors) or "identity" (none).
        num_leapfrog: mean number of steps (and gradients) per move; 16 is our choice for small networks.

    Raises:
        ValueError: if a setting is out of its range; in a run, if step sizes can't be adapted; at the start of a run, if the
            target has a single parameter: a direction on a line can't turn.
    """

    target_acceptance: float = 0.9
    num_leapfrog: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, count, "num_leapfrog")

    def init(self, target: Target, generator: torch.Generator) -> ChainState:
        """Chains at the target's initial points."""
        state = super().init(target, generator)
        check_directions(state.point.position)
        return state

    def move(
        self, density: Density, point: Point, step_size: Tensor, mass: Mass, generator: torch.Generator
    ) -> tuple[Point, MoveInfo]:
        """One trajectory of every chain, of a random length."""
        num_steps = int(torch.randint(1, 2 * self.num_leapfrog, (), generator=generator))
        return isokinetic_move(density, point, step_size, mass, generator, num_steps)


def isokinetic_move(
    density: Density, point: Point, step_size: Tensor, mass: Mass, generator: torch.Generator, num_steps: int
) -> tuple[Point, MoveInfo]:
    """Draw directions, follow the dynamics, accept or reject the ends; step_size is (C,)."""
    direction, step = random_direction(point.position, generator), step_size.unsqueeze(-1)
    one_step = fused(density, isokinetic_step)
    end, error = point, torch.zeros_like(step_size, dtype=torch.float64)
    for _ in range(num_steps):
        end, direction, change = one_step(end, direction, step, mass)
        error = error + change
    energy = -point.log_density.double()
    return accept(point, end, energy, energy + error, generator, num_steps)


def check_directions(position: Tensor) -> None:
    """Raise ValueError where there is a single parameter."""
    if position.shape[-1] < 2:
        raise ValueError("microcanonical dynamics need at least 2 parameters, found 1: use HMC or NUTS")
