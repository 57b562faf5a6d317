r"""Exact inference where functions and noise share one random scale: the algebra of Student-t processes.

.. math:: f \mid \sigma^2 \sim GP(c, \sigma^2 K), \quad \epsilon \mid \sigma^2 \sim N(0, \sigma^2 \tau^2), \quad
          \sigma^2 \sim IG(a, b).

Everything is in units of the scale matrix :math:`\Sigma = r K + \eta^2 I` of observations, with r = b/a and
:math:`\eta^2 = r \tau^2`: the covariance of the Gaussian process that is the limit of a to infinity. Outputs are independent.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from gpytorch.kernels import Kernel
from gpytorch.priors import LogNormalPrior
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Tensor, nn

from bayesnn.posteriors import StudentT
from bayesnn.processes.evidence import Quadratic, log_prior, quadratic
from bayesnn.processes.scale_mixtures import log_multivariate_t

MIN_NOISE_VAR = 1e-4  # in standardised units, BoTorch's
MIN_FIXED_NOISE_VAR = 1e-12  # a matrix without any can't be factored
# Weak, ours, except the noise's, which is BoTorch's. The shape has to have one: see StudentTProcess.
PRIORS = {
    "shape": LogNormalPrior(math.log(2.0), 0.5),
    "ratio": LogNormalPrior(-0.5, 1.0),
    "noise_var": LogNormalPrior(-4.0, 1.0),
}


class MixturePrior(nn.Module):
    r"""The prior over functions and noise of m independent outputs: a kernel, a mean, r = b/a, a and the noise.

    The scale matrix of observations is :math:`\Sigma = r K(X, X) + \eta^2 I`.

    Args:
        kernel: of batch shape (m,).
        num_outputs: m.
        shape, scale: a and b of the inverse gamma, where they aren't learned.
        noise_var: :math:`\eta^2`, (m,), where it isn't learned.
    """

    def __init__(
        self,
        kernel: Kernel,
        num_outputs: int,
        shape: float | None = None,
        scale: float | None = None,
        noise_var: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self._fixed_shape, self._fixed_scale, self._fixed_noise = shape, scale, noise_var
        self.mean = nn.Parameter(torch.zeros(num_outputs, dtype=torch.float64))
        if shape is None:
            self.log_shape = nn.Parameter(torch.full((num_outputs,), math.log(2.0), dtype=torch.float64))
        if scale is None:
            self.log_ratio = nn.Parameter(torch.zeros(num_outputs, dtype=torch.float64))
        if noise_var is None:
            # From the prior's mode, as BoTorch.
            self.log_noise_var = nn.Parameter(torch.full((num_outputs,), -5.0, dtype=torch.float64))
        self.kernel.double()

    @property
    def shape(self) -> Tensor:
        """a, (m,)."""
        return torch.full_like(self.mean, self._fixed_shape) if self._fixed_shape is not None else self.log_shape.exp()

    @property
    def ratio(self) -> Tensor:
        """r = b / a, (m,)."""
        return self._fixed_scale / self.shape if self._fixed_scale is not None else self.log_ratio.exp()

    @property
    def noise_var(self) -> Tensor:
        """The noise's part of the scale matrix, (m,)."""
        if self._fixed_noise is not None:
            return self._fixed_noise.double().clamp_min(MIN_FIXED_NOISE_VAR)
        return MIN_NOISE_VAR + self.log_noise_var.exp()

    def covariance(self, first: Tensor, second: Tensor) -> Tensor:
        """r K of (*batch, n, d) and (*batch, k, d): (*batch, m, n, k)."""
        batch = torch.broadcast_shapes(first.shape[:-2], second.shape[:-2])
        same = first is second
        first = first.expand(*batch, *first.shape[-2:]).unsqueeze(-3)
        second = first if same else second.expand(*batch, *second.shape[-2:]).unsqueeze(-3)
        return self.ratio[:, None, None] * self.kernel(first, second).to_dense()

    def variance(self, X: Tensor) -> Tensor:
        """The diagonal of r K, (*batch, m, n)."""
        return self.ratio[:, None] * self.kernel(X.unsqueeze(-3), diag=True)

    def log_prior(self) -> Tensor:
        """Of the hyperparameters that have one, for each output, (m,); what outputs share counts for each in part."""
        learned = {"shape": self._fixed_shape, "ratio": self._fixed_scale, "noise_var": self._fixed_noise}
        values = [(PRIORS[name], getattr(self, name)) for name, fixed in learned.items() if fixed is None]
        total = sum((prior.log_prob(value) for prior, value in values), torch.zeros_like(self.mean))
        return total + log_prior(self.kernel, len(total))


class Conditioned(NamedTuple):
    r"""What is known after n observations, for m outputs.

    ``X`` (*batch, n, d); ``root``, the Cholesky factor L of :math:`\Sigma`, (*batch, m, n, n); ``whitened``,
    :math:`L^{-1} (y - c)`, (*fantasies, *batch, m, n).
    """

    X: Tensor
    root: Tensor
    whitened: Tensor

    @property
    def size(self) -> int:
        """n."""
        return self.X.shape[-2]

    @property
    def squared_distance(self) -> Tensor:
        r""":math:`(y-c)^\top \Sigma^{-1} (y-c)`, noise included, (*batch, m)."""
        return self.whitened.square().sum(-1)

    @property
    def log_det(self) -> Tensor:
        r""":math:`\ln |\Sigma|`, (*batch, m)."""
        return 2 * self.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def no_observations(prior: MixturePrior, num_features: int) -> Conditioned:
    """Before data."""
    m, empty = prior.mean.shape[0], prior.mean.new_zeros
    return Conditioned(empty(0, num_features), empty(m, 0, 0), empty(m, 0))


