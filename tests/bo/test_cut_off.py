"""Processes that are killed in the middle of a suggestion, share a study, or find what is queued: every trial is counted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest
from command_scripts import posix, wait_until
from sqlalchemy.exc import IntegrityError

from bayesnn.bo import Space, SurrogateSampler, minimize, storage
from bayesnn.bo.recovery import begin, heartbeats, requeue_orphans
from bayesnn.bo.storage import open_storage, put_on_disk
from bayesnn.bo.study import configuration_of
from bayesnn.bo.writing import write

SUGGESTING = """
import sys, time
from bayesnn.bo import minimize

def surrogate(X, Y):
    print("now", flush=True)
    time.sleep(600)

minimize(lambda x: x["n"], {"n": (1, 8)}, surrogate=surrogate, num_trials=6, num_startup=3, storage=sys.argv[1])
"""


@posix
def test_sigkill_in_the_middle_of_a_suggestion(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    process = subprocess.Popen([sys.executable, "-c", SUGGESTING, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "now\n"
    study = optuna.load_study(study_name="bayesnn", storage=open_storage(path))
    suggesting = study.trials[3]
    assert suggesting.state.name == "RUNNING" and suggesting.params == {}
    assert suggesting.user_attrs["process"]["pid"] == process.pid
    # While it lives, its trial is its own.
    assert requeue_orphans(study) == 0
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    result = minimize(lambda x: x["n"], {"n": (1, 8)}, surrogate="gp", num_trials=6, num_startup=6, storage=path)
    assert Counter(trial.state.name for trial in result.study.trials) == {"COMPLETE": 6, "FAIL": 1}
    assert len(result.history) == 6 and len({e.x["n"] for e in result.history}) == 6
    (again,) = [trial for trial in result.study.trials if "retry_history" in trial.system_attrs]
    assert again.system_attrs["retry_history"] == [3] and again.params


TWO = """
import os, sys
from bayesnn.bo import minimize

def f(x):
    open(os.path.join(sys.argv[1], f"{x['n']}-{os.getpid()}"), "w").close()
    return x["n"]

