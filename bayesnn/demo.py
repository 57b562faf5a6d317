"""The demo: every family on real data, a real tuning run, and a report with pictures."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
import torch
from matplotlib import cbook
from sklearn.datasets import load_diabetes, load_digits
from sklearn.decomposition import PCA
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC
from torch import Tensor
from torch.distributions import Normal

from bayesnn import metrics, networks, report
from bayesnn.bnn import BNN
from bayesnn.bo import Space, minimize
from bayesnn.bo.storage import open_storage
from bayesnn.bo.study import quiet_optuna
from bayesnn.inference import HMC, DeepEnsemble, MeanField
from bayesnn.inference.amortized import PFN, MetaTraining, TaskBatch
from bayesnn.model import Model
from bayesnn.predictive import Predictive
from bayesnn.processes import NNGP, ConditionalNeuralProcess

BASELINE = "linear-Gaussian"
STUDY = "bayesnn-demo"
HOW_CNP = (
    "cnp: the shipped network after 400 more steps of meta-training on random functions at the training inputs (never on "
    "their outcomes); its seconds include them."
)
SCORES = ("nll", "rmse", "crps", "coverage_90")
SPACE = {
    "C": (1e-3, 1e3, "log"),
    "gamma": (1e-5, 1.0, "log"),
    "components": (5, 60),
    "kernel": ["rbf", "sigmoid"],
}


class Regression(NamedTuple):
    """A real regression set, split: inputs (n, d) and outcomes (n, 1)."""

    X: Tensor
    Y: Tensor
    X_test: Tensor
    Y_test: Tensor


def diabetes() -> Regression:
    """scikit-learn's diabetes set with a fifth held out: 353 rows to learn from, 89 to be judged by."""
    X, y = load_diabetes(return_X_y=True)
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(0))
    X, Y = torch.as_tensor(X)[order], torch.as_tensor(y)[order, None]
    return Regression(X[:353], Y[:353], X[353:], Y[353:])


def elevation() -> tuple[Tensor, Tensor]:
    """A real series with a gap: metres of elevation along a line over the Jacksboro fault, every third grid point."""
    with np.load(cbook.get_sample_data("jacksboro_fault_dem.npz", asfileobj=False)) as file:
        profile = torch.as_tensor(file["elevation"][172, ::3].astype(float))
    x = torch.arange(len(profile), dtype=torch.float64)
    kept = (x <= 60) | (x >= 80)
    return x[kept, None], profile[kept, None]


def linear_gaussian(data: Regression) -> Predictive:
    """Least squares with Gaussian noise: the mean, and a variance of noise plus the coefficients' uncertainty."""
    design, design_test = (torch.cat([torch.ones_like(X[:, :1]), X], 1) for X in (data.X, data.X_test))
    coefficients = torch.linalg.lstsq(design, data.Y).solution
    noise_var = (data.Y - design @ coefficients).square().sum() / (len(design) - design.shape[1])
    leverage = (design_test * torch.linalg.solve(design.T @ design, design_test.T).T).sum(-1, keepdim=True)
    function_var = (noise_var * leverage)[None]
    components = Normal((design_test @ coefficients)[None], (function_var + noise_var).sqrt())
    return Predictive(components, function_var=function_var)


def families() -> dict[str, Callable[[Tensor], Model]]:
    """By name, a function from the inputs to an unfitted model of each family, at settings that suit a few hundred rows.

    The mean-field network's width is the one whose evidence lower bound on diabetes is highest: -424 for 5 hidden units,
    -435 for 10, -452 for 20, -542 for two layers of 50. Wider ones underfit.
    """
    return {
        "hmc": lambda X: BNN(method=HMC(num_chains=4, num_warmup=200, num_draws=200)),
        "mean-field": lambda X: BNN(
            networks.mlp(X.shape[1], 1, hidden=(5,)), method=MeanField(num_steps=1500, num_samples=2)
        ),
        "ensemble": lambda X: BNN(method=DeepEnsemble(num_steps=300)),
        "nngp": lambda X: NNGP(),
        "cnp": meta_trained_process,
        "pfn": lambda X: PFN(),
    }


def meta_trained_process(X: Tensor) -> ConditionalNeuralProcess:
    """The shipped conditional neural process, trained a little further on random functions at the data's own inputs.

    A deep set has to know what inputs look like; here is a prior over functions that somebody wrote for one data set.
    """
    inputs = (X - X.mean(0)) / X.std(0)
    d = X.shape[1]

    def functions(batch_size: int, num_points: int, generator: torch.Generator) -> TaskBatch:
        def normal(*shape: int) -> Tensor:
            return torch.randn(batch_size, *shape, generator=generator, dtype=X.dtype)

        def uniform() -> Tensor:
            return torch.rand(batch_size, 1, 1, generator=generator, dtype=X.dtype)

        rows = torch.randint(len(X), (batch_size, num_points), generator=generator)
        points = inputs[rows] + 0.05 * normal(num_points, d)
        lengthscale = 1.3 * math.sqrt(d) * (0.5 * normal(1, 1)).exp()
        covariance = (-0.5 * (torch.cdist(points, points) / lengthscale).square()).exp()
        smooth = torch.linalg.cholesky(covariance + 1e-4 * torch.eye(num_points, dtype=X.dtype)) @ normal(num_points, 1)
        linear, share = points @ normal(d, 1) / math.sqrt(d), uniform()
        f = share.sqrt() * linear + (1 - share).sqrt() * smooth
        noise_std = 0.05 * 40 ** uniform()
        return TaskBatch(points, f + noise_std * normal(num_points, 1), f)

    training = MetaTraining(
        num_steps=400, max_context=len(X), num_queries=40, rows_per_batch=3072, max_tasks=32, lr=5e-4, num_warmup=30
    )
    return ConditionalNeuralProcess().meta_fit(functions, training)


