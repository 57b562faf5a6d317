r"""Mass matrices: the metric in which a sampler moves.

With inverse mass :math:`M^{-1} = S S^\top`, an estimate of the posterior's covariance, a momentum is drawn as
:math:`r = S^{-\top} z` with z standard normal, moves the position by :math:`M^{-1} r`, and costs
:math:`\tfrac12 r^\top M^{-1} r`. Vectors are (C, P), one row for each chain.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
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


class LowRank(NamedTuple):
    r"""A diagonal inverse mass, stretched along a few directions; everything it does costs O(P k) for each chain.

    .. math:: M^{-1} = D^{1/2} (I + U (\Lambda - I) U^\top) D^{1/2}, \qquad
              S = D^{1/2} (I + U (\Lambda^{1/2} - I) U^\top)

    with D ``diagonal`` (1, P), orthonormal U ``directions`` (P, k) and Lambda ``stretches`` (k,).
    """

    diagonal: Tensor
    directions: Tensor
    stretches: Tensor

    def momentum(self, noise: Tensor) -> Tensor:
        """S^-T z."""
        return self._stretched(noise, self.stretches.rsqrt()) * self.diagonal.rsqrt()

    def velocity(self, momentum: Tensor) -> Tensor:
        """M^-1 r."""
        root = self.diagonal.sqrt()
        return self._stretched(momentum * root, self.stretches) * root

    def scale(self, noise: Tensor) -> Tensor:
        """S z."""
        return self._stretched(noise, self.stretches.sqrt()) * self.diagonal.sqrt()

    def scale_transposed(self, gradient: Tensor) -> Tensor:
        """S^T g."""
        return self._stretched(gradient * self.diagonal.sqrt(), self.stretches.sqrt())

    def kinetic(self, momentum: Tensor) -> Tensor:
        """r^T M^-1 r / 2, (C,), in float64."""
        scaled = momentum.double() * self.diagonal.double().sqrt()
        along = scaled @ self.directions.double()
        return 0.5 * (scaled.square().sum(-1) + (along.square() * (self.stretches.double() - 1)).sum(-1))

    def _stretched(self, vector: Tensor, factor: Tensor) -> Tensor:
        """(I + U (F - I) U^T) v."""
        return vector + ((vector @ self.directions) * (factor - 1)) @ self.directions.T


def identity_mass(position: Tensor) -> Diagonal:
    """The unit matrix, for positions (C, P)."""
    return Diagonal(torch.ones_like(position[:1]))


def identity_low_rank(position: Tensor, max_rank: int) -> LowRank:
    """The unit matrix in the form of a low-rank one, of rank at most max_rank and P."""
    size = position.shape[-1]
    directions = torch.eye(size, min(size, max_rank), dtype=position.dtype, device=position.device)
    return LowRank(torch.ones_like(position[:1]), directions, torch.ones_like(directions[0]))
