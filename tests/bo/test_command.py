"""Objectives that are commands: arguments, failures, time-outs, several at once, Ctrl-C and SIGKILL."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import optuna
import pytest
from typer.testing import CliRunner

from bayesnn import BayesnnWarning
from bayesnn.bo import Space, When
from bayesnn.bo.command import Command, Runner
from bayesnn.bo.result import is_evaluation
from bayesnn.bo.storage import begin, open_storage, release_own, requeue_orphans
from bayesnn.bo.study import configuration_of
from bayesnn.bo.workers import optimize_command
from bayesnn.cli import app

posix = pytest.mark.skipif(os.name != "posix", reason="process groups and signals are POSIX")


def script(folder: Path, text: str, places: str) -> str:
    """A command that runs a script; -S and -I start Python in a few milliseconds."""
    path = folder / "script.py"
    path.write_text(text)
    return f'"{sys.executable}" -S -I "{path}" {places}'


def wait_until(condition: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


# The command line -------------------------------------------------------------------------------------------------------

SPACE = Space({"lr": (1e-5, 1e-1, "log"), "width": (1, 64), "kind": ["a b", "$(rm) 'x"], "flag": [True, False]})


def test_a_parameter_that_does_not_exist_takes_its_argument_with_it() -> None:
    space = Space({"kind": ["a", "b"], "rate": When((0.0, 1.0), kind="b")})
    command = Command("echo {kind} --rate={rate} end", space)
    assert command.arguments({"kind": "b", "rate": 0.5}) == ["echo", "b", "--rate=0.5", "end"]
    assert command.arguments({"kind": "a"}) == ["echo", "a", "end"]
    with pytest.raises(
        ValueError, match=r"command would leave '--rate' alone where rate doesn't exist: write --rate=\{rate\}"
    ):
        Command("echo {kind} --rate {rate}", space)


def test_values_stay_within_their_argument() -> None:
    command = Command(f"'{sys.executable}' '{{{{\"lr\": {{lr}}}}}}' --w={{width}}/{{width}} {{kind}} {{flag}}", SPACE)
    arguments = command.arguments({"lr": 1e-05, "width": 8, "kind": "$(rm) 'x", "flag": True})
    assert arguments == [sys.executable, '{"lr": 1e-05}', "--w=8/8", "$(rm) 'x", "true"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "must name a program"),
        ("python 'x {lr}", "can't be split into arguments: No closing quotation"),
        (
            "python {lr} {width} {kind} {flag} {depth}",
            "places for depth, which the space doesn't have; it has lr, width",
        ),
        ("python {lr} {kind} {flag}", "no place for width: write {width}"),
        ("python {lr} {width} {kind} {flag} {", "a brace without its partner"),
        ("python {lr} {width} {kind} {flag} }", "a brace without its partner"),
        ("python {lr} {width} {kind} {flag} {}", "places for , which"),
        ("nosuchprogram {lr} {width} {kind} {flag}", "there is no program 'nosuchprogram'"),
    ],
)
def test_commands_that_make_no_sense(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Command(text.replace("python", f"'{sys.executable}'"), SPACE)


# One run ----------------------------------------------------------------------------------------------------------------

BEHAVIOURS = """
import json, os, signal, sys
kind = sys.argv[1]
sys.stderr.write("warming up\\nlast words\\n\\n")
outputs = {
    "fine": '{"loss": 9}\\n10%\\r{"loss": 0.25, "accuracy": 0.5, "name": "n", "ok": true, "big": 1e999}\\n[1]\\n{broken\\nbye',
    "other": '{"loss": 1}\\n{"accuracy": 0.5}',
    "silent": "loss 0.3",
    "nan": '{"loss": NaN}',
    "infinite": '{"loss": -Infinity}',
    "huge": '{"loss": 1' + 400 * "0" + "}",
    "text": '{"loss": "0.3"}',
    "true": '{"loss": true}',
    "bytes": "\\xff",
}
sys.stdout.buffer.write(outputs.get(kind, '{"loss": 0}').encode("latin-1"))
sys.stdout.flush()
if kind == "exit":
    sys.exit(3)
if kind == "signal":
    os.kill(os.getpid(), signal.SIGSEGV)