def compare(data: Regression, log: Callable[[str], None]) -> tuple[list[dict[str, Any]], dict[str, Predictive]]:
    """Fit every family and the baseline; a row of scores and seconds for each, and their predictions."""
    start = time.perf_counter()
    predictions, seconds = {BASELINE: linear_gaussian(data)}, {BASELINE: time.perf_counter() - start}
    for name, build in families().items():
        log(f"  fitting {name} …")
        start = time.perf_counter()
        predictions[name] = build(data.X).fit(data.X, data.Y, seed=0).predict(data.X_test)
        seconds[name] = time.perf_counter() - start
    rows: list[dict[str, Any]] = []
    for name, prediction in predictions.items():
        scores = metrics.summary(prediction, data.Y_test)
        rows.append({"model": name} | {score: scores[score] for score in SCORES} | {"seconds": seconds[name]})
    return rows, predictions


def digits_error(config: Mapping[str, Any]) -> float:
    """Five-fold cross-validated error of a support vector machine on 600 real handwritten digits."""
    X, y = load_digits(return_X_y=True)
    machine = SVC(C=config["C"], gamma=config["gamma"], kernel=config["kernel"])
    pipeline = make_pipeline(PCA(config["components"], svd_solver="full"), machine)
    scores = cross_val_score(pipeline, X[:600] / 16, y[:600], cv=StratifiedKFold(5))
    return float(1 - scores.mean())


def tune(
    folder: Path, num_trials: int, log: Callable[[str], None]
) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """Tune the machine with an ensemble of networks and by random search from the same start; keeps the SQLite study."""
    path = folder / "study.db"
    with quiet_optuna(), suppress(KeyError):  # an earlier demo's; whatever else the file holds stays
        optuna.delete_study(study_name=STUDY, storage=open_storage(path))
    log("  searching with an ensemble of networks …")
    start = time.perf_counter()
    surrogate = BNN(method=DeepEnsemble(num_steps=300, anchored=True))
    result = minimize(
        digits_error, SPACE, surrogate=surrogate, num_trials=num_trials, seed=0, storage=path, study_name=STUDY
    )
    seconds = {"ensemble": time.perf_counter() - start}
    log("  searching at random …")
    start = time.perf_counter()
    with quiet_optuna():
        random = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        for evaluation in result.history[: min(10, num_trials)]:
            random.enqueue_trial(evaluation.x)
        distributions = Space(SPACE).distributions()
        for _ in range(num_trials):
            trial = random.ask(distributions)
            random.tell(trial, digits_error(trial.params))
    seconds["random"] = time.perf_counter() - start
    values = {"ensemble": list(result.best_so_far)}
    values["random"] = np.minimum.accumulate([float(trial.values[0]) for trial in random.trials]).tolist()
    rows: list[dict[str, Any]] = []
    for name, best in values.items():
        reached = next((index + 1 for index, value in enumerate(best) if value <= values["random"][-1]), None)
        rows.append(
            {"search": name, "best error": best[-1], "trials to random's best": reached, "seconds": seconds[name]}
        )
    return rows, values


def notes(rows: list[dict[str, Any]]) -> list[str]:
    """What the regression table shows that a reader should not overlook."""
    baseline = next(row for row in rows if row["model"] == BASELINE)
    found = []
    for row in rows:
        if row["model"] == BASELINE:
            continue
        if not 0.80 <= row["coverage_90"] <= 0.98:
            found.append(f"{row['model']}: its 90 % intervals hold {row['coverage_90']:.0%} of the held-out values.")
        if row["nll"] >= baseline["nll"]:
            found.append(
                f"{row['model']}: NLL {row['nll']:.3f} is no better than the baseline's {baseline['nll']:.3f}: this set is "
                "close to linear, and the baseline is told so while the model has to find out."
            )
    return found


def run_demo(folder: Path, num_trials: int = 30, log: Callable[[str], None] = print) -> Path:
    """Run everything, print both tables and write ``report.html`` into the folder; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    data = diabetes()
    log("Diabetes progression, 353 rows, 10 inputs; 89 rows held out")
    rows, predictions = compare(data, log)
    remarks = [HOW_CNP, *notes(rows)]
    log(report.text_table(rows))
    for remark in remarks:
        log(f"note: {remark}")
    log("\nTuning a support vector machine on handwritten digits")
    tuning, best_so_far = tune(folder, num_trials, log)
    log(report.text_table(tuning))
    log("\nDrawing the report …")
    x, y = elevation()
    grid = torch.linspace(-8, float(x.max()) + 8, 240, dtype=torch.float64)[:, None]
    bands = {name: build(x).fit(x, y).predict(grid) for name, build in families().items()}
    picture = report.bands(grid, bands, x, y)
    picture.supxlabel("grid points along the line")
    picture.supylabel("elevation (m)")
    figures = {
        "Elevation along a line (m), 19 points left out": picture,
        "Calibration on the held-out rows": report.calibration(predictions, data.Y_test),
        "Best cross-validated error so far": report.regret(best_so_far),
    }
    tables = {
        "Diabetes progression: 353 rows to learn from, 89 held out": (rows, remarks),
        f"Tuning a support vector machine on digits, {num_trials} trials": (tuning, []),
    }
    path = folder / "report.html"
    path.write_text(report.html("bayesnn demo", tables, figures), encoding="utf-8")
    log(f"report: {path}")
    log(f"study:  {folder / 'study.db'}")
    return path
