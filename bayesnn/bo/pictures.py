"""Pictures of a study's trials: convergence, parallel coordinates, importances, trade-offs between objectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from bayesnn.bo.observations import Observations
from bayesnn.bo.parameters import Categorical, Parameter, all_codes
from bayesnn.bo.space import FEW_VALUES, Space
from bayesnn.plots import EPISTEMIC, NEUTRAL, OBSERVED, TOTAL

COLORS = "viridis"


def label(text: object, length: int = 24) -> str:
    """Text for a picture: not too long, and without Matplotlib's mathematics."""
    shown = str(text)
    shown = shown if len(shown) <= length else shown[: length - 1] + "…"
    return shown.replace("$", r"\$")


def objective_names(study: Study) -> list[str]:
    """The objectives' names: those given to the study, else "value", or "value 1" and so on."""
    if study.metric_names is not None:
        return study.metric_names
    count = len(study.directions)
    return ["value"] if count == 1 else [f"value {index + 1}" for index in range(count)]


def keeps_constraints(trial: FrozenTrial) -> bool:
    """Whether a finished trial keeps all the constraints that it has set; they are kept where the value is at most 0."""
    return all(value <= 0 for value in trial.constraints.values())


def ticks(axis: Axis, parameter: Parameter) -> None:
    """Label an axis of codes with a parameter's values."""
    if isinstance(parameter, Categorical) or parameter.num_values <= 6:
        codes = all_codes(parameter)[:: -(-int(parameter.num_values) // FEW_VALUES)]
    else:
        codes = [0.0, 1 / 3, 2 / 3, 1.0]
    values = [parameter.value(code) for code in codes]
    axis.set_ticks(codes, [label(f"{v:.3g}" if isinstance(v, float) else v, 12) for v in values])


def convergence(study: Study) -> Figure:
    """Each objective's values by trial, the best so far of those that keep the constraints, and where trials failed."""
    trials = study.get_trials(deepcopy=False)
    failed = [trial.number for trial in trials if trial.state is TrialState.FAIL]
    finished = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    names = objective_names(study)
    figure = Figure(figsize=(8, 3.4 * len(names)), layout="constrained")
    for k, axes in enumerate(figure.subplots(len(names), 1, squeeze=False).flat):
        finite = [trial for trial in finished if np.isfinite(trial.values[k])]
        numbers, values = _points(finite, k, kept=True)
        better = np.maximum if study.directions[k] is StudyDirection.MAXIMIZE else np.minimum
        axes.plot(numbers, values, "o", color=NEUTRAL, markersize=4, label="finished trial")
        axes.step(numbers, better.accumulate(values), where="post", color=TOTAL, linewidth=1.8, label="best so far")
        _mark_broken(axes, *_points(finite, k, kept=False))
        if failed:
            axes.plot(
                failed, [0.02] * len(failed), "x", color=EPISTEMIC, transform=axes.get_xaxis_transform(), label="failed"
            )
        axes.set(xlabel="trial", ylabel=label(names[k]))
        axes.legend(frameon=False)
    return figure


def _points(trials: Sequence[FrozenTrial], objective: int, kept: bool) -> np.ndarray:
    """Numbers and values (2, n) of those that keep their constraints, or of those that don't."""
    points = [(t.number, t.values[objective]) for t in trials if keeps_constraints(t) is kept]
    return np.array(points, dtype=float).reshape(-1, 2).T


def _mark_broken(axes: Axes, x: np.ndarray, y: np.ndarray) -> None:
    if len(x):
        axes.plot(x, y, "o", color=NEUTRAL, markerfacecolor="none", markersize=4, label="breaks a constraint")


def parallel_coordinates(space: Space, observations: Observations, names: Sequence[str]) -> Figure:
    """One line for each finished trial through all its parameters to its objectives; the colour is the first objective."""
    codes, values = observations.codes.numpy(), observations.values[:, : len(names)].numpy()
    low, high = values.min(0), values.max(0)
    heights = np.concatenate([codes / space.bounds[1].numpy(), (values - low) / np.where(high > low, high - low, 1)], 1)
    num_axes = heights.shape[1]
    figure = Figure(figsize=(max(7, 1.6 * num_axes), 4.2), layout="constrained")
    axes = figure.subplots()
    shade = Normalize(low[0], high[0])
    for height, value in zip(heights, values[:, 0], strict=True):
        axes.plot(range(num_axes), height, color=colormaps[COLORS](shade(value)), linewidth=1, alpha=0.6)
    axes.set_xticks(range(num_axes), [label(name, 16) for name in [*space.names, *names]])
    axes.set(xlim=(-0.1, num_axes - 0.9), yticks=[])
    axes.spines[:].set_visible(False)
    for column, parameter in enumerate(space.parameters.values()):
        scale = _inner_axis(axes, column)
        scale.set_ylim(axes.get_ylim()[0] * (top := float(space.bounds[1, column])), axes.get_ylim()[1] * top)
        ticks(scale.yaxis, parameter)
        _on_white(scale)
    for column in range(len(names)):
        scale = _inner_axis(axes, len(space.names) + column)
        scale.set_ylim(axes.get_ylim())
        scale.set_yticks([0, 1], [f"{low[column]:.3g}", f"{high[column]:.3g}"])
        _on_white(scale)
    return figure


def _inner_axis(axes: Axes, column: int) -> Axes:
    """A scale of its own at one of the upright lines."""
    scale = axes.twinx()
    scale.spines[["left", "top", "bottom"]].set_visible(False)
    scale.spines["right"].set_position(("data", column))
    scale.tick_params(labelsize=7)
    return scale


def _on_white(scale: Axes) -> None:
    """Its labels can be read although lines run beneath them."""
    for text in scale.get_yticklabels():
        text.set_bbox({"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1})


def importances(by_objective: Mapping[str, Mapping[str, float]]) -> Figure:
    """Bars, the most important parameter on top, for each objective."""
    longest = max(len(shares) for shares in by_objective.values())
    figure = Figure(figsize=(8, (0.6 + 0.4 * longest) * len(by_objective) + 0.6), layout="constrained")
    panels = figure.subplots(len(by_objective), 1, squeeze=False).flat
    for axes, (objective, shares) in zip(panels, by_objective.items(), strict=True):
        axes.barh([label(name) for name in shares], list(shares.values()), color=TOTAL)
        axes.invert_yaxis()
        axes.set(xlim=(0, 1), xlabel=f"share of the variance of {label(objective)}")
    return figure


def trade_offs(study: Study) -> Figure:
    """Every two objectives against each other, with the Pareto front."""
    names, front = objective_names(study), {trial.number for trial in study.best_trials}
    finished = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    pairs = [(i, j) for j in range(len(names)) for i in range(j)]
    figure = Figure(figsize=(6 * len(pairs), 4.6), layout="constrained")
    for axes, (i, j) in zip(figure.subplots(1, len(pairs), squeeze=False).flat, pairs, strict=True):
        for inside, color, text in ((False, NEUTRAL, "finished trial"), (True, OBSERVED, "Pareto front")):
            chosen = [t.values for t in finished if keeps_constraints(t) and (t.number in front) is inside]
            points = np.array(chosen, dtype=float).reshape(-1, len(names))
            axes.plot(points[:, i], points[:, j], "o", color=color, markersize=5, label=text)
        broken = np.array([t.values for t in finished if not keeps_constraints(t)], dtype=float).reshape(-1, len(names))
        _mark_broken(axes, broken[:, i], broken[:, j])
        axes.set(xlabel=label(names[i]), ylabel=label(names[j]))
        axes.legend(frameon=False)
    return figure
