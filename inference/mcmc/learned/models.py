r"""Graphical models as block samplers see them: a joint density, and the conditionals of blocks of its variables.

A block :math:`x_B` depends on the rest of the model only through the values :math:`x_C` around it (its Markov blanket) and
the model's local parameters :math:`\phi`. A :class:`Conditional` is :math:`p(x_B \mid x_C, \phi)` of many blocks at once, up
to constants, from the factors that touch a block and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Block(NamedTuple):
    """One place where a motif occurs in a model.

    Args:
        variables: the block B that is proposed, (b,).
        condition: the variables that it depends on (its Markov blanket), in any order; -1 stands for none.
        edges: the motif: pairs of places in the block (0 … b - 1) that interact, (e, 2); the same for all blocks of a motif.
    """

    variables: Tensor
    condition: Tensor
    edges: Tensor


class BlockDistribution(Protocol):
    """A normalised law of the values of blocks, of batch shape (*n): chains by blocks, or examples."""

    def sample(self, generator: torch.Generator) -> Tensor:
        """Values, (*n, b)."""
        ...

    def log_prob(self, values: Tensor) -> Tensor:
        """(*n, b) -> (*n), in float64."""
        ...


class Conditional(Protocol):
    """p(x_B | x_C) of blocks of one motif, of batch shape (*n)."""

    @property
    def features(self) -> Tensor:
        """All that the conditional depends on, (*n, k), for a proposal's network."""
        ...

    def log_density(self, values: Tensor) -> Tensor:
        """log p(x_B | x_C) up to a constant of x_C: (*n, b) -> (*n). Differences are those of the model's log density."""
        ...

    def exact(self) -> BlockDistribution:
        """The conditional itself, normalised, for blocks small enough; the cost is exponential in b."""
        ...


class Model(Protocol):
    """What samplers of blocks ask of a model."""

    cardinality: int | None
    """How many values each variable takes, 0 … K - 1; None: real variables."""

    @property
    def fingerprint(self) -> str:
        """A hash of its parameters, that ties checkpoints to it."""
        ...

    def log_density(self, values: Tensor) -> Tensor:
        """log p up to a constant: (C, V) -> (C,)."""
        ...

    def initial(self, count: int, generator: torch.Generator) -> Tensor:
        """Starting values, (count, V): int64, or float64 for real variables."""
        ...

    def conditionals(self, blocks: Sequence[Block]) -> Callable[[Tensor], Conditional]:
        """Of G blocks of one motif: from all values (C, V) to their conditionals, of batch shape (C, G).

        What doesn't depend on values is computed once, here.
        """
        ...


def draw_index(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Indices with the given probabilities, (*n, K) -> (*n), by inversion; they needn't be normalised."""
    cumulative = probabilities.double().cumsum(-1)
    uniform = torch.rand(*cumulative.shape[:-1], 1, generator=generator, dtype=torch.float64)
    # A number below the total never counts the last entry, and entries of probability zero are stepped over.
    return (cumulative <= uniform * cumulative[..., -1:]).sum(-1).clamp_max(cumulative.shape[-1] - 1)
