"""Evaluations in processes of their own: time limits, several at once, deaths, a parent that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from command_scripts import posix, wait_until

from bayesnn import BayesnnWarning
from bayesnn.bo import Interrupted, minimize
from bayesnn.bo.attempt import Call
from bayesnn.bo.children import Child, Children
from bayesnn.bo.goals import Goals

N = {"n": (1, 6)}


def call(f: Any, catch: Any = (Exception,)) -> Call:
    return Call(f, Goals.of("minimize"), catch)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@posix
def test_one_child(tmp_path: Path) -> None:
    path = tmp_path / "pid"

    # Nested, so that it can't be imported there: it travels by value.
    def f(x: dict[str, Any]) -> Any:
        if x["n"] == 1:
            path.write_text(str(os.getpid()))
            time.sleep(600)
        if x["n"] == 2:
            raise TimeoutError("a file's own")
        return "text" if x["n"] == 3 else os.getpid()

    child = Child()
    try:
        first = child(call(f), {"n": 4}, 60)
        assert first.numbers != {"value": os.getpid()} and first.failure is None
        assert child(call(f), {"n": 4}, 60).numbers == first.numbers  # the same process again
        assert child(call(f), {"n": 2}, 60).failure == "TimeoutError: a file's own"
        assert child(call(f), {"n": 3}, 60).failure == "the objective returned 'text', not a finite number"
        error = child(call(f, (KeyError,)), {"n": 2}, 60).error
        assert isinstance(error, RuntimeError) and str(error) == "TimeoutError: a file's own"
        hanging = child(call(f), {"n": 1}, 3)
        assert hanging.failure == "it took longer than 3 seconds" and 3 <= hanging.seconds < 60
        wait_until(lambda: not alive(int(path.read_text())))
        # A new process takes its place, and what it takes to begin isn't the function's time.
        second = child(call(f), {"n": 4}, 3)
        assert second.failure is None and second.numbers != first.numbers
    finally:
        child.stop()


def test_what_cannot_be_sent_is_told_before_any_work(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:

        def f(x: dict[str, Any]) -> float:
            return file.write(str(x))

        with pytest.raises(TypeError, match=r"f, or what it uses, can't be sent to another process: .*[Pp]ickl"):
            minimize(f, N, num_workers=2, storage=tmp_path / "study.db")
        # Where it needn't travel it may use what it likes.
        assert minimize(f, N, num_trials=1).value == 8


@posix
def test_workers_at_once_and_a_hanging_and_a_dying_evaluation(tmp_path: Path) -> None:
    """n = 2 waits for its neighbours, 3 hangs, 4 kills its process at first, 5 always."""
    here = tmp_path / "here"
    here.mkdir()

    def f(x: dict[str, Any]) -> float:
        n = x["n"]
        times = len(list(here.glob(f"{n}-*")))
        (here / f"{n}-{times}").touch()
        if n in (1, 2):
            end = time.monotonic() + 35
            while not (list(here.glob("1-*")) and list(here.glob("2-*"))) and time.monotonic() < end:
                time.sleep(0.01)
            return n if time.monotonic() < end else float("nan")
        if n == 3:
            time.sleep(600)
        if n == 5 or (n == 4 and times == 0):
            os.kill(os.getpid(), signal.SIGKILL)
        return n

    with pytest.warns(BayesnnWarning, match="2 of 6 evaluations failed"):
        result = minimize(
            f, N, num_trials=6, num_startup=6, num_workers=3, evaluation_timeout=40, storage=tmp_path / "study.db"
        )
    failures = {evaluation.x["n"]: evaluation.failure for evaluation in result.history}
    assert failures == {1: None, 2: None, 4: None, 6: None} | {
        3: "it took longer than 40 seconds",
        5: "the process was killed each of the 4 times",
    }
    assert result.value == 1 and all(e.value == e.x["n"] for e in result.history if e.failure is None)
    calls = {n: len(list(here.glob(f"{n}-*"))) for n in range(1, 7)}
    assert calls == {1: 1, 2: 1, 3: 1, 4: 2, 5: 4, 6: 1}
    # One trial for each call, and nothing is left under way.
    states = [trial.state.name for trial in result.study.trials]
    assert sorted(states) == ["COMPLETE"] * 4 + ["FAIL"] * 6


@posix
def test_workers_that_all_die_are_an_error() -> None:
    with pytest.raises(
        RuntimeError, match="16 workers died, one after the other, and no evaluation has come to an end"
    ):
        minimize(lambda x: os._exit(1), N, num_trials=6, num_startup=6, num_workers=2)


def test_stopping_kills_what_runs(tmp_path: Path) -> None:
    def f(x: dict[str, Any]) -> float:
        (tmp_path / f"{os.getpid()}").touch()
        time.sleep(600)
        return 0.0

    children = Children(call(f), 2)
    futures = [children.submit({"n": n}, n) for n in (1, 2)]
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    children.stop()
    assert all(children.died(future.exception(timeout=60)) for future in futures)
    children.close()
    wait_until(lambda: not any(alive(int(path.name)) for path in tmp_path.iterdir()))


def test_ctrl_c_releases_what_runs(tmp_path: Path) -> None:
    def f(x: dict[str, Any]) -> float:
        if x["n"] > 3 and not (tmp_path / "again").exists():
            (tmp_path / f"{os.getpid()}").touch()
            time.sleep(600)
        return x["n"]

    arguments = {"num_trials": 6, "num_startup": 6, "num_workers": 3, "storage": tmp_path / "study.db"}

    def interrupt(study: optuna.Study, trial: Any) -> None:
        if sum(each.state.name == "COMPLETE" for each in study.trials) == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="stopped after 3 of 6"):
        minimize(f, N, callbacks=[interrupt], **arguments)
    (tmp_path / "again").touch()
    result = minimize(f, N, **arguments)
    assert sorted(evaluation.x["n"] for evaluation in result.history) == [1, 2, 3, 4, 5, 6] and result.num_failed == 0


PARENT = """
import os, sys, time
from bayesnn.bo import minimize

def f(x):
    open(os.path.join(sys.argv[1], f"pid-{os.getpid()}"), "w").close()
    time.sleep(600)

minimize(f, {"n": (1, 6)}, num_trials=6, num_startup=6, num_workers=2, storage=os.path.join(sys.argv[1], "study.db"))
"""


@posix
def test_children_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)])
    try:
        wait_until(lambda: len(list(tmp_path.glob("pid-*"))) == 2 or parent.poll() is not None)
        assert parent.poll() is None
    finally:
        parent.kill()
        parent.wait()
    pids = [int(path.name.split("-")[1]) for path in tmp_path.glob("pid-*")]
    wait_until(lambda: not any(map(alive, pids)))
    # Both trials are found and run again, here.
    result = minimize(lambda x: x["n"], N, num_trials=6, num_startup=6, storage=tmp_path / "study.db")
    assert sorted(evaluation.x["n"] for evaluation in result.history) == [1, 2, 3, 4, 5, 6]
    assert sorted(trial.state.name for trial in result.study.trials) == ["COMPLETE"] * 6 + ["FAIL"] * 2
