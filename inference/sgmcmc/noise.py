"""Standard normal noise from a stream of its own, which a second thread can draw ahead of time.

Noise is what a cheap gradient's step spends most of its time on, and PyTorch draws it on one core. A stream is the state of
a generator, a tensor: whoever has it can draw what follows, now or ahead of time, with the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor


def start_stream(generator: torch.Generator) -> Tensor:
    """A stream seeded from a generator."""
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.Generator().manual_seed(seed).get_state()


def draw_noise(
    stream: Tensor, shape: Sequence[int], noisy: Sequence[bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Noise for several steps, (len(noisy), *shape), zero where a step is not noisy, and the stream after it."""
    generator = torch.Generator()
    generator.set_state(stream)
    noise = torch.zeros(len(noisy), *shape, dtype=dtype)
    for step, wanted in zip(noise, noisy, strict=True):
        if wanted:
            step.normal_(generator=generator)
    return noise, generator.get_state()


class NoiseAhead:
    """Draws noise, and at once begins with what will be asked for next."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "bayesnn noise")
        self._after: Tensor | None = None
        self._what: tuple[object, ...] = ()
        self._coming: Future[tuple[Tensor, Tensor]]

    def draw(
        self,
        stream: Tensor,
        shape: Sequence[int],
        noisy: Sequence[bool],
        dtype: torch.dtype,
        next_noisy: Sequence[bool],
    ) -> tuple[Tensor, Tensor]:
        """As :func:`draw_noise`; ``next_noisy`` tells what the call after this one will ask for."""
        ready = self._after is stream and self._what == (tuple(shape), tuple(noisy), dtype)
        noise, after = self._coming.result() if ready else draw_noise(stream, shape, noisy, dtype)
        self._after, self._what = after, (tuple(shape), tuple(next_noisy), dtype)
        self._coming = self._thread.submit(draw_noise, after, shape, next_noisy, dtype)
        return noise, after
