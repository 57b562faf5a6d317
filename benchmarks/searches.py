"""What benchmarks of optimisation share: functions of the unit cube and tables of real experiments, and one search of either.

A search is a scrambled Sobol sequence's first points and then suggestions, each the maximum of an acquisition function over
the values so far (values are maximised). Methods differ in the acquisition function alone.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from botorch.acquisition import AcquisitionFunction
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.optim import optimize_acqf
from botorch.utils.sampling import manual_seed
from gpytorch.kernels import Kernel
from gpytorch.mlls import ExactMarginalLogLikelihood
from torch import Tensor
from torch.quasirandom import SobolEngine

Acquire = Callable[[Tensor, Tensor], AcquisitionFunction]
"""From X (n, d) in the unit cube and values (n, 1) to what is maximised next."""


class Problem(NamedTuple):
    """Something to be minimised over the unit cube: a function, or a table's rows.

    Attributes:
        num_features: d.
        function: (n, d) to (n, 1).
        minimum: its least value.
        rows: (N, d) where only these can be tried.
    """

    num_features: int
    function: Callable[[Tensor], Tensor]
    minimum: float
    rows: Tensor | None = None


def of_botorch(function: Any) -> Problem:
    """One of BoTorch's test functions."""
    low, high = function.bounds.double()

    def values(X: Tensor) -> Tensor:
        return function(low + (high - low) * X).unsqueeze(-1)

    return Problem(function.dim, values, float(function.optimal_value))


def of_table(X: Tensor, values: Tensor) -> Problem:
    """Measured values (N,) at N configurations; columns are scaled to [0, 1], and rows are looked up."""
    low, high = X.amin(0), X.amax(0)
    X = (X - low) / (high - low).clamp_min(1e-12)

    def function(queries: Tensor) -> Tensor:
        return values[_distances(queries, X).argmin(-1)].unsqueeze(-1)

    return Problem(X.shape[1], function, float(values.min()), X)


def _distances(first: Tensor, second: Tensor) -> Tensor:
    """Exactly 0 between equal rows, as matrix products of many rows aren't."""
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")


def lcbench(folder: Path, name: str) -> Problem:
    """Validation error (percent) of 2,000 measured networks on one of LCBench's data sets, by 7 hyperparameters."""
    with np.load(folder / "hpo" / "lcbench_final_val_accuracy_35tasks.npz", allow_pickle=False) as file:
        config, is_log = torch.as_tensor(file["config"]).double(), torch.as_tensor(file["config_log"])
        accuracy = torch.as_tensor(file["val_accuracy"][file["tasks"].tolist().index(name)]).double()
    return of_table(torch.where(is_log, config.clamp_min(1e-12).log(), config), 100 - accuracy)


def fitted_gp(X: Tensor, Y: Tensor, kernel: Kernel | None = None) -> SingleTaskGP:
    """BoTorch's default, or with another kernel."""
    gp = SingleTaskGP(X, Y, covar_module=kernel)
    fit_gpytorch_mll(ExactMarginalLogLikelihood(gp.likelihood, gp))
    return gp


def search(problem: Problem, acquire: Acquire | None, seed: int, num_initial: int, num_steps: int) -> dict[str, Any]:
    """One optimisation: the best value after every evaluation, above the minimum; None: points of the sequence alone."""
    torch.set_num_threads(1)
    start, failures, total = time.process_time(), 0, num_initial + num_steps
    first = _first(problem, seed, total)
    X = first if acquire is None else first[:num_initial]
    Y = -problem.function(X)
    while acquire is not None and len(X) < total:
        with warnings.catch_warnings(), manual_seed(1000 * seed + len(X)):
            warnings.simplefilter("ignore")
            try:
                acquisition = acquire(X, Y)
            except Exception:  # a fit that fails costs a random point, and is counted
                failures += 1
                candidate = first[len(X) : len(X) + 1]
            else:
                candidate = _best(problem, acquisition, X)
        X, Y = torch.cat([X, candidate]), torch.cat([Y, -problem.function(candidate)])
    regrets = (-Y.squeeze(-1).cummax(0).values - problem.minimum).tolist()
    seconds = round(time.process_time() - start, 1)
    return {"regrets": regrets, "fits_that_failed": failures, "cpu_seconds": seconds}


def _first(problem: Problem, seed: int, count: int) -> Tensor:
    if problem.rows is None:
        return SobolEngine(problem.num_features, scramble=True, seed=seed).draw(count).double()
    order = torch.randperm(len(problem.rows), generator=torch.Generator().manual_seed(seed))
    return problem.rows[order[:count]]


def _best(problem: Problem, acquisition: AcquisitionFunction, X: Tensor) -> Tensor:
    if problem.rows is None:
        bounds = torch.stack([torch.zeros_like(X[0]), torch.ones_like(X[0])])
        return optimize_acqf(acquisition, bounds, q=1, num_restarts=4, raw_samples=128, options={"maxiter": 60})[0]
    tried = (_distances(problem.rows, X) < 1e-9).any(-1)
    with torch.no_grad():
        values = torch.cat([acquisition(rows) for rows in problem.rows.unsqueeze(1).split(256)])
    return problem.rows[values.masked_fill(tried, -torch.inf).argmax()][None]
