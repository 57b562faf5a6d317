"""The one-liners: results, failures, storage, resume, Ctrl-C, processes that are killed."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch

from bayesnn import BNN, BayesnnWarning
from bayesnn.bo import Interrupted, Space, maximize, minimize
from bayesnn.bo.recovery import requeue_orphans
from bayesnn.bo.storage import open_storage
from bayesnn.inference import DeepEnsemble

SPACE: dict[str, Any] = {"x": (0.0, 1.0), "n": (1, 10), "kind": ["a", "b"]}


def model() -> BNN:
    return BNN(method=DeepEnsemble(num_members=3, num_steps=30))


def f(x: dict[str, Any]) -> float:
    return (x["x"] - 0.3) ** 2 + 0.1 * abs(x["n"] - 4) + (x["kind"] == "a")


def options(**more: Any) -> dict[str, Any]:
    return {"surrogate": model(), "num_trials": 6, "seed": 0, "num_startup": 4} | more


def test_the_result() -> None:
    result = minimize(f, SPACE, **options())
    values = [evaluation.value for evaluation in result.history]
    assert len(values) == 6 and result.value == min(values) == f(result.x)
    assert np.array_equal(result.best_so_far, np.minimum.accumulate(values))
    assert result.num_failed == 0 and all(evaluation.seconds >= 0 for evaluation in result.history)
    assert repr(result) == f"Result(value={result.value:.6g}, x={result.x}, 6 evaluations)"
    # The surrogate knows all six.
    assert result.model is result.model
    assert torch.allclose(result.model.train_targets.flatten(), torch.tensor(values, dtype=torch.float64))
    assert result.model.posterior(result.space.features([result.x])).mean.shape == (1, 1)


def test_maximize_is_the_mirror_image() -> None:
    lowest = minimize(f, SPACE, **options(num_trials=4))
    highest = maximize(lambda x: -f(x), SPACE, **options(num_trials=4))
    assert highest.value == -lowest.value
    assert [e.x for e in highest.history] == [e.x for e in lowest.history]
    assert np.array_equal(highest.best_so_far, -lowest.best_so_far)


def test_same_seed_same_configurations() -> None:
    first, second, other = (minimize(f, SPACE, **options(seed=seed)).history for seed in (1, 1, 2))
    assert [e.x for e in first] == [e.x for e in second] != [e.x for e in other]


def test_the_acquisition_function_is_the_callers_choice() -> None:
    result = minimize(f, SPACE, **options(acquisition="thompson"))
    assert result.study.trials[-1].user_attrs["acquisition"] == "thompson"
    with pytest.raises(ValueError, match="acquisition must be one of auto, logei"):
        minimize(f, SPACE, **options(acquisition="best"))


def test_failures_are_reported_and_the_study_goes_on() -> None:
    def fragile(x: dict[str, Any]) -> Any:
        answers = {
            1: "0.5",
            2: None,
            3: float("nan"),
            4: float("inf"),
            5: [1.0],
            6: 1j,
            7: np.float32(7),
            8: torch.tensor(8.0),
        }
        if x["n"] == 10:
            raise ZeroDivisionError("n is ten")
        return answers.get(x["n"], x["n"])

    with pytest.warns(BayesnnWarning, match="7 of 10 evaluations failed; the last one: "):
        result = minimize(fragile, {"n": (1, 10)}, **options(num_trials=10))
    assert result.num_failed == 7 and result.x == {"n": 7} and "7 failed" in repr(result)
    reasons = {evaluation.x["n"]: evaluation.failure for evaluation in result.history}
    assert reasons[1] == "the objective returned '0.5', not a finite number"
    assert reasons[10] == "ZeroDivisionError: n is ten"
    assert [n for n in sorted(reasons) if reasons[n] is None] == [7, 8, 9]
    assert all((evaluation.value is None) == (evaluation.failure is not None) for evaluation in result.history)
    assert np.isnan(result.best_so_far[0]) == (result.history[0].failure is not None)
    assert result.best_so_far[-1] == 7


def test_all_failing_is_an_error_with_the_reason() -> None:
    def broken(x: dict[str, Any]) -> float:
        raise KeyError("colour")

    with pytest.raises(RuntimeError, match="no evaluation succeeded, 5 failed; the last one: KeyError: 'colour'"):
        minimize(broken, SPACE, **options(num_trials=5))


def test_only_the_exceptions_to_catch_are_caught(tmp_path: Path) -> None:
    def broken(x: dict[str, Any]) -> float:
        raise KeyError("colour")

    with pytest.raises(KeyError, match="colour"):
        minimize(broken, SPACE, **options(catch=(ValueError,), storage=tmp_path / "study.db"))
    with pytest.warns(BayesnnWarning, match="1 of 6 evaluations failed; the last one: KeyError: 'colour'"):
        minimize(f, SPACE, **options(storage=tmp_path / "study.db"))


def test_stored_studies_go_on(tmp_path: Path) -> None:
    calls = []

    def counted(x: dict[str, Any]) -> float:
        calls.append(x)
        return f(x)

    path = tmp_path / "study.db"
    whole = minimize(counted, SPACE, **options())
    calls.clear()
    minimize(counted, SPACE, **options(num_trials=4, storage=str(path)))
    resumed = minimize(counted, SPACE, **options(storage=path))
    assert len(calls) == 6 == len(resumed.history)
    assert [e.x for e in resumed.history] == [e.x for e in whole.history]
    again = minimize(counted, SPACE, **options(storage=f"sqlite:///{path}"))
    assert len(calls) == 6 and again.value == resumed.value
    # Another study in the same file.
    minimize(counted, SPACE, **options(num_trials=2, storage=path, study_name="second"))
    assert len(calls) == 8


def test_what_a_stored_study_refuses(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    minimize(f, SPACE, **options(num_trials=2, storage=path))
    with pytest.raises(ValueError, match="the stored study 'bayesnn' has another space, which differs in extra, n"):
        minimize(f, SPACE | {"n": (1, 11), "extra": (0.0, 1.0)}, **options(storage=path))
    with pytest.raises(ValueError, match="the stored study 'bayesnn' has the directions minimize, not maximize"):
        maximize(f, SPACE, **options(storage=path))
    with pytest.raises(ValueError, match="the stored study 'bayesnn' has objectives without names"):
        minimize(f, SPACE, objectives={"loss": "minimize"}, **options(storage=path))
    named = options(num_trials=1, num_startup=1, storage=path, study_name="named")
    minimize(lambda x: {"loss": f(x)}, SPACE, objectives={"loss": "minimize"}, **named)
    with pytest.raises(ValueError, match="the stored study 'named' has objectives with names"):
        minimize(f, SPACE, **named)
    # A study that Optuna began by itself.
    study = optuna.create_study(storage=open_storage(path), study_name="plain")
    study.add_trial(
        optuna.create_trial(params={"x": 0.5}, distributions=Space({"x": (0.0, 1.0)}).distributions(), value=1.0)
    )
    with pytest.raises(ValueError, match="differs in kind, n"):
        minimize(f, SPACE, **options(storage=path, study_name="plain"))
    assert len(minimize(lambda x: x["x"], {"x": (0.0, 1.0)}, **options(storage=path, study_name="plain")).history) == 6


def test_numbers_of_numpy() -> None:
    given = options(num_trials=np.int64(4), num_startup=np.int32(4), seed=np.int64(0))
    assert [e.x for e in minimize(f, SPACE, **given).history] == [
        e.x for e in minimize(f, SPACE, **options(num_trials=4, num_startup=4)).history
    ]


def test_a_timeout_that_comes_first() -> None:
    with pytest.raises(RuntimeError, match=r"^nothing was evaluated: the timeout"):
        minimize(lambda x: pytest.fail("work has begun"), SPACE, **options(timeout=1e-9))


def test_files_that_are_no_studies(tmp_path: Path) -> None:
    def tried(name: str) -> None:
        minimize(lambda x: pytest.fail("work has begun"), SPACE, **options(storage=tmp_path / name))

    (tmp_path / "text.db").write_text("x, y\n1, 2\n" * 10)
    with pytest.raises(ValueError, match="isn't an SQLite database"):
        tried("text.db")
    (tmp_path / "damaged.db").write_bytes(b"SQLite format 3\x00" + bytes(range(200)) * 20)
    with pytest.raises(ValueError, match="damaged"):
        tried("damaged.db")
    with sqlite3.connect(tmp_path / "other.db") as connection:
        connection.execute("CREATE TABLE customers (id INTEGER)")
    connection.close()
    with pytest.raises(ValueError, match="a database of something else, with the tables \\['customers'\\]"):
        tried("other.db")
    with pytest.raises(ValueError, match="no folder"):
        tried("nowhere/study.db")
    with pytest.raises(ValueError, match="must be a file"):
        tried(".")
    with pytest.raises(ValueError, match="can't be used as a database of studies"):
        minimize(f, SPACE, **options(storage="nosuchthing://host/db"))
    # Cut short in the middle.
    minimize(f, SPACE, **options(num_trials=2, storage=tmp_path / "cut.db"))
    whole = (tmp_path / "cut.db").read_bytes()
    (tmp_path / "cut.db").write_bytes(whole[: len(whole) // 3])
    with pytest.raises(ValueError, match=r"damaged|can't be"):
        tried("cut.db")


def test_ctrl_c_keeps_what_there_is(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def interrupted(x: dict[str, Any]) -> float:
        seen.append(x)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return f(x)

    with pytest.raises(KeyboardInterrupt, match="stopped after 3 of 6 evaluations") as stopped:
        minimize(interrupted, SPACE, **options(storage=tmp_path / "study.db"))
    assert isinstance(stopped.value, Interrupted) and stopped.value.result is not None
    assert stopped.value.result.value == min(f(x) for x in seen[:3])
    result = minimize(interrupted, SPACE, **options(storage=tmp_path / "study.db"))
    assert len(result.history) == 6 and len(seen) == 7
    assert seen[4] == seen[3]  # what was cut off is run first, once more

    def at_once(x: dict[str, Any]) -> float:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted) as stopped:
        minimize(at_once, SPACE, **options())
    assert stopped.value.result is None


WORKER = """
import sys, time
from bayesnn.bo import minimize

