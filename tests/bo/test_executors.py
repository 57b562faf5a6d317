"""Evaluations on executors: threads, processes, Dask, Ray; asynchronous, with workers that die."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import optuna
import pytest
from command_scripts import posix
from optuna.trial import TrialState

from bayesnn import BayesnnWarning
from bayesnn.bo import Interrupted, RayExecutor, minimize
from bayesnn.bo.attempt import Call
from bayesnn.bo.executors import OnExecutor, executor_of
from bayesnn.bo.goals import Goals

N = {"n": (1, 6)}
ALL: dict[str, Any] = {"num_trials": 6, "num_startup": 6, "num_workers": 2}


def square(x: dict[str, Any]) -> float:
    return float(x["n"] ** 2)


def deadly(x: dict[str, Any]) -> float:
    """n = 4 kills its process at first, 5 always."""
    first = Path(os.environ["BAYESNN_TEST_FOLDER"]) / "first"
    if x["n"] == 5 or (x["n"] == 4 and not first.exists()):
        first.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)  # so that there is a neighbour when the pool breaks
    return float(x["n"])


@pytest.fixture
def processes() -> Iterator[ProcessPoolExecutor]:
    """Forked, so that they know this file's functions; nothing is computed in this process before."""
    with ProcessPoolExecutor(2, get_context("fork")) as pool:
        yield pool


def test_an_executor_has_as_many_evaluations_at_once_as_workers() -> None:
    together, lock, most = 0, threading.Lock(), 0

    def f(x: dict[str, Any]) -> float:
        nonlocal together, most
        with lock:
            together += 1
            most = max(most, together)
        barrier.wait(60)
        with lock:
            together -= 1
        return float(x["n"])

    barrier = threading.Barrier(3)
    with ThreadPoolExecutor(3) as pool:
        minimize(f, N, num_trials=6, num_startup=6, executor=pool)
    assert most == 3

    class Silent(Executor):
        pass

    with pytest.raises(ValueError, match="num_workers must be given: the Silent doesn't say how many it has"):
        minimize(f, N, executor=Silent())


def test_threads_are_asynchronous() -> None:
    """A new evaluation begins as soon as one ends, with those that run as pending."""
    begun: list[int] = []
    others_told, lock = threading.Event(), threading.Lock()

    def f(x: dict[str, Any]) -> float:
        with lock:
            begun.append(x["n"])
        if x["n"] == begun[0]:
            assert others_told.wait(60)
        return float(x["n"])

    def count(study: optuna.Study, trial: Any) -> None:
        if len(study.get_trials(states=[TrialState.COMPLETE])) == 5:
            others_told.set()

    with ThreadPoolExecutor(2) as pool:
        result = minimize(f, N, executor=pool, callbacks=[count], **ALL)
        assert pool.submit(int, "3").result() == 3  # it stays open
    assert sorted(begun) == [1, 2, 3, 4, 5, 6] and result.value == 1
    assert result.study.trials[0].params["n"] == begun[0]
    # The other five were told before it.
    told = sorted(result.study.trials, key=lambda trial: trial.datetime_complete)
    assert told[-1].number == 0
    assert [trial.user_attrs["num_pending"] for trial in result.study.trials] == [0, 1, 1, 1, 1, 1]
    assert [trial.user_attrs["num_observed"] for trial in result.study.trials] == [0, 0, 1, 2, 3, 4]


def test_the_same_result_as_here_where_order_does_not_matter(processes: ProcessPoolExecutor) -> None:
    here = minimize(square, N, **(ALL | {"num_workers": 1}))
    there = minimize(square, N, executor=processes, **ALL)
    assert [(e.x, e.value) for e in there.history] == [(e.x, e.value) for e in here.history]