def condition(prior: MixturePrior, known: Conditioned, X: Tensor, Y: Tensor) -> Conditioned:
    """Take in observations X (*batch, q, d), Y (*fantasies, *batch, q, m): new rows of the Cholesky factor, O(n^2 q)."""
    cross, whitened_mean = _project(prior, known, X)
    batch, q, n = cross.shape[:-2], X.shape[-2], known.size
    schur = prior.covariance(X, X) - cross.mT @ cross
    corner = psd_safe_cholesky(schur + torch.diag_embed(prior.noise_var.unsqueeze(-1).expand(*batch, q)))
    upper = torch.cat([known.root.expand(*batch, n, n), cross.new_zeros(*batch, n, q)], -1)
    root = torch.cat([upper, torch.cat([cross.mT, corner], -1)], -2)
    residual = (Y - prior.mean).mT - whitened_mean
    new = torch.linalg.solve_triangular(corner, residual.unsqueeze(-1), upper=False).squeeze(-1)
    old = known.whitened.expand(*new.shape[:-1], n)
    inputs = torch.cat([known.X.expand(*batch[:-1], n, X.shape[-1]), X.expand(*batch[:-1], q, X.shape[-1])], -2)
    return Conditioned(inputs, root, torch.cat([old, new], -1))


def _project(prior: MixturePrior, known: Conditioned, X: Tensor) -> tuple[Tensor, Tensor]:
    """L^-1 K(known, X), (*batch, m, n, q), and its product with the whitened outcomes, (*fantasies, *batch, m, q)."""
    if known.size == 0:  # kernels have no gradients of nothing
        nothing = X.new_zeros(*X.shape[:-2], prior.mean.shape[0], 0, X.shape[-2])
        return nothing, nothing.sum(-2)
    cross = torch.linalg.solve_triangular(known.root, prior.covariance(known.X, X), upper=False)
    return cross, (known.whitened.unsqueeze(-2) @ cross).squeeze(-2)


def fit_of(prior: MixturePrior, X: Tensor, Y: Tensor) -> Quadratic:
    """How far observations X (n, d), Y (n, m) are from what the prior expects, with fast gradients by its parameters."""
    return quadratic(prior.covariance(X, X), prior.noise_var.unsqueeze(-1).expand(-1, len(X)), (Y - prior.mean).mT)


def log_evidence(prior: MixturePrior, known: Conditioned | Quadratic) -> Tensor:
    r"""The log density of the observations, :math:`\log MVT_{2a}(y; c, \Sigma)`, (*batch, m)."""
    return log_multivariate_t(known.squared_distance, known.log_det, 2 * prior.shape, known.size)


def inflation(prior: MixturePrior, known: Conditioned) -> Tensor:
    r""":math:`(2a + d^2) / (2a + n)`: by how much the data widen or shrink every variance, (*batch, m)."""
    return (2 * prior.shape + known.squared_distance) / (2 * prior.shape + known.size)


def gaussian(prior: MixturePrior, known: Conditioned, X: Tensor) -> tuple[Tensor, Tensor]:
    r"""The Gaussian process of covariance :math:`\Sigma` at X (*batch, q, d).

    Returns:
        Its mean (*batch, q, m) and the covariance of each output (*batch, m, q, q).
    """
    cross, shift = _project(prior, known, X)
    covariance, loc = prior.covariance(X, X) - cross.mT @ cross, prior.mean + shift.mT
    return loc, covariance.expand(*loc.shape[:-2], *covariance.shape[-3:])


def gaussian_marginals(prior: MixturePrior, known: Conditioned, X: Tensor) -> tuple[Tensor, Tensor]:
    """Its means and variances at each point alone, (*batch, q, m) both."""
    cross, shift = _project(prior, known, X)
    loc, var = prior.mean + shift.mT, (prior.variance(X) - cross.square().sum(-2)).clamp_min(0).mT
    return loc, var.expand_as(loc)


def student_t(prior: MixturePrior, known: Conditioned, loc: Tensor, covariance: Tensor) -> StudentT:
    r"""The posterior of f, a joint multivariate t with 2a + n degrees of freedom, from that of the Gaussian process.

    .. math:: \mu = c + k_*^\top \Sigma^{-1} (y - c), \qquad
              S = \frac{2a + d^2}{2a + n} \left(K_{**} - k_*^\top \Sigma^{-1} k_*\right).

    Args:
        prior, known: of the process.
        loc: (*batch, q, m), as :func:`gaussian` gives it.
        covariance: (*batch, m, q, q), likewise.
    """
    return StudentT(loc, inflation(prior, known)[..., None, None] * covariance, 2 * prior.shape + known.size)


def predict_marginals(prior: MixturePrior, known: Conditioned, X: Tensor) -> tuple[Tensor, Tensor]:
    """Locations and squared scales of f at each point alone, (*batch, q, m) both; no q x q matrix is formed."""
    loc, var = gaussian_marginals(prior, known, X)
    return loc, inflation(prior, known).unsqueeze(-2) * var
