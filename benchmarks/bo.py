r"""The front end beside BoTorch, Optuna's samplers and Sobol: functions, designs and tables, every surrogate, paired seeds.

    python benchmarks/bo.py [--data DIR] [--seeds 10] [--problems branin …] [--surrogates gp auto …] [--peers botorch …]
                            [--acquisitions auto …] [--quick]

A search is 10 configurations of a scrambled Sobol sequence, the same for all methods of one seed, and 30 suggestions, one at
a time. Surrogates are asked by ``SurrogateSampler`` at its defaults, with the acquisition functions named ("auto" is each
surrogate's own). ``botorch`` is SingleTaskGP with qLogNEI (qLogNEHVI) by BoTorch itself, ``tpe`` and ``gpsampler`` are
Optuna's samplers, ``sobol`` goes on with the sequence. Problems are described in ``bo_problems.py``.

Regret is the best value so far above the problem's least one; of several objectives the share of the hypervolume that isn't
reached; under constraints only configurations that keep them all count. Normalised regret is in units of the first design's,
by its mean over a problem's seeds: 1 is what 10 points of Sobol's sequence give, 0 is the optimum.

Every search is a line of ``benchmarks/results/bo_cells.jsonl`` when it is finished, with its regret curve: run again, the
benchmark goes on where it stopped. ``--seeds 0`` runs nothing, and makes the table of what is on file. ``DIR`` has
``hpo/*.npz``; by default it is the environment's BAYESNN_DATA, and without one tables are left out.
"""

from __future__ import annotations

import argparse
import itertools
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bo_methods import PEERS, SURROGATES, search
from bo_problems import FUNCTIONS, NAMES, task
from bo_table import print_table, summary
from harness import append_cell, read_cells, write

from bayesnn.bo.acquisition import NAMES as ACQUISITIONS

NAME = "bo"
NUM_INITIAL, NUM_STEPS = 10, 30


def methods(surrogates: list[str], acquisitions: list[str], peers: list[str]) -> list[str]:
    """Names of columns: a surrogate's own acquisition function isn't spelled out."""
    own = [
        surrogate if acquisition == "auto" else f"{surrogate} {acquisition}"
        for surrogate, acquisition in itertools.product(surrogates, acquisitions)
    ]
    return [*own, *peers]


def run(name: str, method: str, seed: int, folder: Path | None, num_steps: int) -> dict[str, Any]:
    """One cell."""
    cell = {"problem": name, "method": method, "seed": seed}
    found = search(task(name, folder), method, seed, NUM_INITIAL, num_steps)
    print(f"{name:20} {method:12} {seed} {found['regrets'][-1]:10.4g} {found['cpu_seconds']:7.1f} s", flush=True)
    return cell | found


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description="The front end beside BoTorch, Optuna's samplers and Sobol.")
    parser.add_argument("--data", type=Path, default=os.environ.get("BAYESNN_DATA"), help="folder with hpo/*.npz")
    parser.add_argument("--quick", action="store_true", help="one seed of 3 suggestions for Branin; nothing is kept")
    parser.add_argument("--seeds", type=int, default=10, help="how many; 0 only reports the searches on file")
    parser.add_argument("--problems", nargs="+", choices=NAMES)
    parser.add_argument("--surrogates", nargs="*", choices=SURROGATES, default=["gp", "nngp", "pfn", "dkl", "auto"])
    parser.add_argument("--acquisitions", nargs="+", choices=ACQUISITIONS, default=["auto"])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    options = parser.parse_args()
    folder = None if options.data is None else Path(options.data)
    problems = options.problems or list(NAMES if folder is not None or not options.seeds else FUNCTIONS)
    columns, num_steps = methods(options.surrogates, options.acquisitions, options.peers), NUM_STEPS
    if options.quick:
        options.seeds, problems, num_steps = 1, ["branin"], 3
    cells = [] if options.quick else [cell for cell in read_cells(NAME) if len(cell["regrets"]) == NUM_STEPS + 1]
    done = {(cell["problem"], cell["method"], cell["seed"]) for cell in cells}
    for seed, name, method in itertools.product(range(options.seeds), problems, columns):
        if (name, method, seed) not in done:
            cells.append(run(name, method, seed, folder, num_steps))
            if not options.quick:
                append_cell(NAME, cells[-1])
    rows, notes = summary(cells, problems, columns)
    write(NAME, rows, {"optuna": version("optuna")}, quick=options.quick, **notes)
    print_table(notes)


if __name__ == "__main__":
    main()
