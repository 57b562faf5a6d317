"""Values far worse than all others, drawn in before a fit: they say where not to look, and by how much doesn't matter."""

from __future__ import annotations

import math

from torch import Tensor

from bayesnn.bo.outcomes import Outcomes

FENCE, MIN_ROWS = 3.0, 5


def drawn_in(values: Tensor, outcomes: Outcomes) -> Tensor:
    """The same values, but for objectives worse, and constraints farther beyond their limit, than a fence: they are put on it.

    The fence is Tukey's outer one, 3 interquartile ranges beyond the worse quartile (Exploratory Data Analysis, 1977; Ax
    winsorises outcomes in the same way, from memory at half the distance). Without it one diverged run of 1e6 makes all
    good values look alike to a standardised model. Good values are never changed, however far off, and a constraint that was
    broken stays broken. Fewer than 5 rows, and columns of which half are equal, have no fence.

    Args:
        values: (n, m), finite.
        outcomes: what the m columns mean.

    Returns:
        (n, m).
    """
    if len(values) < MIN_ROWS:
        return values
    drawn = values.clone()
    for index, sign in zip(outcomes.objectives, outcomes.signs.tolist(), strict=True):
        badness = -sign * values[:, index]
        drawn[badness > _fence(badness), index] = -sign * _fence(badness)
    for index, side, bound in outcomes.limits:
        sign = 1.0 if side == "<=" else -1.0
        excess = sign * (values[:, index] - bound)
        fence = max(_fence(excess), _spread(excess))  # beyond the limit
        drawn[excess > fence, index] = bound + sign * fence
    return drawn


def _fence(badness: Tensor) -> float:
    spread = _spread(badness)
    return float(badness.quantile(0.75)) + FENCE * spread if spread > 0 else math.inf


def _spread(badness: Tensor) -> float:
    """The distance of the quartiles; 0 if it is rounding."""
    lower, upper = badness.quantile(badness.new_tensor([0.25, 0.75])).tolist()
    return upper - lower if upper - lower > 1e-12 * max(abs(lower), abs(upper)) else 0.0
