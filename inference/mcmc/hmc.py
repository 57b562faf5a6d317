r"""Hamiltonian Monte Carlo (Duane et al. 1987; Neal, MCMC using Hamiltonian dynamics, 2011), vectorised over chains.

With momentum :math:`r \sim N(0, M)` and energy :math:`H = -\log\pi(\theta) + \tfrac12 r^\top M^{-1} r`, each move follows L
leapfrog steps

.. math:: r \mathrel{+}= \tfrac\epsilon2 \nabla\log\pi(\theta), \quad \theta \mathrel{+}= \epsilon M^{-1} r,
          \quad r \mathrel{+}= \tfrac\epsilon2 \nabla\log\pi(\theta)

and accepts the end with probability :math:`\min(1, e^{-\Delta H})`. The stationary law is exactly :math:`\pi`. L is drawn
afresh for every move, uniformly from 1 … 2 ``num_leapfrog`` - 1 and independently of the state, which keeps the law and
breaks the resonance of a fixed path with the target's periods.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesnn.checks import check_fields, count
from bayesnn.inference.flat import Density, fused
from bayesnn.inference.mcmc.chain import MarkovChain, MoveInfo, Point, accept
from bayesnn.inference.mcmc.mass import Mass


@dataclass(frozen=True)
class HMC(MarkovChain):
    """Hamiltonian Monte Carlo.

    Its stationary law is exactly the target's: an error in the energy is corrected by rejections.

    Args:
        num_chains: chains, vectorised; 4 so that R-hat can be trusted.
        num_warmup: steps that adapt and are thrown away.
        num_draws: steps kept, for each chain.
        target_acceptance: what dual averaging aims at; 0.8, Stan's.
        initial_step_size: where warm-up's search for a step size begins; with no warm-up, the step size.
        mass: the mass matrix that warm-up learns: "diagonal", "low-rank" (for correlated posteriors) or "identity" (none).
        num_leapfrog: mean number of leapfrog steps (and gradients) per step; 16 is our choice for small networks.

    Raises:
        ValueError: if a setting is out of its range; in a run, if step sizes can't be adapted.
    """

    num_leapfrog: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, count, "num_leapfrog")

    def move(
        self, density: Density, point: Point, step_size: Tensor, mass: Mass, generator: torch.Generator
    ) -> tuple[Point, MoveInfo]:
        """One trajectory of every chain, of a random length."""
        num_leapfrog = int(torch.randint(1, 2 * self.num_leapfrog, (), generator=generator))
        return hmc_move(density, point, step_size, mass, generator, num_leapfrog)


def hmc_move(
    density: Density, point: Point, step_size: Tensor, mass: Mass, generator: torch.Generator, num_leapfrog: int
) -> tuple[Point, MoveInfo]:
    """Draw momenta, follow the leapfrog steps, accept or reject the ends; step_size is (C,)."""
    noise = torch.randn(point.position.shape, generator=generator, dtype=point.position.dtype)
    momentum = mass.momentum(noise)
    end, end_momentum = leapfrog(density, point, momentum, step_size, mass, num_leapfrog)
    energy = mass.kinetic(momentum) - point.log_density.double()
    end_energy = mass.kinetic(end_momentum) - end.log_density.double()
    return accept(point, end, energy, end_energy, generator, num_leapfrog)


def leapfrog(
    density: Density, point: Point, momentum: Tensor, step_size: Tensor, mass: Mass, num_steps: int
) -> tuple[Point, Tensor]:
    """``num_steps`` leapfrog steps of every chain: the end point and its momentum; step_size is (C,)."""
    step, one_step = step_size.unsqueeze(-1), fused(density, leapfrog_step)
    for _ in range(num_steps):
        point, momentum = one_step(point, momentum, step, mass)
    return point, momentum


def leapfrog_step(density: Density, point: Point, momentum: Tensor, step: Tensor, mass: Mass) -> tuple[Point, Tensor]:
    """One leapfrog step of every chain; step is (C, 1), negative to go back in time."""
    momentum = momentum + 0.5 * step * point.gradient
    position = point.position + step * mass.velocity(momentum)
    point = Point(position, *density(position))
    return point, momentum + 0.5 * step * point.gradient
