"""Studies on a PostgreSQL server: processes that share one, SIGKILL of a worker and of the parent, servers that go away."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from command_scripts import script, sometimes_hanging, wait_until
from optuna.exceptions import OptunaError
from sqlalchemy.exc import SQLAlchemyError

from bayesnn.bo import minimize
from bayesnn.bo.evaluations import is_evaluation
from bayesnn.bo.storage import open_storage

psycopg = pytest.importorskip("psycopg")

SPACE: dict[str, Any] = {"x": (0.0, 1.0), "n": (1, 9)}


class Server:
    """A PostgreSQL server in a folder of its own, which nobody reaches but through a socket there.

    PostgreSQL refuses to run as root, so root lends it to an account that may do nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "data"
        self.account = _unprivileged() if os.geteuid() == 0 else {}
        if self.account:
            os.chown(folder, self.account["user"], self.account["group"])
        initdb = [
            "initdb",
            "--username=bayesnn",
            "--auth=trust",
            "--no-sync",
            "--locale=C",
            "-E",
            "UTF8",
            "-D",
            self.data,
        ]
        subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, cwd="/", **self.account)
        self.start()

    def url(self, database: str = "postgres") -> str:
        return f"postgresql+psycopg://bayesnn@/{database}?host={self.folder}"

    def new_database(self, name: str) -> str:
        with self._connect() as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def start(self) -> None:
        options = ["-D", self.data, "-k", self.folder, "-c", "listen_addresses=", "-F"]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(["postgres", *options], stderr=log, cwd="/", **self.account)

        def answers() -> bool:
            assert self.process.poll() is None, (self.folder / "log").read_text()
            try:
                self._connect().close()
            except psycopg.OperationalError:
                return False
            return True

        wait_until(answers, 60)

    def stop(self, how: int = signal.SIGINT) -> None:
        """SIGINT: disconnect everybody; SIGQUIT: as after a power cut."""
        self.process.send_signal(how)
        self.process.wait(60)

    def _connect(self) -> Any:
        return psycopg.connect(host=str(self.folder), user="bayesnn", dbname="postgres", autocommit=True)


def _unprivileged() -> dict[str, Any]:
    for name in ("postgres", "nobody"):
        try:
            account = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    pytest.skip("PostgreSQL doesn't run as root, and there is no other account")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    if shutil.which("initdb") is None or shutil.which("postgres") is None:
        pytest.skip("there is no PostgreSQL server here")
    # Not pytest's folder, which only its owner may enter; and the name of a socket must be short.
    folder = Path(tempfile.mkdtemp(prefix="bayesnn-"))
    try:
        server = Server(folder)
        yield server
        server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def study_at(url: str) -> optuna.Study:
    return optuna.load_study(study_name="bayesnn", storage=open_storage(url))


def states(url: str) -> Counter[str]:
    return Counter("EVALUATED" if is_evaluation(trial) else trial.state.name for trial in study_at(url).trials)


# Each worker writes what it evaluates into a file of its own. The one called "hangs" never finishes its third; the one called
# "works" leaves that to it, whichever of them begins first.
WORKER = """
import json, pathlib, sys, time
from bayesnn.bo import minimize

url, path, num_trials = sys.argv[1], sys.argv[2], int(sys.argv[3])
other = pathlib.Path(path).with_name("hangs")
calls = 0

def f(x):
    global calls
    calls += 1
    with open(path, "a") as file:
        file.write(json.dumps(x) + "\\n")
    if calls == 3 and path.endswith("hangs"):
        time.sleep(600)
    while calls == 3 and path.endswith("works") and not (other.exists() and other.read_text().count("\\n") == 3):
        time.sleep(0.02)
    time.sleep(0.05)
    return x["x"] + x["n"]

minimize(f, {"x": (0.0, 1.0), "n": (1, 9)}, surrogate="nngp", num_trials=num_trials, num_startup=8, storage=url)
"""


def worker(url: str, path: Path, num_trials: int, request: pytest.FixtureRequest) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", WORKER, url, str(path), str(num_trials)]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    request.addfinalizer(process.kill)
    return process


