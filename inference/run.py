"""The one loop: every sampler, optimiser and meta-training goes through :func:`run`.

A method is an object (a frozen dataclass of hyperparameters, say) with four functions. States and infos are named tuples of
tensors (dicts and named tuples nest), so that one loop can checkpoint and resume any of them.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from bayesnn.checks import count, positive
from bayesnn.configured import describe
from bayesnn.files import flatten
from bayesnn.inference.checkpoint import Checkpoint, Draws, Kept, assemble
from bayesnn.inference.ess import effective_sample_size
from bayesnn.inference.probe import probe
from bayesnn.inference.trace import Trace

Callback = Callable[[int, Any, Any], None]
Watch = Callable[[Draws], Tensor]


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
        """What of the state after step ``index`` is a draw worth keeping, or None; which of them, the index alone decides."""
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
    watch: Watch | None = None,
) -> Any:
    """Run a method on a target and return its result.

    Ctrl-C lets the step under way finish, writes the checkpoint and raises KeyboardInterrupt; a second one doesn't wait. If
    that step was the last, the result is returned as if nothing had happened.

    Args:
        method: the algorithm and its hyperparameters.
        target: what it works on; a checkpoint is tied to its parameters and its log density at two points, and to its
            ``fingerprint`` (a string), where it has one.
        seed: seeds the one generator that every random draw of the run comes from.
        progress: show a progress bar with the method's infos, and the effective sample size of what is watched.
        callbacks: each is called as ``callback(index, state, info)`` after every step.
        checkpoint: a folder, written to every ``checkpoint_every`` steps and on interruption. If there is a run in it, this
            one goes on from there, and the result equals that of an uninterrupted run bit for bit on one machine. Draws that
            are written leave the memory until the end.
        checkpoint_every: steps between two writes.
        time_budget: seconds after which the run ends with the draws that it has. With a checkpoint, another run goes on.
        target_ess: end as soon as the smallest effective sample size of what is watched reaches this.
        watch: of a draw (what the method's ``keep`` gives), the values (C, k) whose effective sample size counts. By default
            what the target's ``watched(position)`` gives of positions (C, P), where it has one (networks: function values, for
            weights have permutation symmetries), else eight evenly spaced parameters.

    Raises:
        TypeError: if the method isn't one, or a checkpoint is wanted of one that can't be described.
        ValueError: if the checkpoint belongs to another method, target or seed, or is damaged; if ``checkpoint_every`` or a
            budget isn't positive, or an effective sample size is wanted of a method that keeps no draws.
        OSError: if the checkpoint can't be written; the one before stays.
        TimeoutError: if the time is up before there is a result: before the first draw, or for a method with a ``finished``
            before that.
    """
    check_method(method)
    checkpoint_every = count("checkpoint_every", checkpoint_every)
    for name, value in (("time_budget", time_budget), ("target_ess", target_ess)):
        if value is not None:
            positive(name, value)
    began = time.monotonic()
    saved = None if checkpoint is None else Checkpoint(checkpoint, _identity(method, target, seed))
    generator = torch.Generator().manual_seed(seed)
    state = method.init(target, generator)
    if target_ess is not None and not _keeps_draws(method, state):
        raise ValueError(
            f"target_ess needs a method that keeps draws on its way, and {type(method).__name__} keeps none"
        )
    trace, kept, start = Trace(max(1, method.num_steps // 1000)), Kept(), 0
    if saved is not None and saved.exists:
        state, start = saved.read(state, generator, trace, kept)
    watched = _Watched(watch or _default_watch(target)) if progress or target_ess is not None else None
    if watched is not None and saved is not None:
        for part in saved.parts(kept):
            watched.restore(part)
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
            done = index + 1 == method.num_steps or (finished is not None and finished(state))
            late = not done and time_budget is not None and time.monotonic() - began > time_budget
            enough = target_ess is not None and watched is not None and watched.reached(target_ess)
            last = done or late or enough
            if saved is not None and (last or interrupted() or (index + 1) % checkpoint_every == 0):
                saved.write(index + 1, state, generator, trace, kept)
            if interrupted() and not last:
                raise KeyboardInterrupt(
                    f"stopped after step {index + 1} of {method.num_steps}; "
                    + (
                        f"without a checkpoint, so that its {kept.num_draws} draws are lost"
                        if saved is None
                        else "another run goes on from the checkpoint"
                    )
                )
            if progress and (last or index % 10 == 0):
                bar.set_postfix(_postfix(flatten(info), watched))
            bar.update()
            if last:
                break
    if late and not kept.num_draws and (finished is not None or _keeps_draws(method, state)):
        raise TimeoutError(
            f"time_budget of {time_budget:g} s was over at step {index + 1} of {method.num_steps}, before "
            + (
                "the first draw: give more time, or fewer steps of warm-up"
                if finished is None
                else "the end: give more time"
            )
            + ("" if saved is None else "; another run goes on from the checkpoint")
        )
    draws = assemble(kept.parts() if saved is None else saved.parts(kept), kept.num_draws)
    return method.result(target, state, draws, trace.stacked(with_block=not kept.num_draws))


def check_method(method: Any) -> None:
    """Raise TypeError for what isn't a method, such as a method's class or name."""
    if isinstance(method, type) or not hasattr(method, "step"):
        found = f"the class {method.__name__}: write {method.__name__}()" if isinstance(method, type) else repr(method)
        raise TypeError(f"method must be an object such as HMC(), found {found}")


def _identity(method: Method, target: Any, seed: int) -> dict[str, Any]:
    try:
        description = describe(method)
    except TypeError as error:
        raise TypeError(
            f"a checkpoint needs a method that can be described in it: derive {type(method).__name__} from "
            f"bayesnn.configured.Configured, or run it without one ({error})"
        ) from error
    return {"method": description, "target": getattr(target, "fingerprint", ""), "seed": seed} | probe(target)


def _keeps_draws(method: Method, state: Any) -> bool:
    return any(method.keep(state, index) is not None for index in reversed(range(method.num_steps)))


class _Watched:
    """Some values of every draw, for the effective sample size."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
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


def _default_watch(target: Any) -> Watch:
    watched: Callable[[Tensor], Tensor] | None = getattr(target, "watched", None)
    if watched is None:
        return _some_parameters
    return lambda draw: watched(draw["position"]) if "position" in draw else _some_parameters(draw)


def _some_parameters(draw: Draws) -> Tensor:
    values = next(iter(draw.values()))
    flat = values.reshape(len(values), -1)
    return flat[:, torch.linspace(0, flat.shape[1] - 1, min(8, flat.shape[1])).long()]


def _postfix(info: dict[str, Tensor], watched: _Watched | None) -> dict[str, str]:
    shown = {name: f"{value.double().mean():.3g}" for name, value in info.items()}
    return shown if watched is None or watched.size != watched.size else shown | {"ess": f"{watched.size:.0f}"}


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Let the step under way finish when Ctrl-C comes, so that the checkpoint is one from between two steps.

    A second Ctrl-C doesn't wait. Where interrupts are ignored, as in what nohup starts, they stay so.
    """
    ignored = signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None)
    if ignored or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if received:
            signal.default_int_handler(number, frame)
        received.append(number)

    previous = signal.signal(signal.SIGINT, receive)
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGINT, previous)
