"""Where evaluations fail: a classifier of configurations, and acquisition functions weighed by its answer."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from botorch.acquisition import AcquisitionFunction
from torch import Tensor

from bayesnn.bo.space import Space
from bayesnn.data import BayesnnWarning
from bayesnn.likelihoods import Categorical
from bayesnn.processes import DirichletNNGP

LEAST = 3  # of successes and of failures, before anything is said about where which is likely
NONNEGATIVE = ("kg",)


class SuccessModel:
    r"""The probability that an evaluation gives a value, from those that did and those that didn't.

    An infinitely wide network's function g, fitted to both kinds (``DirichletNNGP``), as a probability
    :math:`E[\mathrm{sigmoid}(g)] \approx \mathrm{sigmoid}(\mu / \sqrt{1 + \pi \sigma^2 / 8})` (MacKay, 1992).

    Args:
        space: that is searched.
        succeeded, failed: codes (n, d).
    """

    def __init__(self, space: Space, succeeded: Tensor, failed: Tensor) -> None:
        self.space = space
        labels = torch.cat([torch.ones(len(succeeded)), torch.zeros(len(failed))]).long()
        self.model = DirichletNNGP(Categorical(2), depth=2, activation="erf")
        with warnings.catch_warnings():
            # A category that hasn't been tried yet, or the one resource of the search.
            warnings.filterwarnings("ignore", message="X: column", category=BayesnnWarning)
            self.model.fit(space.encode(torch.cat([succeeded, failed])), labels)

    @classmethod
    def of(cls, space: Space, succeeded: Tensor, failed: Tensor) -> SuccessModel | None:
        """None where there are too few of either kind to tell them apart."""
        return cls(space, succeeded, failed) if min(len(succeeded), len(failed)) >= LEAST else None

    def log_probability(self, codes: Tensor) -> Tensor:
        """Of success at codes (*batch, d): (*batch,)."""
        posterior: Any = self.model.posterior(self.space.encode(codes).unsqueeze(-2))
        mean = posterior.mean[..., 0, 1] - posterior.mean[..., 0, 0]
        variance = posterior.variance[..., 0, :].sum(-1)
        return torch.nn.functional.logsigmoid(mean / (1 + math.pi / 8 * variance).sqrt())


class IfItSucceeds(AcquisitionFunction):
    """An acquisition function times the probability that the candidate gives a value.

    A logarithm gets the logarithm added, and so do information in nats ("mes"), an upper confidence bound and a draw, in units
    of the objective's spread: those can be negative, so that a product would mean nothing.

    Args:
        acquisition: of one candidate, without its pending points (they are set already).
        success: the model of success.
        name: of the acquisition function.
    """

    def __init__(self, acquisition: AcquisitionFunction, success: SuccessModel, name: str) -> None:
        super().__init__(acquisition.model)
        self.acquisition, self.success = acquisition, success
        self.is_product = name in NONNEGATIVE
        choices = getattr(acquisition, "choices", None)
        if choices is not None:
            self.choices = choices

    def forward(self, X: Tensor) -> Tensor:
        """(b, 1, d) -> (b,)."""
        value, log_probability = self.acquisition(X), self.success.log_probability(X[..., 0, :])
        return value * log_probability.exp() if self.is_product else value + log_probability
