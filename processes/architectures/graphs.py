r"""Graphs: nodes are positions, and a layer takes sums over neighbours.

.. math:: f(x)_v = \sum_u A_{vu}\, h(x)_u, \qquad K' = A_1 K A_2^T, \qquad \Theta' = A_1 \Theta A_2^T

(Du et al. 2019). With a ``Dense`` layer before or after, it is a layer of a graph convolutional network (Kipf & Welling 2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from bayesnn.processes.architectures.combinations import Combination, Repeated
from bayesnn.processes.architectures.covariance import Covariance
from bayesnn.processes.architectures.layers import Layer, Variances
from bayesnn.processes.architectures.mixing import mixed
from bayesnn.processes.architectures.pooling import Mixing, check_pairs


@dataclass(frozen=True)
class Aggregate(Mixing):
    """Sums over nodes, weighted by an adjacency matrix: as it is, so normalise it beforehand if it should be.

    Args:
        adjacency: A (v, v), of all inputs; None: each input has its own.

    Raises:
        ValueError: if it isn't a square matrix of finite numbers.
    """

    adjacency: Sequence[Sequence[float]] | None = None

    def __post_init__(self) -> None:
        if self.adjacency is None:
            return
        rows = tuple(tuple(float(value) for value in row) for row in self.adjacency)
        if not rows or any(len(row) != len(rows) for row in rows):
            raise ValueError(
                f"adjacency must be a square matrix, found {len(rows)} rows of {sorted({*map(len, rows)})}"
            )
        if not torch.tensor(rows).isfinite().all():
            raise ValueError("adjacency must be finite")
        object.__setattr__(self, "adjacency", rows)

    def propagate(self, covariance: Covariance, variances: Variances) -> Covariance:
        """Sums over both nodes of a pair.

        Raises:
            ValueError: if covariances aren't of pairs of nodes, or the adjacency matrix is missing or has another size.
        """
        check_pairs(self, covariance)
        first = covariance.first
        if self.adjacency is not None:
            fixed = torch.tensor(self.adjacency, dtype=first.dtype, device=first.device)
            left = right = fixed.reshape(1, 1, *fixed.shape)
        elif covariance.graphs is not None:
            left, right = covariance.graphs
        else:
            raise ValueError("Aggregate needs adjacency matrices: its own, or one beside each input (with_adjacency)")
        check_nodes(left.shape[-1], tuple(first.shape[-covariance.num_trailing :: 2]))
        return mixed(covariance, left, right)


def check_nodes(num_nodes: int, sizes: tuple[int, ...]) -> None:
    """Raise ValueError unless inputs have one dimension of positions, as many as an adjacency matrix has nodes."""
    if len(sizes) != 1:
        raise ValueError(f"Aggregate needs inputs with one dimension of positions, the nodes, found {len(sizes)}")
    if sizes[0] != num_nodes:
        raise ValueError(f"found an adjacency matrix of {num_nodes} nodes for inputs of {sizes[0]} nodes")


def with_adjacency(covariance: Covariance, adjacency1: Tensor, adjacency2: Tensor | None = None) -> Covariance:
    """Covariances of graphs, with their adjacency matrices.

    Args:
        covariance: of n and m inputs.
        adjacency1: (*batch, n, v, v).
        adjacency2: (*batch, m, v, v); unused where every input is paired with itself.

    Raises:
        ValueError: if a shape doesn't suit.
    """
    first = adjacency1.unsqueeze(-3)
    if covariance.itself:
        second = first
    elif adjacency2 is None:
        raise ValueError("adjacency2 is missing: the second inputs' adjacency matrices")
    else:
        second = adjacency2.unsqueeze(-4)
    for name, given, found, own in (
        ("adjacency1", adjacency1, first, covariance.first),
        ("adjacency2", adjacency2, second, covariance.second),
    ):
        counts = own.shape[own.dim() - covariance.num_trailing - 2 : own.dim() - covariance.num_trailing]
        if given is not None and (found.shape[-4:-2] != counts or given.shape[-1] != given.shape[-2]):
            raise ValueError(f"{name} must be {prod(counts)} square matrices, found shape {tuple(given.shape)}")
    return covariance.replace(graphs=(first, second))


def needs_graphs(architecture: Layer) -> bool:
    """Whether each input needs an adjacency matrix of its own."""
    if isinstance(architecture, Aggregate):
        return architecture.adjacency is None
    if isinstance(architecture, (Combination, Repeated)):
        return any(needs_graphs(layer) for layer in architecture.layers)
    return False


def unflattened(rows: Tensor, input_shape: Sequence[int], graphs: bool = False) -> tuple[Tensor, Tensor | None]:
    """Inputs (*batch, n, C, *positions) from flat rows, and adjacency matrices (*batch, n, v, v) if rows end in them.

    Args:
        rows: (*batch, n, d): inputs, channel by channel; then, with ``graphs``, the rows of the adjacency matrix.
        input_shape: (C, *positions) of one input.
        graphs: whether rows end in an adjacency matrix.

    Raises:
        ValueError: if rows have another length.
    """
    shape = tuple(input_shape)
    size = prod(shape)
    num_nodes = shape[-1] if graphs else 0
    if rows.shape[-1] != size + num_nodes**2:
        adjacency = f" and the adjacency matrix of {num_nodes} nodes" if graphs else ""
        raise ValueError(
            f"rows must have {size + num_nodes**2} columns, for inputs of shape {shape}{adjacency}, found {rows.shape[-1]}"
        )
    x = rows[..., :size].reshape(*rows.shape[:-1], *shape)
    return x, rows[..., size:].reshape(*rows.shape[:-1], num_nodes, num_nodes) if graphs else None
