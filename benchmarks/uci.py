r"""Quality on real data: test log-likelihood and RMSE over the standard UCI splits, beside the published rows.

    python benchmarks/uci.py --data DIR [--quick] [--sets boston energy …] [--methods HMC …] [--splits N]

Every cell (set, split, method) is one fit to a split's training rows, seeded with the split's number, and written as a line
of ``benchmarks/results/uci_cells.jsonl`` when it is finished: run again, the benchmark goes on where it stopped. Cells whose
settings have changed since are run again. The tables and the JSON are of all finished cells.

The test log-likelihood of a row is that of the mixture over all draws, :math:`\log \frac1S \sum_s \mathcal N(y; f_s(x),
\sigma_s^2)`, in the units of y. Where the protocol differs from the published rows': the noise is sampled (or learned)
together with the weights instead of tuned on a grid, there is no tuning for each set, and inputs and outcomes are
standardised by the training rows. The splits and the network (one hidden layer of 50 units) are theirs.

A row's ``ratio`` above 1 means that we are ahead: of log-likelihoods, the exponential of the difference (by how much denser
an observation is under our prediction, in the geometric mean); of RMSE the quotient.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness import append_cell, mean_and_stderr, read_cells, write
from uci_data import NUM_SPLITS, SAME, SETS, SIMILAR, TUNED_DROPOUT, Published, load, published
from uci_methods import METHODS, RECOMMENDED

NAME = "uci"
QUICK_SPLITS = 3
METRICS = {"test_ll": "higher", "rmse": "lower"}
CHOSEN_ON = range(4)
"""The splits that settings were chosen on."""


def run_cell(folder: Path, name: str, index: int, method: str) -> dict[str, Any]:
    """Fit one method to one split's training rows, and score it on the test rows, in the units of y."""
    split = load(folder, name, index)
    model = METHODS[method](len(split.X))
    start = time.process_time()
    model.fit(split.X, split.y, seed=index)
    seconds = time.process_time() - start
    with torch.no_grad():
        prediction = model.predict(split.X_test)
        test_ll = prediction.log_prob(split.y_test).double().mean() - math.log(split.scale)
        rmse = (prediction.mean - split.y_test).double().square().mean().sqrt() * split.scale
    cell = {"set": name, "split": index, "method": method, "settings": settings(method, len(split.X))}
    return cell | {"test_ll": float(test_ll), "rmse": float(rmse), "cpu_seconds": round(seconds, 2)}


def settings(method: str, num_rows: int) -> str:
    """All that a method's fit depends on, defaults included."""
    model = METHODS[method](num_rows)
    return f"{model.method!r}, {model.likelihood!r}, {model.prior!r}"


def finished(folder: Path) -> list[dict[str, Any]]:
    """The cells on file whose settings are the present ones, in the order of sets, methods and splits."""
    cells = read_cells(NAME)
    num_rows = {name: len(load(folder, name, 0).X) for name in {cell["set"] for cell in cells}}
    present = [
        cell
        for cell in cells
        if cell["method"] in METHODS and cell["settings"] == settings(cell["method"], num_rows[cell["set"]])
    ]
    methods = list(METHODS)
    return sorted(present, key=lambda cell: (SETS.index(cell["set"]), methods.index(cell["method"]), cell["split"]))


def run_cells(folder: Path, sets: Sequence[str], methods: Sequence[str], num_splits: int) -> None:
    """Run what isn't finished, split by split, so that all sets have equally many at any time."""
    done = {(cell["set"], cell["split"], cell["method"]) for cell in finished(folder)}
    wanted = [(name, index, method) for index in range(num_splits) for name in sets for method in methods]
    for key in wanted:
        if key in done:
            continue
        cell = run_cell(folder, *key)
        append_cell(NAME, cell)
        where = f"{cell['set']:9} {cell['split']:2} {cell['method']:14}"
        print(f"{where} {cell['test_ll']:8.3f} {cell['rmse']:9.5f} {cell['cpu_seconds']:7.1f} s", flush=True)


def compare(name: str, method: str, metric: str, cells: Sequence[dict[str, Any]], peer: Published) -> dict[str, Any]:
    """One row of the result: a method of ours beside a published figure."""
    ours, stderr = mean_and_stderr([cell[metric] for cell in cells])
    unseen = [cell[metric] for cell in cells if cell["split"] not in CHOSEN_ON]
    return {
        "case": f"{name}, {method}",
        "metric": metric,
        "unit": "nats" if metric == "test_ll" else "units of y",
        "ours": ours,
        "stderr": stderr,
        "ours_unseen_splits": statistics.fmean(unseen) if unseen else None,
        "seeds": [cell["split"] for cell in cells],
        "peer": peer.mean,
        "peer_stderr": None if math.isnan(peer.stderr) else peer.stderr,
        "peer_name": peer.method,
        "peer_protocol": f"{peer.comparable}: {peer.protocol}",
        "ratio": math.exp(ours - peer.mean) if metric == "test_ll" else peer.mean / ours,
        "better": METRICS[metric],
        "cpu_seconds": statistics.fmean(cell["cpu_seconds"] for cell in cells),
    }


