"""Gaussian processes with continuous hyperparameters, from smooth to linear, drawn anew for each task."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesnn.checks import check_fields, count, nonnegative, positive, positive_range
from bayesnn.configured import Configured
from bayesnn.inference.amortized.tasks.base import Draws, Exact, TaskBatch, draw_inputs
from bayesnn.inference.amortized.tasks.covariances import (
    KERNELS,
    centred,
    check_kernels,
    exact_given_hyperparameters,
    gaussian_tasks,
)


@dataclass(frozen=True)
class GPTasks(Configured):
    """Gaussian-process regression tasks with hyperparameters drawn anew for each task.

    * The number of features is uniform in 1..``max_features``.
    * Inputs are those of ``draw_inputs``.
    * :math:`f = \\sqrt{1 - \\rho}\\, g + \\sqrt{\\rho}\\, w^\\top x`, centred and scaled as standardised data are (see
      ``centred``); g is a GP of variance 1 and w is normal with mean 0, variances that sum to 1 and zeros for irrelevant
      features. The kernel of g is one of ``kernels``, each equally likely. The linear share :math:`\\rho` is 0 (a third
      of the tasks), uniform in (0, 1) (a third) or uniform in (0.8, 1) (a third).
    * A lengthscale is :math:`\\sqrt d` times :math:`\\mathrm{LogNormal}(\\log m, s^2)`, one draw per task, times
      :math:`\\mathrm{LogNormal}(0, s_d^2)`, one draw per feature: distances grow like :math:`\\sqrt d`, so the
      function's roughness doesn't depend on d. In half of the tasks each feature is irrelevant with a probability
      uniform in (0, 0.6).
    * The noise's standard deviation is log-uniform over ``noise_range``, relative to f's of 1.

    Attributes:
        max_features: width of X.
        kernels: "rbf", "matern32", "matern52", "periodic" or "nngp" (of an infinitely wide ReLU network).
        lengthscale_median: m, in units of the inputs' standard deviation.
        lengthscale_spread: s.
        ard_spread: s_d.
        noise_range: smallest and largest noise standard deviation.

    The scaling of lengthscales follows Hvarfner et al., Vanilla Bayesian optimization performs great in high dimensions
    (ICML 2024); irrelevant features follow Müller et al., PFNs4BO (ICML 2023).
    """

    max_features: int = 10
    kernels: tuple[str, ...] = tuple(KERNELS)
    lengthscale_median: float = 1.0
    lengthscale_spread: float = 0.75
    ard_spread: float = 0.5
    noise_range: tuple[float, float] = (0.01, 1.5)

    def __post_init__(self) -> None:
        check_fields(self, count, "max_features")
        check_fields(self, positive, "lengthscale_median")
        check_fields(self, nonnegative, "lengthscale_spread", "ard_spread")
        check_fields(self, positive_range, "noise_range")
        check_fields(self, check_kernels, "kernels")

    def __call__(self, batch_size: int, num_points: int, generator: torch.Generator) -> TaskBatch:
        """Draw ``batch_size`` tasks of ``num_points`` points, in float64, with their processes."""
        draw = Draws(batch_size, generator)
        num_features = 1 + draw.integers(self.max_features)
        used = (torch.arange(self.max_features, device=num_features.device) < num_features[:, None]).double()
        X = draw_inputs(draw, num_points, self.max_features) * used[:, None, :]
        covariance = self._covariance(draw, X, used, num_features)
        low, high = (math.log(bound) for bound in self.noise_range)
        noise_std = (low + (high - low) * draw.uniform()).exp()
        return gaussian_tasks(draw, X, covariance, noise_std, num_features)

    def exact(self, batch: TaskBatch, num_context: int) -> Exact:
        """The log densities under each task's own hyperparameters.

        A network doesn't know these, so even a perfect one stays behind this bound.
        """
        return exact_given_hyperparameters(batch, num_context)

    def _covariance(self, draw: Draws, X: Tensor, used: Tensor, num_features: Tensor) -> Tensor:
        d = self.max_features
        irrelevant_share = 0.6 * draw.uniform(1) * (draw.uniform(1) < 0.5)
        relevant = used * (draw.uniform(d) >= irrelevant_share)
        relevant = torch.where(relevant.sum(-1, keepdim=True) > 0, relevant, used)
        typical = math.log(self.lengthscale_median) + self.lengthscale_spread * draw.normal(1)
        log_lengthscale = typical + self.ard_spread * draw.normal(d) + 0.5 * num_features.double().log()[:, None]
        inverse = (relevant * torch.exp(-log_lengthscale))[:, None, :]
        # Weights of irrelevant features are 0; the other weights' variances differ mildly.
        importance = relevant * torch.exp(-0.5 * draw.normal(d).abs())
        weights = (importance / importance.sum(-1, keepdim=True))[:, None, :]
        kind, linear, share = draw.integers(len(self.kernels)), draw.integers(3), draw.uniform()
        share = torch.where(linear == 0, torch.zeros_like(share), torch.where(linear == 1, share, 0.8 + 0.2 * share))
        share = share[:, None, None]

        def kernel(first: Tensor, second: Tensor) -> Tensor:
            smooth = first.new_empty(*first.shape[:-1], second.shape[-2])
            for index, name in enumerate(self.kernels):
                chosen = kind == index
                scale = inverse[chosen]
                smooth[chosen] = KERNELS[name](first[chosen] * scale, second[chosen] * scale)
            return (1 - share) * smooth + share * (first * weights) @ second.mT

        return centred(kernel, X)
