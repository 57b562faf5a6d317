r"""The No-U-Turn sampler (Hoffman and Gelman 2014), vectorised over chains.

A trajectory is doubled, forwards or backwards in time, until it turns back on itself; the next point is drawn from it in
proportion to :math:`e^{-H}` (multinomial sampling, with the newer half preferred: Betancourt, A conceptual introduction to
Hamiltonian Monte Carlo, 2017, appendix A). It has turned back when for its ends' momenta r, or those of any of its
balanced subtrees,

.. math:: (M^{-1} r)^\top \Big( \sum_i r_i - \tfrac12 (r_{\mathrm{first}} + r_{\mathrm{last}}) \Big) \le 0,

the sum running over the momenta of all its points. The stationary law is exactly :math:`\pi`.

Trees are built without recursion (Phan, Pradhan and Jankowiak 2019): all chains are at the same leaf of the same doubling,
so that one list of earlier leaves serves all. A chain that has stopped waits for the others: a move costs as much as the
longest of its trajectories.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesnn.checks import check_fields, count
from bayesnn.inference.flat import Density, fused
from bayesnn.inference.mcmc.chain import MAX_ENERGY_ERROR, MarkovChain, MoveInfo, Point
from bayesnn.inference.mcmc.hmc import leapfrog_step
from bayesnn.inference.mcmc.mass import Mass


@dataclass(frozen=True)
class NUTS(MarkovChain):
    """The No-U-Turn sampler.

    Its stationary law is exactly the target's: an error in the energy is corrected by the weights of a trajectory's points.

    Args:
        num_chains: chains, vectorised; 4 so that R-hat can be trusted.
        num_warmup: steps that adapt and are thrown away.
        num_draws: steps kept, for each chain.
        target_acceptance: of the points of a trajectory, on average; 0.8, Stan's.
        initial_step_size: where warm-up's search for a step size begins; with no warm-up, the step size.
        mass: the mass matrix that warm-up learns: "diagonal", "low-rank" (for correlated posteriors) or "identity" (none).
        max_depth: a trajectory has at most 2^max_depth - 1 leapfrog steps; 10, Stan's.

    Raises:
        ValueError: if a setting is out of its range; in a run, if step sizes can't be adapted.
    """

    max_depth: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, count, "max_depth")

    def move(
        self, density: Density, point: Point, step_size: Tensor, mass: Mass, generator: torch.Generator
    ) -> tuple[Point, MoveInfo]:
        """One trajectory of every chain."""
        return nuts_move(density, point, step_size, mass, generator, self.max_depth)


class Leaf(NamedTuple):
    """A point of the trajectory and its momentum, (C, P)."""

    point: Point
    momentum: Tensor


class Tree(NamedTuple):
    """What is remembered of a trajectory, or of a part of it, for each chain."""

    proposal: Point
    energy: Tensor
    """Of the proposal, (C,)."""
    log_weight: Tensor
    """log of the sum of exp(-H + H_0) over its points, (C,)."""
    momentum_sum: Tensor


class Progress(NamedTuple):
    """Of each chain, (C,): whether it goes on, whether it diverged, leapfrog steps, sum of acceptance probabilities."""

    active: Tensor
    diverging: Tensor
    num_steps: Tensor
    acceptance: Tensor


def nuts_move(
    density: Density, point: Point, step_size: Tensor, mass: Mass, generator: torch.Generator, max_depth: int
) -> tuple[Point, MoveInfo]:
    """Draw momenta, double the trajectories until they turn, draw a point of each; step_size is (C,)."""
    position = point.position
    noise = torch.randn(position.shape, generator=generator, dtype=position.dtype, device=generator.device)
    momentum = mass.momentum(noise.to(position.device))
    energy = mass.kinetic(momentum) - point.log_density.double()
    left = right = Leaf(point, momentum)
    tree = Tree(point, energy, torch.zeros_like(energy), momentum)
    nobody = torch.zeros_like(energy, dtype=torch.bool)
    progress = Progress(~nobody, nobody, torch.zeros_like(energy), torch.zeros_like(energy))
    for depth in range(max_depth):
        forwards = _uniform(energy, generator) < 0.5
        step = torch.where(forwards, step_size, -step_size)
        edge, subtree, progress = _subtree(
            density, _choose(forwards, right, left), step, mass, energy, depth, progress, generator
        )
        active = progress.active
        better = (subtree.log_weight - tree.log_weight).exp()
        taken = active & (_uniform(energy, generator) < better)
        proposal, proposal_energy = _choose(taken, (subtree.proposal, subtree.energy), (tree.proposal, tree.energy))
        tree = Tree(
            proposal,
            proposal_energy,
            torch.logaddexp(tree.log_weight, subtree.log_weight),
            tree.momentum_sum + subtree.momentum_sum,
        )
        left, right = _choose(active & ~forwards, edge, left), _choose(active & forwards, edge, right)
        turned = is_turning(mass, left.momentum, right.momentum, tree.momentum_sum)
        progress = progress._replace(active=active & ~turned)
        if not bool(progress.active.any()):
            break
    acceptance = progress.acceptance / progress.num_steps
    return tree.proposal, MoveInfo(acceptance, progress.diverging.double(), tree.energy, progress.num_steps)


def _subtree(
    density: Density,
    leaf: Leaf,
    step_size: Tensor,
    mass: Mass,
    start_energy: Tensor,
    depth: int,
    progress: Progress,
    generator: torch.Generator,
) -> tuple[Leaf, Tree, Progress]:
    """2^depth more leapfrog steps from an edge; chains whose subtree turns or diverges aren't active any more."""
    next_leaf, step = fused(density, _next_leaf), step_size.unsqueeze(-1)
    starts: dict[int, tuple[Tensor, Tensor]] = {}  # of unfinished subtrees: first momenta, and the sums before them
    none = torch.full_like(start_energy, -torch.inf)
    tree = Tree(leaf.point, start_energy, none, torch.zeros_like(leaf.momentum))
    uniforms = _uniform(start_energy.expand(2**depth, -1), generator)
    for index in range(2**depth):
        sum_before = tree.momentum_sum
        leaf, tree, progress = next_leaf(leaf, tree, progress, uniforms[index], start_energy, step, mass)
        level = (index >> 1).bit_count()
        if index % 2 == 0:
            starts[level] = (leaf.momentum, sum_before)
        # An odd leaf is the last of as many balanced subtrees as its index has ones at the end.
        num_ends = ((index + 1) & -(index + 1)).bit_length() - 1
        for ending in range(level - num_ends + 1, level + 1):
            first_momentum, sum_before = starts[ending]
            turned = is_turning(mass, first_momentum, leaf.momentum, tree.momentum_sum - sum_before)
            progress = progress._replace(active=progress.active & ~turned)
        if not bool(progress.active.any()):
            break
    return leaf, tree, progress


