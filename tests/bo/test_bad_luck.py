"""What goes wrong around evaluations, and costs no more than it must."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import TrialState

from bayesnn.bo import Fidelity, Space, minimize
from bayesnn.bo.chain import Chain
from bayesnn.bo.evaluations import failure_of
from bayesnn.bo.recovery import requeue
from bayesnn.bo.storage import open_storage

N = {"n": (1, 40)}


def test_a_trial_that_somebody_took_for_dead(tmp_path: Path) -> None:
    """Another process fails it and queues it again, as after a laptop's sleep: its value is left aside, the search goes on."""
    other, calls = open_storage(tmp_path / "study.db"), []

    def f(x: dict[str, Any]) -> dict[str, float]:
        calls.append(x["n"])
        if len(calls) == 2:
            study = optuna.load_study(study_name="bayesnn", storage=other)
            running = study.get_trials(states=[TrialState.RUNNING])[0]
            other.set_trial_state_values(running._trial_id, state=TrialState.FAIL)
            requeue(study, running)
        return {"value": x["n"], "size": x["n"]}

    goals: dict[str, Any] = {"objectives": {"value": "minimize"}, "constraints": {"size": ("<=", 50.0)}}
    result = minimize(f, N, num_trials=4, num_startup=4, storage=tmp_path / "study.db", **goals)
    assert len(calls) == 5 and calls.count(calls[1]) == 2
    assert len(result.history) == 4 and result.num_failed == 0


def test_what_has_ended_is_told_though_a_callback_raises() -> None:
    together, study = threading.Barrier(3), []

    def f(x: dict[str, Any]) -> float:
        together.wait()
        return x["n"]

    def broken(found: optuna.Study, trial: Any) -> None:
        study[:] = [found]
        pool.shutdown()  # waits for the others
        raise RuntimeError("mine")

    with ThreadPoolExecutor(3) as pool, pytest.raises(RuntimeError, match="mine"):
        minimize(f, N, num_trials=3, num_startup=3, num_workers=3, executor=pool, callbacks=[broken])
    assert [trial.state for trial in study[0].trials] == [TrialState.COMPLETE] * 3


def test_callbacks_are_looked_at_before_anything_is_evaluated() -> None:
    calls: list[Any] = []
    for callbacks in (print, [3]):
        with pytest.raises(TypeError, match=r"callbacks must be a list of functions \(study, trial\), found"):
            minimize(calls.append, N, callbacks=callbacks)
    assert not calls


def test_an_objective_that_exits_has_failed() -> None:
    def f(x: dict[str, Any]) -> float:
        if x["n"] % 2:
            sys.exit(3)
        return x["n"]

    for num_workers in (1, 2):
        result = minimize(f, N, num_trials=6, num_startup=6, num_workers=num_workers)
        assert [e.failure for e in result.history] == [
            "SystemExit: 3" if e.x["n"] % 2 else None for e in result.history
        ]


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError("not to be shown")


def test_what_comes_back_may_be_anything() -> None:
    result = minimize(lambda x: x["n"] if x["n"] % 2 else Unshowable(), N, num_trials=6, num_startup=6)
    assert {e.failure for e in result.history if not e.x["n"] % 2} == {"RuntimeError: not to be shown"}
    assert all(e.value == e.x["n"] for e in result.history if e.x["n"] % 2)


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_callbacks_hear_of_trials_that_are_given_up() -> None:
    """One that kills its process each time is an evaluation, too: with it, the number is reached."""
    heard: list[str | None] = []

    def f(x: dict[str, Any]) -> float:
        if x["n"] == 5:
            os._exit(1)
        return float(x["n"])

    result = minimize(
        f,
        {"n": (4, 6)},
        num_trials=3,
        num_startup=3,
        num_workers=2,
        callbacks=[lambda _, t: heard.append(failure_of(t))],
    )
    assert sorted(filter(None, heard)) == ["the process was killed each of the 4 times"]
    assert len(heard) == len(result.history) == 3


def _dies_once(x: dict[str, Any]) -> float:
    mark = Path(os.environ["BAYESNN_TEST_MARK"])
    if x["n"] > 20 and not mark.exists():
        mark.touch()
        os._exit(1)
    threading.Event().wait(0.3)
    return x["n"]


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_one_death_in_a_large_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes all evaluations of the pool with it; they are run again."""
    import multiprocessing

    monkeypatch.setenv("BAYESNN_TEST_MARK", str(tmp_path / "mark"))
    with ProcessPoolExecutor(9, mp_context=multiprocessing.get_context("fork")) as pool:
        result = minimize(_dies_once, N, num_trials=12, num_startup=12, num_workers=9, executor=pool)
    assert (tmp_path / "mark").exists() and len(result.history) == 12 and result.num_failed == 0


def test_the_objective_is_to_blame_for_its_own_error() -> None:
    """Also if the process was killed three times before."""
    cut_off = {"retry_history": [0, 1, 2]}
    blamed = optuna.create_trial(
        state=TrialState.FAIL, user_attrs={"failure": "ValueError: mine"}, system_attrs=cut_off
    )
    killed = optuna.create_trial(state=TrialState.FAIL, system_attrs=cut_off)
    assert (
        failure_of(blamed) == "ValueError: mine" and failure_of(killed) == "the process was killed each of the 4 times"
    )


def test_pruned_evaluations_are_never_the_best() -> None:
    def f(x: dict[str, Any]) -> Iterator[dict[str, float]]:
        for epoch in range(1, 10):
            yield {"loss": x["n"] + 1 / epoch, "size": 5.0 + x["n"]}

    goals: dict[str, Any] = {"objectives": {"loss": "minimize"}, "constraints": {"size": ("<=", 1.0)}}
    result = minimize(f, N, fidelity=Fidelity(9), num_trials=12, num_startup=12, **goals)
    assert result.num_pruned and not result.feasible
    assert result.x["n"] == min(e.x["n"] for e in result.history if not e.pruned)


def test_outliers_are_told_at_each_rung() -> None:
    """Ordinary first values are far above all later ones; they stay what they are."""
    space, fidelity = Space({"x": (0.0, 1.0)}), Fidelity(81)
    study = optuna.create_study()
    for x in torch.linspace(0, 1, 11).tolist():
        curve = {1: 8 + 8 * x, 3: 0.5 + 0.1 * x, 9: 0.4, 27: 0.3, 81: 0.2 + 0.01 * x}
        study.add_trial(
            optuna.create_trial(
                params={"x": x}, distributions=space.distributions(), value=curve[81], intermediate_values=curve
            )
        )
    search = {"acquisition": "auto", "reference_point": None, "beta": 4.0, "seconds": None}
    search |= {"num_restarts": 2, "raw_samples": 16, "num_samples": 32}
    (answer,) = Chain("gp", 5, 0, search, fidelity).answers(study, space, 11, 1)
    assert answer.record["sampler"] == "surrogate" and "num_drawn_in" not in answer.record


def test_what_is_tried_again_is_judged_again() -> None:
    study = optuna.create_study()
    marks = {"completed_rung_0": 1.0, "completed_rung_1": 0.5, "fixed_params": {}}
    trial = optuna.create_trial(state=TrialState.FAIL, system_attrs=marks, intermediate_values={1: 1.0})
    study.add_trial(trial)
    assert requeue(study, study.trials[0])
    assert set(study.trials[1].system_attrs) == {"fixed_params", "failed_trial", "retry_history"}


def test_few_rows_for_many_rungs() -> None:
    with pytest.raises(ValueError, match="max_rows must be at least 5, one for each rung, found 4"):
        Fidelity(81, max_rows=4)
