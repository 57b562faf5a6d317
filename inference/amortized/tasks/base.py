"""Tasks, and priors over them: where the data sets come from that an amortised network is trained on.

A prior over tasks is any callable ``(batch_size, num_points, generator) -> TaskBatch``. Five lines make one::

    def sines(batch_size, num_points, generator):
        X = 3.4 * torch.rand(batch_size, num_points, 1, generator=generator) - 1.7
        phase = 6.28 * torch.rand(batch_size, 1, 1, generator=generator)
        f = 1.4 * torch.sin(2 * X + phase)
        return TaskBatch(X, f + 0.1 * torch.randn(f.shape, generator=generator), f)

Units: those of standardised data, which is what a model makes of a user's. A column of X has mean about 0 and standard
deviation about 1 over the region of interest (the unit cube becomes ``(X - 0.5) * sqrt(12)``), and so have the outcomes
of a task, as far as the prior can see to it (``centred`` does so for Gaussian processes).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Process(NamedTuple):
    r"""Given its hyperparameters, f is Gaussian and observations have normal noise.

    Attributes:
        mean: (B, N, 1) of f. Of a network with known weights, f itself.
        covariance: (B, N, N) of f. Of a network with known weights, 0.
        noise_std: (B,).
    """

    mean: Tensor
    covariance: Tensor
    noise_std: Tensor


class TaskBatch(NamedTuple):
    """B data sets of N points each; the first n points of each serve as the context, the others as queries.

    Attributes:
        X: (B, N, d) inputs; features a task doesn't have are zero.
        y: (B, N, 1) observations, or class labels (whole numbers).
        f: (B, N, 1) noise-free function values at the same points; None for classes.
        num_features: (B,) int64, how many of the d features each task has, the first ones; None: all.
        process: what f and y follow once all that the prior drew besides is known; None: the prior doesn't say.
    """

    X: Tensor
    y: Tensor
    f: Tensor | None = None
    num_features: Tensor | None = None
    process: Process | None = None


def check_batch(batch: TaskBatch, batch_size: int, num_points: int, network: Any) -> None:
    """What a prior has drawn, by its shapes, and by what the network can take.

    Raises:
        TypeError: if it is no ``TaskBatch``.
        ValueError: for other shapes than asked for, numbers of features that aren't there, more columns than the network has,
            and labels that aren't its classes.
    """
    if not isinstance(batch, TaskBatch):
        raise TypeError(f"prior must give a TaskBatch, found {type(batch).__name__}")
    shape, X, number = (batch_size, num_points), batch.X, batch.num_features
    for name, value in zip("Xy", (X, batch.y), strict=True):
        if not isinstance(value, Tensor):
            raise TypeError(f"prior must give {name} as a tensor, found {type(value).__name__}")
    if X.shape[:-1] != shape or not X.is_floating_point():
        found = f"{tuple(X.shape)}, {X.dtype}"
        raise ValueError(f"prior must give X of shape {(*shape, 'd')}, in floating point, found {found}")
    for name, values in (("y", batch.y), ("f", batch.f)):
        if values is not None and values.shape != (*shape, 1):
            raise ValueError(f"prior must give {name} of shape {(*shape, 1)}, found {tuple(values.shape)}")
    most, classes = getattr(network, "max_features", None), getattr(network, "num_classes", None)
    if most is not None and X.shape[-1] > most:
        raise ValueError(
            f"prior must give X of at most {most} columns, as many as the network has, found {X.shape[-1]}"
        )
    if classes is not None and not bool(((batch.y == batch.y.round()) & (batch.y >= 0) & (batch.y < classes)).all()):
        raise ValueError(f"prior must give labels y from 0 to {classes - 1}, whole numbers")
    if number is None:
        return
    if number.shape != (batch_size,) or not bool(((number >= 1) & (number <= X.shape[-1])).all()):
        raise ValueError(f"prior must give num_features of shape {(batch_size,)}, each from 1 to {X.shape[-1]}")


class TaskPrior(Protocol):
    """Draws tasks; all randomness comes from the generator."""

    def __call__(self, batch_size: int, num_points: int, generator: torch.Generator) -> TaskBatch: ...


class Exact(NamedTuple):
    """Log densities (B, N - n) of the queries' function values and observations given the context."""

    log_f: Tensor
    log_y: Tensor


class Draws:
    """Random numbers for a batch of tasks: a leading dimension of size B, float64."""

    def __init__(self, batch_size: int, generator: torch.Generator) -> None:
        self.batch_size, self.generator = batch_size, generator

    def uniform(self, *shape: int) -> Tensor:
        """Over (0, 1)."""
        return torch.rand(
            self.batch_size, *shape, generator=self.generator, dtype=torch.float64, device=self.generator.device
        )

    def normal(self, *shape: int) -> Tensor:
        """Standard normal."""
        return torch.randn(
            self.batch_size, *shape, generator=self.generator, dtype=torch.float64, device=self.generator.device
        )

    def integers(self, high: int, *shape: int) -> Tensor:
        """From 0 to high - 1."""
        return torch.randint(high, (self.batch_size, *shape), generator=self.generator, device=self.generator.device)

    def choice(self, values: tuple[float, ...], *shape: int) -> Tensor:
        """One of the values, all with the same probability."""
        return torch.tensor(values, dtype=torch.float64, device=self.generator.device)[
            self.integers(len(values), *shape)
        ]


def draw_inputs(draw: Draws, num_points: int, num_features: int) -> Tensor:
    """Inputs as users have them, (B, N, d) in standardised units.

    Uniform in a cube, standard normal, or normal with correlated columns (low rank plus diagonal), a third of the tasks
    each; in a fifth of the tasks half of the points are drawn together around one centre, as an optimiser's are. Columns
    are then standardised over the task and moved by a small random shift and scale, because in use their mean and scale
    are estimates.
    """
    d = num_features
    uniform = (draw.uniform(num_points, d) - 0.5) * math.sqrt(12)
    normal = draw.normal(num_points, d)
    rank = max(1, d // 2)
    correlated = draw.normal(num_points, rank) @ draw.normal(rank, d) / math.sqrt(rank)
    correlated = correlated + (draw.uniform(1, 1) + 0.1) * normal
    kind = draw.integers(3, 1, 1)
    X = torch.where(kind == 0, uniform, torch.where(kind == 1, normal, correlated))
    near = 0.1 + 0.4 * draw.uniform(1, 1)
    clustered = (draw.uniform(1, 1) < 0.2) & (draw.uniform(num_points, 1) < 0.5)
    X = torch.where(clustered, draw.normal(1, d) + near * X, X)
    X = (X - X.mean(-2, keepdim=True)) / X.std(-2, correction=0, keepdim=True).clamp_min(1e-3)
    return (X + 0.15 * draw.normal(1, d)) * torch.exp(0.15 * draw.normal(1, d))
