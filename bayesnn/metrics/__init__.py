r"""How good a prediction is: scores of a :class:`~bayesnn.predictive.Predictive` against what was observed.

Every function of a prediction takes ``(p, y)``, with y of p's shape (*batch, q, m), or (*batch, q) for one output, and
returns a number: the mean over points and outputs, in the units of y. Lower is better for every error, score and width;
higher for accuracy and AUROC. Uncertainties are scores where higher means more uncertain.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bayesnn.metrics.checks import class_labels, observations
from bayesnn.metrics.classification import accuracy, auroc, brier, expected_calibration_error, reliability
from bayesnn.metrics.crps import crps, crps_draws, crps_gaussian, crps_gaussian_mixture, pointwise_crps
from bayesnn.metrics.regression import calibration_curve, calibration_error, coverage, rmse, sharpness
from bayesnn.predictive import ClassPredictive, Predictive


def nll(p: Predictive, y: Tensor) -> float:
    """Negative log predictive density, the mean of -log p(y) over points (joint over the outputs of a point), in nats.

    Raises:
        ValueError: if y doesn't have the prediction's shape.
    """
    y = class_labels(p, y) if isinstance(p, ClassPredictive) else observations(p, y)
    return -float(p.log_prob(y).mean())


def summary(p: Predictive, y: Tensor) -> dict[str, float]:
    """The usual scores by name: for class labels nll, accuracy, brier and expected calibration error, else
    nll, rmse, crps, the 90 % interval's coverage and width, and calibration error.

    Raises:
        ValueError: if y doesn't have the prediction's shape.
    """
    if isinstance(p, ClassPredictive):
        functions: dict[str, Callable[..., float]] = {
            "nll": nll,
            "accuracy": accuracy,
            "brier": brier,
            "ece": expected_calibration_error,
        }
        return {name: function(p, y) for name, function in functions.items()}
    scores = {"nll": nll(p, y), "rmse": rmse(p, y), "crps": crps(p, y)}
    scores |= {"coverage_90": coverage(p, y, 0.9), "sharpness_90": sharpness(p, 0.9)}
    return scores | {"calibration_error": calibration_error(p, y)}


__all__ = [
    "accuracy",
    "auroc",
    "brier",
    "calibration_curve",
    "calibration_error",
    "coverage",
    "crps",
    "crps_draws",
    "crps_gaussian",
    "crps_gaussian_mixture",
    "expected_calibration_error",
    "nll",
    "pointwise_crps",
    "reliability",
    "rmse",
    "sharpness",
    "summary",
]
