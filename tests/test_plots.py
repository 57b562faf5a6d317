"""Plots draw the numbers they were given, on the axes they were given, and leave global state alone."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from torch import Tensor
from torch.distributions import Categorical, Normal

from bayesnn import metrics, plots
from bayesnn.predictive import ClassPredictive, Predictive


@pytest.fixture(autouse=True)
def untouched_style() -> Iterator[None]:
    before = dict(mpl.rcParams)
    yield
    plt.close("all")
    assert dict(mpl.rcParams) == before


@pytest.fixture
def ax() -> Axes:
    return plt.subplots()[1]


def two_functions(x: Tensor) -> Predictive:
    """Two straight lines with noise 0.5."""
    means = torch.stack([x, -x])[..., None]
    return Predictive(Normal(means, torch.full_like(means, 0.5)))


def test_band_holds_the_intervals_the_mean_and_the_epistemic_part(ax: Axes) -> None:
    x = torch.linspace(0, 2, 11, dtype=torch.float64)
    p = two_functions(x)
    assert plots.predictive_band(x, p, (torch.tensor([1.0]), torch.tensor([3.0])), ax=ax) is ax
    wide, narrow = (collection.get_paths()[0].vertices for collection in ax.collections)
    low, high = p.interval(0.9)
    assert wide[:, 1].min() == pytest.approx(float(low.min())) and wide[:, 1].max() == pytest.approx(float(high.max()))
    assert np.ptp(narrow[:, 1]) < np.ptp(wide[:, 1])
    mean, lower, upper, data = (line.get_ydata() for line in ax.lines)
    assert np.allclose(mean, 0)
    # The two functions are x and -x, so that the epistemic standard deviation is |x|.
    assert np.allclose(upper, 1.6448536 * x) and np.allclose(lower, -upper)
    assert data == [3.0]
    labels = ax.get_legend_handles_labels()[1]
    assert labels == ["90 % of y", "50 % of y", "mean", "epistemic part, 90 %", "data"]


def test_band_needs_one_output_and_numbers() -> None:
    x = torch.linspace(0, 1, 4)
    with pytest.raises(ValueError, match=r"shape \(3, 1\).*found \(4, 1\)"):
        plots.predictive_band(x[:3], two_functions(x))
    with pytest.raises(TypeError, match="class labels"):
        plots.predictive_band(x, ClassPredictive(Categorical(logits=torch.zeros(1, 4, 1, 2))))


def test_calibration_curves_share_one_diagonal(ax: Axes) -> None:
    x = torch.linspace(0, 1, 30, dtype=torch.float64)
    levels, shares = metrics.calibration_curve(two_functions(x), x)
    for label in ("a", "b"):
        plots.calibration_curve(levels, shares, label=label, ax=ax)
    assert len(ax.lines) == 3
    assert np.array_equal(ax.lines[1].get_ydata(), shares.numpy())
    assert ax.get_legend_handles_labels()[1] == ["a", "b"]


def test_reliability_diagram_leaves_out_empty_bins(ax: Axes) -> None:
    p = ClassPredictive(Categorical(probs=torch.tensor([[[[0.9, 0.1]], [[0.4, 0.6]]]])))
    plots.reliability_diagram(*metrics.reliability(p, torch.tensor([0, 0]), num_bins=5), ax=ax)
    line = ax.lines[1]
    assert line.get_xdata() == pytest.approx([0.6, 0.9]) and line.get_ydata() == pytest.approx([0, 1])


def test_regret_curve_takes_the_median_and_a_band_from_three_runs(ax: Axes) -> None:
    runs = np.array([[5.0, 3.0], [4.0, 2.0], [9.0, 8.0]])
    plots.regret_curve({"ours": runs, "random": runs[0]}, optimum=1.0, ax=ax)
    assert list(ax.lines[0].get_ydata()) == [4.0, 2.0] and list(ax.lines[1].get_ydata()) == [4.0, 2.0]
    assert len(ax.collections) == 1
    assert ax.get_yscale() == "log" and ax.get_ylabel() == "simple regret"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["ours", "random"]
    with pytest.raises(ValueError, match="runs, T"):
        plots.regret_curve({"ours": np.zeros((1, 2, 3))}, ax=ax)


def test_a_new_figure_is_made_without_axes() -> None:
    assert plots.regret_curve({"ours": [3.0, 2.0]}).get_ylabel() == "best value so far"
