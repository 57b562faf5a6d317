"""Asynchronous multi-fidelity search on measured learning curves, against searches that train every network to the end.

TaskSet's text classifiers: 1,000 settings of Adam (8 numbers) for each of 12 tasks, each trained for 50 epochs' worth of steps
(TaskSet's unit is 200 of them); validation losses that are infinite, or above the one before training, count as the latter.
Four workers train side by side; a clock of epochs says who is done next, and whoever is begins another trial.

* random: settings in random order, all trained to the end (exactly: the mean over all orders);
* bo: our sampler, all trained to the end;
* asha: random settings, ended early by asynchronous successive halving;
* joint gp, joint nngp: our sampler with the fidelity, MOBSTER's scheme.

What is counted is the best loss of networks trained to the end, against the epochs that all workers together have spent.
Every run is a line of ``benchmarks/results/fidelity_cells.jsonl`` when it is finished: run again, the benchmark goes on where
it stopped. The sum in ``LearningCurveProcess``'s kernel was compared with a product on tasks 0, 4 and 6; nothing else of the
sampler was chosen on these tasks.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import os
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from harness import append_cell, mean_and_stderr, read_cells, write
from optuna.trial import TrialState
from torch import Tensor

from bayesnn.bo import Fidelity, Space, SurrogateSampler

NAME = "fidelity"
EPOCHS, NUM_WORKERS, NUM_STARTUP = 50, 4, 10
FULL_TRIALS = 40  # of random search: its quality after these is what the others are to reach
WHOLE = FULL_TRIALS * EPOCHS
QUARTER = WHOLE // 4
FIDELITY = Fidelity(EPOCHS)
METHODS = {"asha": QUARTER, "bo": WHOLE, "joint nngp": QUARTER, "joint gp": QUARTER}
"""How many epochs each is given."""


class Table(Space):
    """A space of which only the rows of a table (N, d) in the unit cube can be tried."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__({f"x{column}": (0.0, 1.0) for column in range(rows.shape[1])})
        self.rows = rows

    @property
    def size(self) -> float:
        """How many rows there are."""
        return len(self.rows)

    def grid(self) -> Tensor:
        """All rows."""
        return self.rows

    def sobol(self, num_points: int, seed: int, skip: int = 0) -> Tensor:
        """Rows in random order, for a start and for places at which a maximum is looked for."""
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(seed))
        return self.rows[order.roll(-skip)[:num_points]]


class Task:
    """One of TaskSet's: settings in the unit cube (1000, 8) and losses (1000, 51), the first before training."""

    def __init__(self, folder: Path, index: int) -> None:
        with np.load(folder / "hpo" / "taskset_rnn_text_12tasks.npz", allow_pickle=False) as file:
            config, losses = file["config"].copy(), file["valid_loss"][index].astype(float)
            self.name = str(file["tasks"][index])
        config[:, 1:3] = 1 - config[:, 1:3]  # Adam's averages, by how much they forget
        numbers = np.log(np.maximum(config, 1e-12))
        self.settings = torch.tensor((numbers - numbers.min(0)) / np.ptp(numbers, axis=0))
        untrained = np.nanmedian(losses[:, 0])
        self.losses = np.fmin(np.where(np.isfinite(losses), losses, untrained), untrained)

    def of_random_search(self, num_trials: int) -> float:
        """The mean best final loss of so many settings in random order: each as often as it is the best of those tried."""
        missed = np.array([self.all_missed(best, num_trials) for best in range(len(self.losses) + 1)])
        return float((np.sort(self.losses[:, -1]) * (missed[:-1] - missed[1:])).sum())

    def all_missed(self, num_best: int, num_trials: int) -> float:
        """The probability that none of so many best settings is among so many in random order."""
        total, tried = len(self.losses), np.arange(num_trials)
        return float(np.prod(np.maximum(total - num_best - tried, 0) / (total - tried)))


def sampler_of(method: str, space: Space, seed: int) -> SurrogateSampler:
    """What a method chooses settings by."""
    options: dict[str, Any] = {"space": space, "seed": seed, "num_startup": NUM_STARTUP, "num_samples": 128}
    if method == "asha":
        return SurrogateSampler("gp", **options | {"num_startup": 10**9})
    if method == "bo":
        return SurrogateSampler("gp", **options)
    return SurrogateSampler(method.removeprefix("joint "), fidelity=FIDELITY, **options)


