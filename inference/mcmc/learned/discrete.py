"""Discrete models: pairwise Markov random fields on grids (chains are grids of one row), and their blocks' conditionals."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from bayesnn.files import fingerprint
from bayesnn.inference.mcmc.learned.graph import both_ways, neighbourhood
from bayesnn.inference.mcmc.learned.models import Block, draw_index

MAX_OUTCOMES = 2**16


def rectangle_edges(height: int, width: int) -> Tensor:
    """The motif of a rectangle: pairs of neighbouring places, numbered row by row."""
    number = torch.arange(height * width).view(height, width)
    across = torch.stack([number[:, :-1].flatten(), number[:, 1:].flatten()], 1)
    return torch.cat([across, torch.stack([number[:-1].flatten(), number[1:].flatten()], 1)])


def standardised(field: Tensor, coupling: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """The same density up to a constant with tables whose rows and columns have mean zero: one form for each density."""
    by_first, by_second = coupling.mean(-1), coupling.mean(-2)
    coupling = coupling - by_first.unsqueeze(-1) - by_second.unsqueeze(-2) + coupling.mean((-2, -1), keepdim=True)
    field = field.index_add(-2, edges[:, 0], by_first).index_add(-2, edges[:, 1], by_second)
    return field - field.mean(-1, keepdim=True), coupling


class Enumerated:
    """Probabilities of all K^b values of a block, from log p up to a constant, (*n, K^b)."""

    def __init__(self, log_density: Tensor, outcomes: Tensor, cardinality: int) -> None:
        self.log_probabilities, self.outcomes = log_density.log_softmax(-1), outcomes
        self.place_value = cardinality ** torch.arange(outcomes.shape[1] - 1, -1, -1)

    def sample(self, generator: torch.Generator) -> Tensor:
        """Values, (*n, b)."""
        return self.outcomes[draw_index(self.log_probabilities.exp(), generator)]

    def log_prob(self, values: Tensor) -> Tensor:
        """(*n, b) -> (*n)."""
        number = (values * self.place_value).sum(-1, keepdim=True)
        return self.log_probabilities.gather(-1, number).squeeze(-1)


class DiscreteConditional:
    r"""Blocks of a pairwise field, with the values around them absorbed into the field of each variable,

    .. math:: \log p(x_B \mid x_C) = \sum_{i \in B} \theta_i(x_i) + \sum_{i \sim j} w_{ij}(x_i, x_j) + \mathrm{const},
        \quad \theta_i(k) = u_i(k) + \sum_{j \in C} w_{ij}(k, x_j).

    Args:
        field: theta, (*n, b, K).
        coupling: w, :func:`standardised`, (*n, e, K, K), or with dimensions of n missing in front.
        edges: the motif's, (e, 2).
    """

    def __init__(self, field: Tensor, coupling: Tensor, edges: Tensor) -> None:
        self.field, self.coupling, self.edges = field, coupling, edges

    @property
    def features(self) -> Tensor:
        """theta and w less what follows from their means of zero: b (K - 1) + e (K - 1)^2 numbers."""
        field = (self.field - self.field.mean(-1, keepdim=True))[..., :-1].flatten(-2)
        coupling = self.coupling[..., :-1, :-1].flatten(-3)
        return torch.cat([field, coupling.expand(*field.shape[:-1], -1)], -1)

    def log_density(self, values: Tensor) -> Tensor:
        """(*n, b) -> (*n)."""
        total = self.field.gather(-1, values.unsqueeze(-1)).squeeze(-1).sum(-1)
        if not len(self.edges):
            return total
        cell = values[..., self.edges[:, 0]] * self.field.shape[-1] + values[..., self.edges[:, 1]]
        coupling = self.coupling.flatten(-2).expand(*cell.shape, -1)
        return total + coupling.gather(-1, cell.unsqueeze(-1)).squeeze(-1).sum(-1)

    def exact(self) -> Enumerated:
        """By enumeration.

        Raises:
            ValueError: if there are more than 65 536 values of a block.
        """
        size, cardinality = self.field.shape[-2:]
        if cardinality**size > MAX_OUTCOMES:
            raise ValueError(f"a block of {size} variables with {cardinality} values each is too large to enumerate")
        outcomes, by_field, by_coupling = _design(size, cardinality, tuple(map(tuple, self.edges.tolist())))
        log_density = self.field.flatten(-2) @ by_field + self.coupling.flatten(-3) @ by_coupling
        return Enumerated(log_density, outcomes, cardinality)


@functools.lru_cache(maxsize=16)
def _design(size: int, cardinality: int, edges: tuple[tuple[int, int], ...]) -> tuple[Tensor, Tensor, Tensor]:
    """All values of a block, and the matrices that turn its potentials into their log densities."""
    outcomes = torch.tensor(list(itertools.product(range(cardinality), repeat=size)))
    by_field = one_hot(outcomes, cardinality).flatten(1).T
    pairs = torch.tensor(edges, dtype=torch.long).view(-1, 2)
    cells = outcomes[:, pairs[:, 0]] * cardinality + outcomes[:, pairs[:, 1]]
    return outcomes, by_field.double(), one_hot(cells, cardinality**2).flatten(1).T.double()


class Grid:
    r"""A pairwise Markov random field on a grid of R x S discrete variables, numbered row by row,

    .. math:: \log p(x) = \sum_i u_i(x_i) + \sum_{i \sim j} w_{ij}(x_i, x_j) + \mathrm{const}.

    Args:
        unary: u, (R, S, K).
        right: w between (r, s) and (r, s + 1), (R, S - 1, K, K).
        down: w between (r, s) and (r + 1, s), (R - 1, S, K, K).

    Raises:
        ValueError: if the shapes don't belong together, or a potential isn't finite.
    """

    def __init__(self, unary: Tensor, right: Tensor, down: Tensor) -> None:
        rows, columns, cardinality = unary.shape
        for name, found, wanted in (
            ("right", right.shape, (rows, columns - 1, cardinality, cardinality)),
            ("down", down.shape, (rows - 1, columns, cardinality, cardinality)),
        ):
            if tuple(found) != wanted:
                raise ValueError(
                    f"{name} must have shape {wanted} for unary {tuple(unary.shape)}, found {tuple(found)}"
                )
        if not all(bool(torch.isfinite(part).all()) for part in (unary, right, down)):
            raise ValueError("potentials must be finite")
        self.unary, self.right, self.down = unary.double(), right.double(), down.double()
        self.cardinality: int | None = cardinality
        self.edges = rectangle_edges(rows, columns)

    @classmethod
    def random(
        cls, rows: int, columns: int, cardinality: int, coupling: float, generator: torch.Generator, field: float = 0.5
    ) -> Grid:
        """Normal potentials: u of scale ``field``, w of scale ``coupling``."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, cardinality, generator=generator, dtype=torch.float64)

        unary, right = field * normal(rows, columns), coupling * normal(rows, columns - 1, cardinality)
        return cls(unary, right, coupling * normal(rows - 1, columns, cardinality))

    @property
    def fingerprint(self) -> str:
        """A hash of the potentials."""
        return fingerprint("grid", self.unary, self.right, self.down)

    def initial(self, count: int, generator: torch.Generator) -> Tensor:
        """Uniform values."""
        rows, columns, cardinality = self.unary.shape
        return torch.randint(cardinality, (count, rows * columns), generator=generator)

    def log_density(self, values: Tensor) -> Tensor:
        """(C, R S) -> (C,)."""
        x = one_hot(values, self.unary.shape[2]).double().unflatten(1, self.unary.shape[:2])
        total = torch.einsum("crsk,rsk->c", x, self.unary)
        total = total + torch.einsum("crsk,rskl,crsl->c", x[:, :, :-1], self.right, x[:, :, 1:])
        return total + torch.einsum("crsk,rskl,crsl->c", x[:, :-1], self.down, x[:, 1:])

    def blocks(self, height: int, width: int, stride: int = 1) -> list[Block]:
        """All height x width rectangles, ``stride`` apart and flush with the edges, with the neighbours around them.

        Raises:
            ValueError: if the grid is smaller than the rectangle.
        """
        rows, columns = self.unary.shape[:2]
        if not (1 <= height <= rows and 1 <= width <= columns):
            raise ValueError(f"a block of {height} x {width} doesn't fit into a grid of {rows} x {columns}")
        tops = sorted({*range(0, rows - height + 1, stride), rows - height})
        lefts = sorted({*range(0, columns - width + 1, stride), columns - width})
        return [self._block(top, left, height, width) for top in tops for left in lefts]

    def _block(self, top: int, left: int, height: int, width: int) -> Block:
        number = torch.full((self.unary.shape[0] + 2, self.unary.shape[1] + 2), -1)  # with a margin of no variables
        number[1:-1, 1:-1] = torch.arange(self.unary.shape[0] * self.unary.shape[1]).view(self.unary.shape[:2])
        around = number[top : top + height + 2, left : left + width + 2]
        condition = torch.cat([around[0, 1:-1], around[-1, 1:-1], around[1:-1, 0], around[1:-1, -1]])
        return Block(around[1:-1, 1:-1].flatten(), condition, rectangle_edges(height, width))

    def conditionals(self, blocks: Sequence[Block]) -> Callable[[Tensor], DiscreteConditional]:
        """From values (C, R S) to the conditionals of these blocks, (C, G)."""
        cardinality, edges = self.unary.shape[2], blocks[0].edges
        tables = both_ways(torch.cat([self.right.flatten(0, 1), self.down.flatten(0, 1)]))
        places = neighbourhood(self.edges, blocks)
        unary = self.unary.flatten(0, 1)[torch.stack([block.variables for block in blocks])]
        own, coupling = standardised(unary, tables[places.inner], edges)
        # Rows of one long table: the potentials of a variable, for each value of each neighbour.
        rows = tables[places.outer].transpose(-2, -1).flatten(0, 3)
        first_row = cardinality * torch.arange(places.outer.numel()).view(places.outer.shape)

        def at(values: Tensor) -> DiscreteConditional:
            absorbed = rows[first_row + values[:, places.neighbours]].sum(-2)
            return DiscreteConditional(own + absorbed, coupling, edges)

        return at
