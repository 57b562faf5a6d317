r"""Gaussian processes seen through inducing values, with independent functions :math:`f_l \sim GP(c_l, k_l)`, l = 1 … L.

The inducing values :math:`u_l = f_l(Z) - c_l` are whitened, :math:`u_l = R_l v_l` with :math:`R R^\top = K_{ZZ}`, and
:math:`q(v_l) = N(m_l, S_l)`. With :math:`A = R^{-1} K_{ZX}`,

.. math:: q(f_l(X)) = N(c_l + A^\top m_l,\; K_{XX} - A^\top A + A^\top S_l A).
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import torch
from gpytorch.kernels import Kernel, ScaleKernel
from gpytorch.priors import LogNormalPrior
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Tensor, nn
from torch.func import functional_call

from bayesnn.processes.evidence import log_prior
from bayesnn.processes.kernels import KernelFactory, MLPKernel
from bayesnn.processes.kernels.factories import made
from bayesnn.processes.kernels.nystrom import nystrom

JITTER = 1e-10  # of the inducing covariance, as a share of its mean diagonal

Parameters = dict[str, Tensor]


class Inducing(NamedTuple):
    """Inducing inputs Z (M, d) and the lower Cholesky factor R of their covariance, (L, M, M) or (1, M, M)."""

    points: Tensor
    root: Tensor


class Projection(NamedTuple):
    """A (*batch, L, M, n), K_XX (*batch, L, n, n) or its diagonal, and variances (*batch, L, n) that Z leaves unexplained."""

    base: Tensor
    own: Tensor
    left: Tensor


class SparsePrior(nn.Module):
    """The prior over functions: a kernel and a constant mean for each.

    Evaluated in float64, as a function of its parameters where these are given.

    Args:
        kernel: of batch shape (L,), or () if all functions share it.
        num_latents: L.
    """

    def __init__(self, kernel: Kernel, num_latents: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.mean = nn.Parameter(torch.zeros(num_latents))
        self.double()
        self._learned = {name for name, value in self.named_parameters() if value.requires_grad}

    def forward(self, function: str, *arguments: Any) -> Any:
        """One of the methods, for ``functional_call``."""
        return getattr(self, function)(*arguments)

    def at(self, parameters: Parameters, function: str, *arguments: Any) -> Any:
        """What a method gives with other parameters; names that aren't its own are left out."""
        own = {name for name, _ in self.named_parameters()}
        return functional_call(self, {n: v for n, v in parameters.items() if n in own}, (function, *arguments))

    def start(self) -> Parameters:
        """Those of its parameters that are to be learned, as they are."""
        return {name: value.detach().clone() for name, value in self.named_parameters() if name in self._learned}

    def take(self, parameters: Parameters) -> Self:
        """Have these, and learn no more."""
        with torch.no_grad():
            for name, own in self.named_parameters():
                if name in parameters:
                    own.copy_(parameters[name])
        return self.eval().requires_grad_(False)

    def log_prior(self) -> Tensor:
        """Of the kernel's hyperparameters that have one; the mean's is flat."""
        return log_prior(self.kernel, 1).sum()

    def covariance(self, first: Tensor, second: Tensor | None = None) -> Tensor:
        """Of (*batch, n, d) and (*batch, k, d): (*batch, L or 1, n, k)."""
        if second is None:
            return self.kernel(first.unsqueeze(-3)).to_dense()
        batch = torch.broadcast_shapes(first.shape[:-2], second.shape[:-2])
        first, second = (x.expand(*batch, *x.shape[-2:]).unsqueeze(-3) for x in (first, second))
        return self.kernel(first, second).to_dense()

    def variance(self, X: Tensor) -> Tensor:
        """The diagonal, (*batch, L or 1, n)."""
        return self.kernel(X.unsqueeze(-3), diag=True)

    def inducing(self, Z: Tensor) -> Inducing:
        """Z with the factor of its covariance."""
        within = self.covariance(Z)
        jitter = JITTER * within.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).detach()
        within = within + torch.diag_embed(jitter.expand(within.shape[:-1]))
        return Inducing(Z, psd_safe_cholesky(within, max_tries=6))

    def project(self, inducing: Inducing, X: Tensor, joint: bool = False) -> Projection:
        """How X hangs on the inducing values; with the whole of K_XX if ``joint``."""
        base = torch.linalg.solve_triangular(inducing.root, self.covariance(inducing.points, X), upper=False)
        own = self.covariance(X) if joint else self.variance(X)
        variance = own.diagonal(dim1=-2, dim2=-1) if joint else own
        return Projection(base, own, (variance - base.square().sum(-2)).clamp_min(0))

    def landmarks(self, X: Tensor, count: int) -> Tensor:
        """Rows of X by pivoted Cholesky, greedily that with the largest variance left, averaged over functions.

        A good choice of inducing points for a kernel (Burt, Rasmussen & van der Wilk 2020).
        """
        with torch.no_grad():
            scale = self.variance(X[:256]).mean(-1)[..., None, None]

            def average(first: Tensor, second: Tensor) -> Tensor:
                return (self.covariance(first, second) / scale).mean(-3)

            return nystrom(average, X, count).landmarks


def network_prior(
    num_features: int, num_latents: int, shared: bool, kernel: KernelFactory | None, depth: int, activation: str
) -> SparsePrior:
    """The prior of an infinitely wide network with a learned output scale, or of a kernel of the user's.

    Args:
        num_features: d.
        num_latents: L.
        shared: one kernel for all functions, or one for each.
        kernel: ``kernel(num_features, batch_shape)``, taken as it is; None: the network's.
        depth: hidden layers of the network.
        activation: of the network.
    """
    batch = torch.Size([]) if shared else torch.Size([num_latents])
    if kernel is not None:
        return SparsePrior(made(kernel, num_features, batch), num_latents)
    network = MLPKernel(depth, activation)(num_features, batch)
    return SparsePrior(ScaleKernel(network, LogNormalPrior(-0.5, 1.0), batch_shape=batch), num_latents)
