"""Exact answers that tests compare with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import arviz
import numpy as np
import torch
from torch import Tensor

from bayesnn.inference.draws import WeightPosterior


@dataclass(frozen=True)
class LinearGaussian:
    """y = X w + noise with w ~ Normal(0, diag(prior_std^2)): everything about it in closed form.

    ``X`` is (n, p) with a column of ones for each intercept, ``y`` (n,); ``prior_std`` a number or (p,).
    """

    X: Tensor
    y: Tensor
    noise_std: float
    prior_std: Tensor | float
    temperature: float = 1.0

    @property
    def _prior_var(self) -> Tensor:
        return torch.as_tensor(self.prior_std, dtype=self.X.dtype).expand(self.X.shape[1]).square()

    @property
    def precision(self) -> Tensor:
        """Of the (tempered) posterior, (p, p)."""
        return (self.X.mT @ self.X / self.noise_std**2 + torch.diag(1 / self._prior_var)) / self.temperature

    @property
    def covariance(self) -> Tensor:
        return torch.linalg.inv(self.precision)

    @property
    def mean(self) -> Tensor:
        return self.covariance @ (self.X.mT @ self.y) / self.noise_std**2 / self.temperature

    @property
    def log_evidence(self) -> Tensor:
        """log N(y; 0, X V X^T + noise^2 I), at temperature 1."""
        covariance = self.X @ torch.diag(self._prior_var) @ self.X.mT + self.noise_std**2 * torch.eye(len(self.y))
        return torch.distributions.MultivariateNormal(torch.zeros_like(self.y), covariance).log_prob(self.y)

    def predictive(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (q,) and covariance (q, q) of the function at X."""
        return X @ self.mean, X @ self.covariance @ X.mT

    @property
    def mean_field_var(self) -> Tensor:
        """The variances of the closest factorised Gaussian; its means are the posterior's."""
        return 1 / self.precision.diagonal()

    def elbo(self, mean: Tensor, std: Tensor) -> Tensor:
        """E_q log p(y | w) - KL(q || p) of q = Normal(mean, diag(std^2)), at temperature 1."""
        var, noise_var = std.square(), self.noise_std**2
        expected = (self.y - self.X @ mean).square() + self.X.square() @ var
        log_likelihood = -0.5 * (expected / noise_var + math.log(2 * math.pi * noise_var)).sum()
        ratio = var / self._prior_var
        divergence = 0.5 * (ratio + mean.square() / self._prior_var - 1 - ratio.log()).sum()
        return log_likelihood - divergence


def with_intercept(X: Tensor) -> Tensor:
    """A column of ones after the others."""
    return torch.cat([X, torch.ones_like(X[:, :1])], 1)


def gauss_hermite(function: Callable[[Tensor], Tensor], num_nodes: int = 80) -> Tensor:
    """E f(z), z ~ Normal(0, 1), for a function of (k,) nodes that answers (k, …)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(num_nodes)
    weights = torch.from_numpy(weights / weights.sum())
    values = function(torch.from_numpy(nodes))
    return (weights.reshape(-1, *(1 for _ in values.shape[1:])) * values).sum(0)


def grid_moments(log_density: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> dict[str, float]:
    """Moments of an unnormalised density of two variables on a fine rectangular grid (trapezoidal: exact for smooth ones)."""
    A, B = torch.meshgrid(a, b, indexing="ij")
    log_p = log_density(A, B)
    p = (log_p - log_p.max()).exp()
    p = p / p.sum()
    mean_a, mean_b = float((p * A).sum()), float((p * B).sum())
    return {
        "mean_a": mean_a,
        "mean_b": mean_b,
        "var_a": float((p * (A - mean_a).square()).sum()),
        "var_b": float((p * (B - mean_b).square()).sum()),
        "cov": float((p * (A - mean_a) * (B - mean_b)).sum()),
    }


def z_score(samples: Tensor, truth: Tensor | float, effective_size: Tensor | float | None = None) -> Tensor:
    """How many standard errors the mean over the first dimension is off, with n or an effective size of samples."""
    count = samples.shape[0] if effective_size is None else effective_size
    error = samples.std(0) / torch.as_tensor(count, dtype=samples.dtype).sqrt()
    return (samples.mean(0) - truth) / error.clamp_min(1e-300)


def affine_map(step: Callable[[Tensor, Tensor], Tensor], size: int, num_noises: int) -> tuple[Tensor, Tensor, Tensor]:
    """A, b, B of a step x -> A x + b + B z that maps rows x (n, size) and z (n, num_noises) to (n, size), by unit vectors."""
    x, z = torch.eye(size, dtype=torch.float64), torch.eye(num_noises, dtype=torch.float64)
    b = step(torch.zeros_like(x[:1]), torch.zeros_like(z[:1]))
    A = step(x, torch.zeros(size, num_noises, dtype=torch.float64)) - b
    B = step(torch.zeros(num_noises, size, dtype=torch.float64), z) - b
    return A.mT, b.squeeze(0), B.mT


def stationary_law(A: Tensor, b: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the stationary law of x' = A x + b + noise of covariance Q: the discrete Lyapunov equation.

    With A (k, d, d) and b (k, d), each step takes one of k equally likely maps at random.
    """
    A, b = A.reshape(-1, *A.shape[-2:]), b.reshape(-1, b.shape[-1])
    size = A.shape[-1]
    assert torch.linalg.eigvals(A.mean(0)).abs().max() < 1
    identity = torch.eye(size, dtype=A.dtype)
    mean = torch.linalg.solve(identity - A.mean(0), b.mean(0))
    moved = A @ mean + b - mean  # where the mean goes, relative to it
    spread = Q + (moved[:, :, None] * moved[:, None, :]).mean(0)
    kronecker = torch.stack([torch.kron(a.contiguous(), a.contiguous()) for a in A]).mean(0)
    assert torch.linalg.eigvals(kronecker).abs().max() < 1
    square = torch.eye(size**2, dtype=A.dtype) - kronecker
    return mean, torch.linalg.solve(square, spread.flatten()).reshape(size, size)


def effective_sizes(posterior: WeightPosterior, values: Tensor) -> Tensor:
    """How many independent draws would give the mean of each column of values (S, k) as precisely, (k,)."""
    array = posterior.by_chain(values).numpy()
    return torch.tensor([float(arviz.ess(array[..., j], method="mean")) for j in range(array.shape[-1])])
