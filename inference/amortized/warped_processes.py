r"""Gaussian processes over warped inputs, many at once, given the same rows: exact answers that keep up as rows come.

With hyperparameters :math:`\ell_d` (lengthscales), c (a warp), a (amplitude) and :math:`\sigma` (noise) of each,

.. math::
    z_d(x) = \frac{1}{\ell_d} \Bigl(x_d + \sum_{p=2}^5 c_{dp} \bigl(x_d / \sqrt 3\bigr)^p\Bigr), \qquad
    f \mid D \text{ at } x \sim N\bigl(k^\top (K + \sigma^2 I)^{-1} y,\; k(x, x) - k^\top (K + \sigma^2 I)^{-1} k\bigr)

(Rasmussen and Williams, 2006, equations 2.23-2.24), where k is :math:`a^2` times the Matérn-3/2 kernel of z, centred and
scaled over reference inputs as standardised outcomes are (``tasks.covariances.centred``). All of it is in float64: where
observations are precise, K has no digits to spare.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bayesnn.inference.amortized.tasks.covariances import reference_inputs

DEGREES = (2, 3, 4, 5)
FAR = 1.5
LEAST_VARIANCE = 1e-8


class WarpedProcesses(NamedTuple):
    """H processes for each element of a batch, given n rows.

    Attributes:
        sharpness: (*batch, H, d) inverse lengthscales, 0 for features that don't count.
        warp: (*batch, H, d, 4) coefficients c.
        amplitude: (*batch, H).
        noise: (*batch, H) standard deviation.
        reference: (*batch, H, 64, d) reference inputs in z, over which f averages 0.
        within: (*batch, H) the mean of their kernel matrix.
        places: (*batch, H, n, d) the rows in z.
        own: (*batch, H, n) means of their kernel with the reference inputs.
        root: (*batch, H, n, n) Cholesky factor of :math:`K + \\sigma^2 I`.
        whitened: (*batch, H, n, 1) the factor's solution for y.
    """

    sharpness: Tensor
    warp: Tensor
    amplitude: Tensor
    noise: Tensor
    reference: Tensor
    within: Tensor
    places: Tensor
    own: Tensor
    root: Tensor
    whitened: Tensor

    @staticmethod
    def prior(sharpness: Tensor, warp: Tensor, amplitude: Tensor, noise: Tensor) -> WarpedProcesses:
        """Given no rows yet."""
        d = sharpness.shape[-1]
        reference = _placed(sharpness, warp, reference_inputs(d).to(noise).expand(*noise.shape[:-1], -1, -1))
        within = _matern32(reference, reference).mean((-1, -2))
        none = noise.new_zeros(*noise.shape, 0)
        places, root = (none[..., None].expand(*none.shape, size) for size in (d, 0))
        return WarpedProcesses(
            sharpness, warp, amplitude, noise, reference, within, places, none, root, none[..., None]
        )

    def given(self, X: Tensor, y: Tensor) -> WarpedProcesses:
        """Given more rows, (*batch, k, d) and (*batch, k, 1): the factor grows by blocks."""
        n, k = self.root.shape[-1], X.shape[-2]
        places, own = self._seen(X)
        noise = self.noise.square()[..., None, None] * torch.eye(k, dtype=self.noise.dtype, device=X.device)
        covariance = self._covariance(places, places, own, own) + noise
        outcomes = y.to(self.noise).unsqueeze(-3).expand(*self.noise.shape, k, 1)
        if n == 0:
            root = torch.linalg.cholesky(covariance)
            whitened = torch.linalg.solve_triangular(root, outcomes, upper=False)
            return self._replace(places=places, own=own, root=root, whitened=whitened)
        cross = self._whitened_covariance(places, own)
        below = torch.linalg.cholesky(covariance - cross.mT @ cross)
        remains = torch.linalg.solve_triangular(below, outcomes - cross.mT @ self.whitened, upper=False)
        upper = torch.cat([self.root, self.root.new_zeros(*self.root.shape[:-1], k)], -1)
        return self._replace(
            places=torch.cat([self.places, places], -2),
            own=torch.cat([self.own, own], -1),
            root=torch.cat([upper, torch.cat([cross.mT, below], -1)], -2),
            whitened=torch.cat([self.whitened, remains], -2),
        )

    def at(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Means and variances (*batch, H, q) of f at X (*batch, q, d)."""
        places, own = self._seen(X)
        cross = self._whitened_covariance(places, own)
        within = self.within[..., None]
        prior = self.amplitude.square()[..., None] * (1 + within - 2 * own) / _spread(within)
        mean = (cross.mT @ self.whitened)[..., 0]
        return mean, (prior - cross.square().sum(-2)).clamp_min(LEAST_VARIANCE)

    @property
    def log_evidence(self) -> Tensor:
        """log p(y), (*batch, H) (Rasmussen and Williams, equation 2.30)."""
        log_det = self.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * self.whitened.square().sum((-1, -2)) - log_det - 0.5 * self.root.shape[-1] * math.log(2 * math.pi)

    def expand(self, batch: Sequence[int]) -> WarpedProcesses:
        """The same for a larger batch shape."""
        most = self.noise.dim() - 1
        return WarpedProcesses(*(part.expand(*batch, *part.shape[most:]) for part in self))

    def unsqueezed(self) -> WarpedProcesses:
        """With a dimension of size 1 before the last one of the batch."""
        return WarpedProcesses(*(part.unsqueeze(self.noise.dim() - 2) for part in self))

    def flat(self) -> WarpedProcesses:
        """With one batch dimension."""
        most = self.noise.dim() - 1
        return WarpedProcesses(*(part.reshape(math.prod(part.shape[:most]), *part.shape[most:]) for part in self))

    def _seen(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs (*batch, n, d) in z, and the means (*batch, H, n) of their kernel with the reference inputs."""
        places = _placed(self.sharpness, self.warp, X.to(self.noise))
        return places, _matern32(places, self.reference).mean(-1)

    def _whitened_covariance(self, places: Tensor, own: Tensor) -> Tensor:
        covariance = self._covariance(self.places, places, self.own, own)
        return torch.linalg.solve_triangular(self.root, covariance, upper=False)

    def _covariance(self, first: Tensor, second: Tensor, own: Tensor, other: Tensor) -> Tensor:
        """Of f at (*batch, H, n, d) and (*batch, H, m, d) in z: (*batch, H, n, m)."""
        within = self.within[..., None, None]
        centred = _matern32(first, second) - own[..., :, None] - other[..., None, :] + within
        return self.amplitude.square()[..., None, None] * centred / _spread(within)


def _placed(sharpness: Tensor, warp: Tensor, X: Tensor) -> Tensor:
    """Inputs (*batch, n, d) in z: (*batch, H, n, d)."""
    X = X.unsqueeze(-3)
    # In [-1, 1] where the bounds are known; far outside, powers would run away.
    small = (X / math.sqrt(3)).clamp(-FAR, FAR)
    powers = torch.stack([small**degree for degree in DEGREES], -1)
    return (X + (warp.unsqueeze(-3) * powers).sum(-1)) * sharpness.unsqueeze(-2)


def _matern32(first: Tensor, second: Tensor) -> Tensor:
    """That of ``tasks.covariances``, with a gradient where points coincide."""
    norms = first.square().sum(-1)[..., :, None] + second.square().sum(-1)[..., None, :]
    distance = (3 * (norms - 2 * first @ second.mT).clamp_min(0) + 1e-12).sqrt()
    return (1 + distance) * torch.exp(-distance)


def _spread(within: Tensor) -> Tensor:
    """The variance over the reference inputs by which the centred kernel is divided."""
    return (1 - within).clamp_min(1e-4)
