"""Training an amortised network on tasks drawn from a prior.

Each step draws one context size n, a batch of tasks of n + q points, and takes one step of Adam (and of Muon, for the matrices
that the network names) on

.. math::
    L = -\\frac{1}{B q} \\sum_{b, j} \\log p_\\theta(f_{bj} \\mid x_{bj}, D_b)
    + \\log p_\\theta(y_{bj} \\mid x_{bj}, D_b),

in the tasks' own units. Its minimiser is the posterior predictive under the prior (Müller et al., Transformers can do
Bayesian inference, ICLR 2022, corollary 1.1). Where the prior says what f and y follow under a task's own hyperparameters,
the values are integrated out: the same expectation with less noise (Rao and Blackwell), and the same minimiser.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal
from torch.func import functional_call

from bayesnn.checks import check_fields, count, fraction, positive
from bayesnn.configured import Configured, describe
from bayesnn.histogram import Histogram
from bayesnn.inference.amortized.tasks import TaskBatch, TaskPrior
from bayesnn.inference.amortized.tasks.base import check_batch
from bayesnn.inference.amortized.tasks.covariances import given_hyperparameters
from bayesnn.inference.optimizer import (
    AdamState,
    adam_init,
    adam_step,
    clip_by_norm,
    muon_init,
    muon_step,
    warmup_cosine,
)

MATRIX_DECAY = 0.01  # Muon's steps don't shrink with the weights


class AmortizedNetwork(Protocol):
    """An ``nn.Module`` that gives the distributions of f and of y at each query, see ``SetTransformer.forward``."""

    def __call__(
        self, context_X: Tensor, context_y: Tensor, X: Tensor, num_features: Tensor | None = None
    ) -> tuple[Distribution, Distribution]: ...


class MetaTarget(NamedTuple):
    """What is trained on what, and where.

    Attributes:
        network: on the device where it is trained.
        prior: draws tasks with a generator of that device.
        fabric: a launched ``lightning.fabric.Fabric``, for other precisions and several devices; None: this process alone,
            in the network's own precision.
    """

    network: nn.Module
    prior: TaskPrior
    fabric: Any = None

    @property
    def fingerprint(self) -> str:
        """Ties a checkpoint to the network's shape and the prior's settings (as far as the prior describes itself)."""
        try:
            prior = describe(self.prior)
        except TypeError:  # a function, or made of functions
            prior = getattr(self.prior, "__qualname__", type(self.prior).__qualname__)
        text = json.dumps([describe(self.network), prior], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class MetaState(NamedTuple):
    """Parameters, Adam's memory, Muon's momentum, and the parameters' running mean, which is the result."""

    params: dict[str, Tensor]
    adam: AdamState
    momentum: dict[str, Tensor]
    average: dict[str, Tensor]


class MetaInfo(NamedTuple):
    """One step's loss per query (both terms together), gradient norm before clipping, and the last batch's n."""

    loss: Tensor
    grad_norm: Tensor
    num_context: Tensor


