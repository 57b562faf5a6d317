r"""The knowledge gradient over a finite set of places: how much the best mean is expected to rise by one observation.

.. math::
    \mathrm{KG}(x) = E_Z\left[\max_i \left(\mu_i + \frac{\Sigma_{ix}}{\sqrt{\Sigma_{xx} + \sigma^2(x)}} Z\right)\right]
    - \max_i \mu_i, \qquad Z \sim N(0, 1),

over the places i and x itself.

Source: Frazier, Powell, Dayanik, "The knowledge-gradient policy for correlated normal beliefs" (INFORMS Journal on Computing,
2009), equation 10. Its expectation is taken here by the midpoints of equally likely intervals of Z.
"""

from __future__ import annotations

from typing import Any

import torch
from botorch.acquisition import AcquisitionFunction
from botorch.utils.transforms import t_batch_mode_transform
from torch import Tensor
from torch.distributions import Normal

from bayesnn.bo.gaussian_model import GaussianModel
from bayesnn.posteriors import Gaussian

NUM_NORMALS = 63


class KnowledgeGradient(AcquisitionFunction):
    """Of one candidate at a time, given those that are pending.

    Args:
        model: of the merit.
        places: codes (N, d) among which the best mean is looked for.
    """

    def __init__(self, model: GaussianModel, places: Tensor) -> None:
        super().__init__(model)
        self.places = places
        self.pending = places[:0]
        levels = (torch.arange(NUM_NORMALS, dtype=torch.float64) + 0.5) / NUM_NORMALS
        self.normals = Normal(0.0, 1.0).icdf(levels)

    def set_X_pending(self, X_pending: Tensor | None = None) -> None:
        """Their outcomes, whatever they turn out to be, will be known: only what x adds to them counts."""
        self.pending = self.places[:0] if X_pending is None else X_pending

    @t_batch_mode_transform(expected_q=1)  # type: ignore[arg-type]
    def forward(self, X: Tensor) -> Tensor:
        """(b, 1, d) -> (b,)."""
        fixed = torch.cat([self.pending, self.places]).expand(*X.shape[:-2], -1, -1)
        points = torch.cat([X, fixed.to(X)], -2)
        posterior = self.model.posterior(points)
        assert isinstance(posterior, Gaussian)
        mean, covariance = posterior.mean.squeeze(-1), posterior.output_covariance.to_dense().squeeze(-3)
        observed = points[..., : 1 + len(self.pending), :].unsqueeze(-2)
        observations: Any = self.model.posterior(observed, observation_noise=True)
        with_noise = observations.variance.squeeze(-1).squeeze(-1)
        noise = (with_noise - covariance.diagonal(dim1=-2, dim2=-1)[..., : observed.shape[-3]]).clamp_min(1e-9)
        covariance = _given(covariance, noise, len(self.pending))
        slope = covariance[..., 0] / (covariance[..., 0, 0] + noise[..., 0]).clamp_min(1e-12).sqrt()[..., None]
        after = mean.unsqueeze(-1) + slope.unsqueeze(-1) * self.normals.to(mean)
        return after.amax(-2).mean(-1) - mean.amax(-1)


def _given(covariance: Tensor, noise: Tensor, num_pending: int) -> Tensor:
    """After observations at the points 1 … ``num_pending``."""
    if not num_pending:
        return covariance
    known = slice(1, 1 + num_pending)
    block = covariance[..., known, known] + noise[..., known].diag_embed()
    cross = covariance[..., known, :]
    return covariance - cross.mT @ torch.linalg.solve(block, cross)
