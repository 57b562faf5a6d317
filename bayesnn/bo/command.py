"""An objective that is a command: a configuration becomes its arguments, its last line of JSON the values."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from bayesnn.bo.attempt import Attempt
from bayesnn.bo.space import Space

# How much of an output's end is looked at, bytes.
TAIL = 2**20

_PLACE = re.compile(r"(?P<open>\{\{)|(?P<close>\}\})|\{(?P<name>[^{}]*)\}|(?P<stray>[{}])")


class Command:
    """A command line with places for the parameters of a space.

    It is split as a shell would split it, but no shell runs it: each place ``{name}`` is filled within its one argument,
    whatever the value. Numbers are written in full, booleans as true and false; ``{{`` and ``}}`` stand for braces. An
    argument with a place for a parameter that a configuration doesn't have is left out: write ``--momentum={momentum}``.

    Args:
        text: the command line.
        space: the space, each of whose parameters must have a place.

    Raises:
        ValueError: for places that aren't parameters, parameters without a place, stray braces or quotes, and a
            program that there isn't.

    Example:
        >>> command = Command("python train.py --lr {lr}", Space({"lr": (1e-5, 1e-1, "log")}))
        >>> command.arguments({"lr": 0.001})
        ['python', 'train.py', '--lr', '0.001']
    """

    def __init__(self, text: str, space: Space) -> None:
        try:
            self.words = shlex.split(text)
        except ValueError as error:
            raise ValueError(f"command {text!r} can't be split into arguments: {error}") from None
        if not self.words:
            raise ValueError("command must name a program, found nothing")
        places = [match for word in self.words for match in _PLACE.finditer(word)]
        if any(match["stray"] for match in places):
            raise ValueError(f"command {text!r} has a brace without its partner; a literal one is written twice")
        named = {match["name"] for match in places if match["name"] is not None}
        unknown, unused = sorted(named - set(space.names)), [name for name in space.names if name not in named]
        if unknown:
            raise ValueError(
                f"command has places for {', '.join(unknown)}, which the space doesn't have; it has {', '.join(space.names)}"
            )
        if unused:
            raise ValueError(f"command has no place for {', '.join(unused)}: write {{{unused[0]}}} where it belongs")
        for before, word in pairwise(self.words):
            name = word[1:-1]
            if before.startswith("-") and name in space.conditions and word == f"{{{name}}}":
                raise ValueError(
                    f"command would leave {before!r} alone where {name} doesn't exist: write {before}={word} in one piece"
                )
        if not _PLACE.search(self.words[0]) and shutil.which(self.words[0]) is None:
            raise ValueError(f"command: there is no program {self.words[0]!r}")

    def arguments(self, x: Mapping[str, Any]) -> list[str]:
        """The program and its arguments for a configuration."""

        def fill(match: re.Match[str]) -> str:
            return "{" if match["open"] else "}" if match["close"] else _text(x[match["name"]])

        named = {word: {match["name"] for match in _PLACE.finditer(word)} - {None} for word in self.words}
        return [_PLACE.sub(fill, word) for word in self.words if named[word] <= set(x)]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


class Runner:
    """Runs a command, in several threads at once if need be; each run is a process group of its own.

    A group can be killed with all that the command has started, and a terminal's Ctrl-C doesn't reach it.

    Args:
        command: the command.
        metric: which entry of the JSON line is the value.
        timeout: kill a run after so many seconds; None never does.
    """

    def __init__(self, command: Command, metric: str, timeout: float | None = None) -> None:
        self.command, self.metric, self.timeout = command, metric, timeout
        self._lock, self._running, self._stopped = threading.Lock(), set[subprocess.Popen[bytes]](), False

    def run(self, x: Mapping[str, Any], folder: Path) -> Attempt:
        """Run the command for a configuration; ``stdout.txt`` and ``stderr.txt`` in the folder keep what it says."""
        start = time.perf_counter()
        numbers, others, failure = None, dict[str, float](), None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            ending = self._wait(x, folder)
            if ending is None:
                value, others = self._read(folder / "stdout.txt")
                numbers = {self.metric: value}
            else:
                failure = ending + _last_words(folder / "stderr.txt")
        except ValueError as error:
            failure = f"{error}{_last_words(folder / 'stderr.txt')}"
        except OSError as error:
            failure = f"it couldn't be run: {error}"
        return Attempt(numbers, time.perf_counter() - start, failure, others)

    def stop(self) -> None:
        """Kill every run, and begin no other."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                _kill_group(process)

    def _wait(self, x: Mapping[str, Any], folder: Path) -> str | None:
        """Run to the end; returns what was wrong with that end."""
        with (folder / "stdout.txt").open("wb") as out, (folder / "stderr.txt").open("wb") as err:
            with self._lock:
                if self._stopped:
                    return "it was stopped"
                process = subprocess.Popen(
                    self.command.arguments(x),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    start_new_session=True,
                )
                self._running.add(process)
            try:
                code = process.wait(self.timeout)
            except subprocess.TimeoutExpired:
                _kill_group(process)
                process.wait()
                return f"it took longer than {self.timeout:g} seconds"
            finally:
                with self._lock:
                    self._running.discard(process)
        if code < 0:
            return f"it was killed by {_signal_name(-code)}"
        return f"exit code {code}" if code else None

    def _read(self, path: Path) -> tuple[float, dict[str, float]]:
        """The metric and the other numbers of the last line of JSON."""
        entries = _last_json(path)
        if entries is None:
            raise ValueError("it printed no line of JSON")
        if self.metric not in entries:
            raise ValueError(f"its last line of JSON has no {self.metric!r}, only {', '.join(entries) or 'nothing'}")
        found = entries.pop(self.metric)
        value = _finite(found)
        if value is None:
            raise ValueError(f"{self.metric!r} is {json.dumps(found):.100}, not a finite number")
        numbers = {name: _finite(entry) for name, entry in entries.items()}
        return value, {name: number for name, number in numbers.items() if number is not None}


def _last_json(path: Path) -> dict[str, Any] | None:
    for line in reversed(_tail_lines(path)):
        if line.startswith("{"):
            with suppress(ValueError, RecursionError):
                entries = json.loads(line)
                assert isinstance(entries, dict)
                return entries
    return None


def _finite(entry: Any) -> float | None:
    if isinstance(entry, bool) or not isinstance(entry, (int, float)):
        return None
    with suppress(OverflowError):
        return float(entry) if math.isfinite(entry) else None
    return None


def _last_words(path: Path) -> str:
    """The last line of standard error, as the end of a sentence."""
    lines = _tail_lines(path) if path.exists() else []
    return f"; the last of its errors: {lines[-1][:500]}" if lines else ""


def _tail_lines(path: Path) -> list[str]:
    """The lines at a file's end that aren't blank; a carriage return, as of progress bars, ends a line too."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        text = file.read().decode("utf-8", errors="replace")
    return [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:  # then its number may be somebody else's
        return
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
