r"""Processes of infinite-width networks on real data: NNGP and Student-t beside a Matérn GP, with outliers, and in gaps.

    python benchmarks/kernels_uci.py --data DIR [--quick] [--splits N] [--sets boston …] [--tasks standard …]

Three tasks on each set:

* ``standard``: the standard random splits, 90 % for training (20 of them; airfoil has 10);
* ``outliers``: the same splits, with 5 % of the training outcomes, drawn at random, shifted by N(0, (5 s)^2) where s is the
  standard deviation of the training outcomes; the test rows are as they were;
* ``gap``: one split for each input, whose middle third of values is the test set (Foong et al. 2019). Airfoil's are made here
  by the same rule.

All three are exact Gaussian or Student-t processes in float64 with a lengthscale for each input, a constant mean, learned
noise and their hyperparameters at the maximum of the marginal likelihood times their own default priors. Ours search twice,
from little noise and from much (``restart``), and keep the better. The Matérn GP is BoTorch's ``SingleTaskGP`` with its
Matérn-5/2 kernel (gamma priors), inputs in the unit cube and standardised outcomes.

Read log-likelihoods of wine_red with care: 27 % of its test rows are also in the training part, always with the same outcome.
A fit that puts the noise at its floor has a log density of 3.6 on those and -1.2 on the others (NNGP, split 1).

Every cell (task, set, split, method) is one fit, written as a line of ``benchmarks/results/kernels_uci_cells.jsonl`` when it
is finished: run again, the benchmark goes on where it stopped. A row's ``ratio`` above 1 means that the first method is
ahead: of log-likelihoods, the exponential of the mean difference; of RMSE and seconds the quotient. ``difference`` and its
standard error are over the splits that both have.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import gpytorch
import numpy as np
import torch
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.transforms import Normalize, Standardize
from botorch.models.utils.gpytorch_modules import get_matern_kernel_with_gamma_prior
from botorch.utils.sampling import manual_seed
from gpytorch.mlls import ExactMarginalLogLikelihood
from harness import append_cell, mean_and_stderr, read_cells, write
from torch import Tensor
from torch.distributions import Normal

from bayesnn.model import Model
from bayesnn.processes.gaussian import NNGP
from bayesnn.processes.student_t import StudentTProcess

NAME = "kernels_uci"
SETS = ("boston", "energy", "wine_red", "airfoil")
TASKS = ("standard", "outliers", "gap")
QUICK_SPLITS = 2
OUTLIERS, SHIFT = 0.05, 5.0
METRICS = {"test_ll": ("nats", "higher"), "rmse": ("units of y", "lower"), "cpu_seconds": ("s", "lower")}


class Split(NamedTuple):
    """Rows of both parts, float64, in their own units."""

    X: Tensor
    y: Tensor
    X_test: Tensor
    y_test: Tensor


class Score(NamedTuple):
    """Means over the test rows, and whether the fit gave a warning."""

    test_ll: float
    rmse: float
    seconds: float
    warned: str


def num_splits(folder: Path, task: str, name: str) -> int:
    """How many splits there are."""
    return len(_masks(folder, task, name)[2])


def load(folder: Path, task: str, name: str, index: int) -> Split:
    """One split of a task."""
    X, y, masks = _masks(folder, task, name)
    test = masks[index]
    train = ~test
    outcomes = y[train]
    if task == "outliers":
        generator = torch.Generator().manual_seed(index)
        chosen = torch.randperm(len(outcomes), generator=generator)[: round(OUTLIERS * len(outcomes))]
        shifts = torch.randn(len(chosen), generator=generator, dtype=torch.float64)
        outcomes[chosen] += SHIFT * outcomes.std() * shifts
    return Split(X[train], outcomes, X[test], y[test])


def _masks(folder: Path, task: str, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """All rows, and for every split which of them are the test's."""
    path = folder / "uci_regression" / f"{'extra_' if name == 'airfoil' else ''}{name}.npz"
    with np.load(path, allow_pickle=False) as file:
        X, y = torch.as_tensor(file["X"]).double(), torch.as_tensor(file["y"]).double().flatten()
        if task != "gap":
            return X, y, torch.as_tensor(file["test_mask"]) if name == "airfoil" else _mask(file["test_idx"], len(X))
    if name == "airfoil":
        order = X.argsort(dim=0, stable=True)
        return X, y, _mask(order[len(X) // 3 : len(X) - len(X) // 3].T.numpy(), len(X))
    with np.load(folder / "uci_gap" / f"{name}_gap_splits.npz", allow_pickle=False) as file:
        return X, y, _mask(file["test_idx"], len(X))


def _mask(indices: np.ndarray[Any, Any], length: int) -> Tensor:
    mask = torch.zeros(len(indices), length, dtype=torch.bool)
    return mask.scatter_(1, torch.as_tensor(indices.astype(np.int64)), True)


def of_model(make: Callable[[], Model]) -> Callable[[Split, int], Score]:
    """How a model of ours is fitted and scored."""

    def run(split: Split, seed: int) -> Score:
        with _watched() as (clock, found):
            model = make().fit(split.X, split.y, seed=seed)
            seconds = clock()
        with torch.no_grad():
            prediction = model.predict(split.X_test)
            test_ll = prediction.log_prob(split.y_test).mean()
            rmse = (prediction.mean.squeeze(-1) - split.y_test).square().mean().sqrt()
        return Score(float(test_ll), float(rmse), seconds, found())

    return run


def matern(split: Split, seed: int) -> Score:
    """BoTorch's ``SingleTaskGP`` with its Matérn-5/2 kernel."""
    num_features = split.X.shape[-1]
    exact = gpytorch.settings.fast_computations(False, False, False), gpytorch.settings.max_cholesky_size(100_000)
    with exact[0], exact[1]:
        with manual_seed(seed), _watched() as (clock, found):
            gp = SingleTaskGP(
                split.X,
                split.y.unsqueeze(-1),
                covar_module=get_matern_kernel_with_gamma_prior(num_features),
                input_transform=Normalize(num_features),
                outcome_transform=Standardize(1),
            )
            fit_gpytorch_mll(ExactMarginalLogLikelihood(gp.likelihood, gp))
            seconds = clock()
        with torch.no_grad():
            prediction = gp.posterior(split.X_test, observation_noise=True)
            mean, std = prediction.mean.squeeze(-1), prediction.variance.squeeze(-1).sqrt()
    test_ll = Normal(mean, std).log_prob(split.y_test).mean()
    return Score(float(test_ll), float((mean - split.y_test).square().mean().sqrt()), seconds, found())


@contextmanager
def _watched() -> Iterator[tuple[Callable[[], float], Callable[[], str]]]:
    """Processor seconds since here, and warnings since here that concern the fit's outcome."""
    start = time.process_time()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def found() -> str:
            texts = dict.fromkeys(str(warning.message).splitlines()[0][:120] for warning in caught)
            return "; ".join(text for text in texts if "couldn't be maximised" in text or "ptimization failed" in text)

        yield lambda: time.process_time() - start, found


METHODS: dict[str, Callable[[Split, int], Score]] = {
    "NNGP": of_model(NNGP),
    "Student-t": of_model(StudentTProcess),
    "Matérn": matern,
}
COMPARISONS = (("NNGP", "Matérn"), ("Student-t", "Matérn"), ("Student-t", "NNGP"))


def finished() -> list[dict[str, Any]]:
    """The cells on file, in the order of tasks, sets, methods and splits; the last of those with one key."""
    methods = list(METHODS)

    def place(cell: dict[str, Any]) -> tuple[int, ...]:
        return (
            TASKS.index(cell["task"]),
            SETS.index(cell["set"]),
            methods.index(cell["method"]),
            cell["split"],
        )

    return sorted({place(cell): cell for cell in read_cells(NAME)}.values(), key=place)


def run_cells(folder: Path, tasks: Sequence[str], sets: Sequence[str], most: int) -> None:
    """Run what isn't finished, split by split, so that all tasks and sets have equally many at any time."""
    done = {(cell["task"], cell["set"], cell["split"], cell["method"]) for cell in finished()}
    counts = {(task, name): min(most, num_splits(folder, task, name)) for task in tasks for name in sets}
    for index in range(max(counts.values(), default=0)):
        for (task, name), count in counts.items():
            for method in METHODS if index < count else ():
                if (task, name, index, method) in done:
                    continue
                score = METHODS[method](load(folder, task, name, index), index)
                cell = {"task": task, "set": name, "split": index, "method": method, "test_ll": score.test_ll}
                cell |= {"rmse": score.rmse, "cpu_seconds": round(score.seconds, 2), "warned": score.warned}
                append_cell(NAME, cell)
                where = f"{task:9} {name:9} {index:2} {method:10}"
                print(
                    f"{where} {score.test_ll:9.3f} {score.rmse:9.4f} {score.seconds:7.1f} s {score.warned}", flush=True
                )


def rows(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pairs of methods over the splits that both have finished."""
    table = {(cell["task"], cell["set"], cell["method"], cell["split"]): cell for cell in cells}
    result = []
    for task, name in dict.fromkeys((cell["task"], cell["set"]) for cell in cells):
        for ours, peer in COMPARISONS:
            splits = [
                cell["split"]
                for cell in cells
                if (cell["task"], cell["set"], cell["method"]) == (task, name, ours)
                and (task, name, peer, cell["split"]) in table
            ]
            for metric, (unit, better) in METRICS.items() if splits else ():
                values = [[table[task, name, method, i][metric] for i in splits] for method in (ours, peer)]
                (own, error), (other, other_error) = (mean_and_stderr(each) for each in values)
                difference, difference_error = mean_and_stderr([a - b for a, b in zip(*values, strict=True)])
                result.append(
                    {
                        "case": f"{task}, {name}, {ours}",
                        "metric": metric,
                        "unit": unit,
                        "ours": own,
                        "stderr": error,
                        "peer": other,
                        "peer_stderr": other_error,
                        "peer_name": peer,
                        "difference": difference,
                        "difference_stderr": difference_error,
                        "ratio": math.exp(difference) if metric == "test_ll" else other / own,
                        "better": better,
                        "splits": splits,
                        "fits_that_warned": sum(bool(table[task, name, ours, i]["warned"]) for i in splits),
                    }
                )
    return result


def verdicts(table: Sequence[dict[str, Any]]) -> dict[str, str]:
    """For each task and pair: on which sets the first is ahead, behind, or within two standard errors."""
    result = {}
    for task in TASKS:
        for ours, peer in COMPARISONS:
            for metric in ("test_ll", "rmse"):
                groups: dict[str, list[str]] = {"ahead": [], "behind": [], "within two standard errors": []}
                for line in table:
                    where, name, method = line["case"].split(", ")
                    if (where, method, line["peer_name"], line["metric"]) != (task, ours, peer, metric):
                        continue
                    error = line["difference_stderr"]
                    clear = error is not None and abs(line["difference"]) > 2 * error
                    verdict = "ahead" if line["ratio"] > 1 else "behind"
                    groups[verdict if clear else "within two standard errors"].append(name)
                text = "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in groups.items() if names)
                if text:
                    result[f"{task}, {metric}: {ours} against {peer}"] = text
    return result


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description="NNGP, Student-t and Matérn processes on UCI sets.")
    parser.add_argument("--data", type=Path, required=True, help="folder with uci_regression/ and uci_gap/")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SPLITS} splits instead of all")
    parser.add_argument("--splits", type=int, help="how many of the splits; 0 only reports the cells on file")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    options = parser.parse_args()
    most = (QUICK_SPLITS if options.quick else 100) if options.splits is None else options.splits
    run_cells(options.data, options.tasks, options.sets, most)
    table = rows(finished())
    found = verdicts(table)
    write(NAME, table, {}, verdicts=found)
    for question, answer in found.items():
        print(f"{question}: {answer}")


if __name__ == "__main__":
    main()
