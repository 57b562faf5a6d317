"""What a network was trained on bounds what it can be asked: known bounds of inputs, values far off, outliers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bayesnn.checks import interval
from bayesnn.data import Scaling

Bounds = tuple[float, float] | Sequence[tuple[float, float]]

FAR = 2.0
"""Times as far from 0 as anything that the network was trained on: values beyond are refused."""

OUTLIER, MIN_ROWS = 100.0, 10
"""Standard deviations of all other rows, beyond which a row is an outlier, where there are so many rows."""


def pairs(bounds: Bounds) -> list[tuple[float, float]]:
    """One pair for all features, or one for each.

    Raises:
        TypeError, ValueError: for anything else, and for bounds that don't increase.
    """
    given: Any = bounds
    values = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(values, (list, tuple)) or not values:
        raise ValueError(f"bounds must be (low, high) or one such pair for each column of X, found {bounds!r}")
    each = list(values) if isinstance(values[0], (list, tuple)) else [values]
    return [interval("bounds", pair) for pair in each]


def bounded_scaling(bounds: list[tuple[float, float]], X: Tensor) -> Scaling:
    """[low, high] becomes the interval around 0 over which a uniform variable has variance 1.

    Raises:
        ValueError: if there is another number of columns, or X is outside.
    """
    if len(bounds) not in (1, X.shape[-1]):
        raise ValueError(f"X must have {len(bounds)} columns, one for each pair of bounds, found {X.shape[-1]}")
    check_bounds(bounds, X)
    low, high = torch.tensor(bounds, dtype=X.dtype, device=X.device).expand(X.shape[-1], 2).unbind(-1)
    return Scaling(((low + high) / 2)[None], ((high - low) / math.sqrt(12))[None])


def check_bounds(bounds: list[tuple[float, float]] | None, X: Tensor) -> None:
    """Raises ValueError for observations outside the bounds."""
    if outside(bounds, X):
        raise ValueError(f"X must be within the bounds, found {float(X.min()):.6g} to {float(X.max()):.6g}")


def outside(bounds: list[tuple[float, float]] | None, X: Tensor) -> bool:
    """Whether any row is."""
    if bounds is None:
        return False
    low, high = torch.tensor(bounds, dtype=X.dtype, device=X.device).unbind(-1)
    return bool(((low > X) | (high < X)).any())


def check_range(largest: Sequence[float] | None, *rows: Tensor) -> None:
    """Raises ValueError for standardised inputs and outcomes far from all that a network was trained on."""
    for name, values, most in zip("XY", rows, largest or (), strict=False):
        found = float(values.detach().abs().max())
        if found > FAR * most:
            raise ValueError(
                f"{name} must be within {FAR * most:.1f} standard deviations of its mean, twice as far as anything the "
                f"network was trained on; found {found:.1f}: transform it, or drop such rows"
            )


def outlier(values: Tensor) -> str | None:
    """What to say of values (n, k) if one row is so far off that standardising its column makes all others look alike.

    Its distance is measured by the other rows' own mean and deviation: with its own among them, none is ever far. A
    column whose other rows are all equal is let through: that is what a rare category looks like.
    """
    n = len(values)
    if n < MIN_ROWS:
        return None
    farthest = (values - values.mean(0)).abs().argmax(0, keepdim=True)
    kept = torch.ones_like(values, dtype=torch.bool).scatter(0, farthest, False)
    others = values.mT[kept.mT].reshape(values.shape[1], n - 1)
    distance = (values.gather(0, farthest)[0] - others.mean(-1)).abs()
    deviation = others.std(-1)
    alike = deviation <= 10 * torch.finfo(values.dtype).eps * others.abs().amax(-1)
    found = torch.where(alike, torch.zeros_like(distance), distance / deviation)
    if float(found.max()) <= OUTLIER:
        return None
    column = int(found.argmax())
    return (
        f"row {int(farthest[0, column])} of column {column} is {float(found.max()):.3g} standard deviations of the other rows "
        "from their mean, so that these look alike: transform the column (logarithms, ranks), or drop the row"
    )
