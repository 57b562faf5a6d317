r"""The Metropolis-adjusted Langevin algorithm (Roberts and Tweedie 1996), vectorised over chains.

A leapfrog trajectory of one step: with inverse mass :math:`M^{-1}` and step size :math:`\epsilon` it proposes

.. math:: \theta' \sim N\big(\theta + \tfrac{\epsilon^2}{2} M^{-1} \nabla\log\pi(\theta),\ \epsilon^2 M^{-1}\big)

and accepts by Metropolis and Hastings. The stationary law is exactly :math:`\pi`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesnn.inference.flat import Density
from bayesnn.inference.mcmc.chain import MarkovChain, MoveInfo, Point
from bayesnn.inference.mcmc.hmc import hmc_move
from bayesnn.inference.mcmc.mass import Mass


@dataclass(frozen=True)
class MALA(MarkovChain):
    """The Metropolis-adjusted Langevin algorithm.

    Its stationary law is exactly the target's: discretised Langevin steps are proposals, accepted or rejected.

    Args:
        num_chains: chains, vectorised.
        num_warmup: steps that adapt and are thrown away.
        num_draws: steps kept, for each chain.
        target_acceptance: 0.574, best for many independent parameters (Roberts and Rosenthal 1998).
        initial_step_size: where warm-up's search for a step size begins; with no warm-up, the step size.
        mass: the mass matrix that warm-up learns: "diagonal", "low-rank" (for correlated posteriors) or "identity" (none).

    Raises:
        ValueError: if a setting is out of its range; in a run, if step sizes can't be adapted.
    """

    target_acceptance: float = 0.574

    def move(
        self, density: Density, point: Point, step_size: Tensor, mass: Mass, generator: torch.Generator
    ) -> tuple[Point, MoveInfo]:
        """One proposal for every chain."""
        return hmc_move(density, point, step_size, mass, generator, 1)
