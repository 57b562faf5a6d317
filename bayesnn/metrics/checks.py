"""Checking what was observed against a prediction, before it is scored."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Categorical

from bayesnn.predictive import ClassPredictive, Predictive


def observations(p: Predictive, y: Tensor) -> Tensor:
    """Finite numbers, of the prediction's shape and dtype. Raises TypeError if the prediction is of class labels."""
    if isinstance(p, ClassPredictive):
        raise TypeError("this score is for numbers, the prediction is of class labels; see accuracy, brier, nll")
    y = _with_shape(p, torch.as_tensor(y).to(p.mean))
    if not bool(torch.isfinite(y).all()):
        raise ValueError(f"y must be finite, found {int((~torch.isfinite(y)).sum())} NaN or infinite value(s)")
    return y


def class_labels(p: Predictive, y: Tensor) -> Tensor:
    """Whole-number labels, of the prediction's shape. Raises TypeError if the prediction isn't of class labels."""
    if not isinstance(p, ClassPredictive):
        raise TypeError(f"this score is for predictions of class labels, found a {type(p).__name__} of numbers")
    labels = _with_shape(p, torch.as_tensor(y))
    num_classes = p.probabilities.shape[-1] if isinstance(p.components, Categorical) else 2
    wrong = (labels != labels.long()) | (labels < 0) | (labels >= num_classes)
    if bool(wrong.any()):
        raise ValueError(f"y must hold labels 0 … {num_classes - 1}, found {labels[wrong][0].item()}")
    return labels.long()


def _with_shape(p: Predictive, y: Tensor) -> Tensor:
    y = y.unsqueeze(-1) if y.dim() == len(p.shape) - 1 and p.shape[-1] == 1 else y
    if y.shape != p.shape:
        raise ValueError(f"y must have the prediction's shape {tuple(p.shape)}, found {tuple(y.shape)}")
    return y
