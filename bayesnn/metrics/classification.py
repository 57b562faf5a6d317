r"""Scores of predictions of class labels, and of uncertainties that should tell unfamiliar inputs apart.

Source for calibration: Guo et al., On calibration of modern neural networks (2017).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical

from bayesnn.metrics.checks import class_labels
from bayesnn.predictive import ClassPredictive


def accuracy(p: ClassPredictive, y: Tensor) -> float:
    """Share of labels that the most probable one gets right.

    Raises:
        TypeError: if the prediction isn't of class labels.
        ValueError: if the labels don't have the prediction's shape.
    """
    labels = class_labels(p, y)
    return float((_most_probable(p)[1] == labels).double().mean())


def brier(p: ClassPredictive, y: Tensor) -> float:
    r"""Brier score: :math:`\sum_k (p_k - 1[y = k])^2`, between 0 and 2; for Bernoulli :math:`(p - y)^2`, half of that.

    Raises:
        TypeError: if the prediction isn't of class labels.
        ValueError: if the labels don't have the prediction's shape.
    """
    labels, probabilities = class_labels(p, y), p.probabilities
    if isinstance(p.components, Categorical):
        observed = F.one_hot(labels.squeeze(-1), probabilities.shape[-1])
        return float((probabilities - observed).square().sum(-1).mean())
    return float((probabilities - labels).square().mean())


def reliability(p: ClassPredictive, y: Tensor, num_bins: int = 15) -> tuple[Tensor, Tensor, Tensor]:
    """Confidence and accuracy of the most probable label, in bins of equal width over its probability.

    Bin b of B holds the points with probability in (b / B, (b + 1) / B].

    Returns:
        Counts, mean probabilities and accuracies, (B,) each; the last two are NaN in empty bins.

    Raises:
        TypeError: if the prediction isn't of class labels.
        ValueError: if num_bins is below 1 or the labels don't have the prediction's shape.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, found {num_bins}")
    labels = class_labels(p, y)
    confidence, predicted = (tensor.flatten() for tensor in _most_probable(p))
    correct = (predicted == labels.flatten()).double()
    # The nudge puts probabilities on an edge into the bin below it, those that rounding left a little above it too.
    index = (confidence.double() * num_bins - 1e-6).floor().long().clamp(0, num_bins - 1)
    counts = torch.bincount(index, minlength=num_bins)
    confidences = torch.bincount(index, confidence.double(), num_bins) / counts
    return counts, confidences, torch.bincount(index, correct, num_bins) / counts


def expected_calibration_error(p: ClassPredictive, y: Tensor, num_bins: int = 15) -> float:
    r"""Top-label calibration error: :math:`\sum_b \frac{n_b}{n} |\mathrm{accuracy}_b - \mathrm{confidence}_b|`.

    Biased upwards: a bin of n_b points adds noise of about :math:`0.8 \sqrt{c (1 - c) / n_b}` at confidence c, so
    compare models on the same points with the same bins, and don't read a small value as a fault. The bins are
    :func:`reliability`'s.

    Raises:
        TypeError: if the prediction isn't of class labels.
        ValueError: if num_bins is below 1 or the labels don't have the prediction's shape.
    """
    counts, confidences, accuracies = reliability(p, y, num_bins)
    filled = counts > 0
    gaps = (accuracies - confidences).abs()[filled]
    return float((counts[filled] * gaps).sum() / counts.sum())


def auroc(scores_in: Tensor, scores_out: Tensor) -> float:
    """How well an uncertainty tells out-of-distribution points from the rest: P(out > in) + P(out = in) / 2.

    Args:
        scores_in: uncertainty of in-distribution points, any shape; higher means more uncertain.
        scores_out: uncertainty of out-of-distribution points.

    Returns:
        The area under the receiver operating characteristic: 1 is perfect, 0.5 is chance.

    Raises:
        ValueError: if either is empty or holds NaN.
    """
    for name, scores in (("scores_in", scores_in), ("scores_out", scores_out)):
        if scores.numel() == 0 or bool(scores.isnan().any()):
            raise ValueError(f"{name} must hold at least one number and no NaN, found {scores.numel()} value(s)")
    ordered, out = scores_in.flatten().sort().values, scores_out.flatten()
    below, not_above = torch.searchsorted(ordered, out), torch.searchsorted(ordered, out, right=True)
    return float((below + not_above).double().mean() / (2 * ordered.numel()))


def _most_probable(p: ClassPredictive) -> tuple[Tensor, Tensor]:
    """Probability of the most probable label, and that label, (*batch, q, m) both."""
    probabilities = p.probabilities
    if isinstance(p.components, Categorical):
        confidence, labels = probabilities.max(-1, keepdim=True)
        return confidence, labels
    return torch.maximum(probabilities, 1 - probabilities), p.labels