@posix
def test_a_pool_that_breaks_costs_one_trial(processes: ProcessPoolExecutor, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("BAYESNN_TEST_FOLDER", str(tmp_path))
    with pytest.warns(
        BayesnnWarning, match="1 of 6 evaluations failed; the last one: the process was killed each of the 4"
    ):
        result = minimize(deadly, N, executor=processes, storage=tmp_path / "study.db", **ALL)
    # Each breaks the pool once with a neighbour beside it, and is then tried alone: 2 + 2 + 3 trials are cut off.
    assert sum(trial.state.name == "FAIL" for trial in result.study.trials) <= 7
    assert {e.x["n"]: e.value for e in result.history} == {n: None if n == 5 else n for n in range(1, 7)}
    with pytest.raises(BrokenExecutor):
        processes.submit(int)


class Breaking(Executor):
    """One that breaks at the third evaluation, and isn't of a kind that can be made anew."""

    def __init__(self) -> None:
        self.submitted = 0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.submitted += 1
        if self.submitted > 3:
            raise BrokenExecutor("it broke")
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def test_an_executor_that_broke_is_a_clear_error_and_nothing_is_lost(tmp_path: Path) -> None:
    with pytest.raises(BrokenExecutor, match="the Breaking broke; give a new one, and the same call goes on"):
        minimize(square, N, executor=Breaking(), storage=tmp_path / "study.db", **(ALL | {"num_workers": 1}))
    result = minimize(square, N, storage=tmp_path / "study.db", **(ALL | {"num_workers": 1}))
    assert len(result.history) == 6 and len(result.study.trials) == 7  # the one that couldn't begin is there twice
    assert sorted(e.x["n"] for e in result.history) == [1, 2, 3, 4, 5, 6]


def test_time_limits_on_an_executor() -> None:
    def f(x: dict[str, Any]) -> float:
        if x["n"] == 3:
            time.sleep(600)
        return float(x["n"])

    with ThreadPoolExecutor(1) as pool, pytest.warns(BayesnnWarning, match="1 of 6 .* it took longer than 3 seconds"):
        result = minimize(f, N, executor=pool, evaluation_timeout=3, **(ALL | {"num_workers": 1}))
    assert [e.x["n"] for e in result.history if e.failure] == [3] and result.value == 1


def test_what_cannot_be_sent_to_processes(processes: ProcessPoolExecutor) -> None:
    with pytest.raises(
        TypeError, match=r"f, or what it uses, can't be sent to another process: AttributeError: Can't pickle local"
    ):
        minimize(lambda x: 0.0, N, executor=processes, **ALL)


def test_ctrl_c_in_a_worker_ends_the_search() -> None:
    def f(x: dict[str, Any]) -> float:
        if x["n"] == 3:
            raise KeyboardInterrupt
        return float(x["n"])

    with ThreadPoolExecutor(2) as pool, pytest.raises(Interrupted) as stopped:
        minimize(f, N, executor=pool, **ALL)
    if stopped.value.result is not None:
        states = {trial.state.name for trial in stopped.value.result.study.trials}
        assert "RUNNING" not in states


def test_no_executors() -> None:
    with pytest.raises(TypeError, match=r"executor must be one of concurrent.futures, a Dask client or .*, found int"):
        minimize(square, N, executor=4)
    with pytest.raises(ValueError, match="num_workers must be at least 1, found 0"):
        minimize(square, N, num_workers=0)
    with pytest.raises(ValueError, match="evaluation_timeout must be positive"):
        minimize(square, N, evaluation_timeout=0)


# Clusters ---------------------------------------------------------------------------------------------------------------


def test_dask(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")

    def f(x: dict[str, Any]) -> float:  # nested: it travels by value
        if x["n"] == 2:
            raise ValueError("two")
        return float(x["n"])

    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None, silence_logs=50
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        assert isinstance(executor_of(client), Executor)
        with pytest.warns(BayesnnWarning, match="1 of 6 evaluations failed; the last one: ValueError: two"):
            result = minimize(f, N, executor=client, storage=tmp_path / "study.db", **ALL)
        # Two calls with the same configuration are two calls.
        calls = OnExecutor(Call(lambda x: time.perf_counter(), Goals.of("minimize")), client, 1)
        first, second = (calls.submit({"n": 1}, 0).result().numbers for _ in range(2))
        assert first != second
    assert sorted(e.x["n"] for e in result.history) == [1, 2, 3, 4, 5, 6] and result.value == 1


def test_ray(tmp_path: Path, monkeypatch: Any) -> None:
    ray = pytest.importorskip("ray")
    first = tmp_path / "first"

    def f(x: dict[str, Any]) -> float:
        if x["n"] == 4 and not first.exists():
            first.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return float(x["n"])

    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    try:
        result = minimize(f, N, executor=RayExecutor(), storage=tmp_path / "study.db", **ALL)
    finally:
        ray.shutdown()
    assert sorted(e.value for e in result.history) == [1, 2, 3, 4, 5, 6]
    assert sorted(trial.state.name for trial in result.study.trials) == ["COMPLETE"] * 6 + ["FAIL"]