def _next_leaf(
    density: Density,
    leaf: Leaf,
    tree: Tree,
    progress: Progress,
    uniform: Tensor,
    start_energy: Tensor,
    step: Tensor,
    mass: Mass,
) -> tuple[Leaf, Tree, Progress]:
    """One leapfrog step on, and the tree with the leaf that it leads to: one program where the density is compiled."""
    leaf = Leaf(*leapfrog_step(density, leaf.point, leaf.momentum, step, mass))
    energy = mass.kinetic(leaf.momentum) - leaf.point.log_density.double()
    error = (energy - start_energy).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf)
    log_weight = torch.logaddexp(tree.log_weight, -error)
    taken = uniform.log() < -error - log_weight
    proposal, energy = _choose(taken, (leaf.point, energy), (tree.proposal, tree.energy))
    active, diverged = progress.active, progress.active & (error > MAX_ENERGY_ERROR)
    progress = Progress(
        active & ~diverged,
        progress.diverging | diverged,
        progress.num_steps + active,
        progress.acceptance + torch.where(active, (-error).clamp_max(0).exp(), 0.0),
    )
    return leaf, Tree(proposal, energy, log_weight, tree.momentum_sum + leaf.momentum), progress


def is_turning(mass: Mass, first: Tensor, last: Tensor, momentum_sum: Tensor) -> Tensor:
    """Whether a stretch of the trajectory has turned back, (C,), from its ends' momenta and the sum of all, (C, P)."""
    inner = momentum_sum - 0.5 * (first + last)
    return ((mass.velocity(first) * inner).sum(-1) <= 0) | ((mass.velocity(last) * inner).sum(-1) <= 0)


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=generator, dtype=torch.float64, device=generator.device).to(like.device)


def _choose(mask: Tensor, new: Any, old: Any) -> Any:
    """Row by row of nested tuples of tensors: the new where the mask (C,) says so, else the old."""
    if isinstance(new, Tensor):
        return torch.where(mask.reshape(-1, *(1 for _ in range(new.dim() - 1))), new, old)
    chosen = [_choose(mask, a, b) for a, b in zip(new, old, strict=True)]
    return type(new)(*chosen) if hasattr(new, "_fields") else tuple(chosen)