def evaluated(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_two_processes_share_a_study_and_one_is_killed(
    server: Server, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Both begin on an empty database at the same moment."""
    url = server.new_database("shared")
    hangs, works = tmp_path / "hangs", tmp_path / "works"
    processes = [worker(url, path, 8, request) for path in (hangs, works)]
    _, errors = processes[1].communicate(timeout=300)
    assert processes[1].returncode == 0, errors
    assert processes[0].poll() is None and len(evaluated(hangs)) == 3
    # What hangs is a trial like any other, until its process is gone.
    assert states(url)["RUNNING"] == 1 and states(url)["FAIL"] == 0
    os.kill(processes[0].pid, signal.SIGKILL)
    processes[0].communicate()
    before, again = states(url)["EVALUATED"], []
    result = minimize(
        lambda x: again.append(x) or x["x"] + x["n"], SPACE, num_trials=before + 2, num_startup=8, storage=url
    )
    assert states(url) == {"EVALUATED": before + 2, "FAIL": 1}
    assert again[0] == evaluated(hangs)[2] and len(again) == 2  # what was cut off comes first
    # Every evaluation is in the study, once.
    everything = evaluated(hangs)[:2] + evaluated(works) + again
    assert len(everything) == before + 2
    key = lambda x: (x["x"], x["n"])  # noqa: E731
    assert sorted(everything, key=key) == sorted((evaluation.x for evaluation in result.history), key=key)
    assert len({key(x) for x in everything}) == len(everything)


MAIN = "from bayesnn.cli import app; app()"


def test_a_run_is_killed_and_then_the_parent(server: Server, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url, calls = server.new_database("command"), tmp_path / "calls"
    calls.mkdir()
    (tmp_path / "space.toml").write_text("x = [0.0, 1.0]\nn = [1, 9]")
    arguments = [
        *(sys.executable, "-c", MAIN, "optimize", "--space", str(tmp_path / "space.toml"), "--metric", "loss"),
        *("--command", script(tmp_path, sometimes_hanging(3, 4), f'"{calls}" {{x}} {{n}}')),
        *("--storage", url, "--logs", str(tmp_path / "logs"), "--workers", "2", "--trials", "6"),
    ]

    def told(number: int) -> dict[str, Any]:
        return json.loads((calls / str(number)).read_text())

    parent = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    request.addfinalizer(parent.kill)
    wait_until(lambda: parent.poll() is not None or len(list(calls.iterdir())) == 4)
    wait_until(lambda: parent.poll() is not None or all(path.read_text() for path in calls.iterdir()))
    assert parent.poll() is None, parent.communicate()
    # A run that is killed has failed; the next one takes its place.
    os.kill(told(3)["pid"], signal.SIGKILL)
    wait_until(lambda: len(list(calls.iterdir())) >= 6)
    wait_until(lambda: states(url)["EVALUATED"] == 5)
    parent.kill()
    parent.communicate()
    os.kill(told(4)["pid"], signal.SIGKILL)  # which the parent couldn't
    assert states(url) == {"EVALUATED": 5, "RUNNING": 1}

    finished = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr
    assert states(url) == {"EVALUATED": 6, "FAIL": 1} and len(list(calls.iterdir())) == 7
    assert (told(7)["x"], told(7)["n"]) == (told(4)["x"], told(4)["n"])
    failures = [trial.user_attrs["failure"] for trial in study_at(url).trials if "failure" in trial.user_attrs]
    assert failures == ["it was killed by SIGKILL"]
    best = json.loads(finished.stdout)
    assert best["value"] == min(float(told(k)["x"]) + int(told(k)["n"]) for k in (1, 2, 5, 6, 7))


def test_a_server_that_goes_away_takes_nothing_with_it(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    url, seen = server.new_database("interrupted"), []

    def f(x: dict[str, Any]) -> float:
        seen.append(x)
        if len(seen) == 3:
            server.stop(signal.SIGQUIT)
        return x["x"] + x["n"]

    try:
        # Optuna stumbles over the lost connection in its own way.
        with pytest.raises((SQLAlchemyError, OptunaError, UnboundLocalError)):
            minimize(f, SPACE, num_trials=5, num_startup=5, storage=url)
    finally:
        server.start()
    assert states(url) == {"EVALUATED": 2, "RUNNING": 1}
    monkeypatch.setattr("bayesnn.bo.recovery._PROCESS", "a later one of the same number")
    result = minimize(f, SPACE, num_trials=5, num_startup=5, storage=url)
    # The trial that couldn't be told is run again.
    assert len(result.history) == 5 and result.num_failed == 0
    assert [evaluation.value for evaluation in result.history] == [x["x"] + x["n"] for x in (*seen[:2], *seen[3:])]


def test_urls_that_lead_nowhere(server: Server) -> None:
    with pytest.raises(ValueError, match=r"can't be used as a database of studies.*does not exist"):
        open_storage(server.url("nothing"))
    with pytest.raises(ValueError, match="can't be used as a database of studies"):
        open_storage("postgresql+psycopg://bayesnn@/x?host=/nonexistent")
