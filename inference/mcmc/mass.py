r"""Mass matrices: the metric in which a sampler moves.

With inverse mass :math:`M^{-1} = S S^\top`, an estimate of the posterior's covariance, a momentum is drawn as
:math:`r = S^{-\top} z` with z standard normal, moves the position by :math:`M^{-1} r`, and costs
:math:`\tfrac12 r^\top M^{-1} r`. Vectors are (C, P), one row for each chain.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class Mass(Protocol):
    """What a move may ask of a mass matrix."""

    def momentum(self, noise: Tensor) -> Tensor:
        """S^-T z, the momentum that standard normal noise stands for."""
        ...

    def velocity(self, momentum: Tensor) -> Tensor:
        """M^-1 r, the direction in which a momentum moves the position."""
        ...

    def scale(self, noise: Tensor) -> Tensor:
        """S z, noise with the shape of the posterior."""
        ...

    def scale_transposed(self, gradient: Tensor) -> Tensor:
        """S^T g, a gradient in the coordinates S^-1 theta."""
        ...

    def kinetic(self, momentum: Tensor) -> Tensor:
        """r^T M^-1 r / 2, (C,), in float64."""
        ...


class Diagonal(NamedTuple):
    """A diagonal inverse mass, (1, P) for all chains or (C, P)."""

    inverse: Tensor

    def momentum(self, noise: Tensor) -> Tensor:
        """S^-T z."""
        return noise * self.inverse.rsqrt()

    def velocity(self, momentum: Tensor) -> Tensor:
        """M^-1 r."""
        return self.inverse * momentum

    def scale(self, noise: Tensor) -> Tensor:
        """S z."""
        return self.inverse.sqrt() * noise

    def scale_transposed(self, gradient: Tensor) -> Tensor:
        """S^T g."""
        return self.inverse.sqrt() * gradient

    def kinetic(self, momentum: Tensor) -> Tensor:
        """r^T M^-1 r / 2, (C,), in float64."""
        return 0.5 * (momentum.double().square() * self.inverse.double()).sum(-1)
