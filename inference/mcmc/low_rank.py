r"""Low-rank mass matrices from draws and their gradients (Seyboldt, Carlson and Carpenter 2026, algorithm 1; nutpie's).

The gradient of a Gaussian's log density at its draws has the inverse covariance: gradients know the narrow directions as
well as draws know the wide ones. The diagonal D is the ratio of their standard deviations. In its coordinates, on the span
of draws and gradients, the geometric mean :math:`\Sigma` of the draws' covariance and the inverse of the gradients', the
one for which :math:`\Sigma\, C_{gradients}\, \Sigma = C_{draws}`, minimises the Fisher divergence from a Gaussian. The
directions in which it differs most from the unit matrix are kept. For a Gaussian with no more parameters than the rank,
and more draws, this is its covariance, however the draws scatter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bayesnn.inference.mcmc.mass import LowRank

MAX_RANK = 64
NUM_ROWS = 256
"""How many draws of all chains together are remembered, at most; more, if there are so many chains that it's under 8 each."""
REGULARISER = 1e-5
"""Added to both covariances, in the coordinates of D; nutpie's."""
CUTOFF = 2.0
"""A stretch within a factor of this from 1 isn't worth its while, and within what few draws get wrong; nutpie's."""


class Window(NamedTuple):
    """Evenly spaced points of a window of the chains: positions and gradients (B, C, P), ``stride`` steps between two.

    When B reaches its bound, every second one is forgotten and the stride doubles, so that memory is bounded however long
    the window; B is at least half the bound then.
    """

    positions: Tensor
    gradients: Tensor
    stride: Tensor
    num_updates: Tensor

    @classmethod
    def start(cls, position: Tensor) -> Window:
        """Nothing seen yet."""
        none = position.new_empty(0, *position.shape)
        return cls(none, none, torch.ones((), dtype=torch.long), torch.zeros((), dtype=torch.long))

    def update(self, position: Tensor, gradient: Tensor) -> Window:
        """Take in one point of every chain."""
        positions, gradients, stride = self.positions, self.gradients, self.stride
        if int(self.num_updates) % int(stride) == 0:
            if len(positions) == max(8, 2 * (NUM_ROWS // (2 * len(position)))):
                positions, gradients, stride = positions[::2], gradients[::2], 2 * stride
            positions = torch.cat([positions, position.unsqueeze(0)])
            gradients = torch.cat([gradients, gradient.unsqueeze(0)])
        return Window(positions, gradients, stride, self.num_updates + 1)

    def mass(self) -> LowRank:
        """The mass matrix of these points, from their deviations from each chain's mean; computed in float64."""
        draws, gradients = _deviations(self.positions), _deviations(self.gradients)
        size, num_free = draws.shape[-1], (len(self.positions) - 1) * self.positions.shape[1]
        diagonal = _ratio(draws.square().mean(0), gradients.square().mean(0))
        draws, gradients = draws / diagonal.sqrt(), gradients * diagonal.sqrt()
        both = torch.cat([draws, gradients])
        basis = torch.linalg.qr(both.T)[0] if len(both) < size else torch.eye(size).to(draws)
        ridge = REGULARISER * torch.eye(basis.shape[-1]).to(draws)
        draws, gradients = draws @ basis, gradients @ basis
        mean = _geometric_mean(draws.T @ draws / num_free + ridge, gradients.T @ gradients / num_free + ridge)
        stretches, directions = torch.linalg.eigh(mean)
        order = stretches.log().abs().argsort(descending=True)[:MAX_RANK]
        stretches, directions = stretches[order], basis @ directions[:, order]
        stretches = torch.where(stretches.log().abs() > torch.tensor(CUTOFF).log(), stretches, 1.0)
        like = self.positions
        return LowRank(diagonal.unsqueeze(0).to(like), directions.to(like), stretches.to(like))


def _deviations(values: Tensor) -> Tensor:
    """From each chain's mean, as one matrix (B C, P) in float64."""
    values = values.double()
    return (values - values.mean(0)).flatten(0, 1)


def _ratio(variance: Tensor, gradient_variance: Tensor) -> Tensor:
    """sqrt(variance / gradient_variance), (P,); the variance where there is no gradient, and never zero."""
    ratio = torch.where(gradient_variance > 0, (variance / gradient_variance).sqrt(), variance)
    return ratio.clamp_min(1e-10 * float(ratio.max().clamp_min(1e-20)))


def _geometric_mean(covariance: Tensor, precision: Tensor) -> Tensor:
    """The symmetric X with X precision X = covariance."""
    values, vectors = torch.linalg.eigh(precision)
    root, inverse_root = (vectors * values.pow(power) @ vectors.T for power in (0.5, -0.5))
    values, vectors = torch.linalg.eigh(root @ covariance @ root)
    return inverse_root @ (vectors * values.clamp_min(0).sqrt() @ vectors.T) @ inverse_root
