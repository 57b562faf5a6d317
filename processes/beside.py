"""The joint posterior of a Gaussian process at rows that all batches share and at rows of their own."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from botorch.models import SingleTaskGP
from gpytorch.settings import lazily_evaluate_kernels
from torch import Tensor


class Prior(Protocol):
    """A Gaussian process of m independent outputs: ``mean`` (m,) and covariances of rows.

    ``covariance`` of (*batch, n, d) and (*batch, k, d) is (*batch, m, n, k), ``variance`` its diagonal (*batch, m, n).
    """

    @property
    def mean(self) -> Tensor: ...

    def covariance(self, first: Tensor, second: Tensor) -> Tensor: ...

    def variance(self, X: Tensor) -> Tensor: ...


class Observed(Protocol):
    r"""n observations: ``X`` (n, d); ``root`` L with :math:`L L^\top = \Sigma`, (m, n, n); ``whitened``,
    :math:`L^{-1} (y - c)`, (m, n).
    """

    @property
    def X(self) -> Tensor: ...

    @property
    def root(self) -> Tensor: ...

    @property
    def whitened(self) -> Tensor: ...


class Beside:
    r"""The posterior at k shared rows s and, for each batch, at its own q rows o.

    With :math:`A_\cdot = L^{-1} K(X, \cdot)` and the covariance :math:`\Sigma = L L^\top` of the observations,

    .. math:: \mu_\cdot = c + A_\cdot^\top L^{-1} (y - c), \qquad
              C = \begin{pmatrix} K_{ss} - A_s^\top A_s & K_{so} - A_s^\top A_o \\
                                  K_{os} - A_o^\top A_s & K_{oo} - A_o^\top A_o \end{pmatrix},

    whose upper left block is the same for all batches and is computed once. A further batch costs q (n + k) covariances and
    those among its own rows; asked for together with the shared rows it would cost (k + q) (n + k + q).

    Args:
        prior: of the functions.
        observed: what is known, without batch dimensions.
        shared: (k, d), constants: they get no gradients.
    """

    def __init__(self, prior: Prior, observed: Observed, shared: Tensor) -> None:
        self.prior, self.observed = prior, observed
        self.rows = torch.cat([observed.X, shared.detach()])
        with torch.no_grad():
            self.projected = self._project(prior.covariance(observed.X, shared))
            self.mean = self._mean(self.projected)
            self.within = prior.covariance(shared, shared) - self.projected.mT @ self.projected

    def __call__(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """At the shared rows and then those of X (*batch, q, d).

        Returns:
            Means (*batch, k + q, m) and the covariance of each output (*batch, m, k + q, k + q).
        """
        *batch, q, d = X.shape
        n = self.observed.X.shape[-2]
        # One matrix for all batches; (m, ·, batches * q) becomes (*batch, m, ·, q).
        to_observed, to_shared = self.prior.covariance(self.rows, X.reshape(-1, d)).split([n, len(self.rows) - n], -2)
        projected = self._project(to_observed)
        mean = self._mean(projected).reshape(*batch, q, -1)
        across = _by_batch(to_shared - self.projected.mT @ projected, batch, q)
        own = _by_batch(projected, batch, q)
        prior = self.prior.variance(X).unsqueeze(-1) if q == 1 else self.prior.covariance(X, X)
        corner = prior - own.mT @ own
        upper = torch.cat([self.within.expand(*across.shape[:-1], -1), across], -1)
        covariance = torch.cat([upper, torch.cat([across.mT, corner], -1)], -2)
        return torch.cat([self.mean.expand(*batch, *self.mean.shape), mean], -2), covariance

    def _project(self, to_observed: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.observed.root, to_observed, upper=False)

    def _mean(self, projected: Tensor) -> Tensor:
        """(rows, m)."""
        return self.prior.mean + (self.observed.whitened.unsqueeze(-2) @ projected).squeeze(-2).mT


def _by_batch(values: Tensor, batch: list[int], q: int) -> Tensor:
    """(m, rows, batches * q) -> (*batch, m, rows, q)."""
    return values.unflatten(-1, (*batch, q)).movedim((0, 1), (-3, -2))


class Observations(NamedTuple):
    """What is :class:`Observed`."""

    X: Tensor
    root: Tensor
    whitened: Tensor


class PriorOf:
    """The :class:`Prior` of a GPyTorch model with a constant mean, whose batch shape is (m,), or empty for one output."""

    def __init__(self, gp: SingleTaskGP) -> None:
        self.kernel = gp.covar_module
        self.mean: Tensor = gp.mean_module.constant.reshape(-1)

    def covariance(self, first: Tensor, second: Tensor) -> Tensor:
        """Of each row with each, (*batch, m, n, k)."""
        same = first is second  # kernels know their diagonals best
        first = first.unsqueeze(-3)
        with lazily_evaluate_kernels(False):  # what is asked for is needed, and GPyTorch's putting it off costs as much
            return self.kernel(first, first if same else second.unsqueeze(-3)).to_dense()

    def variance(self, X: Tensor) -> Tensor:
        """Of each row, (*batch, m, n)."""
        return self.kernel(X.unsqueeze(-3), diag=True)


def observations_of(gp: SingleTaskGP, X: Tensor) -> Observations:
    """What a fitted GPyTorch model has seen: the factor that it predicts with, computed once for each model.

    Args:
        gp: in evaluation mode, with exact Cholesky factors switched on.
        X: its training inputs (n, d).
    """
    gp.posterior(X[:1])  # GPyTorch makes its caches as it first predicts
    strategy: Any = gp.prediction_strategy
    root = strategy.lik_train_train_covar.cholesky().to_dense().reshape(-1, len(X), len(X))
    residual = (gp.train_targets - gp.mean_module(gp.train_inputs[0])).reshape(-1, len(X), 1)
    return Observations(X, root, torch.linalg.solve_triangular(root, residual, upper=False).squeeze(-1))
