"""Values far worse than all others, drawn in before a fit."""

from __future__ import annotations

import pytest
import torch

from bayesnn.bo.outcomes import outcomes_of
from bayesnn.bo.outliers import drawn_in

PLAIN = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], dtype=torch.float64)


def column(*others: float) -> torch.Tensor:
    """Nine plain values, whose quartiles are 2 and 6, and others."""
    return torch.cat([PLAIN, torch.tensor(others, dtype=torch.float64)])[:, None]


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_bad_values_are_put_on_the_fence_and_good_ones_stay(direction):
    sign = 1.0 if direction == "minimize" else -1.0
    values = sign * column(1e6, -1e6)
    drawn = drawn_in(values, outcomes_of(1, direction))
    lower, upper = (sign * values[:, 0]).quantile(torch.tensor([0.25, 0.75], dtype=torch.float64)).tolist()
    assert float(sign * drawn[9, 0]) == pytest.approx(upper + 3 * (upper - lower))
    assert torch.equal(drawn[[*range(9), 10]], values[[*range(9), 10]])
    assert float(values[9, 0]) == sign * 1e6  # what was given is as it was


def test_plain_values_few_rows_and_equal_columns_stay_as_they_are():
    outcomes = outcomes_of(1, "minimize")
    for values in (column(), torch.tensor([[0.0], [1.0], [2.0], [1e9]]), torch.tensor([[3.0]] * 8 + [[1e9]])):
        assert torch.equal(drawn_in(values, outcomes), values)


@pytest.mark.parametrize(("side", "sign"), [("<=", 1.0), (">=", -1.0)])
def test_a_broken_constraint_stays_broken(side, sign):
    """Also where nearly all rows keep it so well that the fence is on their side of the limit."""
    kept = sign * (column() - 100)
    values = torch.cat([column(3.0), torch.cat([kept, torch.tensor([[sign * 1e6]], dtype=torch.float64)])], -1)
    outcomes = outcomes_of(2, "minimize", {1: (side, 0.0)})
    drawn = drawn_in(values, outcomes)
    assert torch.equal(drawn[:, 0], values[:, 0]) and torch.equal(drawn[:9], values[:9])
    assert 0 < float(sign * drawn[9, 1]) < 10
