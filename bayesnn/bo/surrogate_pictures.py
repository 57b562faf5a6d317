"""Pictures of what a surrogate makes of a study: one or two parameters vary, the others stay at the best configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from botorch.models.model import Model as BotorchModel
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from optuna.study import Study, StudyDirection

from bayesnn.bo.observations import Observations
from bayesnn.bo.parameters import Categorical, Parameter, all_codes
from bayesnn.bo.pictures import COLORS, label, ticks
from bayesnn.bo.space import Space
from bayesnn.plots import EPISTEMIC, OBSERVED, TOTAL

NUM_GRID = 25
# How many parameters are paired with each other: 5 make 10 pairs.
MAX_PAIRED = 5


class View:
    """A surrogate of one objective, seen from one configuration.

    Args:
        model: the surrogate, fitted to the observations.
        space: the space.
        observations: the finished trials.
        objective: which objective.
        best: index of the best observation.
    """

    def __init__(
        self, model: BotorchModel, space: Space, observations: Observations, objective: int, best: int
    ) -> None:
        self.model, self.space, self.objective = model, space, objective
        self.codes, self.values = observations.codes.numpy(), observations.values[:, objective].numpy()
        self.center = self.codes[best]

    def grid(self, name: str) -> np.ndarray:
        """Codes of a parameter, from its lowest to its highest value."""
        parameter = self.space.parameters[name]
        if parameter.num_values <= NUM_GRID:
            return np.array(all_codes(parameter))
        return np.linspace(0, float(self.space.bounds[1, self.column(name)]), NUM_GRID)

    def column(self, name: str) -> int:
        """Where a parameter stands in the codes."""
        return self.space.names.index(name)

    def along(self, *names: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation over the grid of one or two parameters, with a dimension for each."""
        grid = torch.cartesian_prod(*(torch.as_tensor(self.grid(name)) for name in names)).reshape(-1, len(names))
        codes = torch.as_tensor(self.center).repeat(len(grid), 1)
        codes[:, [self.column(name) for name in names]] = grid
        # One point at a time: nobody needs their covariance.
        with torch.no_grad():
            posterior: Any = self.model.posterior(self.space.encode(codes).unsqueeze(1))
            mean, variance = posterior.mean[:, 0, self.objective], posterior.variance[:, 0, self.objective]
        shape = [len(self.grid(name)) for name in names]
        return mean.reshape(shape).numpy(), variance.clamp(min=0).sqrt().reshape(shape).numpy()


def view_of(model: BotorchModel, study: Study, space: Space, observations: Observations, objective: int) -> View:
    """The surrogate of one of a study's objectives, seen from the best trial; constraints count where any trial keeps them."""
    sign = 1 if study.directions[objective] is StudyDirection.MAXIMIZE else -1
    kept = (observations.values[:, len(study.directions) :] <= 0).all(1)
    merits = sign * observations.values[:, objective]
    best = int(torch.where(kept | ~kept.any(), merits, -torch.inf).argmax())
    return View(model, space, observations, objective, best)


def slices(view: View, names: Sequence[str], objective: str) -> Figure:
    """Mean and two standard deviations along each parameter, and the trials, whose other parameters differ."""
    num_rows = -(-len(names) // 3)
    figure = Figure(figsize=(13, 3.4 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, 3, squeeze=False, sharey=True).ravel()
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    for axes, name in zip(panels, names, strict=False):
        grid, (mean, std) = view.grid(name), view.along(name)
        if isinstance(view.space.parameters[name], Categorical):
            axes.errorbar(grid, mean, 2 * std, fmt="s", color=TOTAL, capsize=4)
        else:
            axes.fill_between(grid, mean - 2 * std, mean + 2 * std, color=TOTAL, alpha=0.2, linewidth=0)
            axes.plot(grid, mean, color=TOTAL)
        axes.plot(view.codes[:, view.column(name)], view.values, ".", color=OBSERVED, markersize=4)
        axes.axvline(float(view.center[view.column(name)]), color=EPISTEMIC, linewidth=1, linestyle=":")
        axes.set_xlabel(label(name))
        ticks(axes.xaxis, view.space.parameters[name])
    for axes in panels[::3]:
        axes.set_ylabel(label(objective))
    return figure


def pairs(view: View, names: Sequence[str]) -> Figure:
    """For every two parameters the mean (below the diagonal) and the standard deviation (above it), with the trials."""
    count = len(names)
    figure = Figure(figsize=(2 + 2.6 * count, 0.8 + 2.4 * count), layout="constrained")
    panels = figure.subplots(count, count, squeeze=False)
    surfaces = {(i, j): view.along(names[j], names[i]) for i in range(count) for j in range(i)}
    for part, cmap, title in ((0, COLORS, "mean"), (1, "magma", "standard deviation")):
        everything = np.concatenate([surface[part].ravel() for surface in surfaces.values()])
        shade = Normalize(everything.min(), everything.max())
        for (i, j), surface in surfaces.items():
            below = part == 0
            row, column = (i, j) if below else (j, i)
            axes, x, y = panels[row, column], names[column], names[row]
            heights = surface[part].T if below else surface[part]
            mesh = axes.pcolormesh(
                view.grid(x), view.grid(y), heights, shading="nearest", cmap=cmap, norm=shade, rasterized=True
            )
            if _smooth(view.space.parameters[x]) and _smooth(view.space.parameters[y]) and np.ptp(heights) > 0:
                axes.contour(view.grid(x), view.grid(y), heights, 6, colors="white", linewidths=0.5)
            axes.plot(view.codes[:, view.column(x)], view.codes[:, view.column(y)], ".", color="white", markersize=4)
            axes.plot(view.center[view.column(x)], view.center[view.column(y)], "*", color=EPISTEMIC, markersize=9)
            ticks(axes.xaxis, view.space.parameters[x])
            ticks(axes.yaxis, view.space.parameters[y])
            axes.tick_params(labelsize=7)
        figure.colorbar(mesh, ax=panels, label=title, fraction=0.03, location="left" if part == 0 else "right")
    for index, name in enumerate(names):
        panels[index, index].set_axis_off()
        panels[index, index].text(0.5, 0.5, label(name), ha="center", va="center")
    return figure


def _smooth(parameter: Parameter) -> bool:
    return not isinstance(parameter, Categorical) and parameter.num_values > 2
