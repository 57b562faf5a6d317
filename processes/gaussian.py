"""Gaussian process regression with the kernel of an infinitely wide network."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import gpytorch
import torch
from botorch.exceptions.warnings import BotorchTensorDimensionWarning
from botorch.models import SingleTaskGP
from gpytorch.constraints import GreaterThan
from gpytorch.kernels import ScaleKernel
from gpytorch.priors import LogNormalPrior
from gpytorch.settings import min_fixed_noise
from linear_operator.operators import DiagLinearOperator
from torch import Tensor

from bayesnn.checks import flag
from bayesnn.data import Data
from bayesnn.likelihoods import Gaussian
from bayesnn.model import Model
from bayesnn.posteriors import Gaussian as GaussianPosterior
from bayesnn.predictive import Predictive
from bayesnn.processes.dual_activations import DualActivation
from bayesnn.processes.evidence import log_prior, quadratic
from bayesnn.processes.kernels import KernelFactory, MLPKernel
from bayesnn.processes.kernels.factories import checked_factory, for_searches, made
from bayesnn.processes.maximum import LARGE_LOG_NOISE_VAR, minimise
from bayesnn.processes.memory import check_memory
from bayesnn.registry import register

MIN_NOISE_VAR = 1e-12  # of fixed noise, in units of the outcomes' variance: a matrix without any can't be factored
MIN_LEARNED_NOISE_VAR = 1e-4  # BoTorch's
ROWS = 1024  # that are predicted at once: a prediction needs no covariances between rows
LOGARITHMS = {  # what GPyTorch calls them, and what they are called in files
    "covar_module.raw_outputscale": "covar_module.log_outputscale",
    "likelihood.noise_covar.raw_noise": "likelihood.noise_covar.log_noise",
}
MATRICES = 7  # of n x n for each output that a fit holds at its peak, as many as a Student-t process


class NNGP(Model):
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
        super().__init__(likelihood)
        if not isinstance(self.likelihood, Gaussian):
            raise TypeError(f"likelihood must be likelihoods.Gaussian for exact inference, found {self.likelihood!r}")
        self.kernel = MLPKernel(depth, activation) if kernel is None else kernel
        checked_factory(self.kernel)
        self.optimise, self.restart = flag("optimise", optimise), flag("restart", restart)
        self._gp: Any

    def _build(self, data: Data, fixed: dict[str, Tensor]) -> SingleTaskGP:
        num_outputs = data.Y.shape[-1]
        batch = torch.Size([num_outputs]) if num_outputs > 1 else torch.Size([])
        kernel = made(self.kernel, data.X.shape[-1], batch)
        scaled = ScaleKernel(kernel, batch_shape=batch, outputscale_prior=LogNormalPrior(-0.5, 1.0))
        noise_var = (2 * fixed["log_noise_std"]).exp().expand_as(data.Y) if fixed else None
        X, Y = data.X.double(), data.Y.double()
        with min_fixed_noise(double_value=MIN_NOISE_VAR):
            gp = SingleTaskGP(X, Y, noise_var, covar_module=scaled, outcome_transform=None)
        _by_logarithm(scaled, "outputscale", 0.0)
        if noise_var is None:
            _by_logarithm(gp.likelihood.noise_covar, "noise", MIN_LEARNED_NOISE_VAR)
        return gp.to(X)

    def _fit(self, data: Data, outcome_scale: Tensor, **options: Any) -> None:
        check_memory("NNGP", len(data), MATRICES * data.Y.shape[-1], "SparseNNGP", torch.float64, data.X.device)
        self._fixed = self.likelihood.fixed_parameters(outcome_scale.double())
        gp = self._build(data, self._fixed)
        if self.optimise:

            def loss() -> Tensor:
                return -log_evidence(gp) / len(data)

            restart = self.restart and not self._fixed
            noisy = [{"likelihood.noise_covar.raw_noise": LARGE_LOG_NOISE_VAR}] if restart else []
            minimise(type(self).__name__, loss, gp, options["time_budget"], noisy)
        self._gp = gp.eval().requires_grad_(False)

    def _latent(self, X: Tensor) -> GaussianPosterior:
        with _exact():
            return GaussianPosterior(self._gp.posterior(X.double()).distribution).of_dtype(X.dtype)

    def _predictive(self, X: Tensor) -> Predictive:
        parts = [self._latent(rows) for rows in X.split(ROWS, -2)]
        mean, var = (torch.cat([getattr(part, name) for part in parts], -2) for name in ("mean", "variance"))
        marginals = GaussianPosterior.from_moments(mean, DiagLinearOperator(var.mT))
        return self.likelihood.predictive(marginals, self._likelihood_parameters())

    def _likelihood_parameters(self) -> dict[str, Tensor]:
        parameters = self._fixed or {"log_noise_std": 0.5 * self._gp.likelihood.noise.log().reshape(1, -1)}
        return {name: value.to(self._require_fitted().X) for name, value in parameters.items()}

    @property
    def batch_shape(self) -> torch.Size:
        """Empty, or one entry for each set of fantasies."""
        return self._gp.batch_shape if self._data is not None else torch.Size([])

    def condition_on_observations(self, X: Tensor, Y: Tensor, **kwargs: Any) -> Self:
        """Exact conditioning on more observations, with the hyperparameters kept."""
        scaled, standardised = (values.double() for values in self._observed(X, Y))
        conditioned = self._copy()
        conditioned._conditioned = True
        noise = (
            (2 * self._fixed["log_noise_std"]).exp().expand(*scaled.shape[:-1], standardised.shape[-1])
            if self._fixed
            else None
        )
        with _exact(), min_fixed_noise(double_value=MIN_NOISE_VAR), warnings.catch_warnings():
            # Fantasies at the same inputs: sharing these is what saves time.
            warnings.simplefilter("ignore", BotorchTensorDimensionWarning)
            self._gp.posterior(scaled[..., :1, :])  # GPyTorch conditions from its prediction caches
            conditioned._gp = self._gp.condition_on_observations(scaled, standardised, noise=noise)
        return conditioned

    def _state(self) -> dict[str, Tensor]:
        return {LOGARITHMS.get(name, name): value for name, value in self._gp.state_dict().items()}

    def _set_state(self, tensors: dict[str, Tensor]) -> None:
        assert self._data is not None
        self._fixed = self.likelihood.fixed_parameters(self._outcomes.scale.double())
        gp = self._build(self._data, self._fixed)
        if tensors.keys() & LOGARITHMS.keys():
            raise ValueError("the file holds variances as an earlier version had them: fit the model again")
        raw = {name: key for key, name in LOGARITHMS.items()}
        gp.load_state_dict({raw.get(name, name): value for name, value in tensors.items()})
        self._gp = gp.eval().requires_grad_(False)


def log_evidence(gp: SingleTaskGP) -> Tensor:
    r"""The log density of its outcomes and of its hyperparameters, for each output, (m,).

    .. math:: \ln p(\theta) - \tfrac12 (y-c)^\top \Sigma^{-1} (y-c) - \tfrac12 \ln |\Sigma| - \tfrac n2 \ln 2\pi, \quad
              \Sigma = s K + \sigma^2 I.
    """
    X, Y = gp.train_inputs[0], gp.train_targets
    found = quadratic(gp.covar_module(X).to_dense(), gp.likelihood.noise.expand_as(Y), Y - gp.mean_module(X))
    log_density = -0.5 * (found.squared_distance + found.log_det + found.size * math.log(2 * math.pi))
    return log_density + log_prior(gp, gp.num_outputs)


def _by_logarithm(module: Any, name: str, least: float) -> None:
    """Find a variance by steps in its logarithm: it may lie decades from where it starts, and its own steps are then tiny."""
    start = getattr(module, name).detach().clone()
    module.register_constraint(f"raw_{name}", GreaterThan(least, transform=torch.exp, inv_transform=torch.log))
    module.initialize(**{name: start})


@contextmanager
def _exact() -> Iterator[None]:
    """Cholesky factors whatever the size: GPyTorch would switch to conjugate gradients at 800 rows."""
    with gpytorch.settings.fast_computations(False, False, False), gpytorch.settings.max_cholesky_size(100_000):
        yield


register("nngp", NNGP, for_searches(NNGP))
