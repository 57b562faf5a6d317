"""The one loop: every sampler, optimiser and meta-training goes through :func:`run`.

A method is a frozen dataclass of hyperparameters with four functions. States and infos are named tuples of
tensors (dicts and named tuples nest), so that one loop can checkpoint and resume any of them.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from bayesnn.configured import describe
from bayesnn.files import flatten, read_tensors, unflatten, write_tensors

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
) -> Any:
    """Run a method on a target and return its result.

    Args:
        method: the algorithm and its hyperparameters.
        target: what it works on; its ``fingerprint`` (a string), where it has one, ties a checkpoint to its data.
        seed: seeds the one generator that every random draw of the run comes from.
        progress: show a progress bar with the method's infos.
        callbacks: each is called as ``callback(index, state, info)`` after every step.
        checkpoint: a file, written every ``checkpoint_every`` steps and on interruption. If it exists, the run goes on
            from it, and the result equals that of an uninterrupted run bit for bit on one machine.
        checkpoint_every: steps between two writes.

    Raises:
        ValueError: if the checkpoint belongs to another method, target or seed.
    """
    generator = torch.Generator().manual_seed(seed)
    state = method.init(target, generator)
    identity = {"method": describe(method), "target": getattr(target, "fingerprint", ""), "seed": seed}
    trace = _Trace(max(1, method.num_steps // 1000))
    kept: list[dict[str, Tensor]] = []
    start = 0
    if checkpoint is not None and Path(checkpoint).exists():
        state, kept, start = _resume(checkpoint, identity, state, generator, trace)

    def save(index: int) -> None:
        if checkpoint is not None:
            tensors = {"generator": generator.get_state()} | flatten(state, "state")
            tensors |= {f"trace.{name}": values for name, values in _stack(trace.rows).items()}
            tensors |= {f"block.{name}": values for name, values in trace.block.items()}
            tensors |= {f"kept.{name}": values for name, values in _stack(kept).items()}
            write_tensors(checkpoint, tensors, identity | {"step": index, "block": trace.length})

    finished: Callable[[Any], bool] | None = getattr(method, "finished", None)
    bar = tqdm(total=method.num_steps, initial=start, disable=not progress, desc=type(method).__name__)
    with bar, _deferred_interrupt() as interrupted:
        for index in range(start, method.num_steps):
            state, info = method.step(target, state, generator)
            draw = method.keep(state, index)
            trace.add(flatten(info), draw is not None, first=not kept)
            if draw is not None:
                kept.append(draw)
            for callback in callbacks:
                callback(index, state, info)
            last = index + 1 == method.num_steps or (finished is not None and finished(state))
            if last or interrupted() or (index + 1) % checkpoint_every == 0:
                save(index + 1)
            if interrupted() and not last:
                raise KeyboardInterrupt(f"stopped after step {index + 1} of {method.num_steps}")
            if progress and (last or index % 10 == 0):
                bar.set_postfix({name: f"{value.double().mean():.3g}" for name, value in flatten(info).items()})
            bar.update()
            if last:
                break
    return method.result(target, state, _stack(kept), _stack(trace.rows))


class _Trace:
    """Infos averaged over blocks of steps, so that what is stored grows with the draws and not with the steps."""

    def __init__(self, stride: int) -> None:
        self.stride = stride
        self.rows: list[dict[str, Tensor]] = []
        self.block: dict[str, Tensor] = {}
        self.length = 0

    def add(self, info: dict[str, Tensor], kept: bool, first: bool) -> None:
        """Take in a step's info; ``kept``: it gave a draw, ``first``: no step before it did."""
        last = self.block if self.length else self.rows[-1] if self.rows else info
        changed = last.keys() != info.keys()
        if changed or (kept and first):  # what came before was another phase, or warm-up
            self.rows, self.length = [], 0
        self.block = {name: self.block[name] + value for name, value in info.items()} if self.length else info
        self.length += 1
        if kept or (first and self.length == self.stride):
            row = {name: value / self.length for name, value in self.block.items()} if self.length > 1 else self.block
            self.rows.append(row)
            self.block, self.length = {}, 0


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


def _stack(steps: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([step[name] for step in steps]) for name in steps[0]} if steps else {}


def _unstack(stacked: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    length = len(next(iter(stacked.values()))) if stacked else 0
    return [{name: values[index] for name, values in stacked.items()} for index in range(length)]


def _resume(
    path: str | Path, identity: dict[str, Any], state: Any, generator: torch.Generator, trace: _Trace
) -> tuple[Any, list[dict[str, Tensor]], int]:
    tensors, description = read_tensors(path)
    for key, value in identity.items():
        if description.get(key) != value:
            raise ValueError(
                f"checkpoint {str(path)!r} belongs to another run: its {key} is {description.get(key)!r}, "
                f"this run's is {value!r}. Use another file, or delete this one to start afresh."
            )
    generator.set_state(tensors["generator"])
    parts: dict[str, dict[str, Tensor]] = {"trace": {}, "block": {}, "kept": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part in parts:
            parts[part][rest] = tensor
    state = unflatten(tensors, state, "state")
    trace.rows, trace.block, trace.length = _unstack(parts["trace"]), parts["block"], int(description["block"])
    return state, _unstack(parts["kept"]), int(description["step"])
