"""A model, its blocks and a proposal for them: checked, and sorted into sets of blocks that are visited together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bayesnn.files import fingerprint
from bayesnn.inference.mcmc.learned.graph import colours
from bayesnn.inference.mcmc.learned.models import Block, BlockDistribution, Conditional, Model


class Proposal(Protocol):
    """What the sampler asks of a proposal; :class:`BlockProposal` is one."""

    @property
    def fingerprint(self) -> str:
        """A hash of all that it depends on."""
        ...

    def check(self, block_size: int, num_features: int, cardinality: int | None) -> None:
        """Raise ValueError if it isn't for such a motif."""
        ...

    def __call__(self, conditional: Conditional) -> BlockDistribution:
        """The law to propose from, which may depend on the conditional in any way."""
        ...


class Group(NamedTuple):
    """Blocks of which none touches another: given all other variables, they are independent."""

    variables: Tensor
    """(G, b)."""
    conditionals: Callable[[Tensor], Conditional]
    """From values (C, V) to the blocks' conditionals, (C, G)."""


class BlockTarget:
    """A model and the blocks of one motif that are sampled in it.

    Blocks are sorted into ``groups`` of blocks that aren't neighbours, by a greedy colouring: a group's blocks are independent
    given the rest, so that they are visited in one go.

    Args:
        model: the joint density.
        blocks: where the motif occurs; they may overlap, and together they cover all variables.
        proposal: q; None is enough for Gibbs sampling.

    Raises:
        ValueError: if blocks are of several motifs or of another than the proposal's, leave a variable out, hold one twice or
            one that the model hasn't or that they depend on; or if the conditionals aren't those of the model's density.
    """

    def __init__(self, model: Model, blocks: Sequence[Block], proposal: Proposal | None = None) -> None:
        self.model, self.blocks, self.proposal = model, list(blocks), proposal
        values = model.initial(2, torch.Generator().manual_seed(0))
        check_blocks(self.blocks, values.shape[1])
        self.groups = [
            Group(torch.stack([block.variables for block in own]), model.conditionals(own))
            for own in ([self.blocks[index] for index in group] for group in colours(self.blocks, values.shape[1]))
        ]
        for group in self.groups:
            conditional = group.conditionals(values[:1])
            _check_conditional(model, group, conditional, values)
            if proposal is not None:
                proposal.check(group.variables.shape[1], conditional.features.shape[-1], model.cardinality)
        parts = [part for block in self.blocks for part in block]
        self.fingerprint = fingerprint(model.fingerprint, "" if proposal is None else proposal.fingerprint, *parts)


def check_blocks(blocks: Sequence[Block], num_variables: int) -> None:
    """Raise ValueError if the blocks don't belong together or to a model of so many variables."""
    for block in blocks:
        own, around = block.variables.tolist(), [index for index in block.condition.tolist() if index != -1]
        if len(own) != len(blocks[0].variables) or not torch.equal(block.edges, blocks[0].edges):
            raise ValueError(
                f"all blocks must be of one motif: found variables {own} with edges {block.edges.tolist()} beside "
                f"{blocks[0].variables.tolist()} with edges {blocks[0].edges.tolist()}"
            )
        if not own or len(set(own)) < len(own):
            raise ValueError(f"a block must hold at least one variable, and each once, found {own}")
        outside = sorted(index for index in own + around if not 0 <= index < num_variables)
        if outside:
            raise ValueError(f"a block has variables {outside}, but the model has 0 … {num_variables - 1}")
        if set(own) & set(around):
            raise ValueError(
                f"a block's condition must hold none of its own variables: found {sorted(set(own) & set(around))} in both, "
                "and a proposal that knows the values it replaces would not leave the model's law as it is"
            )
    left = sorted(set(range(num_variables)).difference(*(block.variables.tolist() for block in blocks)))
    if left:
        raise ValueError(
            f"no block holds the variables {left[:8]}{' …' if len(left) > 8 else ''}: they would never move"
        )


def _check_conditional(model: Model, group: Group, conditional: Conditional, values: Tensor) -> None:
    """From one point to another: features must not change, and the density as much as it says."""
    moved = values[:1].clone()
    moved[:, group.variables] = values[1:, group.variables]
    if not torch.allclose(conditional.features, group.conditionals(moved).features):
        raise ValueError("a block's features must depend only on the values around it, not on its own or its group's")
    full = model.log_density(torch.cat([moved, values[:1]])).double()
    change = conditional.log_density(moved[:, group.variables]) - conditional.log_density(values[:1, group.variables])
    wanted, found = float(full[0] - full[1]), float(change.sum())
    if bool(full.isfinite().all()) and abs(wanted - found) > 1e-5 * (1 + float(full.abs().max())):
        raise ValueError(
            f"the conditionals of {len(group.variables)} blocks say that the log density changes by {found:g}, but "
            f"model.log_density changes by {wanted:g}: is every neighbour in each block's condition?"
        )
