r"""Joint draws of an amortised network, point after point: the chain rule in place of a copula.

.. math:: p(y_1, \dots, y_q \mid D) = \prod_j p_\theta(y_j \mid x_j, D, (x_1, y_1), \dots, (x_{j-1}, y_{j-1})).

Source: Bruinsma et al., Autoregressive conditional neural processes (ICLR 2023). The context is encoded once: drawn points
attend to the context and to those drawn before, and the context doesn't see them.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from bayesnn.data import BayesnnWarning
from bayesnn.distributions import affine, from_normals
from bayesnn.posteriors import FunctionDraws
from bayesnn.posteriors.copula import of_outputs
from bayesnn.posteriors.draws import transformed_draws
from bayesnn.posteriors.shared_normals import SharedNormalPosterior


class Autoregressive(SharedNormalPosterior):
    r"""Draws of f or of y at q points, each given the observations drawn before it.

    Every point's marginal given the observations before it is the network's own. Of f, points are tied through those (noisy)
    observations alone, so that draws of f are too little correlated where the noise is large; a ``Copula`` doesn't have that
    fault. Draws depend on the points' order, a repeated point needn't have the same value again, and they differ from those
    that encoding everything anew for each point would give, since the context doesn't see them.

    Args:
        network: with ``query``, ``distributions`` and ``extend``.
        cache: of the context, batch shape (*context, m).
        X: (*batch, q, d), scaled.
        of_observations: draw y in place of f.
        most_points: that the network was trained to draw beside its context; more make a warning. None: not known.
    """

    def __init__(
        self, network: Any, cache: Any, X: Tensor, of_observations: bool, most_points: int | None = None
    ) -> None:
        self.network, self.cache, self.X, self.of_observations = network, cache, X, of_observations
        self.most_points = most_points
        f, y = self._laws(cache, X)
        self._standardised = y if of_observations else f
        m = self._standardised.mean.shape[-1]
        self._mean_like = self._standardised.mean
        self.loc, self.scale = (value.expand(1, m) for value in (X.new_zeros(1, 1), X.new_ones(1, 1)))
        self.indices = list(range(m))

    @property
    def marginals(self) -> Distribution:
        """Of each point by itself, before any is drawn; batch shape (*batch, q, outputs)."""
        return of_outputs(affine(self._standardised, self.loc, self.scale), self.indices)

    @property
    def mean(self) -> Tensor:
        return self.marginals.mean

    @property
    def variance(self) -> Tensor:
        return self.marginals.variance

    def rsample_from_base_samples(self, sample_shape: torch.Size, base_samples: Tensor) -> Tensor:
        """Values from normals of shape (*sample_shape, *batch, q, outputs)."""
        m, q = self._standardised.mean.shape[-1], self.X.shape[-2]
        if self.most_points is not None and q > self.most_points:
            warnings.warn(
                f"X has {q} points to draw one after the other, and the network was trained on {self.most_points} beside "
                "these rows: draw fewer at a time, or take joint='copula'",
                BayesnnWarning,
                stacklevel=2,
            )
        shape = torch.Size([*sample_shape, *self.batch_shape])
        normals = base_samples.to(self.X).expand(*shape, *base_samples.shape[-2:])
        if self.indices != list(range(m)):
            whole = normals.new_zeros(*shape, normals.shape[-2], m)
            whole[..., self.indices] = normals
            normals = whole
        # Turns draws of f into the observations that later points are given: the same at every call, others for each draw.
        per_draw = (*sample_shape, *(1 for _ in self.batch_shape), normals.shape[-2], m)
        noise = torch.randn(per_draw, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(normals)
        return (self.loc + self.scale * self._paths(shape, normals, noise))[..., self.indices]

    def _paths(self, shape: torch.Size, normals: Tensor, noise: Tensor) -> Tensor:
        """Standardised values (*shape, q, m) of f or y; shape is that of the draws and the t-batch."""
        q, m = normals.shape[-2:]
        cache, X, found = self.cache.expand((*shape, m)), self.X.expand(*shape, *self.X.shape[-2:]), []
        for j in range(q):
            place = X[..., j : j + 1, :]
            f, y = self._laws(cache, place)  # (*shape, 1, m)
            normal = normals[..., j : j + 1, :]
            if self.of_observations:
                observed = from_normals(y, normal)
                found.append(observed)
            else:
                share = (f.stddev / y.stddev).clamp_max(1).detach()
                found.append(from_normals(f, normal))
                observed = from_normals(y, share * normal + (1 - share.square()).sqrt() * noise[..., j : j + 1, :])
            if j + 1 < q:
                rows = place.unsqueeze(-3).expand(*shape, m, 1, place.shape[-1])
                cache = self.network.extend(cache, rows, observed.mT.unsqueeze(-1))
        return torch.cat(found, -2)

    def log_prob(self, Y: Tensor) -> Tensor:
        """Log joint density (*batch,) of observations Y (*batch, q, m) of all outputs.

        Raises:
            ValueError: for other shapes, or a posterior of some of the outputs.
        """
        if Y.shape[-2:] != self._standardised.mean.shape[-2:] or self.indices != list(range(Y.shape[-1])):
            raise ValueError(f"Y must have shape (…, q, m) of all outputs, found {tuple(Y.shape)}")
        Y = (Y - self.loc) / self.scale
        shape, m = self.batch_shape, Y.shape[-1]
        cache, total = self.cache.expand((*shape, m)), -Y.shape[-2] * self.scale.log().sum().expand(shape)
        for j in range(Y.shape[-2]):
            place, observed = self.X[..., j : j + 1, :], Y[..., j : j + 1, :]
            total = total + self._laws(cache, place)[1].log_prob(observed).sum((-2, -1))
            rows = place.unsqueeze(-3).expand(*shape, m, 1, place.shape[-1])
            cache = self.network.extend(cache, rows, observed.mT.unsqueeze(-1))
        return total

    def _laws(self, cache: Any, X: Tensor) -> tuple[Distribution, Distribution]:
        """Of f and y at X (*batch, q, d), batch shape (*batch, q, m)."""
        output = self.network.query(cache, X.unsqueeze(-3))  # (*batch, m, q, …)
        return self.network.distributions(output.movedim(len(output.shape) - 3, -2))

    def affine(self, loc: Tensor, scale: Tensor) -> Autoregressive:
        """The posterior of ``loc + scale * value``; loc and scale are (1, m)."""
        return self._with(loc=loc + scale * self.loc, scale=scale * self.scale)

    def outputs(self, indices: list[int]) -> Autoregressive:
        """The posterior of some of the outputs."""
        kept = [self.indices[index] for index in indices]
        return self._with(indices=kept, _mean_like=self._standardised.mean[..., kept])

    def _with(self, **changed: Any) -> Autoregressive:
        twin = object.__new__(Autoregressive)
        twin.__dict__.update(self.__dict__ | changed)
        return twin

    def transformed(self, transform: Any, X: Tensor) -> FunctionDraws:
        """The posterior of a BoTorch ``PosteriorTransform``'s value, through draws."""
        return transformed_draws(self, transform, X)
