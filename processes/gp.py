"""Gaussian process regression as BoTorch does it by default: what every other surrogate is measured against."""

from __future__ import annotations

from typing import Any

import torch
from botorch.models.utils.gpytorch_modules import get_covar_module_with_dim_scaled_prior
from gpytorch.kernels import Kernel
from torch import Tensor

from bayesnn.data import Scaling, standardisation
from bayesnn.inference.amortized.ranges import Bounds, pairs
from bayesnn.likelihoods import Gaussian
from bayesnn.processes.exact import ExactProcess
from bayesnn.registry import register


class GaussianProcess(ExactProcess):
    r"""Exact Gaussian process regression with a squared-exponential kernel, the default of BoTorch 0.18.

    .. math:: f \sim GP\left(c,\ \exp\left(-\tfrac12 \sum_i (x_i - x'_i)^2 / \ell_i^2\right)\right), \quad
              y = f + \epsilon, \quad \epsilon \sim N(0, \sigma^2),

    for inputs in the unit cube and standardised outcomes. With d inputs,
    :math:`\log \ell_i \sim N(\sqrt 2 + \tfrac12 \log d,\ 3)` and :math:`\log \sigma^2 \sim N(-4, 1)`: lengthscales grow with
    the dimension, which makes it a good model in many dimensions too (Hvarfner, Hellsten and Nardi 2024). The lengthscales,
    the constant and the noise maximise the marginal likelihood times these priors. Outputs are independent, each with its own
    hyperparameters. Time is O(n^3), memory O(n^2); computed in float64.

    Args:
        likelihood: Gaussian with learned (default) or fixed noise.
        bounds: known bounds (low, high) of all inputs, or one pair for each, that become the unit cube's, as BoTorch wants it;
            None (default): the lowest and highest value of each column. (0, 1) as a surrogate.
        optimise: False keeps the hyperparameters at the priors' modes.

    Raises:
        TypeError: if the likelihood isn't Gaussian.
        ValueError: for bounds that don't increase; at fit, for another number of columns.
        MemoryError: in ``fit``, if the matrices won't fit.

    Source: Rasmussen and Williams, Gaussian Processes for Machine Learning (2006), algorithm 2.1; Hvarfner, Hellsten and
    Nardi, Vanilla Bayesian optimization performs great in high dimensions (ICML 2024).
    """

    def __init__(self, likelihood: Gaussian | None = None, bounds: Bounds | None = None, optimise: bool = True) -> None:
        super().__init__(likelihood, optimise)
        self.bounds = None if bounds is None else pairs(bounds)

    def _input_scaling(self, X: Tensor) -> Scaling:
        return unit_cube(self.bounds, X)

    def _kernel(self, num_features: int, batch_shape: torch.Size, seed: int) -> Kernel:
        return get_covar_module_with_dim_scaled_prior(num_features, batch_shape)


def unit_cube(bounds: list[tuple[float, float]] | None, X: Tensor) -> Scaling:
    """From [0, 1] to the bounds or, without any, to each column's lowest and highest value; constant columns keep scale 1.

    Raises:
        ValueError: for another number of columns than of bounds.
    """
    if bounds is None:
        scaling = standardisation(X, "X")  # it warns of constant columns, and no others' deviation exceeds their range
        standardised = scaling.standardise(X)
        low = standardised.amin(0, keepdim=True)
        width = standardised.amax(0, keepdim=True) - low
        return Scaling(
            scaling.loc + scaling.scale * low, scaling.scale * torch.where(width > 0.5, width, torch.ones_like(width))
        )
    if len(bounds) not in (1, X.shape[-1]):
        raise ValueError(f"X must have {len(bounds)} columns, one for each pair of bounds, found {X.shape[-1]}")
    lower, upper = X.new_tensor(bounds).expand(X.shape[-1], 2).unbind(-1)
    return Scaling(lower[None], (upper - lower)[None])


def in_the_unit_cube(model: Any) -> Any:
    """What makes the model as a surrogate: search spaces give inputs in the unit cube."""

    def make(**options: Any) -> Any:
        return model(**{"bounds": (0.0, 1.0)} | options)

    return make


register("gp", GaussianProcess, in_the_unit_cube(GaussianProcess))
