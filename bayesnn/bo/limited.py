"""Noisy expected improvement: one value for one candidate however often it is asked for, what candidates share only once."""

from __future__ import annotations

from typing import Any

import torch
from botorch.acquisition.logei import qLogNoisyExpectedImprovement
from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
from botorch.acquisition.multi_objective.parego import qLogNParEGO
from botorch.acquisition.utils import compute_best_feasible_objective, get_infeasible_cost
from torch import Tensor


class _Settled:
    """What a draw in which no tried configuration keeps the limits is compared with: a lower bound of the objective.

    BoTorch 0.18 estimates it at each call from 32 new random points, unless it caches a Gaussian process's root: values of one
    candidate then differ by the noise of that estimate, which an optimiser takes for slopes, and each costs those 32
    predictions. Here it is estimated once, six standard deviations below the mean at known places.

    Args:
        places: codes (N, d), spread over the space.
        **options: BoTorch's.
    """

    def __init__(self, places: Tensor, **options: Any) -> None:
        super().__init__(**options)
        self.places = places
        self.lower_bound: Tensor | None = None

    def _compute_best_feasible_objective(self: Any, samples: Tensor, obj: Tensor) -> Tensor:
        if self._constraints is not None and self.lower_bound is None:
            cost = get_infeasible_cost(self.places, self.model, self.objective, self.posterior_transform)
            self.lower_bound = -cost.detach()
        return compute_best_feasible_objective(samples, obj, self._constraints, infeasible_obj=self.lower_bound)


class _Beside:
    """What is known of the tried and pending configurations is computed once, not beside each candidate of each batch.

    Its model is asked at codes and can be told what all batches share.
    """

    def forward(self: Any, X: Tensor) -> Tensor:
        """(*batch, q, d) -> (*batch,)."""
        self.model.share(self.X_baseline)
        return super().forward(X)  # type: ignore[misc]


class LogNoisyExpectedImprovement(_Beside, _Settled, qLogNoisyExpectedImprovement):
    """BoTorch's, with a settled lower bound, and of draws that are functions each one's best value so far only once.

    BoTorch asks for the tried configurations again beside each candidate, which for Gaussian processes makes their draws
    joint. A draw that is one function has the same values there at each call.

    Args:
        functions: whether the sampler's draws are the same functions whatever is asked.
        **options: those of the base class and BoTorch's.
    """

    def __init__(self, functions: bool, **options: Any) -> None:
        super().__init__(**options)
        self.functions = functions
        self._known: Tensor | None = None  # where the functions' values are known

    def _get_samples_and_objectives(self, X: Tensor) -> tuple[Tensor, Tensor]:
        if not self.functions:
            return super()._get_samples_and_objectives(X)
        if self._known is not self.X_baseline:  # which pending configurations change
            with torch.no_grad():
                self.baseline_samples, self.baseline_obj = self._of_functions(self.X_baseline)
            self._known = self.X_baseline
        return self._of_functions(X)

    def _of_functions(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Draws (S, *batch, q, m) and their objectives."""
        posterior = self.model.posterior(X, posterior_transform=self.posterior_transform)
        samples = self.get_posterior_samples(posterior)
        return samples, self.objective(samples, X=X)


class LogNParEGO(_Beside, _Settled, qLogNParEGO):
    """BoTorch's, with a settled lower bound."""


class LogNoisyExpectedHypervolumeImprovement(_Beside, qLogNoisyExpectedHypervolumeImprovement):  # type: ignore[misc]
    """BoTorch's."""
