"""Windows that slide over positions: how many fit, what they are padded with, and sums over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bayesnn.checks import count

Padding = Literal["same", "valid", "circular"]
"""Around the positions: zeros, nothing, or the positions from the other end."""

Move = tuple[slice, slice]
"""Where something goes, and where it comes from."""


@dataclass(frozen=True)
class Window:
    """A window along one dimension of positions.

    Args:
        size: positions that it covers.
        stride: from one to the next.
        padding: "same" and "circular" give ceil(n / stride) windows for n positions; where they need an odd number of
            padded positions, the end gets one more than the start. "valid": only those that fit.
    """

    size: int
    stride: int
    padding: Padding

    def pads(self, n: int) -> tuple[int, int]:
        """How many positions are added before and after n of them.

        Raises:
            ValueError: if the window doesn't fit.
        """
        if self.padding == "valid":
            if self.size > n:
                raise ValueError(f"a window of {self.size} positions doesn't fit into {n} of them")
            return 0, 0
        total = max((-(-n // self.stride) - 1) * self.stride + self.size - n, 0)
        low, high = total // 2, total - total // 2
        if self.padding == "circular" and high > n:
            raise ValueError(f"a circular window of {self.size} positions wraps around {n} of them more than once")
        return low, high

    def count(self, n: int) -> int:
        """How many windows n positions have."""
        return (n + sum(self.pads(n)) - self.size) // self.stride + 1


def windows(
    size: int | Sequence[int], stride: int | Sequence[int], padding: Padding, num_positions: int
) -> list[Window]:
    """One for each dimension of positions.

    Raises:
        ValueError: if sizes or strides are given for another number of dimensions, or there are no positions.
    """
    if num_positions == 0:
        raise ValueError("windows need inputs with positions, such as (channels, height, width), found vectors")
    sides = []
    for name, value in (("sizes", size), ("strides", stride)):
        sides.append([value] * num_positions if isinstance(value, int) else list(value))
        if len(sides[-1]) != num_positions:
            raise ValueError(f"found {len(sides[-1])} {name} of a window for {num_positions} dimensions of positions")
    return [Window(size, stride, padding) for size, stride in zip(*sides, strict=True)]


def checked_sides(name: str, value: Any) -> int | tuple[int, ...]:
    """A positive integer, or one for each dimension.

    Raises:
        TypeError: if one isn't an integer.
        ValueError: if one isn't positive, or there is none.
    """
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) == 0:
            raise ValueError(f"{name} must be an integer, or one for each dimension, found none")
        return tuple(count(name, each) for each in value)
    return count(name, value)


def check_padding(padding: str) -> None:
    """Raise ValueError for an unknown one."""
    if padding not in get_args(Padding):
        raise ValueError(f"padding must be one of {', '.join(get_args(Padding))}, found {padding!r}")


def window_sums(values: Tensor, dims: Sequence[int], window: Window) -> Tensor:
    r"""Sums over a window that moves along several dimensions of equal length at once, as along diagonals.

    .. math:: y_{i, i', \ldots} = \sum_{\delta=0}^{k-1} x_{s i + \delta - p,\; s i' + \delta - p,\; \ldots}

    Args:
        values: any shape.
        dims: negative ones.
        window: size k, stride s; p positions are added before the first.
    """
    n = values.shape[dims[0]]
    num, (low, high) = window.count(n), window.pads(n)
    if window.padding == "circular" and (low or high):
        wrapped = torch.arange(-low, n + high, device=values.device) % n
        for dim in dims:
            values = values.index_select(dim, wrapped)
        n, low = n + low + high, 0
    moves = []
    for offset in range(window.size):
        first = max(0, -((offset - low) // window.stride))
        last = min(num, (n - 1 + low - offset) // window.stride + 1)
        if first < last:
            start = window.stride * first + offset - low
            source = slice(start, start + window.stride * (last - first - 1) + 1, window.stride)
            moves.append((slice(first, last, 1), source))
    return _Moved.apply(values, tuple(dims), num, moves)


class _Moved(torch.autograd.Function):
    """Slices of a tensor added up at other places: ``result[target] += values[source]`` for each move.

    As a function of its own because autograd would keep, and copy, the whole result for every slice.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, dims: tuple[int, ...], length: int, moves: list[Move]) -> Tensor:
        ctx.dims, ctx.length = dims, values.shape[dims[0]]
        ctx.moves = [(source, target) for target, source in moves]

        def at(place: slice) -> tuple[slice, ...]:
            index = [slice(None)] * values.dim()
            for dim in dims:
                index[dim] = place
            return tuple(index)

        everything = [move for move in moves if move[0] == slice(0, length, 1)]
        if everything:  # spares zeroing
            result = values[at(everything[0][1])].clone()
            moves = [move for move in moves if move is not everything[0]]
        else:
            sizes = list(values.shape)
            for dim in dims:
                sizes[dim] = length
            result = values.new_zeros(sizes)
        for target, source in moves:
            result[at(target)] += values[at(source)]
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _Moved.apply(gradients[0], ctx.dims, ctx.length, ctx.moves), None, None, None
