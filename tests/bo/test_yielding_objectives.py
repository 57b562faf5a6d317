"""Objectives that yield a value after each unit of resource: pruned, counted, resumed, cut off."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from bayesnn import BayesnnWarning
from bayesnn.bo import Fidelity, Result, maximize, minimize, suggest

SPACE = {"x": (1, 60)}
FIDELITY = Fidelity(9)
OPTIONS: dict[str, Any] = {"fidelity": FIDELITY, "num_startup": 100, "seed": 0}


class Counted:
    """Yields x + 1/epoch, and counts what is drawn and closed."""

    def __init__(self, sign: float = 1.0) -> None:
        self.sign, self.drawn, self.closed = sign, 0, 0

    def __call__(self, x: dict[str, Any]) -> Iterator[float]:
        try:
            for epoch in range(1, 100):
                self.drawn += 1
                yield self.sign * (x["x"] + 1 / epoch)
        finally:
            self.closed += 1


def test_drawing_stops_where_a_trial_is_pruned_and_at_the_whole_resource() -> None:
    f = Counted()
    result = minimize(f, SPACE, num_trials=25, **OPTIONS)
    assert len(result.history) == 25 and result.num_failed == 0
    spent = [max(evaluation.curve) for evaluation in result.history]
    assert f.drawn == sum(spent) and f.closed == 25 and set(spent) == {1, 3, 9}
    for evaluation in result.history:
        assert evaluation.pruned == (max(evaluation.curve) < 9) == (evaluation.value is None)
        assert evaluation.curve == {epoch: evaluation.x["x"] + 1 / epoch for epoch in evaluation.curve}
    assert result.num_pruned == sum(epochs < 9 for epochs in spent) and "ended early" in repr(result)
    # Only what was trained to the end counts as found.
    finished = [evaluation for evaluation in result.history if not evaluation.pruned]
    assert result.value == min(evaluation.value for evaluation in finished) == result.x["x"] + 1 / 9
    assert np.nanmin(result.best_so_far) == result.value


def test_maximize_prunes_the_low_ones() -> None:
    result = maximize(Counted(-1.0), SPACE, num_trials=20, **OPTIONS)
    assert result.num_pruned > 8 and result.value == -(result.x["x"] + 1 / 9)
    pruned = [evaluation.x["x"] for evaluation in result.history if evaluation.pruned]
    assert np.mean(pruned) > result.x["x"]


def test_a_study_goes_on_with_its_pruned_trials_counted(tmp_path: Path) -> None:
    storage = tmp_path / "study.db"
    first = minimize(Counted(), SPACE, num_trials=8, storage=storage, **OPTIONS)
    assert first.num_pruned > 2
    f = Counted()
    whole = minimize(f, SPACE, num_trials=12, storage=storage, **OPTIONS)
    assert whole.history[:8] == first.history and len(whole.history) == 12
    assert f.closed == 4
    # As if it hadn't stopped.
    assert _traces(whole) == _traces(minimize(Counted(), SPACE, num_trials=12, **OPTIONS))
    with pytest.raises(
        ValueError, match=r"has rungs = \[1, 3, 9, 20\], but the stored study 'bayesnn' has \[1, 3, 9\]"
    ):
        minimize(Counted(), SPACE, num_trials=12, storage=storage, fidelity=Fidelity(20))


def _traces(result: Result) -> list[tuple[Any, ...]]:
    return [(each.number, each.x, each.value, each.curve) for each in result.history]


SCRIPT = """
    import os, signal, sys
    from bayesnn.bo import Fidelity, minimize

    def f(x):
        for epoch in range(1, 10):
            if epoch == 6 and not os.path.exists("killed"):
                open("killed", "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            yield x["x"] + 1 / epoch

    result = minimize(f, {"x": (1, 60)}, fidelity=Fidelity(9), num_trials=6, num_startup=100, storage="study.db")
    print(len(result.history), result.num_failed)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_process_killed_in_the_middle_of_a_curve_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, "script.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = subprocess.run(command, cwd=tmp_path, env=environment, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    again = subprocess.run(command, cwd=tmp_path, env=environment, timeout=300, capture_output=True, text=True)
    assert again.stdout.split() == ["6", "0"], again.stderr
    study = optuna.load_study(study_name="bayesnn", storage=f"sqlite:///{tmp_path}/study.db")
    cut_off = next(trial for trial in study.trials if trial.state is TrialState.FAIL)
    assert sorted(cut_off.intermediate_values) == [1, 2, 3, 4, 5]  # what it had reported is still there
    retried = next(trial for trial in study.trials if trial.system_attrs.get("retry_history") == [cut_off.number])
    assert retried.params == cut_off.params and sorted(retried.intermediate_values) == list(range(1, 10))
    assert sum(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in study.trials) == 6


@pytest.mark.parametrize("num_workers", [1, 2])
def test_what_a_generator_does_wrong_is_a_failed_evaluation(num_workers: int) -> None:
    def f(x: dict[str, Any]) -> Iterator[Any]:
        kind = x["x"] % 5
        if kind == 0:
            return
        yield 1.0
        if kind == 1:
            raise ValueError("no")
        if kind == 2:
            yield float("nan")
        if kind == 3:
            yield "a"
        yield 2.0  # ends before the whole resource: that is its value

    fidelity = Fidelity(9, reduction_factor=9)
    with pytest.warns(BayesnnWarning, match="evaluations failed"):
        result = minimize(f, {"x": (1, 5)}, num_trials=5, num_workers=num_workers, **OPTIONS | {"fidelity": fidelity})
    failures = {evaluation.x["x"]: evaluation.failure for evaluation in result.history}
    assert failures[4] is None and result.x == {"x": 4} and result.value == 2.0
    assert (
        failures[1] == "ValueError: no"
        and "yielded nothing" in failures[5]
        and "nan" in failures[2]
        and "'a'" in failures[3]
    )


def test_the_surrogate_learns_from_what_is_yielded() -> None:
    result = minimize(Counted(), SPACE, num_trials=9, **OPTIONS | {"num_startup": 6})
    last = result.study.trials[-1].user_attrs
    assert last["sampler"] == "surrogate" and last["num_observed"] == 8 and last["num_rows"] > 8
    assert result.model.posterior(result.space.features([{"x": 5}])).mean.shape == (1, 1)


def test_values_without_a_fidelity_and_a_fidelity_without_values() -> None:
    with pytest.raises(TypeError, match=r"f yields values: say with fidelity=Fidelity\(max_resource=…\)"):
        minimize(lambda x: (yield 1.0), SPACE)
    result = minimize(lambda x: float(x["x"]), SPACE, num_trials=3, **OPTIONS)
    assert [evaluation.pruned for evaluation in result.history] == [False] * 3


def test_named_outcomes_are_yielded_with_their_limits() -> None:
    def f(x: dict[str, Any]) -> Iterator[dict[str, float]]:
        for epoch in range(1, 10):
            yield {"loss": x["x"] + 1 / epoch, "memory": 60.0 - x["x"]}

    result = minimize(
        f, SPACE, objectives={"loss": "minimize"}, constraints={"memory": ("<=", 50.0)}, num_trials=20, **OPTIONS
    )
    assert result.x["x"] >= 10 and result.feasible and result.num_pruned > 5
    best = result.best
    assert (
        best.outcomes == {"loss": result.x["x"] + 1 / 9, "memory": 60.0 - result.x["x"]}
        and best.curve[9] == result.value
    )


def test_an_objective_that_yields_nothing_has_failed() -> None:
    def f(x: dict[str, Any]) -> Iterator[float]:
        if x["x"] % 2:
            yield x["x"]

    with pytest.warns(BayesnnWarning, match="evaluations failed"):
        result = minimize(f, SPACE, num_trials=8, **OPTIONS)
    assert {e.failure for e in result.history if not e.x["x"] % 2} == {"ValueError: the objective yielded nothing"}
    assert all(e.failure is None for e in result.history if e.x["x"] % 2)


def test_what_yields_says_how_often() -> None:
    for f in (Counted(), Counted().__call__):
        with pytest.raises(TypeError, match="f yields values: say with fidelity=Fidelity"):
            minimize(f, SPACE)


def test_a_stored_study_prunes_as_before(tmp_path: Path) -> None:
    again: dict[str, Any] = {"storage": tmp_path / "study.db", "num_trials": 2}
    minimize(Counted(), SPACE, **again, **OPTIONS)
    with pytest.raises(ValueError, match="has hyperband = True, but the stored study 'bayesnn' has False"):
        minimize(Counted(), SPACE, **again, **OPTIONS | {"fidelity": Fidelity(9, hyperband=True)})


def test_the_model_of_a_search_with_a_fidelity_suggests() -> None:
    """Of configurations after the whole resource, none of which has been tried."""
    result = minimize(Counted(), SPACE, num_trials=12, **OPTIONS | {"num_startup": 12, "surrogate": "gp"})
    tried = {evaluation.x["x"] for evaluation in result.history}
    features = result.model.train_inputs[0]
    assert features.shape == (len(tried), 1)
    found = suggest(result.model, result.space, 2, direction="minimize")
    assert len(found) == 2 and not tried & {each["x"] for each in found}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"executor": ThreadPoolExecutor(1)}, "fidelity follows evaluations on this machine, without executor"),
        ({"objectives": ["minimize", "maximize"]}, "fidelity is for one objective, found value 1, value 2"),
    ],
)
def test_what_a_fidelity_does_not_go_with(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        minimize(Counted(), SPACE, **OPTIONS, **changes)
