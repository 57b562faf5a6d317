r"""A prior-data fitted network as the surrogate of Bayesian optimisation: regret curves beside a Gaussian process and chance.

    python benchmarks/pfn_bo.py --data DIR [--seeds 10] [--problems branin …] [--methods pfn …] [--jobs 1]

Every run is 10 points and 40 suggestions, without noise: ``pfn`` is the shipped "bo" with the closed-form log expected
improvement of its histogram, ``gp`` BoTorch's ``SingleTaskGP`` with the analytic one, ``sobol`` no surrogate (of a table, rows
in random order). First points, optimiser and seeds are the same. Problems: Branin, Hartmann-6, and LCBench's measured
validation errors of 2,000 networks (7 hyperparameters) on two data sets, whose rows alone can be tried.

Every run is a line of ``benchmarks/results/pfn_bo_cells.jsonl`` when it is finished: run again, the benchmark goes on where it
stopped. Nothing of the network was chosen on these problems.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from botorch.acquisition import AcquisitionFunction
from botorch.acquisition.analytic import LogExpectedImprovement
from botorch.test_functions import Branin, Hartmann
from harness import append_cell, mean_and_stderr, read_cells, write
from joblib import Parallel, delayed
from searches import Acquire, Problem, fitted_gp, lcbench, of_botorch, search
from torch import Tensor

import bayesnn
from bayesnn.bo import ClosedForm, log_expected_improvement

NAME = "pfn_bo"
NUM_INITIAL, NUM_STEPS = 10, 40

PROBLEMS: dict[str, Callable[[Path], Problem]] = {
    "branin": lambda folder: of_botorch(Branin()),
    "hartmann-6": lambda folder: of_botorch(Hartmann(6)),
    "lcbench adult": lambda folder: lcbench(folder, "adult"),
    "lcbench vehicle": lambda folder: lcbench(folder, "vehicle"),
}


def pfn(X: Tensor, Y: Tensor) -> AcquisitionFunction:
    """Ours."""
    return ClosedForm(bayesnn.surrogate("pfn").fit(X, Y), log_expected_improvement(float(Y.max())))


def gp(X: Tensor, Y: Tensor) -> AcquisitionFunction:
    """BoTorch's default."""
    return LogExpectedImprovement(fitted_gp(X, Y), best_f=Y.max())


METHODS: dict[str, Acquire | None] = {"pfn": pfn, "gp": gp, "sobol": None}


def run_and_keep(folder: Path, name: str, method: str, seed: int) -> None:
    """One optimisation, on file."""
    found = search(PROBLEMS[name](folder), METHODS[method], seed, NUM_INITIAL, NUM_STEPS)
    append_cell(NAME, {"problem": name, "method": method, "seed": seed} | found)
    print(f"{name:16} {method:6} {seed} {found['regrets'][-1]:9.4f} {found['cpu_seconds']:7.1f} s", flush=True)


def rows() -> list[dict[str, Any]]:
    """Ours beside each other method, over the seeds that both have."""
    table = {(cell["problem"], cell["method"], cell["seed"]): cell for cell in read_cells(NAME)}
    result = []
    for name, peer in itertools.product(PROBLEMS, ("gp", "sobol")):
        seeds = [seed for key, other, seed in table if (key, other) == (name, "pfn") and (name, peer, seed) in table]
        if not seeds:
            continue
        own, others = ([table[name, method, seed] for seed in seeds] for method in ("pfn", peer))
        final = [[cell["regrets"][-1] for cell in cells] for cells in (own, others)]
        difference, stderr = mean_and_stderr([b - a for a, b in zip(*final, strict=True)])
        means = [statistics.fmean(values) for values in final]
        result.append(
            {
                "case": name,
                "metric": "regret",
                "unit": "units of y",
                "ours": means[0],
                "peer": means[1],
                "peer_name": peer,
                "ratio": means[1] / means[0] if means[0] > 0 else None,
                "better": "lower",
                "difference": difference,
                "stderr": stderr,
                "seeds": seeds,
                "all_ours": final[0],
                "all_peer": final[1],
                "curve": [statistics.fmean(values) for values in zip(*(cell["regrets"] for cell in own), strict=True)],
                "curve_of_peer": [
                    statistics.fmean(values) for values in zip(*(cell["regrets"] for cell in others), strict=True)
                ],
                "fits_that_failed": [sum(cell["fits_that_failed"] for cell in cells) for cells in (own, others)],
                "cpu_seconds": [statistics.fmean(cell["cpu_seconds"] for cell in cells) for cells in (own, others)],
            }
        )
    return result


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description="A prior-data fitted network as a surrogate.")
    parser.add_argument("--data", type=Path, required=True, help="folder with hpo/")
    parser.add_argument("--seeds", type=int, default=10, help="how many; 0 only reports the runs on file")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each with one thread")
    options = parser.parse_args()
    done = {(cell["problem"], cell["method"], cell["seed"]) for cell in read_cells(NAME)}
    keys = itertools.product(range(options.seeds), options.problems, options.methods)
    wanted = [(name, method, seed) for seed, name, method in keys if (name, method, seed) not in done]
    Parallel(n_jobs=options.jobs)(delayed(run_and_keep)(options.data, *key) for key in wanted)
    write(NAME, rows(), {})


if __name__ == "__main__":
    main()
