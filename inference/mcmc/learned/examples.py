"""Blocks of random models, with exact draws: what proposals are trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bayesnn.configured import Configured
from bayesnn.inference.mcmc.learned.continuous import MixtureConditional, absorb
from bayesnn.inference.mcmc.learned.discrete import DiscreteConditional, rectangle_edges, standardised
from bayesnn.inference.mcmc.learned.models import Conditional


class Examples(NamedTuple):
    """Blocks of n random models: their conditionals (n), and a draw from each, (n, b)."""

    conditional: Conditional
    values: Tensor


@dataclass(frozen=True)
class GridBlocks(Configured):
    """Rectangles in random grids, drawn by enumeration: up to 65 536 values of a block, a few thousand for speed.

    Tables are normal, with a scale that is uniform up to ``max_coupling`` and a part that all tables of a grid have in common,
    symmetric, so that ordered (ferromagnetic) grids are among them as well as disordered ones; the field's scale is uniform up
    to ``max_field``. Each neighbour around exists with probability 0.9 (a missing one is a grid's edge), and has one
    favourite value with a random preference.

    Args:
        height: of the rectangle.
        width: of the rectangle.
        cardinality: K.
        max_coupling: of the standard deviation of w.
        max_field: of the standard deviation of u.
    """

    height: int
    width: int
    cardinality: int = 2
    max_coupling: float = 2.0
    max_field: float = 1.0

    def __call__(self, count: int, generator: torch.Generator) -> Examples:
        """``count`` examples."""
        edges, size, K = rectangle_edges(self.height, self.width), self.height * self.width, self.cardinality

        def normal(*shape: int) -> Tensor:
            return torch.randn(count, *shape, generator=generator, dtype=torch.float64)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(count, *shape, generator=generator, dtype=torch.float64)

        common = normal(1, K, K)
        common, share = (common + common.mT) / 2**0.5, uniform(1, 1, 1)
        scale = self.max_coupling * uniform(1, 1, 1)

        def tables(number: int) -> Tensor:
            return scale * (share * common + (1 - share.square()).sqrt() * normal(number, K, K))

        # Each place has four neighbours, of which those that aren't in the block are around it.
        inside = torch.bincount(edges.flatten(), minlength=size)
        exists = (torch.arange(4) < 4 - inside.unsqueeze(-1)) & (uniform(size, 4) < 0.9)
        favoured = (uniform(size, 4) < uniform(1, 1)) & exists
        favourite, other = torch.randint(K, (2, count, size, 4), generator=generator).unbind()
        around = torch.where(favoured, favourite[:, :1, :1], other)
        outer = tables(4 * size).unflatten(1, (size, 4))
        row = outer.gather(-2, around[..., None, None].expand(-1, -1, -1, 1, K)).squeeze(-2)
        field = self.max_field * uniform(1, 1) * normal(size, K) + (row * exists.unsqueeze(-1)).sum(2)
        conditional = DiscreteConditional(*standardised(field, tables(len(edges)), edges), edges)
        return Examples(conditional, conditional.exact().sample(generator))


@dataclass(frozen=True)
class MixtureBlocks(Configured):
    """Blocks of random mixture fields, drawn from the exact mixture of K^b Gaussians.

    Mixtures have the law of :meth:`MixtureField.random`. Each of the motif's edges is there with probability 0.9, and each
    variable has up to ``num_neighbours`` neighbours around the block, at normal values of scale 2.

    Args:
        size: b.
        edges: the motif's, pairs of places.
        num_components: K; 1 for Gaussian fields.
        max_coupling: couplings are uniform up to it.
        num_neighbours: the most that a variable has around the block.
    """

    size: int
    edges: tuple[tuple[int, int], ...]
    num_components: int = 2
    max_coupling: float = 4.0
    num_neighbours: int = 4

    def __call__(self, count: int, generator: torch.Generator) -> Examples:
        """``count`` examples."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(count, *shape, generator=generator, dtype=torch.float64)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(count, *shape, generator=generator, dtype=torch.float64)

        edges = torch.tensor(self.edges, dtype=torch.long).view(-1, 2)
        coupling = self.max_coupling * uniform(len(edges)) * (uniform(len(edges)) < 0.9)
        exists = uniform(self.size, self.num_neighbours) < uniform(self.size, 1)
        pulls = self.max_coupling * uniform(self.size, self.num_neighbours) * exists
        # Neighbours are near each other more often than independent ones would be.
        around = 2 * (normal(self.size, 1) + normal(self.size, self.num_neighbours)) / 2**0.5
        log_weights, means, log_stds = (normal(self.size, self.num_components) for _ in range(3))
        absorbed = absorb(
            0.5 * log_weights,
            2 * means,
            0.5 * (0.3 * log_stds).exp(),
            pulls.sum(-1, True),
            (pulls * around).sum(-1, True),
        )
        conditional = MixtureConditional(*absorbed, coupling, edges)
        return Examples(conditional, conditional.exact().sample(generator))