@dataclass(frozen=True)
class MetaTraining(Configured):
    """Adam with warm-up and cosine decay over batches of tasks; a method for :func:`bayesnn.inference.run.run`.

    The context size is 0 or 1 in a twentieth of the batches, log-uniform over 2..N in a share of ``log_uniform``, and uniform
    in the others, since most is to be learned about large contexts; N grows geometrically from 8 to ``max_context`` over the
    first ``num_curriculum`` steps. The number of tasks per batch is inverse to their number of
    rows, so that every batch costs about the same. The result are the parameters' running mean, over about the last
    1 / (1 - ``average_decay``) steps.

    Attributes:
        num_steps: steps.
        max_context: largest context.
        num_queries: q.
        rows_per_batch: tasks times rows (context and queries), approximately.
        max_tasks: most tasks in a batch.
        num_batches: whose gradients are averaged for one step, on each device.
        lr: peak learning rate of Adam.
        matrix_lr: peak learning rate of Muon, for the network's ``hidden_matrices`` (a set of parameters' names; without it
            all parameters are Adam's); its author's.
        num_warmup: steps of linear warm-up.
        log_uniform: share of batches with context sizes that are log-uniform.
        num_curriculum: steps until contexts of all sizes are drawn.
        max_norm: gradients are clipped to this norm.
        average_decay: of the running mean; 0: the last parameters alone.

    Raises:
        ValueError: for numbers out of range.
    """

    num_steps: int = 10_000
    max_context: int = 100
    num_queries: int = 48
    rows_per_batch: int = 2048
    max_tasks: int = 32
    num_batches: int = 1
    lr: float = 1e-3
    matrix_lr: float = 0.02
    num_warmup: int = 500
    num_curriculum: int = 0
    log_uniform: float = 1 / 3
    max_norm: float = 1.0
    average_decay: float = 0.999

    def __post_init__(self) -> None:
        check_fields(self, count, "num_steps", "num_queries", "rows_per_batch", "max_tasks", "num_batches")
        check_fields(self, partial(count, least=0), "max_context", "num_warmup", "num_curriculum")
        check_fields(self, positive, "lr", "matrix_lr", "max_norm")
        check_fields(self, partial(fraction, interval="[0, 1)"), "average_decay", "log_uniform")

    def init(self, target: MetaTarget, generator: torch.Generator) -> MetaState:
        """Start from the network's current parameters."""
        params = {name: value.detach().clone() for name, value in target.network.named_parameters()}
        matrices, others = _parted(target.network, params)
        average = {name: value.clone() for name, value in params.items()}
        return MetaState(params, adam_init(others), muon_init(matrices), average)

    def step(self, target: MetaTarget, state: MetaState, generator: torch.Generator) -> tuple[MetaState, MetaInfo]:
        """A few batches of tasks, one Adam step."""
        params = {name: value.detach().requires_grad_() for name, value in state.params.items()}
        some, index = next(iter(params.values())), int(state.adam.step)
        grads = {name: torch.zeros_like(value) for name, value in params.items()}
        loss, num_context = some.new_zeros(()), 0
        for _ in range(self.num_batches):
            num_context = self._context_size(generator, index)
            rows = num_context + self.num_queries
            num_tasks = max(1, min(self.max_tasks, self.rows_per_batch // rows))
            own = _own_generator(target, generator, some.device)
            batch = target.prior(num_tasks, rows, own)
            check_batch(batch, num_tasks, rows, target.network)
            with nullcontext() if target.fabric is None else target.fabric.autocast():
                one = meta_loss(target.network, params, batch, num_context)
            for grad, found in zip(grads.values(), torch.autograd.grad(one, list(params.values())), strict=True):
                grad += found / self.num_batches
            loss += one.detach() / self.num_batches
        if not bool(loss.isfinite()):
            raise FloatingPointError(
                f"the loss is {float(loss)} at step {index}: look at what the prior draws, or lower lr"
            )
        if target.fabric is not None:
            grads, loss = target.fabric.all_reduce((grads, loss), reduce_op="mean")
        grads, norm = clip_by_norm(grads, self.max_norm)
        factor = warmup_cosine(index, self.num_steps, self.num_warmup)
        (matrices, others), (of_matrices, of_others) = (_parted(target.network, all) for all in (state.params, grads))
        others, adam = adam_step(others, of_others, state.adam, factor * self.lr)
        matrices, momentum = muon_step(matrices, of_matrices, state.momentum, factor * self.matrix_lr, MATRIX_DECAY)
        new = others | matrices
        # Over the last tenth of the steps at first, so that it doesn't remember the start.
        decay = min(self.average_decay, (index + 1) / (index + 10))
        average = {name: torch.lerp(value, state.average[name], decay) for name, value in new.items()}
        return MetaState(new, adam, momentum, average), MetaInfo(loss.cpu(), norm.cpu(), torch.tensor(num_context))

    def keep(self, state: MetaState, index: int) -> None:
        """No step's parameters are a draw."""
        return None

    def result(
        self, target: MetaTarget, state: MetaState, draws: dict[str, Tensor], infos: dict[str, Tensor]
    ) -> MetaState:
        """Load the averaged parameters into the network and return the final state."""
        target.network.load_state_dict(state.average, strict=False)
        return state

    def _context_size(self, generator: torch.Generator, index: int) -> int:
        kind, position = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        most = self.max_context
        if index < self.num_curriculum and most > 8:
            most = int(8 * (most / 8) ** (index / self.num_curriculum))
        if kind < 0.05 or most < 2:
            return min(int(kind < 0.025), most)
        if kind < 0.05 + self.log_uniform:
            return min(most, int(2 * ((most + 1) / 2) ** position))
        return min(most, int(2 + (most - 1) * position))


def _parted(network: nn.Module, values: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Those of the matrices that the network names as its hidden layers', and the others."""
    hidden: frozenset[str] = getattr(network, "hidden_matrices", frozenset())
    matrices = {name: value for name, value in values.items() if name in hidden}
    return matrices, {name: value for name, value in values.items() if name not in hidden}


def _own_generator(target: MetaTarget, shared: torch.Generator, device: torch.device) -> torch.Generator:
    """One that each process draws its own tasks with, on the network's device."""
    rank = 0 if target.fabric is None else target.fabric.global_rank
    seed = int(torch.randint(2**62, (), generator=shared)) + rank
    return torch.Generator(device).manual_seed(seed)


def meta_loss(network: nn.Module, params: dict[str, Tensor], batch: TaskBatch, num_context: int) -> Tensor:
    """Minus the mean over queries of log p(f) + log p(y), a scalar; of classes there is no f."""
    n, small = num_context, cast(batch, next(iter(params.values())).dtype)
    laws = functional_call(network, params, (small.X[:, :n], small.y[:, :n], small.X[:, n:], batch.num_features))
    values = [part[:, n:, 0] for part in (small.f, small.y) if part is not None]
    if len(laws) != len(values):
        kinds = "classes" if batch.f is None else "function values and observations"
        raise ValueError(f"prior gives {kinds}, which isn't what the network answers with: {len(laws)} distribution(s)")
    if batch.process is None:
        parts = [law.log_prob(value) for law, value in zip(laws, values, strict=True)]
    else:
        mean, f_var, noise_var = given_hyperparameters(batch, n)
        stds = (f_var.sqrt().to(small.X), (f_var + noise_var[:, None]).sqrt().to(small.X))
        parts = [_expected_log_prob(law, mean.to(small.X), std) for law, std in zip(laws, stds, strict=True)]
    return -torch.stack([part.mean() for part in parts]).sum()


def _expected_log_prob(law: Distribution, mean: Tensor, std: Tensor) -> Tensor:
    """Of normal values."""
    if isinstance(law, Normal):
        return law.log_prob(mean) - 0.5 * (std / law.stddev).square()
    assert isinstance(law, Histogram)
    return law.expected_log_prob(mean, std)


def cast(batch: TaskBatch, dtype: torch.dtype) -> TaskBatch:
    """Of inputs and values; the process keeps its own."""
    f = None if batch.f is None else batch.f.to(dtype)
    return batch._replace(X=batch.X.to(dtype), y=batch.y.to(dtype), f=f)
