"""Models that blocks are proposed for: random variables with a joint density, and the motifs that recur in them."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Block(NamedTuple):
    """One place where a motif occurs in a model.

    Args:
        variables: the block B that is proposed, (b,).
        condition: the variables that it depends on (its Markov blanket), (c,), in the motif's order; -1 where there is none.
        parameters: the model's local parameters, (k,): the same for models in which the block's conditional is the same.
    """

    variables: Tensor
    condition: Tensor
    parameters: Tensor


class Model(Protocol):
    """What samplers of blocks ask of a model."""

    cardinality: int | None
    """How many values each variable takes, 0 … K - 1; None: real variables."""

    def log_density(self, values: Tensor) -> Tensor:
        """log p up to a constant: (C, V) -> (C,)."""
        ...

    def initial(self, count: int, generator: torch.Generator) -> Tensor:
        """Starting values, (count, V): int64, or float64 for real variables."""
        ...


class Grid:
    r"""A pairwise Markov random field on a grid of R x S discrete variables,

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
        self.unary, self.right, self.down, self.cardinality = unary, right, down, cardinality
        self.fingerprint = ""

    @classmethod
    def random(
        cls, rows: int, columns: int, cardinality: int, coupling: float, generator: torch.Generator, field: float = 0.5
    ) -> Grid:
        """Normal potentials: u of scale ``field``, w of scale ``coupling``."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, cardinality, generator=generator, dtype=torch.float64)

        unary, right = field * normal(rows, columns), coupling * normal(rows, columns - 1, cardinality)
        return cls(unary, right, coupling * normal(rows - 1, columns, cardinality))

    def initial(self, count: int, generator: torch.Generator) -> Tensor:
        """Uniform values."""
        return torch.randint(self.cardinality, (count, self.unary.shape[0] * self.unary.shape[1]), generator=generator)

    def log_density(self, values: Tensor) -> Tensor:
        """(C, R S) -> (C,)."""
        x = torch.nn.functional.one_hot(values, self.cardinality).to(self.unary).unflatten(1, self.unary.shape[:2])
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
        rows, columns, cardinality = self.unary.shape

        def number(row: int, column: int) -> int:
            return row * columns + column if 0 <= row < rows and 0 <= column < columns else -1

        nothing = self.unary.new_zeros(cardinality, cardinality)

        def to_right(row: int, column: int) -> Tensor:
            return self.right[row, column] if 0 <= column < columns - 1 else nothing

        def downwards(row: int, column: int) -> Tensor:
            return self.down[row, column] if 0 <= row < rows - 1 else nothing

        inside = [(top + i, left + j) for i in range(height) for j in range(width)]
        around = [(top - 1, left + j) for j in range(width)] + [(top + height, left + j) for j in range(width)]
        around += [(top + i, left - 1) for i in range(height)] + [(top + i, left + width) for i in range(height)]
        potentials = [self.unary[place] for place in inside]
        potentials += [to_right(top + i, left + j) for i in range(height) for j in range(-1, width)]
        potentials += [downwards(top + i, left + j) for i in range(-1, height) for j in range(width)]
        return Block(
            torch.tensor([number(*place) for place in inside]),
            torch.tensor([number(*place) for place in around]),
            torch.cat([potential.flatten() for potential in potentials]),
        )
