"""Gaussian process regression with the kernel of an infinitely wide network."""

from __future__ import annotations

import torch
from gpytorch.kernels import Kernel, ScaleKernel
from gpytorch.priors import LogNormalPrior

from bayesnn.checks import flag
from bayesnn.likelihoods import Gaussian
from bayesnn.processes.dual_activations import DualActivation
from bayesnn.processes.exact import ExactProcess, by_logarithm
from bayesnn.processes.kernels import KernelFactory, MLPKernel
from bayesnn.processes.kernels.factories import checked_factory, for_searches, made
from bayesnn.processes.maximum import LARGE_LOG_NOISE_VAR
from bayesnn.registry import register


class NNGP(ExactProcess):
    r"""Exact Gaussian process regression with the covariance of an infinitely wide multilayer perceptron.

    :math:`f \sim GP(c, s K)` with the NNGP kernel K (Neal 1996; Lee et al. 2018) of ``processes.kernels.NNGPKernel``, a
    constant mean c and an output scale s, the last layer's own variance; :math:`y = f + \epsilon`. All hyperparameters
    (variances, a lengthscale for each input, c, s, noise) maximise the marginal likelihood times weak log-normal priors
    (our choice). Outputs are independent, each with its own hyperparameters. Time is O(n^3), memory O(n^2).

    Computed in float64 whatever the data's dtype: in single precision the matrices of deep networks are singular.

    As the surrogate "nngp" its kernel is ``FourierKernel()``: a plain perceptron's variance grows towards the corners of a
    search space, and an optimiser that is drawn there loses to a Gaussian process with any stationary kernel.

    Not to be confused with nearest-neighbour GPs, which share the name.

    Args:
        depth: hidden layers, at least 1.
        activation: its name, or a dual activation.
        likelihood: Gaussian with learned (default) or fixed noise.
        optimise: False keeps the hyperparameters at their defaults.
        kernel: makes the kernel of any other network from the number of features and the batch shape, in place of depth and
            activation: ``FourierKernel(…)``, or a function that gives a GPyTorch kernel (say, an ``NNGPKernel`` for images).
        restart: search for the hyperparameters twice, from little noise and from much, and keep the better for each output:
            likelihoods of tables have several maxima. It takes twice the time, and with a ``time_budget`` the first search may
            leave none for the second. False as a surrogate, where the second would gain little (nothing in 31 of 32 designs
            of four test functions with 20 and 50 points). With fixed noise there is one search.

    Raises:
        ValueError: for an unknown activation or a depth below 1.
        TypeError: if the likelihood isn't Gaussian, or ``kernel`` is no such function.
        MemoryError: in ``fit``, if the matrices won't fit.
    """

    def __init__(
        self,
        depth: int = 3,
        activation: str | DualActivation = "relu",
        likelihood: Gaussian | None = None,
        optimise: bool = True,
        kernel: KernelFactory | None = None,
        restart: bool = True,
    ) -> None:
        super().__init__(likelihood, optimise)
        self.kernel = MLPKernel(depth, activation) if kernel is None else kernel
        checked_factory(self.kernel)
        self.restart = flag("restart", restart)

    def _kernel(self, num_features: int, batch_shape: torch.Size, seed: int) -> Kernel:
        kernel = made(self.kernel, num_features, batch_shape)
        scaled = ScaleKernel(kernel, batch_shape=batch_shape, outputscale_prior=LogNormalPrior(-0.5, 1.0))
        by_logarithm(scaled, "outputscale", 0.0)
        return scaled

    def _other_starts(self) -> list[dict[str, float]]:
        learned = self.restart and not self._fixed
        return [{"likelihood.noise_covar.raw_noise": LARGE_LOG_NOISE_VAR}] if learned else []


register("nngp", NNGP, for_searches(NNGP))