"""
LAST = "; the last of its errors: last words"
FAILURES = {
    "other": "its last line of JSON has no 'loss', only accuracy" + LAST,
    "silent": "it printed no line of JSON" + LAST,
    "nan": "'loss' is NaN, not a finite number" + LAST,
    "infinite": "'loss' is -Infinity, not a finite number" + LAST,
    "huge": "'loss' is 1" + 99 * "0" + ", not a finite number" + LAST,
    "text": "'loss' is \"0.3\", not a finite number" + LAST,
    "true": "'loss' is true, not a finite number" + LAST,
    "bytes": "it printed no line of JSON" + LAST,
    "exit": "exit code 3" + LAST,
    "signal": "it was killed by SIGSEGV" + LAST,
    "nul\0": "embedded null byte",
}
KINDS = Space({"kind": ["fine", *FAILURES]})


@posix
def test_what_a_run_gives(tmp_path: Path) -> None:
    runner = Runner(Command(script(tmp_path, BEHAVIOURS, "{kind}"), KINDS), "loss")
    outcome = runner.run({"kind": "fine"}, tmp_path / "fine")
    assert outcome[:3] == (0.25, {"accuracy": 0.5}, None) and outcome.seconds > 0
    assert (tmp_path / "fine" / "stdout.txt").read_text().endswith("bye")
    assert (tmp_path / "fine" / "stderr.txt").read_text() == "warming up\nlast words\n\n"
    found = {kind: runner.run({"kind": kind}, tmp_path / "others") for kind in FAILURES}
    assert {kind: outcome.failure for kind, outcome in found.items()} == FAILURES
    assert all(outcome.value is None and outcome.others == {} for outcome in found.values())


def test_a_program_that_cannot_start(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("in the way")
    space = Space({"program": ["nosuchprogram", "neither"]})
    runner = Runner(Command("{program}", space), "loss")
    for folder in (tmp_path / "logs", tmp_path / "folder"):
        failure = runner.run({"program": "nosuchprogram"}, folder).failure
        assert failure is not None and failure.startswith("it couldn't be run: ")


# A child that outlives its parent, both holding the pipe open.
HANGING = """
import subprocess, sys, time
pipe = open(sys.argv[1], "w")
subprocess.Popen([sys.executable, "-S", "-I", "-c", "import time; time.sleep(600)"], pass_fds=[pipe.fileno()])
pipe.write("x")
pipe.flush()
time.sleep(600)
"""


@posix
@pytest.mark.parametrize("how", ["timeout", "stop"])
def test_killing_a_run_kills_all_that_it_started(tmp_path: Path, how: str) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    command = Command(script(tmp_path, HANGING, "{path}"), Space({"path": [str(fifo), "x"]}))
    runner = Runner(command, "loss", timeout=3 if how == "timeout" else None)

    def began() -> bool:
        try:
            return os.read(reader, 1) == b"x"
        except BlockingIOError:
            return False

    if how == "timeout":
        outcome = runner.run({"path": str(fifo)}, tmp_path / "logs")
        assert outcome.failure == "it took longer than 3 seconds" and began()
    else:
        thread = Thread(target=lambda: runner.run({"path": str(fifo)}, tmp_path / "logs"))
        thread.start()
        wait_until(began)
        runner.stop()
        thread.join()
        assert runner.run({"path": str(fifo)}, tmp_path / "logs").failure == "it was stopped"

    def nobody_writes() -> bool:
        try:
            return os.read(reader, 1) == b""
        except BlockingIOError:
            return False

    wait_until(nobody_writes, 10)
    os.close(reader)


# A study ----------------------------------------------------------------------------------------------------------------


def run(tmp_path: Path, command: str, space: Space, **more: Any) -> Any:
    return optimize_command(command, space, "loss", **({"storage": tmp_path / "study.db", "seed": 0} | more))


@posix
def test_failures_are_kept_and_the_others_go_on(tmp_path: Path) -> None:
    command = script(tmp_path, BEHAVIOURS, "{kind}")
    with pytest.warns(BayesnnWarning, match="11 of 12 evaluations failed"):
        result = run(tmp_path, command, KINDS, num_trials=12, num_workers=3)
    assert result.x == {"kind": "fine"} and result.value == 0.25
    assert {evaluation.x["kind"]: evaluation.failure for evaluation in result.history} == FAILURES | {"fine": None}
    best = result.study.best_trial
    assert best.user_attrs["metric:accuracy"] == 0.5 and best.user_attrs["seconds"] > 0
    assert result.study.metric_names == ["loss"]
    logs = sorted(path.name for path in (tmp_path / "study.logs").iterdir())
    assert logs == [f"bayesnn-{number:04d}" for number in range(12)]


MEETING = """
import os, sys, time
open(os.path.join(sys.argv[1], sys.argv[2]), "w").close()
while len(os.listdir(sys.argv[1])) < 3:
    time.sleep(0.01)
print('{"loss": %s}' % sys.argv[2])
"""


def test_so_many_run_at_once(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    command = script(tmp_path, MEETING, f'"{tmp_path / "here"}" {{n}}')
    logs = {"logs": tmp_path / "elsewhere", "study_name": "../a study"}
    space = Space({"n": (1, 3)})
    result = run(
        tmp_path, command, space, num_trials=3, num_workers=3, timeout_per_trial=40, direction="maximize", **logs
    )
    assert sorted(evaluation.x["n"] for evaluation in result.history) == [1, 2, 3] and result.value == 3
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir())[0] == "..%2Fa study-0000"


COUNTED = """
import sys
with open(sys.argv[1], "a") as file:
    file.write(sys.argv[2] + "\\n")
