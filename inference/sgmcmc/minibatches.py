"""Which rows each minibatch step sees."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Minibatches(NamedTuple):
    """Where the present epoch stands: the rows' order, (N,), and how many of them are used up.

    With replacement, or with all rows in every batch, the order is empty: there is nothing to remember.
    """

    order: Tensor
    position: Tensor

    @classmethod
    def start(cls, num_rows: int, batch_size: int, replacement: bool) -> Minibatches:
        """Before the first epoch."""
        length = 0 if replacement or batch_size >= num_rows else num_rows
        return cls(torch.zeros(length, dtype=torch.long), torch.tensor(length))


def draw_rows(
    state: Minibatches, num_rows: int, batch_size: int, count: int, generator: torch.Generator
) -> tuple[Minibatches, Tensor]:
    """The rows of the next ``count`` minibatches, (count, batch_size).

    Without replacement an epoch is a random order of all rows, cut into batches; what is left over, fewer than a batch, is
    skipped, so that every batch is a uniformly random subset of its size.
    """
    if not len(state.order):
        return state, torch.randint(num_rows, (count, batch_size), generator=generator)
    order, position = state.order, int(state.position)
    batches = []
    for _ in range(count):
        if position + batch_size > num_rows:
            order, position = torch.randperm(num_rows, generator=generator), 0
        batches.append(order[position : position + batch_size])
        position += batch_size
    return Minibatches(order, torch.tensor(position)), torch.stack(batches)
