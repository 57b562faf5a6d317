"""Covariance matrices of batches of tasks, and Gaussian processes that are centred and scaled as standardised data are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from bayesnn.inference.amortized.tasks.base import Draws, Exact, Process, TaskBatch

JITTER = 1e-6  # of a covariance with unit variances
NUM_REFERENCE = 64


def squared_distances(first: Tensor, second: Tensor) -> Tensor:
    """Between rows (*batch, N, d) and (*batch, M, d): (*batch, N, M)."""
    norms = first.square().sum(-1)[..., :, None] + second.square().sum(-1)[..., None, :]
    return (norms - 2 * first @ second.mT).clamp_min(0)


def rbf(first: Tensor, second: Tensor) -> Tensor:
    """exp(-r^2 / 2)."""
    return torch.exp(-0.5 * squared_distances(first, second))


def matern32(first: Tensor, second: Tensor) -> Tensor:
    """(1 + sqrt(3) r) exp(-sqrt(3) r)."""
    distance = (3 * squared_distances(first, second)).sqrt()
    return (1 + distance) * torch.exp(-distance)


def matern52(first: Tensor, second: Tensor) -> Tensor:
    """(1 + sqrt(5) r + 5 r^2 / 3) exp(-sqrt(5) r)."""
    distance = (5 * squared_distances(first, second)).sqrt()
    return (1 + distance + distance.square() / 3) * torch.exp(-distance)


def periodic(first: Tensor, second: Tensor) -> Tensor:
    """The RBF kernel of each feature's place on the unit circle, a quarter turn for each unit: it repeats after four."""
    turns = ((points * (math.pi / 2)).unsqueeze(-1) for points in (first, second))
    return rbf(*(torch.cat([turn.sin(), turn.cos()], -1).flatten(-2) for turn in turns))


def nngp(first: Tensor, second: Tensor) -> Tensor:
    """The covariance of an infinitely wide ReLU network of two hidden layers, with a bias as large as one scaled feature.

    Each layer maps a correlation c to (sqrt(1 - c^2) + (pi - arccos c) c) / pi (Cho and Saul, NeurIPS 2009).
    """
    norms = (1 + points.square().sum(-1) for points in (first, second))
    scale = torch.sqrt(next(norms)[..., :, None] * next(norms)[..., None, :])
    correlation = ((1 + first @ second.mT) / scale).clamp(-1, 1)
    for _ in range(2):
        angle = correlation.arccos()
        correlation = (
            ((1 - correlation.square()).clamp_min(0).sqrt() + (math.pi - angle) * correlation) / math.pi
        ).clamp(-1, 1)
    return correlation * scale


KERNELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rbf": rbf,
    "matern32": matern32,
    "matern52": matern52,
    "periodic": periodic,
    "nngp": nngp,
}
"""Of scaled inputs (*batch, N, d) and (*batch, M, d): (*batch, N, M)."""


def check_kernels(name: str, values: Sequence[str]) -> tuple[str, ...]:
    """Names of kernels, at least one.

    Raises:
        ValueError: for unknown kernels, and for none.
    """
    if not values:
        raise ValueError(f"{name} must have at least one value")
    if unknown := set(values) - KERNELS.keys():
        raise ValueError(f"{name} must be among {', '.join(KERNELS)}, got {', '.join(sorted(map(str, unknown)))}")
    return tuple(values)


@cache
def reference_inputs(num_features: int) -> Tensor:
    """Points (64, d) that stand for the region where data are, uniform in the cube of unit variance."""
    with torch.inference_mode(False):  # they are kept, and gradients may need them later
        uniform = torch.quasirandom.SobolEngine(num_features).draw(NUM_REFERENCE + 1)[1:].double()
        return (uniform - 0.5) * math.sqrt(12)


