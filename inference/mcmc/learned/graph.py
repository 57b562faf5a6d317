"""Where blocks lie in a graph: their edges inside and outside, and which of them can be visited at the same time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bayesnn.inference.mcmc.learned.models import Block


class Neighbourhood(NamedTuple):
    """The edges of G blocks, numbered so that potentials can be looked up in ``both_ways``.

    Args:
        inner: the motif's edges, (G, e).
        outer: the edges from each variable to those around the block, (G, b, m), padded with "no edge".
        neighbours: the variables at their other ends, (G, b, m); 0 where there is none.
    """

    inner: Tensor
    outer: Tensor
    neighbours: Tensor


def both_ways(potentials: Tensor) -> Tensor:
    """Potentials (E, …) in both directions and a zero one for "no edge", (2 E + 1, …); pairwise tables are transposed."""
    backwards = potentials.transpose(1, 2) if potentials.dim() == 3 else potentials
    return torch.cat([potentials, backwards, torch.zeros_like(potentials[:1])])


def neighbourhood(edges: Tensor, blocks: Sequence[Block]) -> Neighbourhood:
    """Of blocks in a graph with the given edges (E, 2).

    Raises:
        ValueError: if the model has an edge within a block that the motif hasn't.
    """
    count = len(edges)
    from_variable: dict[int, dict[int, int]] = defaultdict(dict)
    for number, (first, second) in enumerate(edges.tolist()):
        from_variable[first][second], from_variable[second][first] = number, number + count
    inner, outside = [], []
    for block in blocks:
        variables, motif = block.variables.tolist(), block.edges.tolist()
        within = {frozenset((variables[i], variables[j])) for i, j in motif}
        inner.append([from_variable[variables[i]].get(variables[j], 2 * count) for i, j in motif])
        outside.append([[(e, j) for j, e in from_variable[i].items() if j not in variables] for i in variables])
        for i in variables:
            if any(j in variables and frozenset((i, j)) not in within for j in from_variable[i]):
                raise ValueError(f"the model has an edge within the block {variables} that its motif {motif} hasn't")
    most = max((len(around) for block in outside for around in block), default=0)
    padded = [[around + [(2 * count, 0)] * (most - len(around)) for around in block] for block in outside]
    pairs = torch.tensor(padded, dtype=torch.long).view(len(blocks), len(blocks[0].variables), most, 2)
    return Neighbourhood(torch.tensor(inner, dtype=torch.long), pairs[..., 0], pairs[..., 1])


def graph_blocks(edges: Tensor, sets: Sequence[Sequence[int]]) -> list[Block]:
    """Blocks of the given variables, with all their neighbours around; their motif has each edge that one of them has."""
    neighbours: dict[int, set[int]] = defaultdict(set)
    for first, second in edges.tolist():
        neighbours[first].add(second)
        neighbours[second].add(first)
    motif = sorted({(i, j) for own in sets for j in range(len(own)) for i in range(j) if own[j] in neighbours[own[i]]})
    around = [sorted(set().union(*(neighbours[i] for i in own)) - set(own)) for own in sets]
    pairs = torch.tensor(motif, dtype=torch.long).view(-1, 2)
    return [
        Block(torch.tensor(own), torch.tensor(others, dtype=torch.long), pairs)
        for own, others in zip(sets, around, strict=True)
    ]


def colours(blocks: Sequence[Block], num_variables: int) -> list[list[int]]:
    """Sets of blocks (their numbers) of which none touches another: given the rest, they are independent.

    Greedy: each block has the first colour that no block before it has whose variables it holds or depends on.
    """
    own, reach = torch.zeros(2, len(blocks), num_variables).unbind()
    for index, block in enumerate(blocks):
        own[index, block.variables] = 1
        reach[index, torch.cat([block.variables, block.condition[block.condition >= 0]])] = 1
    touching = own @ reach.T > 0
    touching |= touching.T.clone()
    found: list[int] = []
    for index in range(len(blocks)):
        taken = {found[other] for other in touching[index, :index].nonzero().flatten().tolist()}
        found.append(next(colour for colour in range(index + 1) if colour not in taken))
    return [
        [index for index, colour in enumerate(found) if colour == wanted]
        for wanted in range(max(found, default=-1) + 1)
    ]
