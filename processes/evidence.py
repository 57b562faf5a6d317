"""What the marginal likelihoods of processes are made of: a quadratic form, a log determinant and priors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from gpytorch.module import Module
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Tensor
from torch.autograd.function import once_differentiable


class Quadratic(NamedTuple):
    r"""Of n outcomes for each of m outputs: :math:`d^2 = (y-c)^\top \Sigma^{-1} (y-c)` and :math:`\ln |\Sigma|`, (m,)."""

    squared_distance: Tensor
    log_det: Tensor
    size: int


def quadratic(covariance: Tensor, noise_var: Tensor, residual: Tensor) -> Quadratic:
    r"""Of :math:`\Sigma`, the sum of a covariance (*batch, n, n) and of noise (*batch, n), and y - c (*batch, n).

    Their gradients by :math:`\Sigma` are :math:`-a a^\top` with :math:`a = \Sigma^{-1} (y - c)`, and :math:`\Sigma^{-1}`.
    Differentiating the Cholesky factor instead takes three times as long (measured with 1,439 rows: 0.4 against 0.14 s).

    Raises:
        NotPSDError, NanError: for matrices that can't be factored, whatever little is added to their diagonals.
    """
    distance, log_det = _Quadratic.apply(covariance, noise_var, residual)
    return Quadratic(distance, log_det, residual.shape[-1])


class _Quadratic(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, covariance: Tensor, noise_var: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        noisy = covariance.clone()
        noisy.diagonal(dim1=-2, dim2=-1).add_(noise_var)
        root = psd_safe_cholesky(noisy)
        solved = torch.cholesky_solve(residual.unsqueeze(-1), root)
        ctx.save_for_backward(root, solved)
        log_det = 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return (residual * solved.squeeze(-1)).sum(-1), log_det

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_distance: Tensor, by_log_det: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        root, solved = ctx.saved_tensors
        inverse = torch.cholesky_inverse(root).mul_(by_log_det[..., None, None])
        by_covariance = inverse.sub_((solved * by_distance[..., None, None]) @ solved.mT)
        by_noise_var = by_covariance.diagonal(dim1=-2, dim2=-1).clone()
        return by_covariance, by_noise_var, 2 * by_distance.unsqueeze(-1) * solved.squeeze(-1)


def log_prior(module: Module, num_outputs: int) -> Tensor:
    """The log density of a module's hyperparameters for each output, (m,); what outputs share counts for each in part.

    Minus infinity outside of a prior's support, to which no constraint need keep them.
    """
    total = torch.zeros(num_outputs, dtype=torch.float64)
    for _, owner, prior, closure, _ in module.named_priors():
        value = closure(owner)
        try:
            found = prior.log_prob(value)
        except ValueError:  # how torch's distributions say so
            return torch.full_like(total.to(value), -torch.inf)
        by_output = found.shape[:1] == (num_outputs,)
        total = total.to(found) + (found.reshape(num_outputs, -1).sum(-1) if by_output else found.sum() / num_outputs)
    return total
