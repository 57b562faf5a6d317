"""What a fitted model was fitted to, whoever made it."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def training_features(model: Any) -> Tensor:
    """The features (n, d) that a BoTorch model was fitted to, as they were given; of a list, those of its first model.

    Raises:
        TypeError: if it doesn't say.
    """
    first = model.models[0] if hasattr(model, "models") else model
    inputs = getattr(first, "_original_train_inputs", None)  # a GP with input transforms in evaluation mode
    if inputs is None:
        if not hasattr(first, "train_inputs"):
            raise TypeError(f"{type(first).__name__} doesn't say what it was fitted to: it has no train_inputs")
        inputs = first.train_inputs[0]
    while inputs.dim() > 2:  # one copy for each output
        inputs = inputs[0]
    return inputs