def rows(folder: Path, cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each method of ours beside the best published rows: of the same protocol, of splits of their own, of MC dropout."""
    result = []
    for name in dict.fromkeys(cell["set"] for cell in cells):
        for metric in METRICS:
            peers = published(folder, name, metric)
            groups = [[peer for peer in peers if peer.comparable == kind] for kind in (SAME, SIMILAR)]
            groups.append([peer for peer in peers if peer.method in TUNED_DROPOUT])
            beside = list(dict.fromkeys(group[0] for group in groups if group))
            for method in dict.fromkeys(cell["method"] for cell in cells if cell["set"] == name):
                own = [cell for cell in cells if (cell["set"], cell["method"]) == (name, method)]
                result += [compare(name, method, metric, own, peer) for peer in beside]
    return result


def print_table(folder: Path, cells: Sequence[dict[str, Any]]) -> None:
    """Means and standard errors of ours and of the published rows, set by set, and what beats what."""
    for name in dict.fromkeys(cell["set"] for cell in cells):
        own = [cell for cell in cells if cell["set"] == name]
        lines = []
        for method in dict.fromkeys(cell["method"] for cell in own):
            mine = [cell for cell in own if cell["method"] == method]
            found = [mean_and_stderr([cell[metric] for cell in mine]) for metric in METRICS]
            scores = [(mean, math.nan if error is None else error) for mean, error in found]
            cost = f"{statistics.fmean(cell['cpu_seconds'] for cell in mine):.1f} s of CPU each"
            lines.append((scores[0], scores[1], f"** {method} (ours, {len(mine)} splits)", cost))
        errors = {peer.method: (peer.mean, peer.stderr) for peer in published(folder, name, "rmse")}
        for peer in published(folder, name, "test_ll"):
            rmse = errors.get(peer.method, (math.nan, math.nan))
            lines.append(((peer.mean, peer.stderr), rmse, peer.method, peer.comparable))
        print(f"\n{name}: test log-likelihood, RMSE")
        for ll, rmse, method, kind in sorted(lines, reverse=True):
            print(f"{ll[0]:9.3f} ± {ll[1]:5.3f} {rmse[0]:9.4f} ± {rmse[1]:6.4f}  {method:52} {kind}")


def print_verdicts(folder: Path, cells: Sequence[dict[str, Any]]) -> None:
    """On how many sets our best method, and the recommended one, are ahead in test log-likelihood."""
    sets = list(dict.fromkeys(cell["set"] for cell in cells))
    means: dict[str, dict[str, float]] = {}
    for name in sets:
        methods = dict.fromkeys(cell["method"] for cell in cells if cell["set"] == name)
        means[name] = {
            method: statistics.fmean(
                cell["test_ll"] for cell in cells if (cell["set"], cell["method"]) == (name, method)
            )
            for method in methods
        }
    peers = {name: published(folder, name, "test_ll") for name in sets}

    def ahead(scores: dict[str, float], kinds: Sequence[str], only: Sequence[str] = ()) -> str:
        won = [
            name
            for name, score in scores.items()
            if all(
                score > peer.mean
                for peer in peers[name]
                if peer.comparable in kinds and (not only or peer.method in only)
            )
        ]
        return f"{len(won)} of {len(scores)} sets ({', '.join(won)})"

    best = {name: max(scores.values()) for name, scores in means.items()}
    print(f"\nbest of ours above every published row of the same protocol: {ahead(best, [SAME])}")
    print(f"… and above those on random splits of their own:              {ahead(best, [SAME, SIMILAR])}")
    recommended = {name: scores[RECOMMENDED] for name, scores in means.items() if RECOMMENDED in scores}
    print(f"{RECOMMENDED} above every published row of the same protocol: {ahead(recommended, [SAME])}")
    print(f"{RECOMMENDED} above tuned MC dropout: {ahead(recommended, [SAME], TUNED_DROPOUT)}")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description="Test log-likelihood and RMSE over the standard UCI splits.")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with uci_regression/ and published_results.csv"
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SPLITS} splits instead of {NUM_SPLITS}")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--splits", type=int, help="how many of the splits; 0 only reports the cells on file")
    options = parser.parse_args()
    default = QUICK_SPLITS if options.quick else NUM_SPLITS
    num_splits = default if options.splits is None else options.splits
    run_cells(options.data, options.sets, options.methods, num_splits)
    cells = finished(options.data)
    print_table(options.data, cells)
    print_verdicts(options.data, cells)
    named = {method: {rows: settings(method, rows) for rows in (500, 10_000)} for method in METHODS}
    write(NAME, rows(options.data, cells), {}, settings=named, recommended=RECOMMENDED, chosen_on=list(CHOSEN_ON))


if __name__ == "__main__":
    main()
