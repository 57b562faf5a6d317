"""Checking and standardising X and Y, and minibatches. Every model's data come through here, once."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor


class BayesnnWarning(UserWarning):
    """Something about the data that was handled, but that the user should know."""


class Data(NamedTuple):
    """Inputs (n, d) and targets (n, m), checked and in a model's own (standardised) units."""

    X: Tensor
    Y: Tensor

    def __len__(self) -> int:
        return self.X.shape[0]


class Scaling(NamedTuple):
    """An affine change of units, ``user = loc + scale * standardised``; loc and scale are (1, d)."""

    loc: Tensor
    scale: Tensor

    def standardise(self, values: Tensor) -> Tensor:
        """From the user's units to standardised ones."""
        return (values - self.loc.to(values)) / self.scale.to(values)

    def to(self, like: Tensor) -> Scaling:
        """In a tensor's dtype and place."""
        return Scaling(self.loc.to(like), self.scale.to(like))


def as_float(values: Any, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """Turn arrays, data frames, lists and tensors into a floating-point tensor.

    Raises:
        TypeError: if the values aren't numbers.
        ValueError: if any is NaN or infinite.
    """
    if isinstance(values, Tensor):
        tensor = values
    else:
        values = values.to_numpy() if hasattr(values, "to_numpy") else values
        try:
            tensor = torch.as_tensor(values)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{name} must hold numbers (a tensor, array or data frame): {error}") from error
    if tensor.is_complex():
        raise TypeError(f"{name} must be real, found {tensor.dtype}")
    if dtype is not None or not tensor.is_floating_point() or tensor.dtype in (torch.float16, torch.bfloat16):
        tensor = tensor.to(dtype or torch.get_default_dtype())
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise ValueError(f"{name} must be finite, found {bad} NaN or infinite value(s); drop or impute those rows")
    return tensor.detach() if not tensor.requires_grad else tensor


def check_inputs(X: Any, name: str = "X", num_features: int | None = None, batched: bool = False) -> Tensor:
    """Check inputs: (n, d) at fit, (*batch, q, d) at prediction (``batched``), finite, at least one row and column.

    Raises:
        TypeError, ValueError: naming what was found and what is wanted.
    """
    X = as_float(X, name)
    wanted = "(*batch, q, d)" if batched else "(n, d)"
    if X.dim() < 2 or (X.dim() > 2 and not batched):
        raise ValueError(f"{name} must have shape {wanted}, found {tuple(X.shape)}; one input column is X[:, None]")
    if X.shape[-1] == 0 or X.shape[-2] == 0:
        raise ValueError(f"{name} must have at least one row and one column, found shape {tuple(X.shape)}")
    if num_features is not None and X.shape[-1] != num_features:
        raise ValueError(f"{name} must have {num_features} columns as at fit, found {X.shape[-1]}")
    return X


def check_targets(Y: Any, num_rows: int, name: str = "Y", like: Tensor | None = None) -> Tensor:
    """Check real-valued targets: (n, m), or (n,) for one output; finite; as many rows as X.

    Raises:
        TypeError, ValueError: naming what was found and what is wanted.
    """
    Y = as_float(Y, name, dtype=like.dtype if like is not None else None)
    return _check_rows(Y.unsqueeze(-1) if Y.dim() == 1 else Y, num_rows, name)


def check_labels(Y: Any, num_rows: int, num_classes: int | None, name: str = "Y") -> Tensor:
    """Check class labels: whole numbers 0 … num_classes-1, (n,) or (n, 1); returns int64 (n, 1).

    Raises:
        TypeError, ValueError: naming what was found and what is wanted.
    """
    labels = as_float(Y, name, dtype=torch.float64)
    if bool((labels != labels.round()).any()):
        raise ValueError(
            f"{name} must hold class labels (whole numbers), found {float(labels[labels != labels.round()][0])}"
        )
    labels = _check_rows(labels.unsqueeze(-1) if labels.dim() == 1 else labels, num_rows, name).long()
    if labels.shape[-1] != 1:
        raise ValueError(f"{name} must hold one column of class labels, found {labels.shape[-1]}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        limit = "" if num_classes is None else f" … {num_classes - 1}"
        raise ValueError(f"{name} must hold labels 0{limit}, found labels from {low} to {high}")
    return labels


def check_counts(Y: Any, num_rows: int, name: str = "Y", like: Tensor | None = None) -> Tensor:
    """Check counts: non-negative whole numbers, (n, m) or (n,).

    Raises:
        TypeError, ValueError: naming what was found and what is wanted.
    """
    counts = check_targets(Y, num_rows, name, like)
    wrong = (counts < 0) | (counts != counts.round())
    if bool(wrong.any()):
        raise ValueError(f"{name} must hold counts (0, 1, 2, …), found {float(counts[wrong][0])}")
    return counts


def _check_rows(Y: Tensor, num_rows: int, name: str) -> Tensor:
    if Y.dim() != 2 or Y.shape[1] == 0:
        raise ValueError(f"{name} must have shape (n, m) or (n,), found {tuple(Y.shape)}")
    if Y.shape[0] != num_rows:
        raise ValueError(f"{name} must have one row for each row of X: X has {num_rows}, {name} has {Y.shape[0]}")
    return Y


def standardisation(values: Tensor, name: str) -> Scaling:
    """Mean and standard deviation (n-1) of each column; constant columns keep scale 1, and a warning says so.

    A single row is centred and keeps scale 1 (one value says nothing about spread).
    """
    if values.shape[-2] == 1:
        return Scaling(values.clone(), torch.ones_like(values))
    # In units of a power of two as large as the largest, so that no square leaves the dtype, and nothing is rounded.
    largest = values.abs().amax(-2, keepdim=True)
    exponent = largest.clamp_min(torch.finfo(values.dtype).tiny).frexp().exponent - 1
    unit = torch.ldexp(torch.ones_like(largest), exponent)
    scaled = values / unit
    loc, scale = unit * scaled.mean(-2, keepdim=True), unit * scaled.std(-2, keepdim=True)
    # Rounding leaves a constant column a tiny spread; anything below it carries no information.
    floor = 10 * torch.finfo(values.dtype).eps * largest
    constant = scale <= floor
    if bool(constant.any()):
        columns = constant.squeeze(-2).nonzero().squeeze(-1).tolist()
        warnings.warn(
            f"{name}: column(s) {columns} are constant over the {values.shape[-2]} rows", BayesnnWarning, stacklevel=4
        )
    return Scaling(loc, torch.where(constant, torch.ones_like(scale), scale))


def check_variance(scaling: Scaling, name: str) -> None:
    """Raise ValueError unless every scale's square, the unit of variances, is a number of the dtype."""
    var = scaling.scale.square()
    if not bool((torch.isfinite(var) & (var > 0)).all()):
        found = ", ".join(f"{value:.3g}" for value in scaling.scale.flatten().tolist())
        raise ValueError(
            f"{name}: its variance leaves {var.dtype} (found standard deviations {found}): choose other units, or float64"
        )


def identity(num_columns: int, like: Tensor) -> Scaling:
    """The change of units that changes nothing."""
    return Scaling(like.new_zeros(1, num_columns), like.new_ones(1, num_columns))


def minibatch(data: Data, batch_size: int | None, generator: torch.Generator) -> Data:
    """``batch_size`` rows drawn without replacement; all rows if ``batch_size`` is None or not smaller than n."""
    if batch_size is None or batch_size >= len(data):
        return data
    rows = torch.randperm(len(data), generator=generator)[:batch_size].to(data.X.device)
    return Data(data.X[rows], data.Y[rows])
