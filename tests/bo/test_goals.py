"""Several objectives and constraints: what is read from the objective's answers, fronts, hypervolumes, feasibility."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch

from bayesnn import BayesnnWarning
from bayesnn.bo import Result, Space, maximize, minimize
from bayesnn.bo.goals import Goals
from bayesnn.bo.storage import open_storage

LOSS_AND_SIZE: dict[str, Any] = {"loss": "minimize", "size": "maximize"}
MEMORY: dict[str, Any] = {"memory": ("<=", 4.0)}


@pytest.mark.parametrize(
    "objectives, constraints, returned, expected",
    [
        (None, None, 0.5, {"value": 0.5}),
        (None, None, torch.tensor([2.0]), {"value": 2.0}),
        (["minimize", "maximize"], None, (1, np.float32(2)), {"value 1": 1.0, "value 2": 2.0}),
        (["minimize", "maximize"], None, torch.tensor([1.0, 2.0]), {"value 1": 1.0, "value 2": 2.0}),
        (LOSS_AND_SIZE, None, {"size": 2, "loss": 1}, {"loss": 1.0, "size": 2.0}),
        ({"loss": "minimize"}, MEMORY, {"loss": 1, "memory": 5}, {"loss": 1.0, "memory": 5.0}),
        # What isn't understood, in the words in which it is told.
        (None, None, "0.5", "the objective returned '0.5', not a finite number"),
        (None, None, {"value": 0.5}, "the objective returned {'value': 0.5}, not a finite number"),
        (["minimize"] * 2, None, 1.0, "the objective returned 1.0, not a sequence of 2 finite numbers"),
        (["minimize"] * 2, None, [1.0], "the objective returned [1.0], not a sequence of 2 finite numbers"),
        (
            ["minimize"] * 2,
            None,
            (1.0, np.inf),
            "the objective returned (1.0, inf), not a sequence of 2 finite numbers",
        ),
        (["minimize"] * 2, None, "ab", "the objective returned 'ab', not a sequence of 2 finite numbers"),
        (LOSS_AND_SIZE, None, (1.0, 2.0), "the objective returned (1.0, 2.0), not a dict with loss, size"),
        (LOSS_AND_SIZE, None, {"loss": 1, "sise": 2}, "the objective returned no size, only loss, sise"),
        (LOSS_AND_SIZE, None, {}, "the objective returned no loss, size, only nothing"),
        ({"a": "minimize"}, None, {"a": 1, "b": 2, 3: 4}, {"a": 1.0}),
        ({"a": "minimize"}, None, {"a": float("nan")}, "the objective returned nan as a, not a finite number"),
        (
            {"a": "minimize"},
            MEMORY,
            {"a": 1, "memory": "much"},
            "the objective returned 'much' as memory, not a finite number",
        ),
    ],
)
def test_what_is_read(objectives: Any, constraints: Any, returned: Any, expected: Any) -> None:
    goals = Goals.of("minimize", objectives, constraints)
    if isinstance(expected, dict):
        assert list(goals.read(returned).items()) == list(expected.items())
    else:
        with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
            goals.read(returned)


def test_further_numbers_are_kept() -> None:
    goals = Goals.of("minimize", {"a": "minimize"})
    returned = {"a": 1, "b": np.float32(2), 3: 4, "c": float("nan"), "d": "text"}
    assert goals.others(returned) == {"b": 2.0} and goals.others(5.0) == {}
    assert Goals.of("minimize").others({"b": 2.0}) == {}
    with pytest.raises(ValueError, match="the objective returned a generator: say with fidelity=Fidelity"):
        Goals.of("minimize").read(x for x in (1.0, 2.0))

    class Bad:
        def __float__(self) -> float:
            raise ZeroDivisionError

    result = minimize(
        lambda x: {"a": x["n"], "bad": Bad()}, {"n": (1, 3)}, objectives={"a": "minimize"}, num_trials=2, num_startup=2
    )
    assert result.num_failed == 0  # what wasn't asked for costs no evaluation
    result = minimize(
        lambda x: {"a": x["n"], "epochs": 7}, {"n": (1, 3)}, objectives={"a": "minimize"}, num_trials=2, num_startup=2
    )
    assert all(trial.user_attrs["metric:epochs"] == 7 for trial in result.study.trials) and result.num_failed == 0
    assert all(evaluation.outcomes.keys() == {"a"} for evaluation in result.history)


def test_excesses_are_in_the_units_of_what_is_limited() -> None:
    goals = Goals.of("minimize", {"loss": "minimize"}, {"memory": ("<=", 4.0), "accuracy": (">=", 0.9)})
    assert goals.excesses({"loss": 0.0, "memory": 5.0, "accuracy": 0.5}) == {"memory": 1.0, "accuracy": 0.4}
    assert goals.excesses({"loss": 0.0, "memory": 4.0, "accuracy": 1.0})["memory"] == 0.0


GRID = {"a": [1, 2, 3], "b": [1, 2, 3]}


def enumerated(objectives: Any, values: Any, constraints: Any = None, **more: Any) -> Result:
    """Every configuration of a small space, evaluated once."""
    return minimize(values, GRID, objectives=objectives, constraints=constraints, num_trials=9, num_startup=9, **more)


def test_the_front_and_its_hypervolume_by_hand() -> None:
    result = enumerated(LOSS_AND_SIZE, lambda x: {"loss": x["a"], "size": 3 * x["b"] - (3 - x["a"])})
    # Loss 1, 2, 3 with sizes up to 7, 8, 9: the three with b = 3.
    assert sorted((e.outcomes["loss"], e.outcomes["size"]) for e in result.front) == [(1, 7), (2, 8), (3, 9)]
    assert all(e.x["b"] == 3 and e.value is None and e.feasible for e in result.front)
    # Against (4, 0): 3 × 7, and then strips of height 1 and widths 2 and 1.
    volumes = result.hypervolume_so_far((4.0, 0.0))
    assert volumes[-1] == pytest.approx(21 + 2 + 1) and (np.diff(volumes) >= 0).all() and len(volumes) == 9
    first = result.history[0].outcomes
    assert volumes[0] == pytest.approx((4 - first["loss"]) * first["size"])
    # By default a tenth of the front's range beyond its worst: against (3.2, 6.8).
    assert result.hypervolume_so_far()[-1] == pytest.approx(2.2 * 0.2 + 1.2 * 1 + 0.2 * 1)
    assert repr(result) == "Result(3 on the front of loss, size, 9 evaluations)"
    assert [t.number for t in result.study.best_trials] == [e.number for e in result.front]
    with pytest.raises(ValueError, match="there is no single best for loss, size: see the result's front"):
        result.x  # noqa: B018
    with pytest.raises(ValueError, match="see hypervolume_so_far"):
        result.best_so_far  # noqa: B018
    with pytest.raises(ValueError, match="reference_point must have a finite value for each of loss, size"):
        result.hypervolume_so_far([1.0])


def test_of_one_objective_the_front_is_the_best() -> None:
    result = enumerated(None, lambda x: x["a"] * x["b"])
    assert [e.value for e in result.front] == [1] and result.front == (result.best,) and result.feasible
    assert result.hypervolume_so_far([10.0])[-1] == 9
    assert np.array_equal(result.hypervolume_so_far([10.0]), 10 - result.best_so_far)


def test_only_what_keeps_the_constraints_is_best() -> None:
    def f(x: dict[str, Any]) -> dict[str, float]:
        return {"loss": x["a"] + x["b"] / 10, "memory": 6 - x["a"]}

    result = enumerated({"loss": "minimize"}, f, MEMORY)
    assert result.x == {"a": 2, "b": 1} and result.value == 2.1 and result.feasible
    assert result.best.outcomes == {"loss": 2.1, "memory": 4.0}
    for evaluation in result.history:
        assert evaluation.outcomes == f(evaluation.x) and evaluation.feasible == (evaluation.x["a"] > 1)
    losses = [e.outcomes["loss"] if e.feasible else np.inf for e in result.history]
    assert np.array_equal(np.nan_to_num(result.best_so_far, nan=np.inf), np.minimum.accumulate(losses))
    assert result.study.best_trial.number == result.best.number

    with pytest.warns(BayesnnWarning, match="no evaluation keeps all constraints: memory <= 2, spare >= 1"):
        hopeless = enumerated(
            {"loss": "minimize"},
            lambda x: f(x) | {"spare": x["b"] - 3},
            {"memory": ("<=", 2.0), "spare": (">=", 1.0)},
        )
    # The largest excesses are 3 of memory and 3 of the spare; the least bad of both is a = b = 3.
    assert not hopeless.feasible and hopeless.x == {"a": 3, "b": 3} and hopeless.front == ()
    assert np.isnan(hopeless.best_so_far).all() and (hopeless.hypervolume_so_far() == 0).all()
    assert "no constraint-keeping one" in repr(hopeless)


def test_the_surrogate_models_objectives_and_constraints() -> None:
    def f(x: dict[str, Any]) -> dict[str, float]:
        return {"loss": x["x"] ** 2, "cost": (10 - x["x"]) ** 2, "heat": 10 - x["y"]}

    result = minimize(
        f,
        {"x": (0, 10), "y": (0, 10)},
        objectives={"loss": "minimize", "cost": "minimize"},
        constraints={"heat": ("<=", 5.0)},
        acquisition="lognparego",
        surrogate="gp",
        num_trials=9,
        num_startup=6,
    )
    *_, last = result.study.trials
    assert last.user_attrs["acquisition"] == "lognparego" and "fallback" not in last.user_attrs
    assert (
        last.constraints == {"heat": f(last.params)["heat"] - 5}
        and last.user_attrs["metric:heat"] == 10 - last.params["y"]
    )
    assert result.model.posterior(result.space.features([last.params])).mean.shape == (1, 3)
    assert result.study.metric_names == ["loss", "cost"]
    # Heat is linear in y, which six points show: nothing that breaks its limit is suggested.
    assert all(evaluation.feasible for evaluation in result.history[6:])


def test_failures_among_several_objectives() -> None:
    def f(x: dict[str, Any]) -> Any:
        return {"loss": x["a"]} if x["b"] == 2 else {"loss": x["a"], "size": x["b"]}

    with pytest.warns(
        BayesnnWarning, match="3 of 9 evaluations failed; the last one: the objective returned no size, only loss"
    ):
        result = enumerated(LOSS_AND_SIZE, f)
    assert result.num_failed == 3 and [e.outcomes for e in result.history if e.failure] == [{}] * 3
    assert not any(e.feasible for e in result.history if e.failure)
    assert [e.outcomes for e in result.front] == [{"loss": 1.0, "size": 3.0}]


def test_unnamed_objectives_and_maximize() -> None:
    result = maximize(
        lambda x: (x["a"], -x["b"]), GRID, objectives=["maximize", "minimize"], num_trials=9, num_startup=9
    )
    assert [e.x for e in result.front] == [{"a": 3, "b": 3}]
    assert result.front[0].outcomes == {"value 1": 3.0, "value 2": -3.0} and result.study.metric_names is None


def test_stored_studies_keep_their_goals(tmp_path: Path) -> None:
    path = open_storage(tmp_path / "study.db")

    def run(objectives: Any, constraints: Any = None, **more: Any) -> Result:
        names = list(objectives) if isinstance(objectives, dict) else []
        wanted = {"num_trials": 3, "num_startup": 9, "storage": path} | more
        return minimize(
            lambda x: {name: float(x["a"]) for name in [*names, *(constraints or {})]},
            GRID,
            objectives=objectives,
            constraints=constraints,
            **wanted,
        )

    first = run({"loss": "minimize"}, MEMORY)
    again = run({"loss": "minimize"}, MEMORY, num_trials=4)
    assert again.history[:3] == first.history and len(again.history) == 4
    with pytest.raises(
        ValueError, match=r"has the constraints \{'memory': \['<=', 4.0\]\}, not \{'memory': \['<=', 3.0\]\}"
    ):
        run({"loss": "minimize"}, {"memory": ("<=", 3.0)})
    with pytest.raises(ValueError, match=r"has the constraints \{'memory'.*, not none"):
        run({"loss": "minimize"})
    with pytest.raises(ValueError, match="is about 'loss', not 'time': give another study_name"):
        run({"time": "minimize"}, MEMORY)
    with pytest.raises(ValueError, match="has the directions minimize, not minimize, maximize"):
        run(LOSS_AND_SIZE)
    minimize(lambda x: x["a"], GRID, num_trials=2, num_startup=9, storage=path, study_name="plain")
    with pytest.raises(ValueError, match="has objectives without names: go on with these, or give another study_name"):
        run({"loss": "minimize"}, MEMORY, study_name="plain")


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"objectives": {}}, ValueError, "objectives must have at least one"),
        ({"objectives": "minimize"}, TypeError, "objectives must be"),
        ({"objectives": {"a": "down"}}, ValueError, "objectives must each be minimize or maximize, found 'down' for a"),
        ({"objectives": {"a\n": "minimize"}}, TypeError, "objectives must be named by short, printable strings"),
        ({"constraints": MEMORY}, ValueError, "constraints need named objectives"),
        (
            {"objectives": {"a": "minimize"}, "constraints": {"a": ("<=", 1)}},
            ValueError,
            "on other outcomes than .*, found a",
        ),
        ({"objectives": {"a": "minimize"}, "constraints": {"b": 1}}, ValueError, r"constraints\['b'\] must be"),
        (
            {"objectives": {"a": "minimize"}, "constraints": {"b": ("<=", np.nan)}},
            ValueError,
            r"constraints\['b'\] must be",
        ),
        ({"objectives": {"a": "minimize"}, "constraints": ["b"]}, TypeError, "constraints must be"),
        (
            {"objectives": LOSS_AND_SIZE, "acquisition": "logei"},
            ValueError,
            "acquisition must be one of lognehvi, lognparego",
        ),
        (
            {"objectives": LOSS_AND_SIZE, "reference_point": [1.0]},
            ValueError,
            "reference_point must have 2 values, found 1",
        ),
        ({"reference_point": [1.0]}, ValueError, "reference_point must be None for one objective"),
        (
            {"objectives": {"a": "minimize"}, "constraints": MEMORY, "acquisition": "ucb"},
            ValueError,
            "under constraints",
        ),
    ],
)
def test_goals_that_make_no_sense(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        minimize(lambda x: pytest.fail("work has begun"), Space({"x": (0.0, 1.0)}), **change)


def test_optuna_reads_the_constraints(tmp_path: Path) -> None:
    result = enumerated(
        {"loss": "minimize"}, lambda x: {"loss": x["a"], "memory": 6 - x["a"]}, MEMORY, storage=tmp_path / "study.db"
    )
    study = optuna.load_study(study_name="bayesnn", storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert study.best_trial.params["a"] == 2 == result.x["a"]
