"""A model's one objective as a Gaussian process would answer, for acquisition functions that insist on Gaussians."""

from __future__ import annotations

from typing import Any

import torch
from botorch.models.model import Model as BotorchModel
from botorch.posteriors import Posterior
from gpytorch.distributions import MultivariateNormal
from torch import Tensor

from bayesnn.bo.outcomes import Scales
from bayesnn.posteriors import Gaussian, gaussian_view


class GaussianModel(BotorchModel):
    """The merit, in units of about one, moment-matched to a Gaussian: exact for Gaussian posteriors.

    Args:
        model: of one output.
        sign: 1 to maximise, -1 to minimise.
        scales: of the merit.
    """

    def __init__(self, model: BotorchModel, sign: Tensor, scales: Scales) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("factor", sign / scales.scale)
        self.register_buffer("offset", -scales.loc / scales.scale)
        self.factor: Tensor
        self.offset: Tensor

    @property
    def num_outputs(self) -> int:
        return 1

    @property
    def batch_shape(self) -> torch.Size:
        return self.model.batch_shape

    def posterior(self, X: Tensor, *args: Any, **kwargs: Any) -> Posterior:
        view = gaussian_view(self.model.posterior(X, observation_noise=kwargs.get("observation_noise", False)))
        mean, covariance = view.mean.double(), view.output_covariance.to_dense().double()
        square = self.factor.square()[..., None, None]
        return Gaussian.from_moments(self.factor * mean + self.offset, square * covariance)

    def forward(self, X: Tensor) -> MultivariateNormal:
        """As BoTorch asks for with pending points."""
        posterior = self.posterior(X)
        assert isinstance(posterior, Gaussian)
        distribution = posterior.distribution
        assert isinstance(distribution, MultivariateNormal)
        return distribution