print('{"loss": %s}' % sys.argv[2])
"""


def test_a_stored_study_goes_on_or_refuses(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    command = script(tmp_path, COUNTED, f'"{calls}" {{x}}')
    space = Space({"x": (0.0, 1.0)})
    for num_trials in (2, 3, 3):
        result = run(tmp_path, command, space, num_trials=num_trials)
        assert len(result.history) == num_trials == len(calls.read_text().splitlines())
    wider = Space({"x": (0.0, 2.0)})
    with pytest.raises(ValueError, match="has another space, which differs in x"):
        run(tmp_path, command, wider)
    with pytest.raises(ValueError, match="is to minimize, not to maximize"):
        run(tmp_path, command, space, direction="maximize")
    with pytest.raises(ValueError, match="is about 'loss', not 'accuracy'"):
        optimize_command(command, space, "accuracy", storage=tmp_path / "study.db")
    assert len(calls.read_text().splitlines()) == 3


def test_nothing_succeeds(tmp_path: Path) -> None:
    command = script(tmp_path, "raise SystemExit('no data')", "{x}")
    with pytest.raises(RuntimeError, match=r"no evaluation succeeded, 2 failed; .* exit code 1; .*no data"):
        run(tmp_path, command, Space({"x": (0.0, 1.0)}), num_trials=2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_workers": 0}, "num_workers must be at least 1, found 0"),
        ({"num_trials": 0}, "num_trials must be at least 1, found 0"),
        ({"timeout_per_trial": 0.0}, "timeout_per_trial must be a positive number of seconds, found 0"),
        ({"direction": "down"}, "direction must be minimize or maximize, found 'down'"),
        ({"storage": "postgresql://host/db"}, "logs must be given"),
        ({"surrogate": "oracle"}, "no surrogate named 'oracle'"),
        ({"metric": ""}, "metric must name an entry"),
    ],
)
def test_arguments_that_make_no_sense(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    arguments = {"metric": "loss", "storage": tmp_path / "study.db"} | change
    with pytest.raises(ValueError, match=message):
        optimize_command(f"'{sys.executable}' {{x}}", Space({"x": (0.0, 1.0)}), **arguments)
    assert not list(tmp_path.iterdir())


# Cut off ----------------------------------------------------------------------------------------------------------------


class Stopped(optuna.samplers.RandomSampler):
    """A sampler that never gets to suggest anything."""

    def infer_relative_search_space(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
        raise KeyboardInterrupt


@posix
def test_a_process_killed_while_it_suggests_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = subprocess.Popen([sys.executable, "-S", "-I", "-c", ""])
    dead.wait()
    storage = open_storage(tmp_path / "study.db")
    study = optuna.create_study(study_name="bayesnn", storage=storage, sampler=Stopped())
    with monkeypatch.context() as context:
        context.setattr("bayesnn.bo.storage.os.getpid", lambda: dead.pid)
        with pytest.raises(KeyboardInterrupt):
            configuration_of(begin(study), SPACE)
    assert [trial.state.name for trial in study.trials] == ["RUNNING"]
    requeue_orphans(study)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "WAITING"]
    # A process with the same number takes what it finds for its own.
    with pytest.raises(KeyboardInterrupt):
        configuration_of(begin(study), SPACE)
    requeue_orphans(study)
    assert study.trials[1].state.name == "RUNNING"
    release_own(study)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "FAIL", "WAITING"]


def test_a_failure_that_could_not_be_told_is_not_run_again(tmp_path: Path) -> None:
    study = optuna.create_study(study_name="bayesnn", storage=open_storage(tmp_path / "study.db"))
    begin(study).set_user_attr("failure", "exit code 1")
    release_own(study)
    assert [is_evaluation(trial) for trial in study.trials] == [True]


# A shell that starts pytest in the background has SIGINT ignored in all that comes of it.
MAIN = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from bayesnn.cli import app
app()
"""

# The third, fourth, seventh and eighth call hang.
SOMETIMES_HANGING = """
import json, os, sys, time
folder, x, n = sys.argv[1:]
number = 1
while True:
    try:
        file = open(os.path.join(folder, str(number)), "x")
        break
    except FileExistsError:
        number += 1
json.dump({"pid": os.getpid(), "x": x, "n": n}, file)
file.close()
if number in (3, 4, 7, 8):
    time.sleep(600)
print(json.dumps({"loss": float(x) + int(n)}))
"""


@posix
def test_ctrl_c_and_a_kill_lose_nothing_and_count_nothing_twice(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    calls = tmp_path / "calls"
    calls.mkdir()
    (tmp_path / "space.toml").write_text("x = [0.0, 1.0]\nn = [1, 9]")
    arguments = [
        *("optimize", "--space", str(tmp_path / "space.toml"), "--metric", "loss", "--workers", "2", "--trials", "6"),
        *("--command", script(tmp_path, SOMETIMES_HANGING, f'"{calls}" {{x}} {{n}}')),
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
