"""Objectives that are commands: arguments, failures, time-outs, several at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from command_scripts import posix, script, wait_until

from bayesnn import BayesnnWarning
from bayesnn.bo import Space, When
from bayesnn.bo.command import Command, Runner
from bayesnn.bo.workers import optimize_command

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
    fine = runner.run({"kind": "fine"}, tmp_path / "fine")
    assert fine.numbers == {"loss": 0.25} and fine.others == {"accuracy": 0.5}
    assert fine.failure is None and fine.seconds > 0
    assert (tmp_path / "fine" / "stdout.txt").read_text().endswith("bye")
    assert (tmp_path / "fine" / "stderr.txt").read_text() == "warming up\nlast words\n\n"
    found = {kind: runner.run({"kind": kind}, tmp_path / "others") for kind in FAILURES}
    assert {kind: attempt.failure for kind, attempt in found.items()} == FAILURES
    assert all(attempt.numbers is None and attempt.others == {} for attempt in found.values())


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
    with pytest.raises(ValueError, match="has the directions minimize, not maximize"):
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
