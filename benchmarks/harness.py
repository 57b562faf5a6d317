"""What every benchmark shares: alternating timings, the table, the JSON file, and a peer's own environment."""

from __future__ import annotations

import datetime
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
OUR_PACKAGES = ("bayesnn", "torch", "botorch", "gpytorch", "pyro-ppl", "numpy")


def peer_python(name: str, requirements: Sequence[str]) -> Path:
    """The Python of a sibling environment with the peer's real packages, made once under ``benchmarks/envs``."""
    folder = FOLDER / "envs" / name
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *requirements], check=True)
    return python


def alternate(ours: Callable[[], float], peer: Callable[[], float], repeats: int) -> tuple[list[float], list[float]]:
    """Both measurements in turn, ``repeats`` times each."""
    pairs = [(ours(), peer()) for _ in range(repeats)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def seconds(function: Callable[[], Any]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def row(
    case: str, metric: str, unit: str, ours: list[float], peer: list[float], peer_name: str, better: str
) -> dict[str, Any]:
    """One comparison of medians; ``ratio`` above 1 means that we are ahead."""
    own, other = statistics.median(ours), statistics.median(peer)
    return {
        "case": case,
        "metric": metric,
        "unit": unit,
        "ours": own,
        "peer": other,
        "peer_name": peer_name,
        "ratio": own / other if better == "higher" else other / own,
        "better": better,
        "all_ours": ours,
        "all_peer": peer,
    }


def write(name: str, rows: list[dict[str, Any]], peer_versions: dict[str, str], **notes: Any) -> None:
    """Print the table and write ``benchmarks/results/NAME.json``, with notes (settings, say) before the rows.

    A note ``quick=True`` says that the figures are of a trial run: they are printed, and the file stays as it is.
    """
    print(f"{'case':44} {'metric':22} {'ours':>12} {'peer':>12} {'ratio':>7}  peer")
    for line in rows:
        ratio = math.nan if line["ratio"] is None else line["ratio"]
        print(
            f"{line['case']:44} {line['metric']:22} {line['ours']:12.4g} {line['peer']:12.4g} {ratio:7.2f}  "
            f"{line['peer_name']}"
        )
    if notes.pop("quick", False):
        return
    result = {
        "versions": {package: version(package) for package in OUR_PACKAGES} | peer_versions,
        "machine": {"processor": _processor(), "system": platform.system()},
        "date": datetime.date.today().isoformat(),
        **notes,
        "rows": rows,
    }
    path = FOLDER / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path.relative_to(FOLDER.parent)}")


def read_cells(name: str) -> list[dict[str, Any]]:
    """What :func:`append_cell` has kept under a benchmark's name, oldest first."""
    path = _cells(name)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def append_cell(name: str, cell: dict[str, Any]) -> None:
    """Keep one finished piece of a long benchmark, so that it goes on where it stopped."""
    path = _cells(name)
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(cell) + "\n")


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error; None for one value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def _cells(name: str) -> Path:
    return FOLDER / "results" / f"{name}_cells.jsonl"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
