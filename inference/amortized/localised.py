r"""Queries that see their nearest rows only.

A network's answer has a bias that more data don't remove, unless its prediction depends, as the context grows, on rows closer
and closer to the query; attention with trained weights doesn't see to that. Restricted to the k nearest rows, with k to
infinity and k / n to 0, the bias vanishes; and rows beyond those that the network was trained on are no obstacle.

Source: Nagler, Statistical foundations of prior-data fitted networks (ICML 2023), section 5.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

QUERIES = 128  # that are answered at once: each has a context of its own


def nearest_output(network: Any, X: Tensor, Y: Tensor, queries: Tensor, k: int, processes: Any = None) -> Tensor:
    """What the network's head gives at each query, with the k rows nearest to it as the context.

    Nearness is Euclidean; of equally near rows the first ones are taken. Every query is a context of its own to encode:
    time is that of as many contexts of k rows, against one of n.

    Args:
        network: with ``encode`` and ``query``.
        X: (*batch, n, d) all rows.
        Y: (*batch, m, n, 1) their outcomes.
        queries: (*batch, q, d).
        k: rows for each query.
        processes: Gaussian processes, read off some of the rows, whose hyperparameters all queries share; None: each reads
            its own, if the network has some.

    Returns:
        (*batch, q, m, num_outputs).
    """
    return torch.cat([_output(network, X, Y, some, k, processes) for some in queries.split(QUERIES, -2)], -3)


def _output(network: Any, X: Tensor, Y: Tensor, queries: Tensor, k: int, processes: Any) -> Tensor:
    nearest = (
        torch.cdist(queries, X, compute_mode="donot_use_mm_for_euclid_dist")
        .sort(dim=-1, stable=True)
        .indices[..., :k]
        .sort(-1)
        .values
    )
    batch, (n, d), m, q = nearest.shape[:-2], X.shape[-2:], Y.shape[-3], queries.shape[-2]
    rows = X.unsqueeze(-3).expand(*batch, q, n, d).gather(-2, nearest.unsqueeze(-1).expand(*nearest.shape, d))
    whole = torch.broadcast_shapes(batch, Y.shape[:-3])  # with fantasies, which differ in outcomes alone
    values = Y[..., 0].unsqueeze(-3).expand(*whole, q, m, n)
    values = values.gather(-1, nearest.unsqueeze(-2).expand(*whole, q, m, k)).unsqueeze(-1)
    options = {} if processes is None else {"processes": processes.without_rows().unsqueezed()}
    cache = network.encode(rows.unsqueeze(-3).expand(*whole, q, m, k, d), values, **options)
    at = queries.expand(*whole, q, d)[..., None, None, :].expand(*whole, q, m, 1, d)
    found: Tensor = network.query(cache, at).squeeze(-2)
    return found
