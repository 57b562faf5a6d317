"""Gaussian processes whose hyperparameters come from a finite set: the exact answer under all of them is known."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesnn.checks import check_fields, count, positives
from bayesnn.configured import Configured
from bayesnn.inference.amortized.tasks.base import Draws, Exact, TaskBatch, draw_inputs
from bayesnn.inference.amortized.tasks.covariances import (
    KERNELS,
    centred,
    check_kernels,
    conditional,
    gaussian_tasks,
    normal_log_densities,
)


@dataclass(frozen=True)
class GridGPTasks(Configured):
    r"""Gaussian-process regression with a kernel, lengthscales and noise drawn from finite sets, each value equally likely.

    The number of features is uniform in 1..``max_features``; inputs are those of ``draw_inputs``. The function is a Gaussian
    process, centred and scaled as standardised data are (see ``centred``); each feature's lengthscale is
    :math:`\sqrt d` times one of the set. The posterior predictive is a finite mixture over all hyperparameters h,

    .. math:: p(f_* \mid D) = \sum_h p(h \mid D)\, N(f_*; \mu_h, \sigma_h^2), \qquad p(h \mid D) \propto p(y \mid X, h),

    which :meth:`exact` enumerates: what the best of all networks would answer.

    Attributes:
        max_features: width of X.
        kernels: "rbf", "matern32", "matern52", "periodic", "nngp".
        lengthscales: in units of the inputs' standard deviation.
        noise_stds: relative to f's of about 1.
    """

    max_features: int = 2
    kernels: tuple[str, ...] = ("rbf", "matern32")
    lengthscales: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    noise_stds: tuple[float, ...] = (0.05, 0.15, 0.45)

    def __post_init__(self) -> None:
        check_fields(self, count, "max_features")
        check_fields(self, check_kernels, "kernels")
        check_fields(self, positives, "lengthscales", "noise_stds")

    def __call__(self, batch_size: int, num_points: int, generator: torch.Generator) -> TaskBatch:
        """Draw ``batch_size`` tasks of ``num_points`` points, in float64, with their processes."""
        draw = Draws(batch_size, generator)
        num_features = 1 + draw.integers(self.max_features)
        used = torch.arange(self.max_features, device=num_features.device) < num_features[:, None]
        X = draw_inputs(draw, num_points, self.max_features) * used[:, None, :]
        lengthscale = draw.choice(self.lengthscales, self.max_features)
        kind, noise_std = draw.integers(len(self.kernels)), draw.choice(self.noise_stds)
        covariance = X.new_zeros(batch_size, num_points, num_points)
        for d, (index, name) in itertools.product(range(1, self.max_features + 1), enumerate(self.kernels)):
            chosen = (num_features == d) & (kind == index)
            if bool(chosen.any()):
                covariance[chosen] = _covariance(name, X[chosen, :, :d], lengthscale[chosen, :d])
        return gaussian_tasks(draw, X, covariance, noise_std, num_features)

    def exact(self, batch: TaskBatch, num_context: int) -> Exact:
        """The posterior predictive's log densities at the queries' values, over all hyperparameters."""
        n = num_context
        assert batch.f is not None and batch.num_features is not None
        log_f, log_y = (torch.empty_like(batch.y[:, n:, 0]) for _ in range(2))
        for index, d in enumerate(batch.num_features.tolist()):
            X, y, f = batch.X[index, :, :d], batch.y[index], batch.f[index]
            lengthscale = X.new_tensor(list(itertools.product(self.lengthscales, repeat=d)))
            noise_var = X.new_tensor(self.noise_stds).square()
            parts: list[tuple[Tensor, Tensor, Tensor]] = []
            for name in self.kernels:
                K = _covariance(name, X.expand(len(lengthscale), *X.shape), lengthscale).unsqueeze(-3)
                grid = K.expand(-1, len(noise_var), -1, -1)
                mean, variance, evidence = conditional(grid, noise_var, y[:n], n)
                found = normal_log_densities(f[n:, 0], y[n:, 0], mean, variance, noise_var)
                parts.append((evidence, found.log_f, found.log_y))
            evidence, *densities = (torch.cat([part[i].flatten(0, 1) for part in parts]) for i in range(3))
            log_weights = evidence.log_softmax(0).unsqueeze(-1)
            log_f[index], log_y[index] = ((log_weights + each).logsumexp(0) for each in densities)
        return Exact(log_f, log_y)


def _covariance(name: str, X: Tensor, lengthscale: Tensor) -> Tensor:
    """Of inputs (B, N, d) with lengthscales (B, d): (B, N, N)."""
    inverse = 1 / (lengthscale * math.sqrt(X.shape[-1])).unsqueeze(-2)
    return centred(lambda a, b: KERNELS[name](a * inverse, b * inverse), X)
