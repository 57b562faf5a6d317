"""Commands that are cut off by Ctrl-C or SIGKILL: every trial is counted, none twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest
from command_scripts import posix, script, sometimes_hanging, wait_until
from typer.testing import CliRunner

from bayesnn.bo import Space
from bayesnn.bo.evaluations import is_evaluation
from bayesnn.bo.recovery import begin, release, requeue_orphans
from bayesnn.bo.storage import open_storage
from bayesnn.bo.study import configuration_of
from bayesnn.cli import app


class Stopped(optuna.samplers.RandomSampler):
    """A sampler that never gets to suggest anything."""

    def infer_relative_search_space(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
        raise KeyboardInterrupt


@posix
def test_a_process_killed_while_it_suggests_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = subprocess.Popen([sys.executable, "-S", "-I", "-c", ""])
    dead.wait()
    space = Space({"x": (0.0, 1.0)})
    storage = open_storage(tmp_path / "study.db")
    study = optuna.create_study(study_name="bayesnn", storage=storage, sampler=Stopped())
    with monkeypatch.context() as context:
        context.setattr("bayesnn.bo.recovery.os.getpid", lambda: dead.pid)
        with pytest.raises(KeyboardInterrupt):
            configuration_of(begin(study), space)
    assert [trial.state.name for trial in study.trials] == ["RUNNING"]
    assert requeue_orphans(study) == 1
    assert [trial.state.name for trial in study.trials] == ["FAIL", "WAITING"]
    # A later process may have the same number, as in containers.
    with monkeypatch.context() as context:
        context.setattr("bayesnn.bo.recovery._PROCESS", "an earlier one")
        with pytest.raises(KeyboardInterrupt):
            configuration_of(begin(study), space)
    assert requeue_orphans(study) == 1
    assert [trial.state.name for trial in study.trials] == ["FAIL", "FAIL", "WAITING"]
    # Its own are nobody's orphans.
    with pytest.raises(KeyboardInterrupt):
        configuration_of(begin(study), space)
    assert requeue_orphans(study) == 0 and study.trials[2].state.name == "RUNNING"


def test_a_failure_that_could_not_be_told_is_not_run_again(tmp_path: Path) -> None:
    study = optuna.create_study(study_name="bayesnn", storage=open_storage(tmp_path / "study.db"))
    trial = begin(study)
    trial.set_user_attr("failure", "exit code 1")
    assert not release(study, trial._trial_id)
    assert [is_evaluation(trial) for trial in study.trials] == [True]


# A shell that starts pytest in the background has SIGINT ignored in all that comes of it.
MAIN = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from bayesnn.cli import app
app()
"""


@posix
def test_ctrl_c_and_a_kill_lose_nothing_and_count_nothing_twice(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    calls = tmp_path / "calls"
    calls.mkdir()
    (tmp_path / "space.toml").write_text("x = [0.0, 1.0]\nn = [1, 9]")
    arguments = [
        *("optimize", "--space", str(tmp_path / "space.toml"), "--metric", "loss", "--workers", "2", "--trials", "6"),
        *("--command", script(tmp_path, sometimes_hanging(3, 4, 7, 8), f'"{calls}" {{x}} {{n}}')),
        *("--storage", str(tmp_path / "study.db")),
    ]

    def started_until(count: int) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", MAIN, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        request.addfinalizer(process.kill)
        wait_until(lambda: process.poll() is not None or len(list(calls.iterdir())) == count)
        wait_until(lambda: process.poll() is not None or all(path.read_text() for path in calls.iterdir()))
        assert process.poll() is None, process.communicate()
        return process

    def told(number: int) -> dict[str, Any]:
        return json.loads((calls / str(number)).read_text())

    def states() -> Counter[str]:
        study = optuna.load_study(study_name="bayesnn", storage=open_storage(tmp_path / "study.db"))
        return Counter("EVALUATED" if is_evaluation(trial) else trial.state.name for trial in study.trials)

    interrupted = started_until(4)
    interrupted.send_signal(signal.SIGINT)
    out, err = interrupted.communicate(timeout=300)
    assert interrupted.returncode == 130 and out == ""
    assert "interrupted: the same command line goes on" in err and "Traceback" not in err
    assert states() == {"EVALUATED": 2, "FAIL": 2, "WAITING": 2}
    for number in (3, 4):  # reaped by the parent, so they are gone for good
        with pytest.raises(ProcessLookupError):
            os.kill(told(number)["pid"], 0)

    killed = started_until(8)
    killed.kill()
    killed.communicate()
    for number in (7, 8):  # the parent couldn't
        os.kill(told(number)["pid"], signal.SIGKILL)
    assert states() == {"EVALUATED": 4, "FAIL": 2, "RUNNING": 2}

    finished = CliRunner().invoke(app, arguments)
    assert finished.exit_code == 0, finished.output
    assert states() == {"EVALUATED": 6, "FAIL": 4} and len(list(calls.iterdir())) == 10
    configurations = {number: (told(number)["x"], told(number)["n"]) for number in range(1, 11)}
    for cut_off, again in (((3, 4), (5, 6)), ((7, 8), (9, 10))):
        assert {configurations[number] for number in cut_off} == {configurations[number] for number in again}
    assert len(set(configurations.values())) == 6
    best = json.loads(finished.stdout)
    assert best["value"] == min(float(x) + int(n) for x, n in configurations.values())
    assert best["value"] == best["x"]["x"] + best["x"]["n"]
    # Nothing is left to do.
    assert CliRunner().invoke(app, arguments).exit_code == 0 and len(list(calls.iterdir())) == 10
