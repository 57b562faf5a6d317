"""``bayesnn dashboard`` answers, for studies with several objectives, constraints, failures and what runs."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import optuna
import pytest

from bayesnn.bo import Space
from bayesnn.bo.storage import open_storage

MAIN = "from bayesnn.cli import app; app()"


def stored(path: Path) -> None:
    """Two studies, as searches leave them."""
    storage, space = open_storage(path), Space({"x": (0.0, 1.0), "kind": ["a", "b"]})
    for name, directions in (("one", ["minimize"]), ("two", ["minimize", "maximize"])):
        study = optuna.create_study(storage=storage, study_name=name, directions=directions)
        for x in space.configurations(space.sobol(6, seed=0)):
            trial = study.ask(space.distributions())
            trial.set_constraint("limit", x["x"] - 0.5)
            trial.set_user_attr("surrogate_scores", {"gp": {"mean": -1.0}})
            if trial.number == 2:
                trial.set_user_attr("failure", "exit code 1")
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            elif trial.number < 5:  # the last one runs
                study.tell(trial, [x["x"], 1.0][: len(directions)])


@pytest.mark.filterwarnings("ignore:Heartbeat of storage", "ignore::optuna.exceptions.ExperimentalWarning")
def test_it_answers(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("optuna_dashboard")
    stored(tmp_path / "study.db")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [sys.executable, "-c", MAIN, "dashboard", str(tmp_path / "study.db"), "--port", str(port)]
    server = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    request.addfinalizer(server.wait)
    request.addfinalizer(server.kill)
    assert server.stdout is not None
    assert server.stdout.readline() == f"http://127.0.0.1:{port}/ (Ctrl-C ends it)\n"

    def get(path: str) -> bytes:
        for _ in range(3000):
            connection = HTTPConnection("127.0.0.1", port, timeout=60)
            try:
                connection.request("GET", path)
                response = connection.getresponse()
                assert response.status == 200
                return response.read()
            except (ConnectionError, HTTPException):  # not listening yet
                assert server.poll() is None
                time.sleep(0.02)
            finally:
                connection.close()
        raise AssertionError("waited in vain")

    assert b"<html" in get("/dashboard").lower()
    names = {study["study_name"]: study["study_id"] for study in json.loads(get("/api/studies"))["study_summaries"]}
    assert set(names) == {"one", "two"}
    for name, num_objectives in (("one", 1), ("two", 2)):
        found: dict[str, Any] = json.loads(get(f"/api/studies/{names[name]}?after=0"))
        assert len(found["directions"]) == num_objectives
        states = [trial["state"] for trial in found["trials"]]
        assert states == ["Complete", "Complete", "Fail", "Complete", "Complete", "Running"]
        assert all(len(trial["values"]) == num_objectives for trial in found["trials"] if trial["state"] == "Complete")
