"""Objectives as Bayesian optimisation meets them: warped, noisy, with inputs that don't matter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bayesnn.checks import check_fields, count, nonnegative, positive_range
from bayesnn.configured import Configured
from bayesnn.inference.amortized.tasks.base import Draws, Exact, TaskBatch
from bayesnn.inference.amortized.tasks.covariances import (
    centred,
    exact_given_hyperparameters,
    gaussian_tasks,
    matern32,
)

LENGTHSCALE = (1.2107, 1.5212)  # shape and rate


class SearchHyperparameters(NamedTuple):
    """Of B objectives: which features matter (B, d), lengthscales (B, d), powers a, b of the warp (B, 2, d), noise (B,)."""

    relevant: Tensor
    lengthscale: Tensor
    powers: Tensor
    noise_std: Tensor


@dataclass(frozen=True)
class SearchTasks(Configured):
    r"""Gaussian processes over a warped unit cube, as HEBO models objectives.

    Points u are uniform in the cube; in half of the tasks half of them lie together, as an optimiser's do.
    :math:`f = GP(0, k)` of :math:`w(u)`, centred and scaled as standardised data are, with a Matérn-3/2 kernel,

    * lengthscales :math:`\sqrt d\, \mathrm{Gamma}(1.2107, 1.5212)` for each feature, in units of the cube, 0.05 at least;
    * each feature unused with probability 0.3, but not all of them;
    * Kumaraswamy's warp :math:`w(u) = 1 - (1 - u^a)^b` of each feature, :math:`\log a, \log b \sim N(0, s_w^2)`, in half
      of the tasks;
    * noise of standard deviation :math:`\mathrm{LogNormal}(m, s)`, relative to f's of 1, or, in a third of the tasks,
      log-uniform over ``noise_range``.

    X is :math:`(u - \frac12) \sqrt{12}`: a search space has known bounds.

    Attributes:
        max_features: width of X; the number of features is uniform in 1..``max_features``.
        warp_spread: :math:`s_w`.
        noise: m and s; HEBO's noise variance is :math:`\mathrm{LogNormal}(-4.63, 0.5)`, which are these values.
        noise_range: of the third; from next to nothing, as objectives without noise have it, to much.

    Source: the HEBO+ prior of Müller et al., PFNs4BO (ICML 2023). Ours: the factor :math:`\sqrt d` (Hvarfner et al., ICML
    2024), the noisy third, the centring in place of a random output scale, and points near each other.
    """

    max_features: int = 8
    warp_spread: float = 0.5
    noise: tuple[float, float] = (-2.315, 0.25)
    noise_range: tuple[float, float] = (0.01, 0.5)

    def __post_init__(self) -> None:
        check_fields(self, count, "max_features")
        check_fields(self, nonnegative, "warp_spread")
        check_fields(self, positive_range, "noise_range")
        if len(self.noise) != 2 or not all(math.isfinite(value) for value in self.noise) or self.noise[1] < 0:
            raise ValueError(f"noise must be a mean and a spread of logarithms, found {self.noise!r}")

    def __call__(self, batch_size: int, num_points: int, generator: torch.Generator) -> TaskBatch:
        """Draw ``batch_size`` tasks of ``num_points`` points, in float64, with their processes."""
        draw = Draws(batch_size, generator)
        num_features = 1 + draw.integers(self.max_features)
        used = (torch.arange(self.max_features, device=num_features.device) < num_features[:, None]).double()
        X = (self._points(draw, num_points) - 0.5) * math.sqrt(12)
        hyperparameters = self.hyperparameters(draw, used)
        covariance, noise_std = self.covariance(X, hyperparameters), hyperparameters.noise_std
        return gaussian_tasks(draw, X * used[:, None, :], covariance, noise_std, num_features)

    def hyperparameters(self, draw: Draws, used: Tensor) -> SearchHyperparameters:
        """Draws from the prior, for tasks that use the features marked by 1 in (B, d)."""
        relevant = used * (draw.uniform(used.shape[-1]) >= 0.3)
        relevant = torch.where(relevant.sum(-1, keepdim=True) > 0, relevant, used)
        shape = torch.full_like(used, LENGTHSCALE[0])
        lengthscale = torch._standard_gamma(shape, generator=draw.generator) / LENGTHSCALE[1]
        lengthscale = lengthscale.clamp_min(0.05) * used.sum(-1, keepdim=True).sqrt()
        powers = torch.exp(self.warp_spread * draw.normal(2, used.shape[-1]) * (draw.uniform(1, 1) < 0.5))
        low, high = (math.log(bound) for bound in self.noise_range)
        mean, spread = self.noise
        others = (low + (high - low) * draw.uniform()).exp()
        noise_std = torch.where(draw.uniform() < 1 / 3, others, torch.exp(mean + spread * draw.normal()))
        return SearchHyperparameters(relevant, lengthscale, powers, noise_std)

    def covariance(self, X: Tensor, hyperparameters: SearchHyperparameters) -> Tensor:
        """Of f at X (B, N, d): (B, N, N)."""
        inverse = (hyperparameters.relevant / hyperparameters.lengthscale)[:, None, :]

        def kernel(first: Tensor, second: Tensor) -> Tensor:
            places = (_warped(points / math.sqrt(12) + 0.5, hyperparameters.powers) for points in (first, second))
            first, second = (place * inverse for place in places)
            return matern32(first, second)

        return centred(kernel, X)

    def exact(self, batch: TaskBatch, num_context: int) -> Exact:
        """The log densities under each task's own hyperparameters, which a network doesn't know."""
        return exact_given_hyperparameters(batch, num_context)

    def _points(self, draw: Draws, num_points: int) -> Tensor:
        d = self.max_features
        uniform = draw.uniform(num_points, d)
        near = draw.uniform(1, d) + (0.02 + 0.2 * draw.uniform(1, 1)) * draw.normal(num_points, d)
        together = (draw.uniform(1, 1) < 0.5) & (draw.uniform(num_points, 1) < 0.5)
        return torch.where(together, near.clamp(0, 1), uniform)


def _warped(u: Tensor, powers: Tensor) -> Tensor:
    """Kumaraswamy's distribution function of each feature; powers (B, 2, d)."""
    tiny = 1e-6
    a, b = powers.unsqueeze(-2).unbind(1)
    return 1 - (1 - u.clamp(tiny, 1 - tiny) ** a) ** b
