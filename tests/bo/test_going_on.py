"""Surrogates of Bayesian neural networks between trials: fitted from scratch now and then, from there in between."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bayesnn import BNN
from bayesnn.bo import Fidelity, minimize
from bayesnn.bo.fitters import GoingOn, fitter_of
from bayesnn.inference import DeepEnsemble

X = torch.rand(30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.sin(5 * X).sum(-1, keepdim=True)
SPACE = {"x": (0.0, 1.0), "z": (0.0, 1.0)}


def unfitted() -> BNN:
    return BNN(method=DeepEnsemble(num_members=3, num_steps=20, anchored=True))


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done, in order: "fit 10", "refit 12"."""
    done: list[str] = []
    for name in ("fit", "refit"):
        original = getattr(BNN, name)

        def noted(self: BNN, X: Tensor, Y: Tensor, _name: str = name, _original: Any = original, **options: Any) -> Any:
            if _name == "refit" or self._earlier is None:
                done.append(f"{_name} {len(X)}")
            return _original(self, X, Y, **options)

        monkeypatch.setattr(BNN, name, noted)
    return done


def test_networks_are_fitted_from_scratch_now_and_then(fits: list[str]) -> None:
    name, fitter = fitter_of(unfitted(), None, seed=5)
    assert name == "BNN" and isinstance(fitter, GoingOn)
    models = [fitter(X[:n], Y[:n], n) for n in (9, 10, 11, 14, 15, 16, 22, 30)]
    assert fits == ["fit 9", "fit 10", "refit 11", "refit 14", "fit 15", "refit 16", "fit 22", "refit 30"]
    assert [len(model.train_targets) for model in models] == [9, 10, 11, 14, 15, 16, 22, 30]


def test_outliers_that_later_rows_make_of_earlier_ones_change_no_fit_from_scratch(fits: list[str]) -> None:
    """What is drawn in depends on all rows; of the first ones, on these alone."""

    def f(x: dict[str, Any]) -> float:
        return float(math.exp(9 * (x["x"] + x["z"])))

    result = minimize(f, SPACE, surrogate=unfitted(), num_trials=14, num_startup=10, seed=0)
    assert fits == ["fit 10", "refit 11", "refit 12", "refit 13"]
    assert any(trial.user_attrs.get("num_drawn_in") for trial in result.study.trials)
    fits.clear()

    def yields(x: dict[str, Any]) -> Iterator[float]:
        for epoch in range(1, 10):
            yield x["x"] + 1 / epoch

    minimize(yields, SPACE, surrogate=unfitted(), num_trials=13, num_startup=10, seed=0, fidelity=Fidelity(9))
    assert (
        not any(each.startswith("refit") for each in fits) and 1 <= len(fits) <= 3
    )  # the first rows change with the curves


def test_what_is_fitted_is_a_function_of_the_rows_alone() -> None:
    """Also by another process, and when an earlier row has changed."""
    grown, other = (fitter_of(unfitted(), None, seed=5)[1] for _ in range(2))
    for n in (12, 17, 25):
        found = grown(X[:n], Y[:n], n)
    fresh = other(X[:25], Y[:25], 1)
    assert torch.equal(found.posterior(X).mean, fresh.posterior(X).mean)
    copied = pickle.loads(pickle.dumps(other))  # in memory, as samplers are sent to other processes
    assert torch.equal(copied(X[:25], Y[:25], 1).posterior(X).mean, fresh.posterior(X).mean)
    changed = Y.clone()
    changed[3] = 1.0
    assert not torch.equal(other(X[:25], changed[:25], 1).posterior(X).mean, fresh.posterior(X).mean)
    back = other(X[:25], Y[:25], 1)
    assert torch.equal(back.posterior(X).mean, fresh.posterior(X).mean)


def test_a_search_that_stops_and_goes_on_suggests_the_same(tmp_path: Path, fits: list[str]) -> None:
    def f(x: dict[str, Any]) -> float:
        return float((x["x"] - 0.3) ** 2 + (x["z"] - 0.8) ** 2)

    options: dict[str, Any] = {"surrogate": unfitted(), "num_startup": 9, "seed": 1}
    whole = minimize(f, SPACE, num_trials=14, **options)
    assert "refit 12" in fits and fits.count("fit 10") == 1
    fits.clear()
    for num_trials in (12, 14):
        parts = minimize(f, SPACE, num_trials=num_trials, storage=tmp_path / "study.db", **options)
    assert [e.x for e in parts.history] == [e.x for e in whole.history]
    assert fits.count("fit 10") == 2  # by each of the two calls
