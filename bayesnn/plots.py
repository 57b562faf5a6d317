"""Pictures of predictions and of optimisations. Each draws on ``ax`` and returns it; no global style is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import NormalDist

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike
from torch import Tensor

from bayesnn.predictive import ClassPredictive, Predictive

TOTAL, EPISTEMIC, OBSERVED = "#2a6fb0", "#c1440e", "#222222"
NEUTRAL = "#8a8a8a"


def predictive_band(
    x: Tensor,
    p: Predictive,
    observed: tuple[Tensor, Tensor] | None = None,
    *,
    levels: Sequence[float] = (0.5, 0.9),
    ax: Axes | None = None,
) -> Axes:
    r"""A prediction of one output along one input: its mean and central intervals, and what of them is ignorance.

    Filled: where y lies with the given probabilities. Dashed: the mean :math:`\pm z` epistemic standard deviations at the
    highest level, the interval that would be left without noise if the function's distribution were Gaussian.

    Args:
        x: (q,) or (q, 1), increasing.
        p: the prediction there, of shape (q, 1).
        observed: data to draw as points, two tensors of shape (n,) or (n, 1).
        levels: probabilities of the intervals.
        ax: where to draw; a new figure by default.

    Raises:
        TypeError: for class labels.
        ValueError: if x and the prediction don't have one value for each point, or a level isn't between 0 and 1.
    """
    if isinstance(p, ClassPredictive):
        raise TypeError("a band needs a prediction of numbers, found one of class labels")
    inputs = x.detach().cpu().numpy().reshape(-1)
    if tuple(p.shape) != (len(inputs), 1):
        raise ValueError(f"p must have shape ({len(inputs)}, 1), one output for each x, found {tuple(p.shape)}")
    axes = _axes(ax)
    for index, level in enumerate(sorted(levels, reverse=True)):
        low, high = (_flat(end) for end in p.interval(level))
        label = f"{100 * level:.3g} % of y"
        axes.fill_between(inputs, low, high, color=TOTAL, alpha=min(0.18 + 0.16 * index, 1), linewidth=0, label=label)
    mean = _flat(p.mean)
    axes.plot(inputs, mean, color=TOTAL, linewidth=1.6, label="mean")
    reach = NormalDist().inv_cdf((1 + max(levels)) / 2) * _flat(p.epistemic.clamp_min(0).sqrt())
    for index, edge in enumerate((mean - reach, mean + reach)):
        name = f"epistemic part, {100 * max(levels):.3g} %" if index == 0 else None
        axes.plot(inputs, edge, color=EPISTEMIC, linewidth=1, linestyle="--", label=name)
    if observed is not None:
        axes.plot(*(_flat(values) for values in observed), ".", color=OBSERVED, markersize=3.5, label="data")
    return axes


def calibration_curve(levels: Tensor, shares: Tensor, *, label: str | None = None, ax: Axes | None = None) -> Axes:
    """Share of observations below their predicted quantiles against the quantiles' levels; calibrated on the diagonal.

    Args:
        levels, shares: (L,) each, from ``metrics.calibration_curve``.
        label: the legend's; call again with another label and the same axes to compare.
        ax: where to draw; a new figure by default.
    """
    axes = _axes(ax)
    _diagonal(axes)
    axes.plot(_flat(levels), _flat(shares), linewidth=1.6, label=label)
    axes.set(xlabel="predicted probability", ylabel="observed share")
    return axes


def reliability_diagram(
    counts: Tensor, confidences: Tensor, accuracies: Tensor, *, label: str | None = None, ax: Axes | None = None
) -> Axes:
    """Accuracy against confidence of the most probable label; a point's area is proportional to its bin's count.

    Args:
        counts, confidences, accuracies: (B,) each, from ``metrics.reliability``.
        label: the legend's.
        ax: where to draw; a new figure by default.
    """
    axes = _axes(ax)
    _diagonal(axes)
    filled = _flat(counts) > 0
    x, y, n = _flat(confidences)[filled], _flat(accuracies)[filled], _flat(counts)[filled]
    (line,) = axes.plot(x, y, linewidth=1.2, label=label)
    axes.scatter(x, y, s=10 + 190 * n / n.max(), color=line.get_color(), alpha=0.5)
    axes.set(xlabel="confidence", ylabel="accuracy")
    return axes


def regret_curve(
    best_so_far: Mapping[str, ArrayLike],
    *,
    optimum: float | None = None,
    level: float = 0.5,
    ax: Axes | None = None,
) -> Axes:
    """How fast optimisers get where: the median over runs against the number of evaluations, and a band.

    Args:
        best_so_far: by method, (T,) or (runs, T): each run's best value after each evaluation; NaN: none yet.
        optimum: the best value there is, to be taken off (simple regret, on a logarithmic scale); None: the values
            themselves.
        level: share of the runs that the band holds; it is drawn from 3 runs on.
        ax: where to draw; a new figure by default.

    Raises:
        ValueError: for values of another shape.
    """
    axes = _axes(ax)
    for name, values in best_so_far.items():
        runs = np.atleast_2d(np.asarray(values, dtype=float))
        if runs.ndim != 2:
            raise ValueError(f"best_so_far[{name!r}] must have shape (T,) or (runs, T), found {runs.shape}")
        regrets = runs if optimum is None else np.abs(runs - optimum)
        evaluations = np.arange(1, runs.shape[1] + 1)
        (line,) = axes.step(evaluations, np.median(regrets, 0), where="post", linewidth=1.8, label=name)
        if len(runs) >= 3:
            low, high = np.quantile(regrets, [(1 - level) / 2, (1 + level) / 2], axis=0)
            axes.fill_between(evaluations, low, high, step="post", color=line.get_color(), alpha=0.18, linewidth=0)
    if optimum is not None:
        axes.set_yscale("log")
    axes.set(xlabel="evaluations", ylabel="best value so far" if optimum is None else "simple regret")
    axes.legend(frameon=False)
    return axes


def _axes(ax: Axes | None) -> Axes:
    return plt.subplots(layout="constrained")[1] if ax is None else ax


def _diagonal(axes: Axes) -> None:
    """Once for each axes, however many curves are compared on it."""
    if not any(line.get_gid() == "diagonal" for line in axes.lines):
        axes.plot([0, 1], [0, 1], color=NEUTRAL, linewidth=1, linestyle=":", gid="diagonal")
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")


def _flat(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy().reshape(-1)
