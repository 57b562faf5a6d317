"""Early stopping: by what the values did, by what the surrogate expects."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import optuna
import pytest

from bayesnn.bo import little_expected, minimize, no_improvement

X = {"x": (0.0, 1.0)}


def evaluations(values: list[Any], callback: Any, **more: Any) -> int:
    """How many there were before it stopped."""
    answers = iter(values)
    options = {"num_trials": len(values), "num_startup": len(values)} | more
    return len(minimize(lambda x: next(answers), X, callbacks=[callback], **options).history)


@pytest.mark.filterwarnings("ignore:.*evaluations failed")
@pytest.mark.parametrize(
    "values, expected",
    [
        ([5, 4, 3, 3, 4, 3, 0, 0], 6),  # 3 isn't better than 3
        ([5, 4, 3, 3, 4, 2, 2, 2, 2], 9),  # just in time
        ([5, math.nan, "x", None, 1], 4),  # failures bring nothing
        ([math.nan, math.nan, math.nan, math.nan, 1, 2], 6),  # before the first value nothing stops
        ([5, 6], 2),
    ],
)
def test_values_that_no_longer_improve(values: list[Any], expected: int) -> None:
    assert evaluations(values, no_improvement(3)) == expected


def test_an_improvement_within_the_tolerance_is_none() -> None:
    values = [5.0, 4.9, 4.8, 4.7, 4.6, 4.5]
    assert evaluations(values, no_improvement(3)) == 6
    assert evaluations(values, no_improvement(3, tolerance=0.5)) == 4


def test_of_several_objectives_and_under_constraints() -> None:
    both = {"objectives": ["minimize", "maximize"]}
    # (3, 1) and (1, 0) are worse than (1, 1), of equal ones the first counts, (2, 5) is a trade-off.
    assert evaluations([(1, 1), (3, 1), (1, 0), (1, 1), (0, 0)], no_improvement(3), **both) == 4
    assert evaluations([(1, 1), (3, 1), (2, 5), (1, 1), (9, 0)], no_improvement(3), **both) == 5
    limited = {"objectives": {"a": "minimize"}, "constraints": {"b": ("<=", 0.0)}}
    values = [{"a": 5, "b": 0}, {"a": 4, "b": 1}, {"a": 3, "b": 1}, {"a": 2, "b": 0}, {"a": 1, "b": 0}]
    assert evaluations(values, no_improvement(2), **limited) == 3


def test_a_search_that_goes_on_stops_as_it_would_have(tmp_path: Path) -> None:
    stored = {"storage": tmp_path / "study.db"}
    assert evaluations([5, 4, 4], no_improvement(3), **stored) == 3
    # After 5, 4, 4 and one more 4, the last three have brought nothing.
    assert evaluations([4, 4, 4, 4, 4, 4], no_improvement(2), **stored) == 4


def study_with(promises: list[tuple[str, float] | None]) -> tuple[optuna.Study, optuna.trial.FrozenTrial]:
    study = optuna.create_study()
    study._thread_local.in_optimize_loop = True
    distributions = {"x": optuna.distributions.FloatDistribution(0.0, 1.0)}
    for promise in promises:
        attributes = {} if promise is None else {"acquisition": promise[0], "acquisition_value": promise[1]}
        study.add_trial(
            optuna.create_trial(params={"x": 0.5}, distributions=distributions, value=1.0, user_attrs=attributes)
        )
    return study, study.trials[-1]


@pytest.mark.parametrize(
    "promises, stops",
    [
        ([("lognei", -8.0)] * 2, True),
        ([("logei", -8.0), ("lognei", -7.0)], True),
        ([("lognei", -8.0), ("lognei", -6.0)], False),
        ([("lognei", -8.0)], False),
        ([None, ("lognei", -8.0)], False),
        ([("ucb", -8.0)] * 2, False),
        ([("closed-form logei", -8.0)] * 2, False),
    ],
)
def test_little_is_expected(promises: Any, stops: bool) -> None:
    study, trial = study_with(promises)  # log 0.001 = -6.9
    study._stop_flag = False
    little_expected(0.001, num_trials=2)(study, trial)
    assert study._stop_flag is stops


def test_a_parabola_is_known_soon() -> None:
    result = minimize(
        lambda x: (x["x"] - 0.3) ** 2,
        X,
        surrogate="gp",
        num_trials=25,
        num_startup=5,
        callbacks=[little_expected(0.01, num_trials=2)],
    )
    assert 7 <= len(result.history) < 25 and result.value < 1e-3


def test_numbers_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="num_trials must be at least 1"):
        no_improvement(0)
    with pytest.raises(ValueError, match="tolerance must be a number from 0 on"):
        no_improvement(3, tolerance=-1.0)
    with pytest.raises(ValueError, match="fraction must be positive"):
        little_expected(0.0)
