"""Commands for tests: scripts that start fast, and waiting for them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

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


_SOMETIMES_HANGING = """
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
if number in HANGING:
    time.sleep(600)
print(json.dumps({"loss": float(x) + int(n)}))
"""


def sometimes_hanging(*numbers: int) -> str:
    """A script (folder, x, n) that writes who it is into a file for each call, and hangs at some of them."""
    return f"HANGING = {numbers}" + _SOMETIMES_HANGING
