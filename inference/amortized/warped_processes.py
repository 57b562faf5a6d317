r"""Gaussian processes over warped inputs, many at once, given the same rows: exact answers that keep up as rows come.

With hyperparameters :math:`\ell_d` (lengthscales), c (a warp), a (amplitude) and :math:`\sigma` (noise) of each,

.. math::
    z_d(x) = \frac{1}{\ell_d} \Bigl(x_d + \sum_{p=2}^5 c_{dp} \bigl(x_d / \sqrt 3\bigr)^p\Bigr), \qquad
    f \mid D \text{ at } x \sim N\bigl(k^\top (K + \sigma^2 I)^{-1} y,\; k(x, x) - k^\top (K + \sigma^2 I)^{-1} k\bigr)

(Rasmussen and Williams, 2006, equations 2.23-2.24), where k is :math:`a^2` times the Matérn-3/2 kernel of z, centred and
scaled over reference inputs as the outcomes of tasks are (``tasks.covariances.centred``), plus the variance of an unknown
constant: outcomes that were standardised by their own rows' mean are off by as much as that mean is. All of it is in float64:
where observations are precise, K has no digits to spare.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bayesnn.inference.amortized.tasks.covariances import NUM_REFERENCE, reference_inputs

DEGREES = (2, 3, 4, 5)  # of the warp, by Horner's rule
FAR = 1.5  # times the bounds of a uniform input: the warp is a shift beyond
LEAST_VARIANCE = 1e-8  # of f, in place of what rounding may make negative
LEAST_SPREAD = 1e-4  # of a kernel over the reference inputs, where lengthscales are so large that it is constant
LEAST_SQUARED_DISTANCE = 1e-12  # whose root has a gradient


class WarpedProcesses(NamedTuple):
    """H processes for each element of a batch, given n rows.

    Attributes:
        sharpness: (*batch, H, d) inverse lengthscales, 0 for features that don't count.
        warp: (*batch, H, d, 4) coefficients c.
        amplitude: (*batch, H).
        noise: (*batch, H) standard deviation.
        offset: (*batch, H) standard deviation of the constant.
        within: (*batch, H) the mean of the kernel matrix of the R reference inputs, over which f averages 0.
        places: (*batch, H, R + n, d) the reference inputs and the rows in z.
        own: (*batch, H, n) means of the rows' kernel with the reference inputs.
        root: (*batch, H, n, n) Cholesky factor of :math:`K + \\sigma^2 I`.
        whitened: (*batch, H, n, 1) the factor's solution for y.
        log_evidence: (*batch, H) log p(y) (Rasmussen and Williams, equation 2.30).
    """

    sharpness: Tensor
    warp: Tensor
    amplitude: Tensor
    noise: Tensor
    offset: Tensor
    within: Tensor
    places: Tensor
    own: Tensor
    root: Tensor
    whitened: Tensor
    log_evidence: Tensor

    @staticmethod
    def prior(sharpness: Tensor, warp: Tensor, amplitude: Tensor, noise: Tensor, offset: Tensor) -> WarpedProcesses:
        """Given no rows yet."""
        d = sharpness.shape[-1]
        reference = _placed(sharpness, warp, reference_inputs(d).to(noise).expand(*noise.shape[:-1], -1, -1))
        within = matern32(reference, reference)[0].mean((-1, -2))
        return WarpedProcesses(sharpness, warp, amplitude, noise, offset, within, reference, *_no_rows(noise))

    def without_rows(self) -> WarpedProcesses:
        """The prior again."""
        own, root, whitened, log_evidence = _no_rows(self.noise)
        places = self.places[..., :NUM_REFERENCE, :]
        return self._replace(places=places, own=own, root=root, whitened=whitened, log_evidence=log_evidence)

    def given(self, X: Tensor, y: Tensor) -> WarpedProcesses:
        """Given more rows, (*batch, k, d) and (*batch, k, 1): the factor grows by blocks."""
        n, k = self.root.shape[-1], X.shape[-2]
        places = _placed(self.sharpness, self.warp, X.to(self.noise))
        kernel = matern32(torch.cat([self.places, places], -2), places)[0]
        own = kernel[..., :NUM_REFERENCE, :].mean(-2)
        covariance = self._centred(kernel[..., NUM_REFERENCE:, :], torch.cat([self.own, own], -1), own)
        K = covariance[..., n:, :] + self.noise.square()[..., None, None] * torch.eye(
            k, dtype=own.dtype, device=own.device
        )
        remains = y.to(K).unsqueeze(-3).expand(*self.noise.shape, k, 1)
        if n:
            cross = torch.linalg.solve_triangular(self.root, covariance[..., :n, :], upper=False)
            K, remains = K - cross.mT @ cross, remains - cross.mT @ self.whitened
        root = torch.linalg.cholesky(K)
        whitened = torch.linalg.solve_triangular(root, remains, upper=False)
        log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        evidence = -0.5 * whitened.square().sum((-1, -2)) - log_det - 0.5 * k * math.log(2 * math.pi)
        if n:
            upper = torch.cat([self.root, self.root.new_zeros(*self.root.shape[:-1], k)], -1)
            root = torch.cat([upper, torch.cat([cross.mT, root], -1)], -2)
        return self._replace(
            places=torch.cat([self.places, places], -2),
            own=torch.cat([self.own, own], -1),
            root=root,
            whitened=torch.cat([self.whitened, whitened], -2),
            log_evidence=self.log_evidence + evidence,
        )

    def at(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Means and variances (*batch, H, q) of f at X (*batch, q, d)."""
        _, own, cross = self._seen(X)
        scale = self.amplitude.square() / spread(self.within)
        most = scale * (1 + self.within) + self.offset.square()
        prior = most[..., None] - (2 * scale)[..., None] * own
        mean = (cross.mT @ self.whitened)[..., 0]
        return mean, (prior - cross.square().sum(-2)).clamp_min(LEAST_VARIANCE)

    def joint(self, X: Tensor, q: int) -> tuple[Tensor, Tensor]:
        """Means (*batch, H, E, q) and covariances (*batch, H, E, q, q) of f within groups of q rows of X (*batch, E q, d)."""
        places, own, cross = self._seen(X)
        places, own = places.unflatten(-2, (-1, q)), own.unflatten(-1, (-1, q))
        mean = (cross.mT @ self.whitened)[..., 0].unflatten(-1, (-1, q))
        cross = cross.unflatten(-1, (-1, q)).movedim(-2, -3)
        within, scale = self.within[..., None], (self.amplitude.square() / spread(self.within))[..., None]
        prior = matern32(places, places)[0] - own[..., :, None] - (own - within[..., None])[..., None, :]
        prior = scale[..., None, None] * prior + self.offset.square()[..., None, None, None]
        return mean, prior - cross.mT @ cross

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

    def _seen(self, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs (*batch, m, d) in z, the means (*batch, H, m) of their kernel with the reference inputs, and what the rows'
        factor makes of their covariances with the rows, (*batch, H, n, m).
        """
        places = _placed(self.sharpness, self.warp, X.to(self.noise))
        kernel = matern32(self.places, places)[0]
        own = kernel[..., :NUM_REFERENCE, :].mean(-2)
        covariance = self._centred(kernel[..., NUM_REFERENCE:, :], self.own, own)
        return places, own, torch.linalg.solve_triangular(self.root, covariance, upper=False)

    def _centred(self, kernel: Tensor, own: Tensor, other: Tensor) -> Tensor:
        """The covariances of f from the kernel (*batch, H, n, m) and the means of both sides with the reference inputs."""
        scale = self.amplitude.square() / spread(self.within)
        shift = scale[..., None] * (self.within[..., None] - own) + self.offset.square()[..., None]
        return torch.addcmul(shift[..., :, None], scale[..., None, None], kernel - other[..., None, :])


def _no_rows(noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is known of no rows: own, root, whitened and log_evidence."""
    none = noise.new_zeros(*noise.shape, 0)
    return none, none[..., None].expand(*none.shape, 0), none[..., None], torch.zeros_like(noise)


def _placed(sharpness: Tensor, warp: Tensor, X: Tensor) -> Tensor:
    """Inputs (*batch, n, d) in z: (*batch, H, n, d)."""
    X = X.unsqueeze(-3)
    small = _small(X)
    *lower, bend = warp.unsqueeze(-3).unbind(-1)
    for coefficient in reversed(lower):
        bend = torch.addcmul(coefficient, bend, small)
    return torch.addcmul(X, bend * small, small) * sharpness.unsqueeze(-2)


def _small(X: Tensor) -> Tensor:
    """In [-1, 1] where the bounds are known; far outside, powers would run away."""
    return (X / math.sqrt(3)).clamp(-FAR, FAR)


def powers(X: Tensor) -> Tensor:
    """What the warp's coefficients multiply, (*X.shape, 4)."""
    return torch.stack([_small(X) ** degree for degree in DEGREES], -1)


def matern32(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    r"""That of ``tasks.covariances``, of points that may coincide, and its factor :math:`\exp(-\sqrt 3 r)`."""
    first, second = math.sqrt(3) * first, math.sqrt(3) * second
    norms, others = (points.square().sum(-1, keepdim=True) for points in (first, second))
    # A squared distance as an inner product of longer rows: one matrix product in place of several passes over its result.
    left = torch.cat([first, norms, torch.ones_like(norms)], -1)
    right = torch.cat([-2 * second, torch.ones_like(others), others], -1)
    distance = (left @ right.mT).clamp_min(LEAST_SQUARED_DISTANCE).sqrt()
    decay = (-distance).exp()
    return torch.addcmul(decay, distance, decay), decay


def spread(within: Tensor) -> Tensor:
    """The variance over the reference inputs by which the centred kernel is divided."""
    return (1 - within).clamp_min(LEAST_SPREAD)
