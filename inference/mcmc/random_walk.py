r"""Random-walk Metropolis (Metropolis et al. 1953), vectorised over chains: a plain yardstick for the others.

Proposes :math:`\theta' = \theta + \epsilon S z` with standard normal z and inverse mass :math:`S S^\top`, and accepts it with
probability :math:`\min(1, \pi(\theta') / \pi(\theta))`. The stationary law is exactly :math:`\pi`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesnn.inference.flat import Density
from bayesnn.inference.mcmc.chain import MarkovChain, MoveInfo, Point, accept
from bayesnn.inference.mcmc.mass import Mass


@dataclass(frozen=True)
class RandomWalk(MarkovChain):
    """Random-walk Metropolis; it needs some P steps where HMC needs one.

    Its stationary law is exactly the target's.

    Args:
        num_chains: chains, vectorised.
        num_warmup: steps that adapt and are thrown away.
        num_draws: steps kept, for each chain.
        target_acceptance: 0.234, best for many independent parameters (Roberts, Gelman and Gilks 1997).
        initial_step_size: where warm-up's search for a step size begins; with no warm-up, the step size.
        mass: the mass matrix that warm-up learns: "diagonal", "low-rank" (for correlated posteriors) or "identity" (none).

    Raises:
        ValueError: if a setting is out of its range; in a run, if step sizes can't be adapted.
    """

    target_acceptance: float = 0.234
    initial_step_size: float = 0.1

    def move(
        self, density: Density, point: Point, step_size: Tensor, mass: Mass, generator: torch.Generator
    ) -> tuple[Point, MoveInfo]:
        """One proposal for every chain; the gradients that the density gives aren't used."""
        noise = torch.randn(point.position.shape, generator=generator, dtype=point.position.dtype)
        position = point.position + step_size.unsqueeze(-1) * mass.scale(noise)
        new = Point(position, *density(position))
        return accept(point, new, -point.log_density.double(), -new.log_density.double(), generator, 1)
