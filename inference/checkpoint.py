"""A run's checkpoint: a folder from which it goes on after any interruption, a killed process included.

``state.safetensors`` is replaced as a whole by renaming; draws are only ever added, as ``draws-000000.safetensors`` and so
on, and are written before the state that counts them. Whenever the process dies, the state and the draws that it counts are
complete.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from bayesnn.files import flatten, read_tensors, unflatten, write_tensors
from bayesnn.inference.trace import Trace

FORMAT = 2
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


class Checkpoint:
    """Where a run is saved.

    Args:
        folder: made if it doesn't exist.
        identity: what the run is of; a folder of another run is refused.

    Raises:
        ValueError: if there is a file where the folder should be.
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any]) -> None:
        self.folder, self.identity = Path(folder), identity | {"format": FORMAT}
        if self.folder.is_file():
            raise ValueError(f"checkpoint must be a folder, found a file: {str(folder)!r}")

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
            OSError: if the disk is full or can't be written; the checkpoint before is intact.
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
            raise OSError(
                f"can't write the checkpoint after step {step} to {str(self.folder)!r}: {error}. The one before is intact: "
                "make room, and run again to go on from it"
            ) from error
        kept.num_files, kept.new = num_files, []

    def read(self, state: Any, generator: torch.Generator, trace: Trace, kept: Kept) -> tuple[Any, int]:
        """Restore a run: the state, in the form of the given one, and the number of steps behind it.

        Raises:
            ValueError: if the checkpoint belongs to another method, target, seed or format, or is damaged.
        """
        tensors, description = read_tensors(self._state)
        for key, value in self.identity.items():
            if description.get(key) != value:
                raise ValueError(
                    f"checkpoint {str(self.folder)!r} belongs to another run: its {key} is {description.get(key)!r}, "
                    f"this run's is {value!r}. Use another folder, or delete this one to start afresh."
                )
        generator.set_state(tensors["generator"])
        trace.restore(tensors, int(description["block"]))
        kept.num_draws, kept.num_files = int(description["num_draws"]), int(description["num_files"])
        return unflatten(tensors, state, "state"), int(description["step"])

    def read_draws(self, kept: Kept) -> Draws:
        """All draws, stacked."""
        parts = [read_tensors(self._draws(index))[0] for index in range(kept.num_files)]
        return concatenate([*parts, stack(kept.new)])


def stack(steps: list[Draws]) -> Draws:
    """A list of dicts as a dict of tensors with a new first dimension."""
    return {name: torch.stack([step[name] for step in steps]) for name in steps[0]} if steps else {}


def concatenate(parts: list[Draws]) -> Draws:
    """Stacked dicts one after the other."""
    parts = [part for part in parts if part]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}
