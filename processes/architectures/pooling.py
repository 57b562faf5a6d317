"""Pooling: averages and sums over positions. Linear, but the only place where convolutions' equal weights show.

A network without pooling has the same kernel as one whose filters differ between positions; with it, covariances between
different positions count (Novak et al. 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

from torch import Tensor

from bayesnn.checks import check_fields
from bayesnn.processes.architectures.covariance import Covariance
from bayesnn.processes.architectures.layers import Plain, Variances
from bayesnn.processes.architectures.windows import Padding, check_padding, checked_sides, window_sums, windows


class Mixing(Plain):
    """A layer without weights whose outputs depend on covariances between different positions."""

    def mixes_positions(self) -> bool:
        """Yes."""
        return True


def check_pairs(layer: object, covariance: Covariance) -> None:
    """Raise ValueError unless covariances are of pairs of positions."""
    name = type(layer).__name__
    if covariance.num_positions == 0:
        raise ValueError(f"{name} needs inputs with positions, such as (channels, height, width), found vectors")
    if not covariance.pairs:
        raise ValueError(
            f"{name} needs covariances between different positions: make those of the inputs with pairs=True (needs_pairs "
            "says for which architectures)"
        )


@dataclass(frozen=True)
class WindowPooling(Mixing):
    """What means and sums over windows have in common.

    Args:
        size: of a window, or one for each dimension of positions.
        stride: from one to the next; None: as large as the window.
        padding: as for ``Convolution``; padded zeros count in a mean.

    Raises:
        TypeError: if sizes or strides aren't integers.
        ValueError: if they aren't positive, or the padding is unknown.
    """

    mean: ClassVar[bool]
    size: int | Sequence[int] = 2
    stride: int | Sequence[int] | None = None
    padding: Padding = "valid"

    def __post_init__(self) -> None:
        check_fields(self, checked_sides, "size", *([] if self.stride is None else ["stride"]))
        check_padding(self.padding)

    def propagate(self, covariance: Covariance, variances: Variances) -> Covariance:
        """Over both positions of a pair.

        Raises:
            ValueError: if covariances aren't of pairs of positions, or a window is larger than the input.
        """
        check_pairs(self, covariance)
        num = covariance.num_positions
        sides = windows(self.size, self.size if self.stride is None else self.stride, self.padding, num)
        area = prod(side.size for side in sides)

        def pool(values: Tensor) -> Tensor:
            for index, side in enumerate(sides):
                for dim in (2 * (index - num), 2 * (index - num) + 1):
                    values = window_sums(values, (dim,), side)
            return values / area**2 if self.mean else values

        return covariance.map(pool)


class AveragePooling(WindowPooling):
    """Means over windows."""

    mean = True


class SumPooling(WindowPooling):
    """Sums over windows."""

    mean = False


class GlobalPooling(Mixing):
    """What the mean and the sum over all positions have in common."""

    mean: ClassVar[bool]

    def propagate(self, covariance: Covariance, variances: Variances) -> Covariance:
        """Over all pairs.

        Raises:
            ValueError: if covariances aren't of pairs of positions.
        """
        check_pairs(self, covariance)
        dims = list(range(-covariance.num_trailing, 0))

        def pool(values: Tensor) -> Tensor:
            return values.mean(dims) if self.mean else values.sum(dims)

        return covariance.map(pool, num_positions=0, pairs=False)


@dataclass(frozen=True)
class GlobalAveragePooling(GlobalPooling):
    """The mean over all positions, of images as of nodes of a graph; vectors are what is left."""

    mean = True


@dataclass(frozen=True)
class GlobalSumPooling(GlobalPooling):
    """The sum over all positions, of images as of nodes of a graph; vectors are what is left."""

    mean = False
