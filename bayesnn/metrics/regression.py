r"""Scores of predictions of numbers: accuracy, intervals and calibration.

Source for calibration by quantiles: Kuleshov, Fenner and Ermon, Accurate uncertainties for deep learning using
calibrated regression (2018).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayesnn.metrics.checks import observations
from bayesnn.predictive import COUNTS, Predictive

CALIBRATION_LEVELS = torch.arange(1, 100, dtype=torch.float64) / 100


def rmse(p: Predictive, y: Tensor) -> float:
    """Root of the mean squared difference between y and the predictive mean.

    Raises:
        TypeError: for class labels.
        ValueError: if y doesn't have the prediction's shape.
    """
    return float((observations(p, y) - p.mean).square().mean().sqrt())


def coverage(p: Predictive, y: Tensor, level: float = 0.9) -> float:
    """Share of observations inside the central interval that should hold them with probability ``level``.

    Raises:
        TypeError: for class labels.
        ValueError: if the level isn't strictly between 0 and 1, or y doesn't have the prediction's shape.
    """
    y = observations(p, y)
    low, high = p.interval(level)
    return float(((low <= y) & (y <= high)).double().mean())


def sharpness(p: Predictive, level: float = 0.9) -> float:
    """Mean width of the central intervals in the units of y: the smaller the better among calibrated predictions.

    Raises:
        TypeError: for class labels.
        ValueError: if the level isn't strictly between 0 and 1.
    """
    low, high = p.interval(level)
    return float((high - low).mean())


def calibration_curve(p: Predictive, y: Tensor, levels: Tensor = CALIBRATION_LEVELS) -> tuple[Tensor, Tensor]:
    r"""Share of observations below their predicted quantiles, for each level: equal to the level if calibrated.

    The share at level :math:`\alpha` is the mean of :math:`1[F(y) \le \alpha]`. For counts, where F jumps, it is the
    mean of :math:`(\alpha - F(y - 1)) / (F(y) - F(y - 1))` cut to [0, 1] (Czado et al. 2009): a calibrated prediction
    gives the diagonal there too.

    Args:
        p: the prediction.
        y: what was observed.
        levels: (L,), between 0 and 1; by default 0.01, 0.02, …, 0.99.

    Returns:
        levels (L,), shares (L,).

    Raises:
        TypeError: for class labels.
        ValueError: if y doesn't have the prediction's shape.
    """
    y = observations(p, y)
    above = p.cdf(y).flatten().double()
    if isinstance(p.components, COUNTS):
        below = p.cdf(y - 1).flatten().double()
        shares = ((levels[:, None] - below) / (above - below)).clamp(0, 1)
    else:
        shares = (above <= levels[:, None]).double()
    return levels, shares.mean(-1)


def calibration_error(p: Predictive, y: Tensor) -> float:
    """Mean distance of the calibration curve from the diagonal, over the levels 0.01 … 0.99.

    Not zero even for a perfect prediction: about 0.3 / sqrt(n) from n observations.

    Raises:
        TypeError: for class labels.
        ValueError: if y doesn't have the prediction's shape.
    """
    levels, shares = calibration_curve(p, y)
    return float((shares - levels).abs().mean())
