"""The one loop: every sampler, optimiser and meta-training goes through :func:`run`.

A method is a frozen dataclass of hyperparameters with four functions. States and infos are named tuples of
tensors (dicts and named tuples nest), so that one loop can checkpoint and resume any of them.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from bayesnn.configured import describe
from bayesnn.files import flatten
from bayesnn.inference.checkpoint import Checkpoint, Draws, Kept, stack
from bayesnn.inference.ess import effective_sample_size
from bayesnn.inference.trace import Trace

Callback = Callable[[int, Any, Any], None]


class Method(Protocol):
    """How a posterior is computed: ``num_steps`` calls of ``step``, then ``result``.

    A method that can't know beforehand how many steps it takes has a ``finished(state) -> bool`` too.
    """

    @property
    def num_steps(self) -> int:
        """How many steps a whole run takes."""
        ...

    def init(self, target: Any, generator: torch.Generator) -> Any:
        """The state before the first step."""
        ...

    def step(self, target: Any, state: Any, generator: torch.Generator) -> tuple[Any, Any]:
        """One step: the new state, and an info (a named tuple of small tensors) for traces and progress."""
        ...

    def keep(self, state: Any, index: int) -> dict[str, Tensor] | None:
        """What of the state after step ``index`` is a draw worth keeping, or None."""
        ...

    def result(self, target: Any, state: Any, draws: dict[str, Tensor], infos: dict[str, Tensor]) -> Any:
        """The answer: ``draws`` are stacked along a new first dimension, and so are ``infos``.

        There is one row of infos for each draw, averaged over the steps since the draw before; for a method that keeps no
        draws, one for each thousandth of the run.
        """
        ...


def run(
    method: Method,
    target: Any,
    *,
    seed: int = 0,
    progress: bool = False,
    callbacks: Sequence[Callback] = (),
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    time_budget: float | None = None,
    target_ess: float | None = None,
    watch: Callable[[Draws], Tensor] | None = None,
) -> Any:
    """Run a method on a target and return its result.

    Args:
        method: the algorithm and its hyperparameters.
        target: what it works on; its ``fingerprint`` (a string), where it has one, ties a checkpoint to its data.
        seed: seeds the one generator that every random draw of the run comes from.
        progress: show a progress bar with the method's infos, and the effective sample size of what is watched.
        callbacks: each is called as ``callback(index, state, info)`` after every step.
        checkpoint: a folder, written to every ``checkpoint_every`` steps and on interruption. If there is a run in it, this
            one goes on from there, and the result equals that of an uninterrupted run bit for bit on one machine. Draws that
            are written leave the memory until the end.
        checkpoint_every: steps between two writes.
        time_budget: seconds after which the run ends with the draws that it has. With a checkpoint, another run goes on.
        target_ess: end as soon as the smallest effective sample size of what is watched reaches this.
        watch: of a draw (what the method's ``keep`` gives), the values (C, k) whose effective sample size counts; by default
            eight evenly spaced parameters. For networks, watch function values: weights have permutation symmetries.

    Raises:
        ValueError: if the checkpoint belongs to another method, target or seed, or a budget isn't positive.
        OSError: if the checkpoint can't be written; the one before stays.
        TimeoutError: if the time is up before the first draw.
    """
    for name, value in (("time_budget", time_budget), ("target_ess", target_ess)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive or None, found {value}")
    began = time.monotonic()
    generator = torch.Generator().manual_seed(seed)
    state = method.init(target, generator)
    identity = {"method": describe(method), "target": getattr(target, "fingerprint", ""), "seed": seed}
    saved = None if checkpoint is None else Checkpoint(checkpoint, identity)
    trace, kept, start = Trace(max(1, method.num_steps // 1000)), Kept(), 0
    if saved is not None and saved.exists:
        state, start = saved.read(state, generator, trace, kept)
    watched = _Watched(watch) if progress or target_ess is not None else None
    if watched is not None and saved is not None and kept.num_draws:
        watched.restore(saved.read_draws(kept))
    finished: Callable[[Any], bool] | None = getattr(method, "finished", None)
    done = finished is not None and start > 0 and finished(state)
    late, enough = False, target_ess is not None and watched is not None and watched.reached(target_ess)

    bar = tqdm(total=method.num_steps, initial=start, disable=not progress, desc=type(method).__name__)
    with bar, _deferred_interrupt() as interrupted:
        for index in range(start, start if done or enough else method.num_steps):
            state, info = method.step(target, state, generator)
            draw = method.keep(state, index)
            trace.add(flatten(info), draw is not None, first=not kept.num_draws)
            if draw is not None:
                kept.add(draw)
                if watched is not None:
                    watched.add(draw)
            for callback in callbacks:
                callback(index, state, info)
            late = time_budget is not None and time.monotonic() - began > time_budget
            enough = target_ess is not None and watched is not None and watched.reached(target_ess)
            last = index + 1 == method.num_steps or late or enough or (finished is not None and finished(state))
            if saved is not None and (last or interrupted() or (index + 1) % checkpoint_every == 0):
                saved.write(index + 1, state, generator, trace, kept)
            if interrupted() and not last:
                raise KeyboardInterrupt(f"stopped after step {index + 1} of {method.num_steps}")
            if progress and (last or index % 10 == 0):
                bar.set_postfix(_postfix(flatten(info), watched))
            bar.update()
            if last:
                break
    if not kept.num_draws and late and method.keep(state, method.num_steps - 1) is not None:
        raise TimeoutError(
            f"time_budget of {time_budget:g} s was over at step {index + 1} of {method.num_steps}, before the first draw: "
            "give more time, or fewer steps of warm-up"
            + ("" if saved is None else "; another run goes on from the checkpoint")
        )
    draws = stack(kept.new) if saved is None else saved.read_draws(kept)
    return method.result(target, state, draws, trace.stacked(with_block=not kept.num_draws))


class _Watched:
    """Some values of every draw, for the effective sample size."""

    def __init__(self, watch: Callable[[Draws], Tensor] | None) -> None:
        self._watch = watch or _some_parameters
        self._values: list[Tensor] = []
        self.size = float("nan")

    def add(self, draw: Draws) -> None:
        """Take in a draw; the effective sample size is computed anew when there are 5 % more of them, and 20 at least."""
        self._values.append(self._watch(draw))
        if len(self._values) >= 20 and (len(self._values) - 20) % max(1, len(self._values) // 20) == 0:
            self.size = float(effective_sample_size(torch.stack(self._values, 1)).min())

    def restore(self, draws: Draws) -> None:
        """Take in stacked draws."""
        for index in range(len(next(iter(draws.values())))):
            self.add({name: values[index] for name, values in draws.items()})

    def reached(self, size: float) -> bool:
        """Whether the smallest effective sample size is this or more."""
        return self.size >= size


def _some_parameters(draw: Draws) -> Tensor:
    values = next(iter(draw.values()))
    flat = values.reshape(len(values), -1)
    return flat[:, torch.linspace(0, flat.shape[1] - 1, min(8, flat.shape[1])).long()]


def _postfix(info: dict[str, Tensor], watched: _Watched | None) -> dict[str, str]:
    shown = {name: f"{value.double().mean():.3g}" for name, value in info.items()}
    return shown if watched is None or watched.size != watched.size else shown | {"ess": f"{watched.size:.0f}"}


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Let the step under way finish when Ctrl-C comes, so that the checkpoint is one from between two steps."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    received: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGINT, previous)
