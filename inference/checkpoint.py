"""A run's checkpoint: a folder from which it goes on after any interruption, a killed process included.

``state.safetensors`` is replaced as a whole by renaming; draws are only ever added, as ``draws-000000.safetensors`` and so
on, and are written before the state that counts them. Whenever the process dies, the state and the draws that it counts are
complete.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from bayesnn.files import flatten, read_tensors, unflatten, write_tensors
from bayesnn.inference.trace import Trace

FORMAT = 3
CLOSE = 1e-4
"""Log densities this close are the same: above the rounding of float32 in another order."""
Draws = dict[str, Tensor]


class Kept:
    """The draws of a run: those not written yet, and how many files the others are in."""

    def __init__(self) -> None:
        self.new: list[Draws] = []
        self.num_draws = 0
        self.num_files = 0

    def add(self, draw: Draws) -> None:
        """One more draw."""
        self.new.append(draw)
        self.num_draws += 1

    def parts(self) -> Iterator[Draws]:
        """The draws in memory one by one, stacked; each leaves it when it's taken."""
        for index, draw in enumerate(self.new):
            self.new[index] = {}
            yield stack([draw])


class Checkpoint:
    """Where a run is saved.

    Args:
        folder: made if it doesn't exist.
        identity: what the run is of; a folder of another run is refused.

    Raises:
        ValueError: if there is a file where the folder should be.
        OSError: if the folder can't be made, or not be written to.
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any]) -> None:
        self.folder, self.identity = Path(folder), {"format": FORMAT} | identity
        if self.folder.is_file():
            raise ValueError(f"checkpoint must be a folder, found a file: {str(folder)!r}")
        if not self.exists:
            self._require_writable()

    def _require_writable(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise OSError(f"can't write to the checkpoint's folder {str(self.folder)!r}: {error}") from error

    @property
    def exists(self) -> bool:
        """Whether there is something to go on from."""
        return self._state.exists()

    @property
    def _state(self) -> Path:
        return self.folder / "state.safetensors"

    def _draws(self, index: int) -> Path:
        return self.folder / f"draws-{index:06d}.safetensors"

    def write(self, step: int, state: Any, generator: torch.Generator, trace: Trace, kept: Kept) -> None:
        """Save all that the run needs to go on after this many steps; written draws leave the memory.

        Raises:
            OSError: if the disk is full or can't be written; the checkpoint before, if there is one, is intact.
        """
        tensors = {"generator": generator.get_state()} | flatten(state, "state") | trace.tensors()
        num_files = kept.num_files + bool(kept.new)
        description = self.identity | {
            "step": step,
            "block": trace.length,
            "num_draws": kept.num_draws,
            "num_files": num_files,
        }
        try:
            if kept.new:
                write_tensors(self._draws(kept.num_files), stack(kept.new), {"format": FORMAT})
            write_tensors(self._state, tensors, description)
        except (OSError, SafetensorError) as error:
            before = "The one before is intact: make room, and run again to go on from it"
            raise OSError(
                f"can't write the checkpoint after step {step} to {str(self.folder)!r}: {error}. "
                + (before if self.exists else "It was the first: nothing is saved")
            ) from error
        kept.num_files, kept.new = num_files, []

    def read(self, state: Any, generator: torch.Generator, trace: Trace, kept: Kept) -> tuple[Any, int]:
        """Restore a run: the state, in the form of the given one, and the number of steps behind it.

        Raises:
            ValueError: if the checkpoint belongs to another method, target, seed or format, is damaged, or lacks draws.
        """
        tensors, description = read_tensors(self._state)
        for key, value in self.identity.items():
            if not _same(description.get(key), value):
                raise ValueError(
                    f"checkpoint {str(self.folder)!r} belongs to another run: its {key} is {description.get(key)!r}, "
                    f"this run's is {value!r}. Use another folder, or delete this one to start afresh."
                )
        num_files = int(description["num_files"])
        missing = [path.name for path in map(self._draws, range(num_files)) if not path.is_file()]
        if missing:
            raise ValueError(
                f"checkpoint {str(self.folder)!r} lacks {len(missing)} of its {num_files} files of draws "
                f"({missing[0]}{' …' if len(missing) > 1 else ''}): put them back, or delete the folder to start afresh"
            )
        generator.set_state(tensors["generator"])
        trace.restore(tensors, int(description["block"]))
        kept.num_draws, kept.num_files = int(description["num_draws"]), num_files
        return unflatten(tensors, state, "state"), int(description["step"])

    def parts(self, kept: Kept) -> Iterator[Draws]:
        """All draws, stacked: a file at a time, then those in memory."""
        for index in range(kept.num_files):
            yield read_tensors(self._draws(index))[0]
        yield from kept.parts()


def _same(found: Any, wanted: Any) -> bool:
    """Equality of JSON, up to rounding in lists of numbers."""
    if not (isinstance(found, list) and isinstance(wanted, list) and all(isinstance(x, float) for x in found + wanted)):
        return bool(found == wanted)
    first, second = (torch.tensor(numbers, dtype=torch.float64) for numbers in (found, wanted))
    return len(first) == len(second) and torch.allclose(first, second, rtol=CLOSE, atol=CLOSE, equal_nan=True)


def stack(steps: list[Draws]) -> Draws:
    """A list of dicts as a dict of tensors with a new first dimension."""
    return {name: torch.stack([step[name] for step in steps]) for name in steps[0]} if steps else {}


def assemble(parts: Iterable[Draws], num_draws: int) -> Draws:
    """Stacked dicts one after the other; no more than one part is in memory twice.

    A draw's first dimension, the chains, comes first in memory, so that taking the draws chain by chain copies nothing.
    """
    whole: Draws = {}
    start = 0
    for part in parts:
        for name, values in part.items():
            if name not in whole:
                whole[name] = _empty(num_draws, values)
            whole[name][start : start + len(values)] = values
        start += len(next(iter(part.values())))
    return whole


def _empty(num_draws: int, like: Tensor) -> Tensor:
    if like.dim() == 1:
        return like.new_empty(num_draws)
    return like.new_empty(like.shape[1], num_draws, *like.shape[2:]).transpose(0, 1)