def search(task: Task, method: str, seed: int, budget: int) -> dict[str, Any]:
    """One search of so many epochs: for each network trained to the end, the epochs spent until then and its loss."""
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    start, space = time.process_time(), Table(task.settings)
    pruner = optuna.pruners.NopPruner() if method == "bo" else FIDELITY.pruner()
    study = optuna.create_study(study_name="s", sampler=sampler_of(method, space, seed), pruner=pruner)
    rungs = (EPOCHS,) if method == "bo" else FIDELITY.rungs
    spent, finished, fallbacks = 0, list[tuple[int, float]](), 0
    # (when, worker, its trial, the setting's row, the epochs it will have had by then)
    clock: list[tuple[int, int, Any, int, int]] = []

    def begin(now: int, worker: int) -> None:
        nonlocal fallbacks
        trial = study.ask(space.distributions())
        fallbacks += "fallback" in study.trials[trial.number].user_attrs
        setting = torch.tensor([trial.params[name] for name in space.names])
        row = int((task.settings - setting).abs().amax(-1).argmin())
        heapq.heappush(clock, (now + rungs[0], worker, trial, row, rungs[0]))

    for worker in range(NUM_WORKERS):
        begin(0, worker)
    had = dict.fromkeys(range(NUM_WORKERS), 0)
    while True:
        now, worker, trial, row, epochs = heapq.heappop(clock)
        spent += epochs - had[worker]
        had[worker] = epochs
        if spent > budget:
            break
        loss = float(task.losses[row, epochs])
        trial.report(loss, epochs)
        if epochs < EPOCHS and not trial.should_prune():
            following = next(rung for rung in rungs if rung > epochs)
            heapq.heappush(clock, (now + following - epochs, worker, trial, row, following))
            continue
        if epochs == EPOCHS:
            finished.append((spent, loss))
            study.tell(trial, loss)
        else:
            study.tell(trial, state=TrialState.PRUNED)
        had[worker] = 0
        begin(now, worker)
    num_trials = len(study.trials)
    return {
        "finished": finished,
        "num_trials": num_trials,
        "fallbacks": fallbacks,
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def run_and_keep(folder: Path, index: int, method: str, seed: int, budget: int) -> None:
    """One search, on file."""
    task = Task(folder, index)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = search(task, method, seed, budget)
    append_cell(NAME, {"task": index, "method": method, "seed": seed, "budget": budget} | found)
    best = min((loss for _, loss in found["finished"]), default=float("nan"))
    print(f"{task.name:38} {method:10} {seed} {best:8.4f} {found['cpu_seconds']:7.1f} s", flush=True)


def epochs_to(cell: dict[str, Any], target: float) -> int | None:
    """The epochs that a search spent until it had a network with at most this loss; None: it never had."""
    return next((spent for spent, loss in cell["finished"] if loss <= target), None)


def best_after(cell: dict[str, Any], epochs: int) -> float | None:
    """The least loss that a search had after so many epochs; None: no network was trained to the end by then."""
    return min((loss for spent, loss in cell["finished"] if spent <= epochs), default=None)


def rows(folder: Path) -> list[dict[str, Any]]:
    """For each method, over its tasks and seeds: how far it is from the best setting, and how often it has what random search
    has after all its epochs."""
    cells, result = read_cells(NAME), []
    tasks = {index: Task(folder, index) for index in sorted({cell["task"] for cell in cells})}
    for method, epochs in itertools.product(METHODS, (QUARTER, WHOLE)):
        own = [cell for cell in cells if cell["method"] == method and cell["budget"] >= epochs]
        if not own:
            continue
        common = {
            "peer_name": "random",
            "tasks": [cell["task"] for cell in own],
            "seeds": [cell["seed"] for cell in own],
            "cpu_seconds": statistics.fmean(cell["cpu_seconds"] for cell in own),
            "num_trials": statistics.fmean(cell["num_trials"] for cell in own),
            "fallbacks": sum(cell["fallbacks"] for cell in own),
        }
        found = [_compared(cell, tasks[cell["task"]], epochs) for cell in own]
        regrets, at_random, reached, by_chance = ([each[key] for each in found] for key in range(4))
        mean, stderr = mean_and_stderr(regrets)
        result.append(
            {
                "case": f"{method}: {epochs} epochs, random: {WHOLE}",
                "metric": "normalised regret",
                "unit": "share of the untrained loss's",
                "ours": mean,
                "peer": statistics.fmean(at_random),
                "ratio": statistics.fmean(at_random) / mean if mean > 0 else None,
                "better": "lower",
                "stderr": stderr,
                "all_ours": regrets,
                "all_peer": at_random,
                **common,
            }
        )
        within = [spent is not None and spent <= epochs for spent in reached]
        result.append(
            {
                "case": f"{method}: quality of random's {WHOLE} in {epochs}",
                "metric": "share of searches",
                "unit": "1",
                "ours": statistics.fmean(within),
                "peer": statistics.fmean(by_chance),
                "ratio": statistics.fmean(within) / statistics.fmean(by_chance),
                "better": "higher",
                "epochs": reached,
                **common,
            }
        )
    return result


def _compared(cell: dict[str, Any], task: Task, epochs: int) -> tuple[float, float, int | None, float]:
    """Normalised regrets, after so many epochs and of random search after all; the epochs until the latter's quality, and how
    likely random search has it after so many."""
    target, final, untrained = task.of_random_search(FULL_TRIALS), task.losses[:, -1], task.losses.max()
    found = best_after(cell, epochs)
    regrets = [
        ((untrained if loss is None else loss) - final.min()) / (untrained - final.min()) for loss in (found, target)
    ]
    by_chance = 1 - task.all_missed(int((final <= target).sum()), epochs // EPOCHS)
    return regrets[0], regrets[1], epochs_to(cell, target), by_chance


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description="Asynchronous multi-fidelity search on learning curves.")
    default = os.environ.get("BAYESNN_DATA")
    parser.add_argument("--data", type=Path, default=default, required=default is None, help="folder with hpo/")
    parser.add_argument("--seeds", type=int, default=5, help="how many; 0 only reports the runs on file")
    parser.add_argument("--tasks", type=int, nargs="+", choices=range(12), default=list(range(12)))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no search after so many")
    options = parser.parse_args()
    folder, begun = Path(options.data), time.monotonic()
    done = {(cell["task"], cell["method"], cell["seed"]) for cell in read_cells(NAME)}
    for seed, method, index in itertools.product(range(options.seeds), options.methods, options.tasks):
        if (index, method, seed) not in done and time.monotonic() - begun < 60 * options.minutes:
            run_and_keep(folder, index, method, seed, METHODS[method])
    write(NAME, rows(folder), {})


if __name__ == "__main__":
    main()
