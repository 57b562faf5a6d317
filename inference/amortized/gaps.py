"""How far an amortised network stays behind the exact answer of its prior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bayesnn.checks import count
from bayesnn.inference.amortized.meta_training import cast
from bayesnn.inference.amortized.tasks import TaskBatch, TaskPrior


def gap_to_exact(
    network: nn.Module,
    prior: TaskPrior,
    generator: torch.Generator,
    num_tasks: int = 256,
    context_sizes: Sequence[int] = (0, 1, 4, 16, 64, 256),
    num_queries: int = 48,
    tasks_per_batch: int = 16,
) -> dict[str, dict[str, float]]:
    """Mean negative log densities of held-out queries, in nats per query, minus those of the exact answer.

    The gap is at least 0 in expectation; a prior whose ``exact`` knows what a network can't know, such as each task's
    hyperparameters, leaves a gap to even the best of all networks.

    Args:
        network: as in :class:`AmortizedNetwork`.
        prior: one with a method ``exact(batch, num_context)``.
        generator: draws the tasks.
        num_tasks: tasks per context size.
        context_sizes: values of n.
        num_queries: queries per task.
        tasks_per_batch: tasks at a time.

    Returns:
        For each n (as a string) ``nll_f``, ``nll_y``, ``exact_nll_f``, ``exact_nll_y``, ``gap_f``, ``gap_y``, the
        standard errors ``stderr_f`` and ``stderr_y`` of the gaps over tasks, and ``coverage_y``, the share of
        observations inside the central 90 % interval.

    Raises:
        TypeError: for a prior without exact answers.
    """
    if not callable(getattr(prior, "exact", None)):
        raise TypeError(f"prior must have a method exact(batch, num_context), found {prior!r}")
    table: dict[str, dict[str, float]] = {}
    for n in context_sizes:
        per_task = _per_task(network, prior, generator, num_tasks, n, num_queries, tasks_per_batch)
        row = {name: float(values.mean()) for name, values in per_task.items()}
        for part in ("f", "y"):
            gaps = per_task[f"nll_{part}"] - per_task[f"exact_nll_{part}"]
            row[f"gap_{part}"] = float(gaps.mean())
            row[f"stderr_{part}"] = float(gaps.std() / math.sqrt(len(gaps)))
        table[str(n)] = row
    return table


def held_out_nll(
    network: nn.Module,
    prior: TaskPrior,
    generator: torch.Generator,
    num_tasks: int = 256,
    context_sizes: Sequence[int] = (0, 1, 4, 16, 64, 256),
    num_queries: int = 48,
    tasks_per_batch: int = 16,
) -> dict[str, dict[str, float]]:
    """Mean negative log densities of held-out queries, for priors without exact answers; arguments as above.

    Returns:
        For each n (as a string) ``nll_f`` and ``nll_y``, or ``nll`` of classes, in nats per query, and ``stderr``, that of the
        last one over tasks.
    """
    table: dict[str, dict[str, float]] = {}
    for n in context_sizes:
        per_task = _per_task(network, prior, generator, num_tasks, n, num_queries, tasks_per_batch)
        names = ("nll_f", "nll_y") if "nll_f" in per_task else ("nll",)
        row = {name: float(per_task[name].mean()) for name in names}
        table[str(n)] = row | {"stderr": float(per_task[names[-1]].std() / math.sqrt(num_tasks))}
    return table


@torch.no_grad()
def _per_task(
    network: nn.Module,
    prior: Any,
    generator: torch.Generator,
    num_tasks: int,
    n: int,
    num_queries: int,
    tasks_per_batch: int,
) -> dict[str, Tensor]:
    """Means over each task's queries, (num_tasks,) each."""
    count("num_tasks", num_tasks, least=2)
    dtype = next(network.parameters()).dtype
    columns: dict[str, list[Tensor]] = {}
    for start in range(0, num_tasks, tasks_per_batch):
        batch = prior(min(tasks_per_batch, num_tasks - start), n + num_queries, generator)
        for name, values in _held_out(network, prior, batch, n, dtype).items():
            columns.setdefault(name, []).append(values)
    return {name: torch.cat(values) for name, values in columns.items()}


def _held_out(network: nn.Module, prior: Any, batch: TaskBatch, n: int, dtype: torch.dtype) -> dict[str, Tensor]:
    small = cast(batch, dtype)
    laws = network(small.X[:, :n], small.y[:, :n], small.X[:, n:], batch.num_features)
    values_y = small.y[:, n:, 0]
    if small.f is None:
        values = {"nll": -laws[0].log_prob(values_y).double()}
    else:
        f, y = laws
        rank = y.cdf(values_y)
        values = {"nll_f": -f.log_prob(small.f[:, n:, 0]).double(), "nll_y": -y.log_prob(values_y).double()}
        values["coverage_y"] = ((rank > 0.05) & (rank < 0.95)).double()
        if callable(getattr(prior, "exact", None)):
            exact = prior.exact(batch, n)
            values |= {"exact_nll_f": -exact.log_f, "exact_nll_y": -exact.log_y}
    return {name: value.mean(-1) for name, value in values.items()}
