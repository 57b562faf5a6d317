r"""Metropolis–Hastings with block proposals, and Gibbs sampling to compare it with.

A sweep visits every block once and proposes :math:`x_B' \sim q(\cdot \mid x_C)`, which is accepted with probability

.. math:: \min\left(1, \frac{p(x_B' \mid x_C)\, q(x_B \mid x_C)}{p(x_B \mid x_C)\, q(x_B' \mid x_C)}\right),

so that the model's law is stationary whatever q, trained or not. Only factors that touch a block are computed. Blocks that
aren't neighbours are independent given the rest: they are proposed and decided upon at the same time, each by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bayesnn.configured import Configured
from bayesnn.inference.draws import WeightPosterior
from bayesnn.inference.mcmc.learned.target import BlockTarget, Group


class BlockState(NamedTuple):
    """Values (C, V), and sweeps made."""

    values: Tensor
    num_sweeps: Tensor


class BlockInfo(NamedTuple):
    """Of one sweep, (C,): mean acceptance probability over the blocks."""

    acceptance: Tensor


@dataclass(frozen=True)
class BlockMetropolis(Configured):
    """Sweeps of Metropolis–Hastings over blocks, group by group in a random order.

    Args:
        num_chains: chains, vectorised.
        num_warmup: sweeps thrown away.
        num_draws: sweeps kept.

    Raises:
        ValueError: if a count isn't positive.
    """

    num_chains: int = 16
    num_warmup: int = 100
    num_draws: int = 500

    def __post_init__(self) -> None:
        if min(self.num_chains, self.num_draws) < 1 or self.num_warmup < 0:
            raise ValueError(f"num_chains and num_draws must be at least 1 and num_warmup 0, found {self}")

    @property
    def num_steps(self) -> int:
        """Warm-up and draws."""
        return self.num_warmup + self.num_draws

    def init(self, target: BlockTarget, generator: torch.Generator) -> BlockState:
        """Chains at the model's initial values.

        Raises:
            ValueError: if one has no density there, or there is nothing to propose from.
        """
        if target.proposal is None and type(self) is BlockMetropolis:
            raise ValueError("BlockMetropolis needs a proposal: BlockTarget(model, blocks, proposal)")
        values = target.model.initial(self.num_chains, generator)
        impossible = (~target.model.log_density(values).isfinite()).nonzero().flatten().tolist()
        if impossible:
            raise ValueError(f"model.initial must give values of finite log density; chains {impossible[:8]} have none")
        return BlockState(values, torch.zeros((), dtype=torch.long))

    def step(self, target: BlockTarget, state: BlockState, generator: torch.Generator) -> tuple[BlockState, BlockInfo]:
        """One sweep."""
        values, total = state.values.clone(), torch.zeros(len(state.values), dtype=torch.float64)
        with torch.no_grad():
            for index in torch.randperm(len(target.groups), generator=generator).tolist():
                group = target.groups[index]
                values[:, group.variables], acceptance = self.visit(target, group, values, generator)
                total += acceptance.sum(1)
        return BlockState(values, state.num_sweeps + 1), BlockInfo(total / len(target.blocks))

    def visit(
        self, target: BlockTarget, group: Group, values: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """New values of a group's blocks in every chain, (C, G, b), and their acceptance probabilities, (C, G)."""
        assert target.proposal is not None
        conditional, old = group.conditionals(values), values[:, group.variables]
        proposed = target.proposal(conditional)
        new = proposed.sample(generator)
        log_ratio = conditional.log_density(new) - conditional.log_density(old)
        log_ratio = log_ratio.double() + proposed.log_prob(old) - proposed.log_prob(new)
        acceptance = log_ratio.nan_to_num(nan=-torch.inf).clamp_max(0).exp()
        accepted = torch.rand(acceptance.shape, generator=generator, dtype=torch.float64) < acceptance
        return torch.where(accepted.unsqueeze(-1), new, old), acceptance

    def keep(self, state: BlockState, index: int) -> dict[str, Tensor] | None:
        """The values after warm-up."""
        return {"values": state.values} if index >= self.num_warmup else None

    def result(
        self, target: BlockTarget, state: BlockState, draws: dict[str, Tensor], infos: dict[str, Tensor]
    ) -> WeightPosterior:
        """The draws as a parameter named ``values``, chain by chain."""
        values = draws["values"].transpose(0, 1).flatten(0, 1)
        return WeightPosterior({"values": values}, self.num_chains, statistics=infos)


@dataclass(frozen=True)
class Gibbs(BlockMetropolis):
    """Gibbs sampling: each block from its exact conditional, for which the blocks must be small; any proposal is ignored.

    With blocks of one variable, ``BlockTarget(grid, grid.blocks(1, 1))``, it is single-site Gibbs sampling.
    """

    def visit(
        self, target: BlockTarget, group: Group, values: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """New values of a group's blocks, (C, G, b); they are always accepted."""
        new = group.conditionals(values).exact().sample(generator)
        return new, torch.ones(new.shape[:2], dtype=torch.float64)