def centred(kernel: Callable[[Tensor, Tensor], Tensor], X: Tensor) -> Tensor:
    r"""The covariance of a process whose values average 0 with mean square 1 over reference inputs R.

    Of :math:`f(x) = s\,(g(x) - \frac1{|R|} \sum_{r \in R} g(r))` with :math:`g \sim GP(0, k)` and s such that the variances
    of f at R average 1:

    .. math:: s^2 \left(k(x, x') - m(x) - m(x') + \bar m\right), \quad m(x) = \frac1{|R|} \sum_r k(x, r), \quad
              s^{-2} = \frac1{|R|} \sum_r k(r, r) - \bar m, \quad \bar m = \frac1{|R|} \sum_r m(r).

    A slowly varying g would otherwise be a task of hardly any variation around some constant, which is what no data set
    looks like once it is standardised.

    Args:
        kernel: of inputs (*batch, N, d) and (*batch, M, d).
        X: (*batch, N, d).
    """
    reference = reference_inputs(X.shape[-1]).to(X).expand(*X.shape[:-2], -1, -1)
    within = kernel(reference, reference)
    own = kernel(X, reference).mean(-1)
    everywhere = within.mean((-1, -2))[..., None, None]
    scale = within.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] - everywhere
    return (kernel(X, X) - own[..., :, None] - own[..., None, :] + everywhere) / scale.clamp_min(1e-4)


def gaussian_tasks(draw: Draws, X: Tensor, covariance: Tensor, noise_std: Tensor, num_features: Tensor) -> TaskBatch:
    """Function values of mean 0 with covariances (B, N, N) at X (B, N, d), and observations with noise (B,)."""
    identity = torch.eye(X.shape[1], dtype=X.dtype, device=X.device)
    f = torch.linalg.cholesky(covariance + JITTER * identity) @ draw.normal(X.shape[1], 1)
    y = f + noise_std[:, None, None] * draw.normal(X.shape[1], 1)
    return TaskBatch(X, y, f, num_features, Process(torch.zeros_like(f), covariance, noise_std))


def conditional(covariance: Tensor, noise_var: Tensor, y: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    r"""Of Gaussian processes of mean 0: the moments of f at the queries and log p(context).

    With :math:`K = K_{cc} + \sigma^2 I`: mean :math:`k_q^\top K^{-1} y`, variance :math:`k_{qq} - k_q^\top K^{-1} k_q`
    (Rasmussen and Williams, 2006, equations 2.23-2.24 and 2.30).

    Args:
        covariance: (*batch, N, N); the first n rows are the context.
        noise_var: (*batch,).
        y: (*batch, n, 1) the context's observations.
        n: its size.

    Returns:
        Means and variances (*batch, N - n), and log evidences (*batch,).
    """
    identity = torch.eye(n, dtype=covariance.dtype, device=covariance.device)
    root = torch.linalg.cholesky(covariance[..., :n, :n] + (noise_var[..., None, None] + JITTER) * identity)
    cross = torch.linalg.solve_triangular(root, covariance[..., :n, n:], upper=False)
    whitened = torch.linalg.solve_triangular(root, y, upper=False)
    mean = (cross.mT @ whitened)[..., 0]
    variance = covariance.diagonal(dim1=-2, dim2=-1)[..., n:] + JITTER - cross.square().sum(-2)
    log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    evidence = -0.5 * whitened.square().sum((-1, -2)) - log_det - 0.5 * n * math.log(2 * math.pi)
    return mean, variance.clamp_min(JITTER), evidence


def given_hyperparameters(batch: TaskBatch, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Means and variances (B, N - n) of f at the queries under each task's own hyperparameters, and noise variances (B,)."""
    if batch.process is None:
        raise ValueError("batch must have a process")
    prior_mean, covariance, noise_std = batch.process
    excess = batch.y[:, :n].to(prior_mean) - prior_mean[:, :n]
    mean, variance, _ = conditional(covariance, noise_std.square(), excess, n)
    return prior_mean[:, n:, 0] + mean, variance, noise_std.square()


def exact_given_hyperparameters(batch: TaskBatch, n: int) -> Exact:
    """Log densities of the queries under each task's own hyperparameters.

    A network doesn't know these, so even a perfect one stays behind this bound.
    """
    assert batch.f is not None
    return normal_log_densities(batch.f[:, n:, 0], batch.y[:, n:, 0], *given_hyperparameters(batch, n))


def normal_log_densities(f: Tensor, y: Tensor, mean: Tensor, variance: Tensor, noise_var: Tensor) -> Exact:
    """Of function values and observations (*batch, q) under normals of f, with noise (*batch,)."""
    noisy = (variance + noise_var[..., None]).sqrt()
    return Exact(
        torch.distributions.Normal(mean, variance.sqrt()).log_prob(f),
        torch.distributions.Normal(mean, noisy).log_prob(y),
    )
