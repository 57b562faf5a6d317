"""How the function values at several points go together, as far as a network that predicts each by itself lets it be known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

MIN_SHARE = 0.01
"""Least share of the variance of f that a network's answer to an observation at the same point implies; guards a root."""

BESIDE = 0.05
"""How far from a point, in standardised units, its observation is imagined. Networks answer to one at the very same place more
sharply than to one beside it, as if functions were rough: with "bo", correlations at a thousandth of the range were 0.996 to
0.999, where those of a Matérn kernel of lengthscale 1 are over 0.9999; with this distance they are 0.9998."""

CONTEXTS = 32
"""That are encoded at once, for each element of a t-batch."""


class Context(NamedTuple):
    """Inputs (*batch, n, d), outcomes (*batch, m, n, 1), and the network's cache of them.

    Where each query has rows of its own there is no cache, but ``common``, a context of some rows for all queries, whose
    answers tell how points go together. ``num_read`` is the number of rows that processes were read off, where the network
    has some.
    """

    X: Tensor
    Y: Tensor
    cache: Any
    common: Any = None
    num_read: int = 0

    @property
    def processes(self) -> Any:
        """The Gaussian processes of a network that reads some, batch shape (*batch, m); or None."""
        return getattr(self.cache, "processes", None)


Marginals = Callable[[Context, Tensor], tuple[Distribution, ...]]
"""From a context and X (*batch, q, d) to the laws of f and of y, batch shape (*batch, q, m)."""

Encode = Callable[[Tensor, Tensor], Context]
"""From inputs (*batch, n, d) and outcomes (*batch, m, n, 1)."""


def correlations(marginals: Marginals, encode: Encode, context: Context, X: Tensor) -> Tensor:
    r"""Correlations of f between the points of each t-batch element, (*batch, m, q, q).

    :math:`\mathrm{Cov}(f_i, f_j) = \sigma_{y_i} (E[f_j \mid y_i = \mu_i + \sigma_{y_i}] - E[f_j])` for jointly
    Gaussian values. A network needn't agree with itself on i and j exchanged, nor on the variance at i = j; the mean
    of both and that variance are taken. So the order of points doesn't matter, and points that come close to each
    other have a correlation that goes to one: draws are continuous. Points with the same inputs are the same point.
    Observations are imagined a little beside their points.
    """
    q, context = X.shape[-2], context if context.common is None else context.common
    f, _ = marginals(context, X)
    if q == 1:
        return f.mean.new_ones(f.mean.mT.unsqueeze(-1).shape)
    beside = X + BESIDE / math.sqrt(X.shape[-1])
    _, y = marginals(context, beside)
    num_shared = _num_shared_rows(X) if context.X.dim() == 2 else 0
    columns = []
    for rows in (slice(0, num_shared), slice(num_shared, q)):
        if rows.start == rows.stop:
            continue
        # Rows that all t-batch elements share (a baseline, pending points) are conditioned on once for all of them.
        one = (0,) * (X.dim() - 2) if rows.start < num_shared else (...,)
        own_mean, own_std = y.mean[one][..., rows, :], y.stddev[one][..., rows, :]
        places, values = beside[one][..., rows, :], own_mean + own_std
        parts = zip(places.split(CONTEXTS, -2), values.split(CONTEXTS, -2), strict=True)
        shifted = torch.cat([_conditional_mean(marginals, encode, context, X, *part) for part in parts], -2)
        shift = shifted - f.mean.mT.unsqueeze(-2)  # (*batch, m, rows, q)
        columns.append((shift * own_std.mT.unsqueeze(-1)).mT)
    covariance = torch.cat(columns, -1)
    covariance = 0.5 * (covariance + covariance.mT)
    own = covariance.diagonal(dim1=-2, dim2=-1)
    scale = torch.maximum(own, MIN_SHARE * f.variance.mT).sqrt()
    correlation = (covariance / (scale.unsqueeze(-1) * scale.unsqueeze(-2))).clamp(-1, 1)
    return torch.where(same_points(X), torch.ones_like(correlation), correlation)


def _conditional_mean(
    marginals: Marginals, encode: Encode, old: Context, X: Tensor, rows: Tensor, values: Tensor
) -> Tensor:
    """E[f(X) | old context and y = values at one of the rows], for each row: (*batch, m, rows, q)."""
    m, n = old.Y.shape[-3], old.X.shape[-2]
    batch = torch.broadcast_shapes(rows.shape[:-2], old.X.shape[:-2])
    k, d = rows.shape[-2:]
    more_X = torch.cat([old.X.unsqueeze(-3).expand(*batch, k, n, d), rows.unsqueeze(-2).expand(*batch, k, 1, d)], -2)
    old_Y = old.Y.unsqueeze(-4).expand(*batch, k, m, n, 1)
    more_Y = torch.cat([old_Y, values[..., None, None].expand(*batch, k, m, 1, 1)], -2)
    f, _ = marginals(encode(more_X, more_Y), X.unsqueeze(-3))
    return f.mean.movedim(-1, -3)  # (*batch, rows, q, m) -> (*batch, m, rows, q)


def same_points(X: Tensor) -> Tensor:
    """Which points have the same inputs, (*batch, 1, q, q)."""
    return (X.unsqueeze(-2) == X.unsqueeze(-3)).all(-1).unsqueeze(-3)


def _num_shared_rows(X: Tensor) -> int:
    """How many leading rows all t-batch elements have in common, X (*batch, q, d)."""
    flat = X.detach().reshape(-1, *X.shape[-2:])
    differs = (flat != flat[:1]).any(-1).any(0)
    return int(differs.nonzero()[0]) if bool(differs.any()) else X.shape[-2]
