r"""What a suggestion costs: every surrogate's fit and search beside BoTorch's SingleTaskGP with qLogNEI, in CPU seconds.

    python benchmarks/bo_speed.py [--surrogates gp nngp …] [--rows 50 200 500] [--features 6 20] [--batch 1] [--repeats 1]

The data are the first points of a scrambled Sobol sequence and Hartmann's function (6 inputs) or Levy's (20). Ours is
``bayesnn.surrogate(name).fit`` and ``suggest``, at their defaults; the peer is the same by BoTorch alone
(``bo_methods.botorch_acquisition``), with as many starting points and draws. All of a round run one after the other in one
process with one thread, and only ratios within rounds are compared, so that a busy machine disturbs little. Bayesian neural
networks are also asked as a search asks them between two fits from scratch ("going on": from a fit to the first 33 of 50
rows, 170 of 200, 384 of 500). ("auto" isn't here: it costs what the surrogate that it chose costs, and at 10, 15, 22, 33, …
rows five fits of each candidate.)

Every round is a line of ``benchmarks/results/bo_speed_cells.jsonl``; ``--repeats 0`` makes the table of those on file.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
import warnings
from typing import Any

import torch
from bo_methods import botorch_acquisition
from botorch.optim import optimize_acqf
from botorch.test_functions import Hartmann, Levy
from botorch.utils.sampling import manual_seed
from harness import append_cell, read_cells, write
from searches import of_botorch
from torch import Tensor

import bayesnn
from bayesnn import BNN
from bayesnn.bo import Space, suggest
from bayesnn.bo.auto import num_scored

NAME = "bo_speed"
PEER = "botorch"
FUNCTIONS = {6: Hartmann(6), 20: Levy(20)}


def by_botorch(X: Tensor, Y: Tensor, q: int, seed: int) -> tuple[float, float]:
    """Seconds of the fit and of the search, Y being minimised."""
    with manual_seed(seed):
        start = time.process_time()
        acquisition = botorch_acquisition(None, X, -Y, 1, seed)
        fitted = time.process_time()
        bounds = torch.stack([torch.zeros_like(X[0]), torch.ones_like(X[0])])
        optimize_acqf(acquisition, bounds, q=q, num_restarts=8, raw_samples=256, sequential=True)
        return fitted - start, time.process_time() - fitted


def by_ours(name: str, X: Tensor, Y: Tensor, q: int, seed: int) -> tuple[float, float]:
    """Likewise; "name, going on": from the last fit from scratch, which isn't counted."""
    space = Space({f"x{index}": (0.0, 1.0) for index in range(X.shape[1])})
    name, _, going_on = name.partition(", ")
    num_before = num_scored(len(X) - 1)
    earlier = bayesnn.surrogate(name).fit(X[:num_before], Y[:num_before], seed=seed) if going_on else None
    start = time.process_time()
    model = bayesnn.surrogate(name).fit(X, Y, seed=seed) if earlier is None else earlier.refit(X, Y)
    fitted = time.process_time()
    suggest(model, space, q, seed=seed)
    return fitted - start, time.process_time() - fitted


def round_of(surrogates: list[str], num_rows: int, num_features: int, q: int, seed: int) -> dict[str, Any]:
    """Each method once; one that can't answer has a reason in place of seconds."""
    space = Space({f"x{index}": (0.0, 1.0) for index in range(num_features)})
    X = space.sobol(num_rows, seed)
    Y = of_botorch(FUNCTIONS[num_features]).function(X)
    found: dict[str, Any] = {}
    going_on = [f"{name}, going on" for name in surrogates if isinstance(bayesnn.surrogate(name), BNN)]
    for name in (PEER, *surrogates, *going_on):
        try:
            seconds = by_botorch(X, Y, q, seed) if name == PEER else by_ours(name, X, Y, q, seed)
        except (ValueError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
        else:
            found[name] = [round(each, 3) for each in seconds]
        print(f"n = {num_rows}, d = {num_features}, q = {q}: {name:20} {found[name]}", flush=True)
    return {"n": num_rows, "d": num_features, "q": q, "seed": seed, "seconds": found}


def rows(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each case and surrogate the medians over the rounds in which it ran, and the median ratio."""
    result = []
    for n, d, q in sorted({(cell["n"], cell["d"], cell["q"]) for cell in cells}):
        rounds = [cell["seconds"] for cell in cells if (cell["n"], cell["d"], cell["q"]) == (n, d, q)]
        for name in sorted({name for each in rounds for name in each} - {PEER}):
            pairs = [(each[name], each[PEER]) for each in rounds if isinstance(each.get(name), list)]
            if not pairs:
                continue
            totals = [[sum(seconds) for seconds in column] for column in zip(*pairs, strict=True)]
            result.append(
                {
                    "case": f"{name}, n = {n}, d = {d}, q = {q}",
                    "metric": "suggestion",
                    "unit": "CPU s",
                    "ours": statistics.median(totals[0]),
                    "peer": statistics.median(totals[1]),
                    "peer_name": "SingleTaskGP, qLogNEI",
                    "ratio": statistics.median(peer / own for own, peer in zip(*totals, strict=True)),
                    "better": "lower",
                    "fit": statistics.median(own[0] for own, _ in pairs),
                    "fit_of_peer": statistics.median(peer[0] for _, peer in pairs),
                    "repeats": len(pairs),
                }
            )
    return result


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description="What a suggestion costs.")
    parser.add_argument("--surrogates", nargs="+", choices=bayesnn.surrogates(), default=bayesnn.surrogates())
    parser.add_argument("--rows", nargs="+", type=int, default=[50, 200, 500])
    parser.add_argument("--features", nargs="+", type=int, choices=FUNCTIONS, default=list(FUNCTIONS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1], help="suggestions at once, q")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    cases = itertools.product(range(options.repeats), options.rows, options.features, options.batch)
    if options.repeats:  # whoever comes first would pay for what is done once in a process
        round_of(options.surrogates, 10, 6, 1, seed=0)
    for seed, num_rows, num_features, q in cases:
        append_cell(NAME, round_of(options.surrogates, num_rows, num_features, q, seed))
    write(NAME, rows(read_cells(NAME)), {})


if __name__ == "__main__":
    main()
