"""Pictures of predictions, of chains and of optimisations. Each draws on ``ax`` and returns it; no global style is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Protocol

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike
from scipy.stats import rankdata
from torch import Tensor

from bayesnn.predictive import ClassPredictive, Predictive

TOTAL, EPISTEMIC, OBSERVED = "#2a6fb0", "#c1440e", "#222222"
NEUTRAL = "#8a8a8a"


class Chains(Protocol):
    """Draws of chains, as ``inference.WeightPosterior``: chain by chain in the first dimension of the parameters."""

    parameters: dict[str, Tensor]
    num_chains: int
    statistics: dict[str, Tensor]


class Fitted(Protocol):
    """A model with such draws, as ``BNN`` after fit."""

    @property
    def weights(self) -> Chains:
        """The draws."""
        ...


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


def trace(posterior: Chains | Fitted, of: str | Tensor, *, ax: Axes | None = None) -> Axes:
    """One quantity along the chains: lines that overlap and don't drift are what a converged run looks like.

    Args:
        posterior: a fitted BNN, or its ``weights``.
        of: a number of each draw, (S,), chain by chain (say, the function values at one point, which the permutation
            symmetries of weights leave alone); or one entry of a parameter, named as ``weights.summary()`` names it:
            "likelihood.log_noise_std[0, 0]".
        ax: where to draw; a new figure by default.

    Raises:
        ValueError: if there is no such entry, or not one number for each draw.
    """
    values = _by_chain(_chains(posterior), of)
    axes = _axes(ax)
    for index, chain in enumerate(values):
        axes.plot(chain, linewidth=0.8, alpha=0.8, label=f"chain {index + 1}")
    axes.set(xlabel="draw", ylabel=of if isinstance(of, str) else "value")
    return axes


def rank(posterior: Chains | Fitted, of: str | Tensor, *, num_bins: int = 20, ax: Axes | None = None) -> Axes:
    """How the ranks of each chain's draws among those of all chains are spread (Vehtari et al. 2021, section 4.2).

    Chains of one law have flat histograms, at the dotted line but for chance; a tilted one is off in location, one with a
    bulge or a dip in the middle in scale.

    Args:
        posterior, of: as for :func:`trace`.
        num_bins: bins of equal width over all ranks.
        ax: where to draw; a new figure by default.

    Raises:
        ValueError: as :func:`trace`, or if num_bins isn't between 2 and the number of draws.
    """
    values = _by_chain(_chains(posterior), of)
    if not 2 <= num_bins <= values.size:
        raise ValueError(f"num_bins must lie between 2 and the number of draws, {values.size}, found {num_bins}")
    axes = _axes(ax)
    ranks = rankdata(values, axis=None).reshape(values.shape)
    edges = np.linspace(0.5, values.size + 0.5, num_bins + 1)
    for index, chain in enumerate(ranks):
        axes.stairs(np.histogram(chain, edges)[0], edges, linewidth=1.4, label=f"chain {index + 1}")
    axes.axhline(values.shape[1] / num_bins, color=NEUTRAL, linewidth=1, linestyle=":")
    axes.set(xlabel="rank among all draws", ylabel="draws", ylim=(0, None))
    return axes


def energy(posterior: Chains | Fitted, *, ax: Axes | None = None) -> Axes:
    """The energies of a Hamiltonian sampler, and how far one step changes them (Betancourt 2016).

    Where the changes are spread much less than the energies, momenta move the chain too slowly through its energies;
    ``diagnostics`` gives the ratio of the squares as ``e_bfmi``.

    Args:
        posterior: a fitted BNN, or its ``weights``.
        ax: where to draw; a new figure by default.

    Raises:
        ValueError: if the method reported no energies, or fewer than two for each chain.
    """
    statistics = _chains(posterior).statistics
    energies = statistics.get("energy")
    if energies is None or energies.dim() != 2 or len(energies) < 2:
        found = ", ".join(statistics) if energies is None else f"energies of shape {tuple(energies.shape)}"
        raise ValueError(
            f"a plot of energies needs them among the statistics, (draws, chains): found {found or 'none'}"
        )
    values = energies.detach().double().cpu().numpy()
    spread, changes = (values - values.mean(0)).reshape(-1), np.diff(values, axis=0).reshape(-1)
    edges = np.histogram_bin_edges(np.concatenate([spread, changes]), 40)
    axes = _axes(ax)
    for numbers, color, label in ((spread, TOTAL, "energy - its mean"), (changes, EPISTEMIC, "change in one step")):
        density = np.histogram(numbers, edges, density=True)[0]
        axes.stairs(density, edges, fill=True, color=color, alpha=0.35, label=label)
    axes.set(xlabel="energy", ylabel="probability density")
    return axes


def _chains(posterior: Chains | Fitted) -> Chains:
    return posterior.weights if hasattr(posterior, "weights") else posterior


def _by_chain(draws: Chains, of: str | Tensor) -> np.ndarray:
    """(chains, draws)."""
    values = _entry(draws.parameters, of) if isinstance(of, str) else of
    num_draws = len(next(iter(draws.parameters.values())))
    if tuple(values.shape) != (num_draws,):
        found = f"{of!r}, of shape {tuple(values.shape[1:])}" if isinstance(of, str) else str(tuple(values.shape))
        raise ValueError(f"of must be one number of each draw, ({num_draws},), or name an entry: found {found}")
    return _flat(values).reshape(draws.num_chains, -1)


def _entry(parameters: Mapping[str, Tensor], label: str) -> Tensor:
    """The draws of "name" or "name[i, j]"."""
    name, _, entry = label.removesuffix("]").partition("[") if label.endswith("]") else (label, "", "")
    if name not in parameters:
        raise ValueError(f"of must name one of {', '.join(parameters)}, found {label!r}")
    try:
        where: list[slice | int] = [slice(None), *(int(index) for index in entry.split(",") if entry)]
        return parameters[name][tuple(where)]
    except (IndexError, ValueError) as error:
        shape = tuple(parameters[name].shape[1:])
        raise ValueError(f"of must name an entry of {name}, of shape {shape}, found {label!r}") from error


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
