"""What the searches on file say: normalised regrets with their seeds, ranks, and each surrogate beside BoTorch's process."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from bo_problems import HARD
from harness import mean_and_stderr

PEER = "botorch"

Cells = dict[tuple[str, str, int], dict[str, Any]]
"""By problem, method and seed."""


def summary(
    cells: Sequence[dict[str, Any]], problems: Sequence[str], methods: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of every method beside BoTorch's process over the seeds that both have, and the notes: what all reached."""
    table = {(cell["problem"], cell["method"], cell["seed"]): cell for cell in cells}
    problems = [name for name in problems if any(key[0] == name for key in table)]
    methods = [method for method in methods if any(key[1] == method for key in table)]
    units = {name: _unit(table, name) for name in problems}
    rows = [
        row
        for name in problems
        for method in methods
        if method != PEER and (row := _beside_peer(table, units, name, method)) is not None
    ]
    ranks, num_ranked = mean_ranks(table, problems, methods)
    notes = {
        "normalised_regret": {name: _column(table, units, name, methods) for name in problems},
        "mean_ranks": {"over": num_ranked, **ranks},
        "beside_botorch": {method: _verdict(rows, method) for method in methods if method != PEER},
        "curves": {name: _curves(table, units, name, methods) for name in problems},
    }
    return rows, notes


def _seeds(table: Cells, name: str, *methods: str) -> list[int]:
    """Those that all the methods have."""
    found = {seed for problem, _, seed in table if problem == name}
    return sorted(seed for seed in found if all((name, method, seed) in table for method in methods))


def _unit(table: Cells, name: str) -> float:
    """A problem's regret after the first design, by its mean over seeds; the design is the same for all methods."""
    first = {seed: cell["regrets"][0] for (problem, _, seed), cell in table.items() if problem == name}
    return statistics.fmean(first.values()) or 1.0


def _final(table: Cells, units: dict[str, float], name: str, method: str, seeds: Sequence[int]) -> list[float]:
    return [table[name, method, seed]["regrets"][-1] / units[name] for seed in seeds]


def _column(table: Cells, units: dict[str, float], name: str, methods: Sequence[str]) -> dict[str, Any]:
    """For each method the mean, its standard error, how many seeds, and what a suggestion costs."""
    found: dict[str, Any] = {}
    for method in methods:
        seeds = _seeds(table, name, method)
        if seeds:
            mean, error = mean_and_stderr(_final(table, units, name, method, seeds))
            own = [table[name, method, seed] for seed in seeds]
            found[method] = {
                "mean": round(mean, 4),
                "stderr": None if error is None else round(error, 4),
                "seeds": len(seeds),
                "cpu_seconds_per_suggestion": round(
                    statistics.fmean(cell["cpu_seconds"] / (len(cell["regrets"]) - 1) for cell in own), 2
                ),
                "fallbacks": sum(cell["fallbacks"] for cell in own),
            }
    return found


def _curves(table: Cells, units: dict[str, float], name: str, methods: Sequence[str]) -> dict[str, str]:
    """Mean normalised regret after each suggestion; as text, so that a curve is one line of the file."""
    found = {}
    for method in methods:
        curves = [table[name, method, seed]["regrets"] for seed in _seeds(table, name, method)]
        if curves:
            means = [statistics.fmean(values) / units[name] for values in zip(*curves, strict=True)]
            found[method] = " ".join(f"{mean:.3g}" for mean in means)
    return found


def _beside_peer(table: Cells, units: dict[str, float], name: str, method: str) -> dict[str, Any] | None:
    seeds = _seeds(table, name, method, PEER)
    if not seeds:
        return None
    own, peer = (_final(table, units, name, each, seeds) for each in (method, PEER))
    difference, stderr = mean_and_stderr([a - b for a, b in zip(own, peer, strict=True)])
    means = [statistics.fmean(values) for values in (own, peer)]
    return {
        "case": f"{name}, {method}",
        "problem": name,
        "method": method,
        "metric": "normalised regret",
        "unit": "first design's",
        "ours": means[0],
        "peer": means[1],
        "peer_name": PEER,
        "ratio": means[1] / means[0] if means[0] > 0 else None,
        "better": "lower",
        "difference": difference,
        "stderr": stderr,
        "seeds": len(seeds),
    }


def mean_ranks(table: Cells, problems: Sequence[str], methods: Sequence[str]) -> tuple[dict[str, float], int]:
    """Each method's mean rank by final regret (1 is best, ties share theirs), over the searches that all methods have."""
    keys = [(name, seed) for name in problems for seed in _seeds(table, name, *methods)]
    ranks: dict[str, list[float]] = {method: [] for method in methods}
    for name, seed in keys:
        final = {method: table[name, method, seed]["regrets"][-1] for method in methods}
        for method, value in final.items():
            better = sum(other < value for other in final.values())
            equal = sum(other == value for other in final.values())
            ranks[method].append(better + (equal + 1) / 2)
    return {method: round(statistics.fmean(values), 2) for method, values in ranks.items() if values}, len(keys)


def _verdict(rows: Sequence[dict[str, Any]], method: str) -> dict[str, Any]:
    """On how many of the hard problems a method is better than BoTorch's, and where it is worse by over one standard error."""
    own = [row for row in rows if row["method"] == method]
    hard = [row for row in own if row["problem"] in HARD]
    worse = [row for row in own if row["stderr"] is not None and row["difference"] > row["stderr"]]
    return {
        "mean_normalised_regret": round(statistics.fmean(row["ours"] for row in own), 4) if own else None,
        "that_of_botorch": round(statistics.fmean(row["peer"] for row in own), 4) if own else None,
        "problems": len(own),
        "hard_problems": len(hard),
        "hard_problems_won": sum(row["difference"] < 0 for row in hard),
        "worse_by_a_standard_error_on": [row["problem"] for row in worse],
    }


def print_table(notes: dict[str, Any]) -> None:
    """Mean normalised regrets (standard error; seeds), a column for each method, and what follows from them."""
    regrets = notes["normalised_regret"]
    methods = list(dict.fromkeys(method for column in regrets.values() for method in column))
    print("\nnormalised regret ± standard error (seeds)")
    print(" " * 20 + "".join(f"{method:>17}" for method in methods))
    for name, column in regrets.items():
        print(f"{name:20}" + "".join(f"{_entry(column.get(method)):>17}" for method in methods))
    ranks = dict(notes["mean_ranks"])
    print(f"\nmean ranks over {ranks.pop('over')} searches that all have")
    for method, rank in sorted(ranks.items(), key=lambda pair: pair[1]):
        print(f"  {method:16} {rank:5.2f}")
    print(f"\nbeside {PEER}, over the seeds that both have")
    for method, found in notes["beside_botorch"].items():
        worse = ", ".join(found["worse_by_a_standard_error_on"]) or "none"
        print(
            f"  {method:16} better on {found['hard_problems_won']} of {found['hard_problems']} hard problems; worse by over "
            f"a standard error: {worse}"
        )


def _entry(found: dict[str, Any] | None) -> str:
    if found is None:
        return "–"
    error = "" if found["stderr"] is None else f"±{found['stderr']:.2g}"
    return f"{found['mean']:.3g}{error} ({found['seeds']})"
