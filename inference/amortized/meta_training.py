"""Training an amortised network on tasks drawn from a prior, and how far it stays behind the exact answer.

Each step draws one context size n, a batch of tasks of n + q points, and takes one Adam step on

.. math::
    L = -\\frac{1}{B q} \\sum_{b, j} \\log p_\\theta(f_{bj} \\mid x_{bj}, D_b)
    + \\log p_\\theta(y_{bj} \\mid x_{bj}, D_b),

with the outcomes standardised by the context. Its minimiser is the posterior predictive under the prior (Müller et
al., Transformers can do Bayesian inference, ICLR 2022, corollary 1.1).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.func import functional_call

from bayesnn.configured import Configured, describe
from bayesnn.inference.amortized.tasks import TaskBatch, TaskPrior, exact_log_prob, standardise_context
from bayesnn.inference.optimizer import AdamState, adam_init, adam_step, clip_by_norm, warmup_cosine


class AmortizedNetwork(Protocol):
    """An ``nn.Module`` that gives the distributions of f and of y at each query, see ``SetTransformer.forward``."""

    def __call__(
        self, context_X: Tensor, context_y: Tensor, X: Tensor, num_features: Tensor | None = None
    ) -> tuple[Distribution, Distribution]: ...


class MetaTarget(NamedTuple):
    """What is trained on what."""

    network: nn.Module
    prior: TaskPrior

    @property
    def fingerprint(self) -> str:
        """Ties a checkpoint to the network's shape and the prior's settings (as far as the prior describes itself)."""
        prior = describe(self.prior) if isinstance(self.prior, Configured) else getattr(self.prior, "__qualname__", "")
        text = json.dumps([describe(self.network), prior], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class MetaState(NamedTuple):
    """Parameters and Adam's memory."""

    params: dict[str, Tensor]
    adam: AdamState


class MetaInfo(NamedTuple):
    """One step's loss per query (both terms together, standardised units), gradient norm before clipping, and n."""

    loss: Tensor
    grad_norm: Tensor
    num_context: Tensor