calls = 0
def f(x):
    global calls
    calls += 1
    if calls == 3:
        print("now", flush=True)
        time.sleep(600)
    return x["x"]

minimize(f, {"x": (0.0, 1.0), "n": (1, 10)}, surrogate="ensemble", num_trials=6, num_startup=6, storage=sys.argv[1])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL here")
def test_a_killed_process_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    worker = subprocess.Popen([sys.executable, "-c", WORKER, str(path)], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    assert worker.stdout.readline() == "now\n"
    study = optuna.load_study(study_name="bayesnn", storage=open_storage(path))
    cut_off = study.trials[2]
    assert cut_off.state.name == "RUNNING"
    seen: list[dict[str, Any]] = []

    def g(x: dict[str, Any]) -> float:
        seen.append(x)
        return x["x"]

    # While it runs, its trial is its own.
    kwargs = {"surrogate": "ensemble", "num_startup": 6, "storage": path}
    minimize(g, {"x": (0.0, 1.0), "n": (1, 10)}, num_trials=4, **kwargs)
    assert len(seen) == 1 and seen[0] != cut_off.params
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    worker.stdout.close()
    result = minimize(g, {"x": (0.0, 1.0), "n": (1, 10)}, num_trials=6, **kwargs)
    assert len(result.history) == 6 and result.num_failed == 0
    assert seen[1] == cut_off.params and len(seen) == 4
    states = [trial.state.name for trial in result.study.trials]
    assert sorted(states) == ["COMPLETE"] * 6 + ["FAIL"]
    (retried,) = [t for t in result.study.trials if "failed_trial" in t.system_attrs]
    assert retried.system_attrs["failed_trial"] == cut_off.number and retried.state.name == "COMPLETE"


def begin(study: optuna.Study, space: Space, process: dict[str, Any]) -> optuna.Trial:
    with pytest.warns(UserWarning, match="Heartbeat"):
        trial = study.ask(space.distributions())
    trial.set_user_attr("process", process)
    return trial


def test_a_configuration_that_kills_its_process_is_given_up(tmp_path: Path) -> None:
    space = Space({"x": (0.0, 1.0)})
    study = optuna.create_study(study_name="bayesnn", storage=open_storage(tmp_path / "study.db"))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for _ in range(4):
        begin(study, space, {"host": socket.gethostname(), "pid": dead.pid})
        requeue_orphans(study)
        # Whoever takes it up must not look dead before having signed.
        assert all("process" not in t.user_attrs for t in study.trials if t.state.name == "WAITING")
    assert len({trial.params["x"] for trial in study.trials}) == 1 and len(study.trials) == 4
    with pytest.warns(
        BayesnnWarning, match="1 of 2 evaluations failed; the last one: the process was killed each of the 4"
    ):
        result = minimize(lambda x: x["x"], space, **options(num_trials=2, storage=tmp_path / "study.db"))
    assert [evaluation.failure is None for evaluation in result.history] == [False, True]


def test_a_process_elsewhere_is_missed_by_its_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bayesnn.bo.recovery.HEARTBEAT_SECONDS", 1)
    monkeypatch.setattr("bayesnn.bo.recovery.GRACE_SECONDS", 1)
    space, storage = Space({"x": (0.0, 1.0)}), open_storage(tmp_path / "study.db")
    study = optuna.create_study(study_name="bayesnn", storage=storage)
    trial = begin(study, space, {"host": "elsewhere", "pid": 1})
    storage.record_heartbeat(trial._trial_id)
    requeue_orphans(study)
    assert study.trials[0].state.name == "RUNNING"
    time.sleep(2.5)
    result = minimize(lambda x: x["x"], space, **options(num_trials=1, storage=storage))
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE"]
    assert result.x == trial.params


def test_callbacks_stop_and_timeouts() -> None:
    seen: list[int] = []

    def callback(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        seen.append(trial.number)
        if trial.number == 2:
            study.stop()

    assert len(minimize(f, SPACE, **options(callbacks=[callback])).history) == 3
    assert seen == [0, 1, 2]

    def slow(x: dict[str, Any]) -> float:
        time.sleep(0.05)
        return f(x)

    start = time.perf_counter()
    result = minimize(slow, SPACE, **options(num_trials=1000, num_startup=1000, timeout=0.3))
    assert 1 <= len(result.history) <= 7 and time.perf_counter() - start < 5
    assert all(evaluation.seconds >= 0.05 for evaluation in result.history)


def test_a_small_space_is_finished_early() -> None:
    with pytest.warns(BayesnnWarning, match="the space has only 4 configurations"):
        result = minimize(lambda x: x["n"], {"n": (1, 4)}, **options(num_startup=2))
    assert sorted(evaluation.x["n"] for evaluation in result.history) == [1, 2, 3, 4]


def test_the_progress_bar_and_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    optuna.logging.set_verbosity(optuna.logging.INFO)
    minimize(f, SPACE, **options(num_trials=3))
    silent = capsys.readouterr()
    assert silent.out == silent.err == ""
    assert optuna.logging.get_verbosity() == optuna.logging.INFO
    result = minimize(f, SPACE, **options(num_trials=3, progress=True))
    assert f"best={result.value:.6g}" in capsys.readouterr().err


def test_the_objective_cannot_change_the_configuration() -> None:
    def greedy(x: dict[str, Any]) -> float:
        return float(x.pop("n"))

    assert set(minimize(greedy, SPACE, **options(num_trials=2)).history[0].x) == {"x", "n", "kind"}


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"f": 3}, TypeError, "f must be a function of a configuration, found int"),
        ({"space": {}}, ValueError, "at least one parameter"),
        ({"num_trials": 0}, ValueError, "num_trials must be at least 1, found 0"),
        ({"num_trials": 2.5}, TypeError, "num_trials must be an integer, found 2.5"),
        ({"surrogate": "nothing"}, ValueError, "no surrogate named 'nothing'"),
        ({"seed": -1}, ValueError, "seed must be at least 0, found -1"),
        ({"seed": 1.5}, TypeError, "seed must be an integer, found 1.5"),
        ({"num_startup": 0}, ValueError, "num_startup must be at least 1, found 0"),
        ({"num_startup": "a"}, TypeError, "num_startup must be an integer, found 'a'"),
        ({"timeout": 0}, ValueError, "timeout must be positive and finite, found 0"),
        ({"timeout": "a"}, TypeError, "timeout must be a positive number, found 'a'"),
        ({"catch": Exception}, TypeError, "catch must be a tuple of exception classes"),
        ({"storage": 5}, TypeError, "storage must be a path, a database URL or an Optuna storage, found 5"),
    ],
)
def test_arguments_that_make_no_sense(change: dict[str, Any], error: type[Exception], message: str) -> None:
    def never(x: dict[str, Any]) -> float:
        pytest.fail("work has begun")

    with pytest.raises(error, match=message):
        minimize(**(options(f=never, space=SPACE) | change))
