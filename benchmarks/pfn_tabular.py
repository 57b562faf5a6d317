r"""A prior-data fitted network on real tables with classes, beside what people use.

    python benchmarks/pfn_tabular.py --data DIR [--splits 5] [--sets NAME …]

The sets of OpenML's CC18 suite (of those with at most 2,000 rows) with at most 20 features and 5 classes. Half of the rows,
stratified, are the training rows; five splits. Missing values become the training column's median, for all methods alike.
``pfn`` is the shipped "tabular-classification" on the 400 rows nearest to each query (``neighbours``; 400 is what it was
trained on), with its features standardised and categories as the numbers that they are stored as; logistic regression and the
Gaussian process (one against the rest, an RBF kernel fitted to at most 400 rows) standardise too; gradient boosting is
scikit-learn's ``HistGradientBoostingClassifier``. All at their defaults. AUC is one against one, averaged over pairs.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import append_cell, mean_and_stderr, read_cells, write
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.gaussian_process import GaussianProcessClassifier
from sklearn.gaussian_process.kernels import RBF, ConstantKernel
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import StratifiedShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bayesnn.inference.amortized import PFNClassifier
from bayesnn.likelihoods import Categorical

NAME = "pfn_tabular"
MOST_FEATURES, MOST_CLASSES, MOST_ROWS = 20, 5, 400

Array = np.ndarray[Any, Any]
Method = Callable[[Array, Array, Array], Array]
"""From training rows, labels and test rows to probabilities."""


def pfn(X: Array, y: Array, X_test: Array) -> Array:
    """Ours."""
    model = PFNClassifier(Categorical(int(y.max()) + 1), neighbours=MOST_ROWS)
    found: Array = (
        model.fit(torch.as_tensor(X), torch.as_tensor(y)).predict(torch.as_tensor(X_test)).probabilities.numpy()
    )
    return found


def logistic(X: Array, y: Array, X_test: Array) -> Array:
    """Logistic regression."""
    found: Array = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(X, y).predict_proba(X_test)
    return found


def boosting(X: Array, y: Array, X_test: Array) -> Array:
    """Gradient boosting."""
    found: Array = HistGradientBoostingClassifier(random_state=0).fit(X, y).predict_proba(X_test)
    return found


def gaussian_process(X: Array, y: Array, X_test: Array) -> Array:
    """Laplace's approximation of a Gaussian process."""
    rows = np.random.default_rng(0).permutation(len(X))[:MOST_ROWS]
    kernel = ConstantKernel(1.0) * RBF(np.sqrt(X.shape[1]))
    model = make_pipeline(StandardScaler(), GaussianProcessClassifier(kernel, random_state=0))
    found: Array = model.fit(X[rows], y[rows]).predict_proba(X_test)
    return found


METHODS: dict[str, Method] = {"pfn": pfn, "logistic": logistic, "boosting": boosting, "gp": gaussian_process}


def sets(folder: Path) -> dict[str, tuple[Array, Array]]:
    """The tables within the network's limits."""
    with np.load(folder / "classification_tabular" / "openml_cc18_small30.npz", allow_pickle=False) as file:
        tables = {
            name: (file[f"{name}/X"].astype(float), file[f"{name}/y"].astype(int)) for name in file["names"].tolist()
        }
    return {name: (X, y) for name, (X, y) in tables.items() if X.shape[1] <= MOST_FEATURES and y.max() < MOST_CLASSES}


def auc(y: Array, probabilities: Array) -> float:
    """One against one."""
    if probabilities.shape[1] == 2:
        return float(roc_auc_score(y, probabilities[:, 1]))
    return float(roc_auc_score(y, probabilities, multi_class="ovo"))


def run_and_keep(name: str, X: Array, y: Array, method: str, split: int) -> None:
    """One fit, on file."""
    ((train, test),) = StratifiedShuffleSplit(1, test_size=0.5, random_state=split).split(X, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        medians = np.nan_to_num(np.nanmedian(X[train], 0))
        filled = np.where(np.isnan(X), medians, X)
        varies = filled[train].std(0) > 0
        start = time.process_time()
        found = METHODS[method](filled[train][:, varies], y[train], filled[test][:, varies])
        seconds = time.process_time() - start
    found = found / found.sum(1, keepdims=True)
    scores = {"auc": auc(y[test], found), "log_loss": float(log_loss(y[test], found))}
    scores["accuracy"] = float((found.argmax(1) == y[test]).mean())
    append_cell(NAME, {"set": name, "method": method, "split": split, "cpu_seconds": round(seconds, 2)} | scores)
    print(
        f"{name:34} {method:9} {split} AUC {scores['auc']:.4f} log loss {scores['log_loss']:.3f} {seconds:.1f} s",
        flush=True,
    )


def rows() -> list[dict[str, Any]]:
    """Ours beside each other method: the mean over sets of the mean over splits."""
    table = {(cell["set"], cell["method"], cell["split"]): cell for cell in read_cells(NAME)}
    result = []
    for peer in ("logistic", "boosting", "gp"):
        keys = [(name, split) for name, method, split in table if method == "pfn" and (name, peer, split) in table]
        names = sorted({name for name, _ in keys})
        for metric, better in (("auc", "higher"), ("log_loss", "lower"), ("accuracy", "higher")):
            own, others = (
                [np.mean([table[name, method, split][metric] for key, split in keys if key == name]) for name in names]
                for method in ("pfn", peer)
            )
            if not names:
                continue
            difference, stderr = mean_and_stderr([float(a - b) for a, b in zip(own, others, strict=True)])
            means = float(np.mean(own)), float(np.mean(others))
            result.append(
                {
                    "case": f"mean over {len(names)} sets",
                    "metric": metric,
                    "unit": "nats" if metric == "log_loss" else "1",
                    "ours": means[0],
                    "peer": means[1],
                    "peer_name": peer,
                    "ratio": means[0] / means[1] if better == "higher" else means[1] / means[0],
                    "better": better,
                    "difference": difference,
                    "stderr_over_sets": stderr,
                    "sets": dict(zip(names, zip(map(float, own), map(float, others), strict=True), strict=True)),
                    "splits": len({split for _, split in keys}),
                }
            )
    return result


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description="Tables with classes.")
    parser.add_argument("--data", type=Path, required=True, help="folder with classification_tabular/")
    parser.add_argument("--splits", type=int, default=5, help="how many; 0 only reports the runs on file")
    parser.add_argument("--sets", nargs="+", help="by name; default: all within the limits")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = {(cell["set"], cell["method"], cell["split"]) for cell in read_cells(NAME)}
    for split in range(options.splits):
        for name, (X, y) in sets(options.data).items():
            for method in options.methods:
                if (options.sets is None or name in options.sets) and (name, method, split) not in done:
                    run_and_keep(name, X, y, method, split)
    write(NAME, rows(), {})


if __name__ == "__main__":
    main()
