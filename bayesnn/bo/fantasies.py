"""A model after imagined observations where values aren't known yet."""

from __future__ import annotations

from typing import Any

import torch
from botorch.models.model import Model as BotorchModel
from botorch.utils.sampling import draw_sobol_normal_samples
from torch import Tensor

from bayesnn.distributions import from_normals


def fantasised(model: BotorchModel, X: Tensor, num_fantasies: int, seed: int) -> BotorchModel:
    r"""A model given S fantasies of the observations at some points, drawn jointly.

    .. math:: p(y_1, \dots, y_k \mid D) = \prod_j p(y_j \mid x_j, D, (x_1, y_1), \dots, (x_{j-1}, y_{j-1})),

    each factor the model's own marginal after it has taken in the points before. All outcomes are drawn.

    Args:
        model: fitted, whose posterior of observations has ``marginals``, and that can take in observations.
        X: (k, d), k at least 1.
        num_fantasies: S; the draws are quasi-random, best for powers of two. A single one takes the medians.
        seed: of the draws.

    Returns:
        A model of batch shape (S,).

    Raises:
        TypeError, ValueError: by a model that can't take in the observations.

    Source: Snoek, Larochelle and Adams (2012), "Practical Bayesian optimization of machine learning algorithms", section 3.2;
    one fantasy of medians is close to the "Kriging believer" of Ginsbourger et al. (2010), which takes means (from memory).
    """
    shape = (num_fantasies, len(X), model.num_outputs)
    normals = torch.zeros(shape, dtype=torch.float64)
    if num_fantasies > 1:
        normals = draw_sobol_normal_samples(len(X) * model.num_outputs, num_fantasies, dtype=torch.float64, seed=seed)
    with torch.no_grad():
        for place, normal in zip(X.split(1), normals.reshape(shape).split(1, -2), strict=True):
            posterior: Any = model.posterior(place, observation_noise=True)
            observed = from_normals(posterior.marginals, normal.to(posterior.mean))
            model = model.condition_on_observations(place, observed)
    return model
