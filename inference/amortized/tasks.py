"""Priors over tasks: where the data sets come from that an amortised network is trained on.

A prior over tasks is any callable ``(batch_size, num_points, generator) -> TaskBatch``. Five lines make one::

    def sines(batch_size, num_points, generator):
        X = 3.4 * torch.rand(batch_size, num_points, 1, generator=generator) - 1.7
        phase = 6.28 * torch.rand(batch_size, 1, 1, generator=generator)
        f = torch.sin(2 * X + phase)
        return TaskBatch(X, f + 0.1 * torch.randn(f.shape, generator=generator), f)

Units: a column of X has mean about 0 and standard deviation about 1 over the region of interest (the unit cube becomes
``(X - 0.5) * sqrt(12)``), f has a variance about 1. Outcomes are standardised by the context, in training and in use
alike, by :func:`standardise_context`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bayesnn.configured import Configured


class TaskBatch(NamedTuple):
    """B data sets of N points each; the first n points of each serve as the context, the others as queries.

    Attributes:
        X: (B, N, d) inputs; features a task doesn't have are zero.
        y: (B, N, 1) observations.
        f: (B, N, 1) noise-free function values at the same points.
        num_features: (B,) int64, how many of the d features each task has, the first ones; None: all.
        noise_std: (B,) standard deviation of y - f, where the prior knows it.
        covariance: (B, N, N) prior covariance of f given the task's hyperparameters (mean 0), where the prior is
            Gaussian.
    """

    X: Tensor
    y: Tensor
    f: Tensor
    num_features: Tensor | None = None
    noise_std: Tensor | None = None
    covariance: Tensor | None = None


class TaskPrior(Protocol):
    """Draws tasks; all randomness comes from the generator."""

    def __call__(self, batch_size: int, num_points: int, generator: torch.Generator) -> TaskBatch: ...


def standardise_context(context_y: Tensor) -> tuple[Tensor, Tensor]:
    """Location and scale that put outcomes in the units in which every amortised network works.

    The context's mean and its standard deviation (divisor n). One row gives its own value and scale 1, no rows give 0
    and 1: then the outcomes count as being in the prior's units already. Where all outcomes are equal (standard
    deviation under 1e-6 of their size, or of 1) the scale is 1.

    Two or three outcomes can lie close together by chance. Further outcomes in such units have tails like Student's t with
    one or two degrees of freedom, heavier than any head's: averages over tasks of that size are ruled by a few of them.

    Args:
        context_y: (*batch, n, 1).

    Returns:
        ``loc`` and ``scale``, both (*batch, 1, 1): the network sees ``(y - loc) / scale``.
    """
    if context_y.shape[-2] == 0:
        loc = context_y.new_zeros(*context_y.shape[:-2], 1, 1)
        return loc, torch.ones_like(loc)
    loc = context_y.mean(-2, keepdim=True)
    scale = (context_y - loc).square().mean(-2, keepdim=True).sqrt()
    smallest = 1e-6 * loc.abs().clamp_min(1)
    return loc, torch.where(scale > smallest, scale, torch.ones_like(scale))


@dataclass(frozen=True)
class GPTasks(Configured):
    """Gaussian-process regression tasks with hyperparameters drawn anew for each task.

    * The number of features is uniform in 1..``max_features``.
    * Inputs are uniform in the cube of unit variance, standard normal, or normal with correlated columns (low rank plus
      diagonal), a third of the tasks each; columns are then standardised over the task and moved by a small random
      shift and scale, because in use their mean and scale are estimates. In a fifth of the tasks half of the points
      are drawn together around one centre, as an optimiser's are.
    * :math:`f = \\sqrt{1 - \\rho}\\, g + \\sqrt{\\rho}\\, w^\\top x`; g is a GP of variance 1 and w is normal with mean
      0, variances that sum to 1 and zeros for irrelevant features. The kernel of g is RBF, Matérn-3/2 or Matérn-5/2
      (a third each). The linear share :math:`\\rho` is 0 (a third of the tasks), uniform in (0, 1) (a third) or
      uniform in (0.8, 1) (a third).
    * A lengthscale is :math:`\\sqrt d` times :math:`\\mathrm{LogNormal}(\\log m, s^2)`, one draw per task, times
      :math:`\\mathrm{LogNormal}(0, s_d^2)`, one draw per feature: distances grow like :math:`\\sqrt d`, so the
      function's roughness doesn't depend on d. In half of the tasks each feature is irrelevant with a probability
      uniform in (0, 0.6).
    * The noise's standard deviation is log-uniform over ``noise_range``, relative to f's of 1.

    Attributes:
        max_features: width of X.
        lengthscale_median: m, in units of the inputs' standard deviation.
        lengthscale_spread: s.
        ard_spread: s_d.
        noise_range: smallest and largest noise standard deviation.

    The scaling of lengthscales follows Hvarfner et al., Vanilla Bayesian optimization performs great in high dimensions
    (ICML 2024); irrelevant features follow Müller et al., PFNs4BO (ICML 2023).
    """

    max_features: int = 10
    lengthscale_median: float = 1.0
    lengthscale_spread: float = 0.75
    ard_spread: float = 0.5
    noise_range: tuple[float, float] = (0.01, 1.5)

    def __post_init__(self) -> None:
        if self.max_features < 1:
            raise ValueError(f"max_features must be at least 1, got {self.max_features}")
        object.__setattr__(self, "noise_range", tuple(self.noise_range))  # JSON gives a list
        if not 0 < self.noise_range[0] <= self.noise_range[1]:
            raise ValueError(f"noise_range must be two increasing positive numbers, got {self.noise_range}")

    def __call__(self, batch_size: int, num_points: int, generator: torch.Generator) -> TaskBatch:
        """Draw ``batch_size`` tasks of ``num_points`` points, in float64, with their covariance matrices."""
        draw = _Draws(batch_size, generator)
        num_features = torch.randint(1, self.max_features + 1, (batch_size,), generator=generator)
        used = (torch.arange(self.max_features) < num_features[:, None]).double()
        X = self._inputs(draw, num_points) * used[:, None, :]
        covariance = self._covariance(draw, X, used, num_features)
        low, high = (math.log(bound) for bound in self.noise_range)
        noise_std = (low + (high - low) * draw.uniform()).exp()
        jitter = 1e-6 * torch.eye(num_points, dtype=torch.float64)
        f = torch.linalg.cholesky(covariance + jitter) @ draw.normal(num_points, 1)
        y = f + noise_std[:, None, None] * draw.normal(num_points, 1)
        return TaskBatch(X, y, f, num_features, noise_std, covariance)

    def _inputs(self, draw: _Draws, num_points: int) -> Tensor:
        d = self.max_features
        uniform = (draw.uniform(num_points, d) - 0.5) * math.sqrt(12)
        normal = draw.normal(num_points, d)
        rank = max(1, d // 2)
        correlated = draw.normal(num_points, rank) @ draw.normal(rank, d) / math.sqrt(rank)
        correlated = correlated + (draw.uniform(1, 1) + 0.1) * normal
        kind = draw.integers(3)[:, None, None]
        X = torch.where(kind == 0, uniform, torch.where(kind == 1, normal, correlated))
        near = 0.1 + 0.4 * draw.uniform(1, 1)
        clustered = (draw.uniform(1, 1) < 0.2) & (draw.uniform(num_points, 1) < 0.5)
        X = torch.where(clustered, draw.normal(1, d) + near * X, X)
        X = (X - X.mean(-2, keepdim=True)) / X.std(-2, correction=0, keepdim=True).clamp_min(1e-3)
        return (X + 0.15 * draw.normal(1, d)) * torch.exp(0.15 * draw.normal(1, d))

    def _covariance(self, draw: _Draws, X: Tensor, used: Tensor, num_features: Tensor) -> Tensor:
        d = self.max_features
        irrelevant_share = torch.where(draw.uniform(1) < 0.5, 0.6 * draw.uniform(1), torch.zeros(1, dtype=X.dtype))
        relevant = used * (draw.uniform(d) >= irrelevant_share)
        relevant = torch.where(relevant.sum(-1, keepdim=True) > 0, relevant, used)
        typical = math.log(self.lengthscale_median) + self.lengthscale_spread * draw.normal(1)
        log_lengthscale = typical + self.ard_spread * draw.normal(d) + 0.5 * num_features.double().log()[:, None]
        scaled = X * (relevant * torch.exp(-log_lengthscale))[:, None, :]
        norms = scaled.square().sum(-1)
        squared = (norms[:, :, None] + norms[:, None, :] - 2 * scaled @ scaled.mT).clamp_min(0)
        stationary = _stationary(squared, draw.integers(3))
        # Weights of irrelevant features are 0; the other weights' variances differ mildly.
        importance = relevant * torch.exp(-0.5 * draw.normal(d).abs())
        linear = (X * (importance / importance.sum(-1, keepdim=True))[:, None, :]) @ X.mT
        kind, share = draw.integers(3), draw.uniform()
        share = torch.where(kind == 0, torch.zeros_like(share), torch.where(kind == 1, share, 0.8 + 0.2 * share))
        return (1 - share)[:, None, None] * stationary + share[:, None, None] * linear


def exact_log_prob(batch: TaskBatch, num_context: int) -> tuple[Tensor, Tensor]:
    """Log predictive densities of each query given the context, under the task's own hyperparameters.

    With :math:`K = K_{cc} + \\sigma^2 I`: mean :math:`k_q^\\top K^{-1} y`, variance of f :math:`k_{qq} - k_q^\\top
    K^{-1} k_q` (Rasmussen and Williams, 2006, equations 2.23-2.24). A network doesn't know the hyperparameters, so
    even a perfect one stays behind this bound.

    Args:
        batch: tasks with ``covariance`` and ``noise_std``.
        num_context: n; the remaining N - n points are queries.

    Returns:
        Log densities (B, N - n) of ``f`` and of ``y`` in the task's units.

    Raises:
        ValueError: if the prior left out the covariance or the noise.
    """
    if batch.covariance is None or batch.noise_std is None:
        raise ValueError("the exact density needs tasks with covariance and noise_std; this prior gives none")
    n, noise_var = num_context, batch.noise_std.square()[:, None]
    K = batch.covariance
    jitter = 1e-6
    factor = torch.linalg.cholesky(K[:, :n, :n] + (noise_var + jitter)[:, :, None] * torch.eye(n, dtype=K.dtype))
    cross = torch.linalg.solve_triangular(factor, K[:, :n, n:], upper=False)
    whitened = torch.linalg.solve_triangular(factor, batch.y[:, :n], upper=False)
    mean = (cross.mT @ whitened)[..., 0]
    variance = K.diagonal(dim1=-2, dim2=-1)[:, n:] + jitter - cross.square().sum(-2)
    variance = variance.clamp_min(jitter)
    log_f = torch.distributions.Normal(mean, variance.sqrt()).log_prob(batch.f[:, n:, 0])
    log_y = torch.distributions.Normal(mean, (variance + noise_var).sqrt()).log_prob(batch.y[:, n:, 0])
    return log_f, log_y


class _Draws:
    """Random numbers with a leading batch dimension, in float64."""

    def __init__(self, batch_size: int, generator: torch.Generator) -> None:
        self.batch_size, self.generator = batch_size, generator

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(self.batch_size, *shape, generator=self.generator, dtype=torch.float64)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.batch_size, *shape, generator=self.generator, dtype=torch.float64)

    def integers(self, high: int) -> Tensor:
        return torch.randint(high, (self.batch_size,), generator=self.generator)


def _stationary(squared: Tensor, kind: Tensor) -> Tensor:
    """Unit-variance kernels of squared scaled distances (B, N, N): 0 is RBF, 1 is Matérn-3/2, 2 is Matérn-5/2."""
    result = torch.empty_like(squared)
    for index, kernel in enumerate((_rbf, _matern32, _matern52)):
        chosen = kind == index
        result[chosen] = kernel(squared[chosen])
    return result


def _rbf(squared: Tensor) -> Tensor:
    return torch.exp(-0.5 * squared)


def _matern32(squared: Tensor) -> Tensor:
    distance = (3 * squared).sqrt()
    return (1 + distance) * torch.exp(-distance)


def _matern52(squared: Tensor) -> Tensor:
    distance = (5 * squared).sqrt()
    return (1 + distance + distance.square() / 3) * torch.exp(-distance)
