"""Gaussian process regression on learning curves: outcomes of configurations after some resource has been spent on each."""

from __future__ import annotations

import torch
from botorch.models.utils.gpytorch_modules import get_covar_module_with_dim_scaled_prior
from gpytorch.kernels import ConstantKernel, Kernel, ScaleKernel
from gpytorch.priors import LogNormalPrior
from torch import Tensor

from bayesnn.checks import positive
from bayesnn.data import Scaling, identity
from bayesnn.inference.amortized.ranges import Bounds
from bayesnn.likelihoods import Gaussian
from bayesnn.processes.gp import GaussianProcess, unit_cube
from bayesnn.processes.kernels.exponential_decay import ExponentialDecay


class LearningCurveProcess(GaussianProcess):
    r"""Exact Gaussian process regression jointly over configurations and resources: curves decay towards their limits.

    .. math:: f(x, r) = c + f_\infty(x) + f_\delta(x, r), \qquad
        k\bigl((x, r), (x', r')\bigr) = s_\infty k_\infty(x, x') + \bigl(s_0 + s_1 k_1(x, x')\bigr)
        \left(\frac{\beta}{r + r' + \beta}\right)^\alpha,

    with squared-exponential :math:`k_\infty` and :math:`k_1`, each with BoTorch's lengthscales and their priors. The first
    term is where a curve ends, the second how far it still is from there: a decay that all curves have in common
    (:math:`s_0`; integrated over, it is the mean that MOBSTER's kernel has) and one that differs between configurations,
    so that curves may cross. Freeze-thaw Bayesian optimisation has independent decays for each configuration instead; here
    a new configuration learns from the decays of those near to it, as in MOBSTER. The scales have priors
    :math:`\log s \sim N(0, 1)` (our choice: outcomes are standardised). All else as in :class:`GaussianProcess`.

    Args:
        ratio: the whole resource over the least, :math:`\rho > 1`. The last column of X is a resource on the log scale, 0 at
            the least and 1 at the whole one.
        likelihood, bounds, optimise: as in :class:`GaussianProcess`; the bounds are of all columns but the last.

    Raises:
        TypeError: if the likelihood isn't Gaussian.
        ValueError: for a ratio of 1 or less, and bounds that don't increase; at fit, for X with a single column.
        MemoryError: in ``fit``, if the matrices won't fit.

    Source: Swersky, Snoek and Adams, Freeze-thaw Bayesian optimization (2014); Klein, Tiao, Lienart, Archambeau and Seeger,
    Model-based asynchronous hyperparameter and neural architecture search (2020). The sum is ours, after both from memory.
    """

    def __init__(
        self, ratio: float, likelihood: Gaussian | None = None, bounds: Bounds | None = None, optimise: bool = True
    ) -> None:
        super().__init__(likelihood, bounds, optimise)
        self.ratio = positive("ratio", ratio)
        if ratio <= 1:
            raise ValueError(f"ratio must be above 1, found {ratio}")

    def _input_scaling(self, X: Tensor) -> Scaling:
        if X.shape[-1] < 2:
            raise ValueError("X must have the configuration's columns and then the resource's, found a single column")
        parts = unit_cube(self.bounds, X[:, :-1]), identity(1, X)
        return Scaling(*(torch.cat(each, -1) for each in zip(*parts, strict=True)))

    def _max_steps(self) -> int:
        return 100

    def _kernel(self, num_features: int, batch_shape: torch.Size, seed: int) -> Kernel:
        columns, resource = tuple(range(num_features - 1)), (num_features - 1,)

        def scaled() -> Kernel:
            kernel = get_covar_module_with_dim_scaled_prior(len(columns), batch_shape, active_dims=columns)
            return ScaleKernel(kernel, LogNormalPrior(0.0, 1.0), batch_shape=batch_shape)

        shared = ConstantKernel(batch_shape, LogNormalPrior(0.0, 1.0))
        return scaled() + (shared + scaled()) * ExponentialDecay(self.ratio, batch_shape, active_dims=resource)