minimize(f, {"n": (1, 40)}, num_trials=12, num_startup=12, storage=os.path.join(sys.argv[1], "study.db"))
"""


def test_two_processes_on_one_study(tmp_path: Path) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", TWO, str(tmp_path)]) for _ in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    study = optuna.load_study(study_name="bayesnn", storage=open_storage(tmp_path / "study.db"))
    calls = [path.name.split("-") for path in tmp_path.glob("*-*") if not path.name.startswith("study")]
    # One call for each trial, none left under way, none twice; the last of each may exceed the number.
    assert {trial.state.name for trial in study.trials} == {"COMPLETE"}
    assert sorted(int(n) for n, _ in calls) == sorted(trial.params["n"] for trial in study.trials)
    assert 12 <= len(study.trials) <= 13 and [trial.number for trial in study.trials] == list(range(len(study.trials)))


class NoFit(SurrogateSampler):
    """A sampler that must not be asked."""

    def answers(self, *_: Any) -> Any:
        pytest.fail("a suggestion was made for parameters that are fixed")


def test_what_is_queued_costs_no_suggestion() -> None:
    space = Space({"x": (0.0, 1.0), "n": (1, 9)})
    study = optuna.create_study(sampler=NoFit(space=space))
    study.enqueue_trial({"x": 0.25, "n": 3})
    assert configuration_of(begin(study), space) == {"x": 0.25, "n": 3}
    distributions = space.distributions()
    study.add_trial(
        optuna.create_trial(
            state=optuna.trial.TrialState.WAITING, params={"x": 0.5, "n": 4}, distributions=distributions
        )
    )
    trial = begin(study)
    assert configuration_of(trial, space) == {"x": 0.5, "n": 4} and trial.number == 1
    assert [each.params for each in study.trials] == [{"x": 0.25, "n": 3}, {"x": 0.5, "n": 4}]


def test_two_that_want_the_same_queued_trial(tmp_path: Path) -> None:
    study = optuna.create_study(study_name="bayesnn", storage=open_storage(tmp_path / "study.db"))
    for _ in range(4):
        study.add_trial(optuna.create_trial(state=optuna.trial.TrialState.WAITING))
    before = study.get_trials(deepcopy=False)
    # Both have read the same trials; whoever is second takes the next, and the fifth is a new one.
    numbers = [begin(study, before).number for _ in range(5)]
    assert numbers == [0, 1, 2, 3, 4]


def test_written_at_once_or_one_by_one(tmp_path: Path) -> None:
    space = Space({"x": (1e-3, 1.0, "log"), "n": (1, 9), "kind": ["a", "b"]})
    configuration = {"x": 0.125, "n": 3, "kind": "b"}
    for kept in (open_storage(tmp_path / "study.db"), open_storage(None)):
        study = optuna.create_study(storage=kept)
        trial = begin(study)
        write(study._storage, trial._trial_id, {"a": [1, None]}, configuration, space.distributions())
        write(study._storage, trial._trial_id, {"a": 2, "b": "c"})  # again, and something new
        study.tell(trial, 1.0)
        (told,) = study.trials
        assert told.params == configuration and told.distributions == space.distributions()
        assert told.user_attrs["a"] == 2 and told.user_attrs["b"] == "c"
        with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
            write(study._storage, trial._trial_id, {"d": 1})


def test_hearts_beat_for_all_that_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bayesnn.bo.recovery.HEARTBEAT_SECONDS", 0.01)
    beats: Counter[int] = Counter()
    kept = open_storage(tmp_path / "study.db")
    monkeypatch.setattr(kept, "record_heartbeat", lambda trial_id: beats.update([trial_id]))
    trials = {7: None}
    with heartbeats(kept, trials):
        wait_until(lambda: beats[7] > 2)
        trials[8] = None
        wait_until(lambda: beats[8] > 2)
    count = beats.total()
    time.sleep(0.1)
    assert beats.total() == count


# The file ---------------------------------------------------------------------------------------------------------------


def test_the_file_is_whole_by_itself(tmp_path: Path) -> None:
    """Copied after the search, without what lies beside it while it is open."""
    result = minimize(lambda x: x["n"], {"n": (1, 8)}, num_trials=5, num_startup=5, storage=tmp_path / "study.db")
    (tmp_path / "copy.db").write_bytes((tmp_path / "study.db").read_bytes())
    copied = optuna.load_study(study_name="bayesnn", storage=open_storage(tmp_path / "copy.db"))
    assert [trial.values for trial in copied.trials] == [[e.value] for e in result.history]
    put_on_disk(open_storage(None))  # nothing to do


def test_a_file_that_somebody_else_is_making(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes that make the tables at once: the second finds them half made."""
    failures = iter(["UNIQUE constraint failed: alembic_version.version_num", "table studies already exists"])

    def interfered(*_: Any) -> Any:
        reason = next(failures, None)
        if reason is not None:
            raise IntegrityError("INSERT", {}, Exception(reason))
        return made(*_)

    made = storage._connected
    monkeypatch.setattr(storage, "_connected", interfered)
    assert open_storage(tmp_path / "study.db").get_all_studies() == []
    failures = iter(["disk image is malformed"])
    with pytest.raises(ValueError, match=r"can't be used as a database of studies: .*malformed"):
        open_storage(tmp_path / "other.db")


def test_files_are_written_ahead_but_on_network_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "network_file_system", lambda path: "nfs4")
    with pytest.warns(match=r"lies on a network file system \(nfs4\)"):
        kept = open_storage(tmp_path / "study.db")
    with kept.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "delete"
    monkeypatch.undo()
    with open_storage(tmp_path / "other.db").engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 1  # NORMAL
