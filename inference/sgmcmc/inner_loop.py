"""The inner loop of all stochastic-gradient samplers: some minibatch steps, one after the other or as one compiled program.

Where the gradient comes from a compiled target, gradients, updates and noise of several steps become one program, and the
noise for the next ones is drawn in a second thread meanwhile. The draws are those of the plain loop to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from bayesnn.data import Data
from bayesnn.inference.sgmcmc.control_variates import Gradient
from bayesnn.inference.sgmcmc.noise import NoiseAhead, draw_noise
from bayesnn.inference.sgmcmc.preconditioners import Metric

Variables = dict[str, Tensor]
Update = Callable[[Variables, Tensor, Tensor, Tensor, Tensor], Variables]

MAX_STEPS, MAX_NUMBERS = 8, 2**24  # of one program (it's compiled step by step), and of the noise that it is handed


def chunk_size(num_steps: int, numbers_per_step: int) -> int:
    """How many steps are taken at once: the largest divisor of ``num_steps`` within bounds of memory and program length."""
    most = max(1, min(MAX_STEPS, MAX_NUMBERS // max(1, numbers_per_step)))
    return next(size for size in range(most, 0, -1) if num_steps % size == 0)


def follow(
    update: Update,
    gradient: Gradient,
    variables: Variables,
    batches: Data | None,
    step_sizes: Tensor,
    metric: Metric,
    noises: Tensor,
) -> tuple[Variables, Tensor]:
    """Some steps: the new variables, and the last gradient.

    Args:
        update: the sampler's.
        gradient: estimates the gradient from a position and a minibatch; with ``fuse``, it's compiled.
        variables: each with C rows.
        batches: inputs (k, B, d) and targets (k, B, m) of k minibatches; None: all data each time.
        step_sizes: (k,).
        metric: may learn from the gradients.
        noises: (k, num_noises, C, P).
    """
    fuse = getattr(gradient, "fuse", None)
    if fuse is not None and not metric.adapting:
        return fuse(_steps, update)(variables, batches, step_sizes, metric.scale, noises)
    for index, (step_size, noise) in enumerate(zip(step_sizes, noises, strict=True)):
        slope = gradient(variables["position"], _minibatch(batches, index))
        variables = update(variables, slope, step_size, metric.observe(slope), noise)
    return variables, slope


def _steps(
    gradient: Gradient,
    update: Update,
    variables: Variables,
    batches: Data | None,
    step_sizes: Tensor,
    scale: Tensor,
    noises: Tensor,
) -> tuple[Variables, Tensor]:
    for index in range(len(noises)):
        slope = gradient(variables["position"], _minibatch(batches, index))
        variables = update(variables, slope, step_sizes[index], scale, noises[index])
    return variables, slope


def _minibatch(batches: Data | None, index: int) -> Data | None:
    return None if batches is None else Data(batches.X[index], batches.Y[index])


def noise_for(
    gradient: Gradient,
    stream: Tensor,
    shape: Sequence[int],
    noisy: Sequence[bool],
    next_noisy: Sequence[bool],
    like: Tensor,
) -> tuple[Tensor, Tensor]:
    """Noise for some steps, (k, *shape), and the stream after it; ``next_noisy`` tells what will be asked for next."""
    if hasattr(gradient, "fuse"):
        noise, stream = _noise_ahead().draw(stream, shape, noisy, like.dtype, next_noisy)
    else:
        noise, stream = draw_noise(stream, shape, noisy, like.dtype)
    return noise.to(like.device), stream


@cache
def _noise_ahead() -> NoiseAhead:
    return NoiseAhead()


@contextmanager
def core_for_noise(gradient: Gradient) -> Iterator[None]:
    """Leave a core to the thread that draws noise, if there is one."""
    # Threads that wait for each other by spinning lose far more than a core if there's one too many of them.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(max(1, num_threads - 1) if hasattr(gradient, "fuse") else num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