@dataclass(frozen=True)
class MetaTraining(Configured):
    """Adam with warm-up and cosine decay over batches of tasks; a method for :func:`bayesnn.inference.run.run`.

    The context size is 0 or 1 in a tenth of the steps and otherwise log-uniform over 2..``max_context``. The number
    of tasks per batch is inverse to their number of rows, so that every step costs about the same.

    Attributes:
        num_steps: steps.
        max_context: largest context.
        num_queries: q.
        rows_per_step: tasks times rows (context and queries), approximately.
        max_tasks: most tasks in a batch.
        lr: peak learning rate.
        num_warmup: steps of linear warm-up.
        max_norm: gradients are clipped to this norm.
    """

    num_steps: int = 10_000
    max_context: int = 100
    num_queries: int = 48
    rows_per_step: int = 2048
    max_tasks: int = 32
    lr: float = 1e-3
    num_warmup: int = 500
    max_norm: float = 1.0

    def init(self, target: MetaTarget, generator: torch.Generator) -> MetaState:
        """Start from the network's current parameters."""
        params = {name: value.detach().clone() for name, value in target.network.named_parameters()}
        return MetaState(params, adam_init(params))

    def step(self, target: MetaTarget, state: MetaState, generator: torch.Generator) -> tuple[MetaState, MetaInfo]:
        """One batch of tasks, one Adam step."""
        num_context = self._context_size(generator)
        rows = num_context + self.num_queries
        num_tasks = max(1, min(self.max_tasks, self.rows_per_step // rows))
        batch = _cast(target.prior(num_tasks, rows, generator), next(iter(state.params.values())).dtype)
        params = {name: value.detach().requires_grad_() for name, value in state.params.items()}
        loss = meta_loss(target.network, params, batch, num_context)
        grads = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
        grads, norm = clip_by_norm(grads, self.max_norm)
        lr = self.lr * warmup_cosine(int(state.adam.step), self.num_steps, self.num_warmup)
        new, adam = adam_step(state.params, grads, state.adam, lr)
        return MetaState(new, adam), MetaInfo(loss.detach(), norm, torch.tensor(num_context))

    def keep(self, state: MetaState, index: int) -> None:
        """No step's parameters are a draw."""
        return None

    def result(
        self, target: MetaTarget, state: MetaState, draws: dict[str, Tensor], infos: dict[str, Tensor]
    ) -> MetaState:
        """Load the trained parameters into the network and return the final state."""
        target.network.load_state_dict(state.params, strict=False)
        return state

    def _context_size(self, generator: torch.Generator) -> int:
        kind, position = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        if kind < 0.1 or self.max_context < 2:
            return min(int(kind < 0.05), self.max_context)
        return min(self.max_context, int(2 * ((self.max_context + 1) / 2) ** position))


def meta_loss(network: nn.Module, params: dict[str, Tensor], batch: TaskBatch, num_context: int) -> Tensor:
    """Minus the mean over queries of log p(f) + log p(y) in standardised units, a scalar."""
    n = num_context
    loc, scale = standardise_context(batch.y[:, :n])
    arguments = (batch.X[:, :n], (batch.y[:, :n] - loc) / scale, batch.X[:, n:], batch.num_features)
    f, y = functional_call(network, params, arguments)
    standardised_f, standardised_y = ((values[:, n:] - loc) / scale for values in (batch.f, batch.y))
    return -(f.log_prob(standardised_f[..., 0]) + y.log_prob(standardised_y[..., 0])).mean()


@torch.no_grad()
def gap_to_exact(
    network: nn.Module,
    prior: TaskPrior,
    generator: torch.Generator,
    num_tasks: int = 256,
    context_sizes: Sequence[int] = (0, 1, 4, 16, 64, 256),
    num_queries: int = 48,
    tasks_per_batch: int = 16,
) -> dict[str, dict[str, float]]:
    """Mean negative log densities of held-out queries, in nats per query and the tasks' units, minus the exact ones.

    The exact Gaussian process knows each task's hyperparameters and the network doesn't, so the gap of even a perfect
    network is positive.

    Args:
        network: as in :class:`AmortizedNetwork`.
        prior: its tasks must have ``covariance`` and ``noise_std``.
        generator: draws the tasks.
        num_tasks: tasks per context size.
        context_sizes: values of n.
        num_queries: queries per task.
        tasks_per_batch: tasks at a time.

    Returns:
        For each n (as a string) ``nll_f``, ``nll_y``, ``exact_nll_f``, ``exact_nll_y``, ``gap_f``, ``gap_y``, the
        standard errors ``stderr_f`` and ``stderr_y`` of the gaps over tasks, and ``coverage_y``, the share of
        observations inside the central 90 % interval.
    """
    dtype = next(network.parameters()).dtype
    table: dict[str, dict[str, float]] = {}
    for n in context_sizes:
        columns: dict[str, list[Tensor]] = {}
        for start in range(0, num_tasks, tasks_per_batch):
            batch = prior(min(tasks_per_batch, num_tasks - start), n + num_queries, generator)
            for name, values in _held_out(network, batch, n, dtype).items():
                columns.setdefault(name, []).append(values)
        per_task = {name: torch.cat(values) for name, values in columns.items()}
        row = {name: float(values.mean()) for name, values in per_task.items()}
        for part in ("f", "y"):
            gaps = per_task[f"nll_{part}"] - per_task[f"exact_nll_{part}"]
            row[f"gap_{part}"] = float(gaps.mean())
            row[f"stderr_{part}"] = float(gaps.std() / math.sqrt(len(gaps)))
        table[str(n)] = row
    return table


def _held_out(network: nn.Module, batch: TaskBatch, n: int, dtype: torch.dtype) -> dict[str, Tensor]:
    loc, scale = standardise_context(batch.y[:, :n])
    small = _cast(batch, dtype)
    context_y = ((batch.y[:, :n] - loc) / scale).to(dtype)
    f, y = network(small.X[:, :n], context_y, small.X[:, n:], batch.num_features)
    standardised_f, standardised_y = (((v[:, n:] - loc) / scale)[..., 0].to(dtype) for v in (batch.f, batch.y))
    log_f, log_y = (d.log_prob(v).double() - scale.log()[..., 0] for d, v in ((f, standardised_f), (y, standardised_y)))
    exact_f, exact_y = exact_log_prob(batch, n)
    rank = y.cdf(standardised_y)
    values = {"nll_f": -log_f, "nll_y": -log_y, "exact_nll_f": -exact_f, "exact_nll_y": -exact_y}
    values["coverage_y"] = ((rank > 0.05) & (rank < 0.95)).double()
    return {name: value.mean(-1) for name, value in values.items()}


def _cast(batch: TaskBatch, dtype: torch.dtype) -> TaskBatch:
    return batch._replace(X=batch.X.to(dtype), y=batch.y.to(dtype), f=batch.f.to(dtype))
