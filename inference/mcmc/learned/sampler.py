r"""Metropolis–Hastings with block proposals, and single-site Gibbs sampling to compare it with.

A sweep visits every block once, in a random order, proposes :math:`x_B' \sim q(\cdot \mid x_C)` and accepts it with
probability

.. math:: \min\left(1, \frac{p(x_B', x_C)\, q(x_B \mid x_C)}{p(x_B, x_C)\, q(x_B' \mid x_C)}\right),

so that the model's law is stationary whatever q, trained or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bayesnn.configured import Configured
from bayesnn.inference.draws import WeightPosterior
from bayesnn.inference.mcmc.learned.models import Block, Model


class Proposal(Protocol):
    """What the sampler asks of a proposal; :class:`BlockProposal` is one."""

    def check(self, block: Block) -> None:
        """Raise ValueError if the block is of another motif."""
        ...

    def features(self, condition: Tensor, present: Tensor, parameters: Tensor) -> Tensor:
        """What a proposal is computed from, (C, ·)."""
        ...

    def log_prob(self, values: Tensor, features: Tensor) -> Tensor:
        """log q, (C,)."""
        ...

    def sample(self, features: Tensor, generator: torch.Generator) -> Tensor:
        """A block's values, (C, b)."""
        ...


class BlockTarget:
    """A model and the blocks that a proposal is used on.

    Args:
        model: the joint density.
        blocks: where the proposal's motif occurs; together they should cover all variables.
        proposal: q.

    Raises:
        ValueError: if a block is of another motif than the proposal's, or has a variable that the model hasn't.
    """

    def __init__(self, model: Model, blocks: Sequence[Block], proposal: Proposal | None = None) -> None:
        self.model, self.blocks, self.proposal = model, list(blocks), proposal
        size = model.initial(1, torch.Generator()).shape[1]
        for block in self.blocks:
            if proposal is not None:
                proposal.check(block)
            low, high = int(block.variables.min()), int(torch.cat([block.variables, block.condition]).max())
            if low < 0 or high >= size:
                raise ValueError(f"a block has variables {low} … {high}, but the model has 0 … {size - 1}")


class BlockState(NamedTuple):
    """Values (C, V), their log density (C,), and sweeps made."""

    values: Tensor
    log_density: Tensor
    num_sweeps: Tensor


class BlockInfo(NamedTuple):
    """Of one sweep, (C,): mean acceptance probability."""

    acceptance: Tensor


@dataclass(frozen=True)
class BlockMetropolis(Configured):
    """Sweeps of Metropolis–Hastings over blocks.

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
        """Chains at the model's initial values."""
        values = target.model.initial(self.num_chains, generator)
        return BlockState(values, target.model.log_density(values).double(), torch.zeros((), dtype=torch.long))

    def step(self, target: BlockTarget, state: BlockState, generator: torch.Generator) -> tuple[BlockState, BlockInfo]:
        """One sweep."""
        acceptances = []
        with torch.no_grad():
            for index in torch.randperm(len(target.blocks), generator=generator).tolist():
                state, acceptance = self.visit(target, target.blocks[index], state, generator)
                acceptances.append(acceptance)
        return state._replace(num_sweeps=state.num_sweeps + 1), BlockInfo(torch.stack(acceptances).mean(0))

    def visit(
        self, target: BlockTarget, block: Block, state: BlockState, generator: torch.Generator
    ) -> tuple[BlockState, Tensor]:
        """Propose one block in every chain; also the acceptance probabilities, (C,)."""
        assert target.proposal is not None
        old, present = state.values[:, block.variables], block.condition >= 0
        features = target.proposal.features(state.values[:, block.condition.clamp_min(0)], present, block.parameters)
        new = target.proposal.sample(features, generator)
        values = state.values.clone()
        values[:, block.variables] = new
        log_density = target.model.log_density(values).double()
        log_ratio = log_density - state.log_density
        log_ratio = log_ratio + target.proposal.log_prob(old, features) - target.proposal.log_prob(new, features)
        acceptance = log_ratio.nan_to_num(nan=-torch.inf).clamp_max(0).exp()
        accepted = torch.rand(len(values), generator=generator, dtype=torch.float64) < acceptance
        values = torch.where(accepted.unsqueeze(-1), values, state.values)
        log_density = torch.where(accepted, log_density, state.log_density)
        return state._replace(values=values, log_density=log_density), acceptance

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
class SingleSiteGibbs(BlockMetropolis):
    """Gibbs sampling of discrete variables, one at a time, each from its exact conditional; blocks are ignored."""

    def step(self, target: BlockTarget, state: BlockState, generator: torch.Generator) -> tuple[BlockState, BlockInfo]:
        """One sweep over the variables in a random order."""
        cardinality, values = target.model.cardinality, state.values.clone()
        if cardinality is None:
            raise ValueError("single-site Gibbs sampling is for discrete variables")
        count, size = values.shape
        for site in torch.randperm(size, generator=generator).tolist():
            tried = values.repeat(cardinality, 1)
            tried[:, site] = torch.arange(cardinality).repeat_interleave(count)
            log_densities = target.model.log_density(tried).double().view(cardinality, count)
            values[:, site] = torch.multinomial(log_densities.T.softmax(-1), 1, generator=generator).squeeze(-1)
        state = BlockState(values, target.model.log_density(values).double(), state.num_sweeps + 1)
        return state, BlockInfo(torch.ones(count, dtype=torch.float64))
