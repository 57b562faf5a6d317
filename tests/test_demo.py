"""The demo's parts on their real data; ``make demo`` runs all of it."""

import re

import numpy as np
import optuna
import pytest
import torch

from bayesnn import demo, metrics, report
from bayesnn.bo import minimize


def test_baseline_is_least_squares():
    data = demo.diabetes()
    p = demo.linear_gaussian(data)
    design = np.c_[np.ones(353), data.X.numpy()]
    coefficients, residual, *_ = np.linalg.lstsq(design, data.Y.numpy(), rcond=None)
    noise_var = residual.item() / (353 - 11)
    row = np.r_[1, data.X_test[5].numpy()]
    assert p.mean[5].item() == pytest.approx((row @ coefficients).item())
    assert p.variance[5].item() == pytest.approx(noise_var * (1 + row @ np.linalg.inv(design.T @ design) @ row))
    assert p.aleatoric[5].item() == pytest.approx(noise_var)


def test_held_out_rows_are_not_trained_on():
    data = demo.diabetes()
    assert (len(data.X), len(data.X_test)) == (353, 89)
    assert not (data.X_test[:, None] == data.X).all(-1).any()


def test_notes_name_what_misses():
    rows = [
        {"model": demo.BASELINE, "nll": 1.0, "coverage_90": 0.9},
        {"model": "good", "nll": 0.9, "coverage_90": 0.9},
        {"model": "sure", "nll": 0.8, "coverage_90": 0.5},
        {"model": "late", "nll": 1.1, "coverage_90": 0.85},
    ]
    assert [note.split(":")[0] for note in demo.notes(rows)] == ["sure", "late"]


def test_tuning_starts_alike_and_keeps_its_study(tmp_path):
    rows, best = demo.tune(tmp_path, 12, lambda text: None)
    assert (tmp_path / "study.db").exists()
    assert best["ensemble"][:10] == best["random"][:10]
    assert [len(values) for values in best.values()] == [12, 12]
    assert rows[1]["trials to random's best"] <= 12


def test_report_is_self_contained():
    data = demo.diabetes()
    p = demo.linear_gaussian(data)
    x, y = demo.elevation()
    grid = torch.linspace(0, 10, 5, dtype=torch.float64)[:, None]
    band = demo.families()["pfn"](x).fit(x, y).predict(grid)
    figures = {
        "bands & more": report.bands(grid, {"pfn": band}, x, y),
        "calibration": report.calibration({"linear": p}, data.Y_test),
        "regret": report.regret({"random": [3.0, 2.0, 2.0]}),
    }
    page = report.html(
        "title", {"table": ([{"model": "a<b", "nll": metrics.nll(p, data.Y_test)}], ["remark"])}, figures
    )
    assert page.count("data:image/png;base64,") == 3
    assert "a&lt;b" in page and "bands &amp; more" in page and "remark" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)


def test_text_table_aligns():
    table = report.text_table([{"model": "a", "nll": 1.23456}, {"model": "long name", "nll": None}])
    assert table.splitlines() == ["model        nll", "a          1.235", "long name      –"]


def test_tuning_again_starts_afresh_and_leaves_other_studies(tmp_path):
    path = tmp_path / "study.db"
    minimize(lambda config: config["x"], {"x": (0.0, 1.0)}, num_trials=2, storage=path, study_name="mine")
    first, second = (demo.tune(tmp_path, 3, lambda text: None)[1] for _ in range(2))
    assert first == second
    counts = {summary.study_name: summary.n_trials for summary in optuna.get_all_study_summaries(f"sqlite:///{path}")}
    assert counts == {"mine": 2, demo.STUDY: 3}
