"""Objectives that yield, several at once, in processes of their own: pruned, timed, killed and tried again."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from bayesnn import BayesnnWarning
from bayesnn.bo import Fidelity, minimize

SPACE = {"x": (1, 60)}
OPTIONS: dict[str, Any] = {"fidelity": Fidelity(9), "num_startup": 100, "seed": 0, "num_workers": 2}

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals")


def test_they_are_pruned_and_closed(tmp_path: Path) -> None:
    """Two processes, which draw what the study's curves have, and nothing more."""
    drawn, closed = tmp_path / "drawn", tmp_path / "closed"

    def f(x: dict[str, Any]) -> Iterator[float]:
        try:
            for epoch in range(1, 100):
                with drawn.open("a") as file:
                    file.write(f"{os.getpid()}\n")
                time.sleep(0.01)
                yield x["x"] + 1 / epoch
        finally:
            with closed.open("a") as file:
                file.write("closed\n")

    result = minimize(f, SPACE, num_trials=20, storage=tmp_path / "study.db", **OPTIONS)
    assert len(result.history) == 20 and result.num_failed == 0 and result.num_pruned > 5
    for evaluation in result.history:
        assert evaluation.curve == {epoch: evaluation.x["x"] + 1 / epoch for epoch in evaluation.curve}
        assert set(evaluation.curve) == set(range(1, 1 + max(evaluation.curve))) and max(evaluation.curve) in (1, 3, 9)
        assert evaluation.pruned == (max(evaluation.curve) < 9)
    processes = drawn.read_text().split()
    assert len(processes) == sum(len(evaluation.curve) for evaluation in result.history)
    assert len(set(processes)) == 2 and str(os.getpid()) not in processes
    assert len(closed.read_text().split()) == 20


def test_functions_that_return_do_as_well() -> None:
    result = minimize(lambda x: float(x["x"]), SPACE, num_trials=4, **OPTIONS)
    assert [evaluation.value for evaluation in result.history] == [evaluation.x["x"] for evaluation in result.history]


def test_the_time_limit_is_of_the_whole_evaluation() -> None:
    def f(x: dict[str, Any]) -> Iterator[float]:
        for epoch in range(9):
            time.sleep(600 if x["x"] % 2 and epoch == 2 else 0.0)
            yield float(x["x"])

    fidelity = Fidelity(9, reduction_factor=9)
    with pytest.warns(BayesnnWarning, match="evaluations failed"):
        result = minimize(f, {"x": (1, 4)}, num_trials=4, evaluation_timeout=4.0, **OPTIONS | {"fidelity": fidelity})
    for evaluation in result.history:
        slow = bool(evaluation.x["x"] % 2) and not evaluation.pruned
        assert evaluation.failure == ("it took longer than 4 seconds" if slow else None)
        assert not slow or sorted(evaluation.curve) == [1, 2]  # what it had yielded


@posix
def test_a_process_that_dies_on_the_way_costs_one_trial(tmp_path: Path) -> None:
    killed = tmp_path / "killed"

    def f(x: dict[str, Any]) -> Iterator[float]:
        for epoch in range(1, 10):
            if epoch == 2 and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield x["x"] + 1 / epoch

    result = minimize(f, SPACE, num_trials=6, **OPTIONS)
    assert len(result.history) == 6 and result.num_failed == 0
    (cut_off,) = [trial for trial in result.study.trials if trial.state is TrialState.FAIL]
    assert sorted(cut_off.intermediate_values) == [1]
    assert any(trial.params == cut_off.params for trial in result.study.trials if trial.state is not TrialState.FAIL)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_what_goes_wrong_at_the_end_is_heard_and_ends_the_curve(tmp_path: Path, num_workers: int) -> None:
    """The same in processes as here: what ``finally`` raises, and a value that can't travel (which here is no number)."""
    closed = tmp_path / "closed"

    def f(x: dict[str, Any]) -> Iterator[Any]:
        try:
            yield 1.0
            if x["x"] == 2:
                yield threading.Lock()
            yield 2.0
        finally:
            with closed.open("a") as file:
                file.write("closed\n")
            if x["x"] == 1:
                raise KeyError("at the end")

    options = OPTIONS | {"num_workers": num_workers, "fidelity": Fidelity(2)}
    with pytest.warns(BayesnnWarning, match="evaluations failed"):
        result = minimize(f, {"x": (1, 3)}, num_trials=3, **options)
    failures = {evaluation.x["x"]: evaluation.failure for evaluation in result.history}
    assert failures[1] == "KeyError: 'at the end'" and failures[3] is None
    sent = "what the objective returned can't be sent between processes: TypeError: cannot pickle"
    assert str(failures[2]).startswith(sent if num_workers == 2 else "the objective returned <unlocked")
    assert len(closed.read_text().split()) == 3

    def nothing(x: dict[str, Any]) -> Iterator[float]:
        yield from ()

    with pytest.raises(ValueError, match="the objective yielded nothing"):
        minimize(nothing, {"x": (1, 3)}, num_trials=3, catch=(KeyError,), **options)
