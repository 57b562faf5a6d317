"""The infos of a run, thinned so that they grow with its draws and not with its steps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Trace:
    """Infos averaged over blocks of steps: a block ends with a draw, or where none are kept, after ``stride`` steps."""

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
            self.rows.append(self._mean())
            self.block, self.length = {}, 0

    def stacked(self, with_block: bool = False) -> dict[str, Tensor]:
        """The rows along a new first dimension; ``with_block``: the unfinished block is one of them."""
        rows = self.rows + ([self._mean()] if with_block and self.length else [])
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]} if rows else {}

    def _mean(self) -> dict[str, Tensor]:
        return {name: value / self.length for name, value in self.block.items()} if self.length > 1 else self.block

    def tensors(self) -> dict[str, Tensor]:
        """All of it, to be saved."""
        rows = {f"trace.{name}": values for name, values in self.stacked().items()}
        return rows | {f"block.{name}": values for name, values in self.block.items()}

    def restore(self, tensors: Mapping[str, Tensor], length: int) -> None:
        """Become what was saved."""
        parts: dict[str, dict[str, Tensor]] = {"trace": {}, "block": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            if part in parts:
                parts[part][rest] = tensor
        count = len(next(iter(parts["trace"].values()))) if parts["trace"] else 0
        self.rows = [{name: values[index] for name, values in parts["trace"].items()} for index in range(count)]
        self.block, self.length = parts["block"], length
