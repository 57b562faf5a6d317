"""Exact Gaussian process regression, whatever the kernel: what its models have in common."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import gpytorch
import torch
from botorch.exceptions.warnings import BotorchTensorDimensionWarning
from botorch.models import SingleTaskGP
from botorch.posteriors import Posterior
from gpytorch.constraints import GreaterThan
from gpytorch.kernels import Kernel
from gpytorch.settings import min_fixed_noise
from linear_operator.operators import DiagLinearOperator
from torch import Tensor

from bayesnn.checks import flag
from bayesnn.data import Data
from bayesnn.likelihoods import Gaussian
from bayesnn.model import Model
from bayesnn.posteriors import Gaussian as GaussianPosterior
from bayesnn.predictive import Predictive
from bayesnn.processes.beside import Beside, PriorOf, observations_of
from bayesnn.processes.evidence import log_prior, quadratic
from bayesnn.processes.maximum import minimise
from bayesnn.processes.memory import check_memory

MIN_NOISE_VAR = 1e-12  # of fixed noise, in units of the outcomes' variance: a matrix without any can't be factored
MIN_LEARNED_NOISE_VAR = 1e-4  # BoTorch's
ROWS = 1024  # that are predicted at once: a prediction needs no covariances between rows
LOGARITHMS = {  # what GPyTorch calls them, and what they are called in files
    "covar_module.raw_outputscale": "covar_module.log_outputscale",
    "likelihood.noise_covar.raw_noise": "likelihood.noise_covar.log_noise",
}
MATRICES = 7  # of n x n for each output that a fit holds at its peak, as many as a Student-t process


class ExactProcess(Model):
    r"""Base class: :math:`f \sim GP(c, k)`, :math:`y = f + \epsilon`, with BoTorch's ``SingleTaskGP`` for the algebra.

    A family implements ``_kernel``. All hyperparameters maximise the marginal likelihood times their priors; outputs are
    independent, each with its own. Computed in float64 whatever the data's dtype. Time is O(n^3), memory O(n^2).

    Args:
        likelihood: Gaussian with learned (default) or fixed noise.
        optimise: False keeps the hyperparameters at their defaults.

    Raises:
        TypeError: if the likelihood isn't Gaussian.
        MemoryError: in ``fit``, if the matrices won't fit.
    """

    def __init__(self, likelihood: Gaussian | None, optimise: bool) -> None:
        super().__init__(likelihood)
        if not isinstance(self.likelihood, Gaussian):
            raise TypeError(f"likelihood must be likelihoods.Gaussian for exact inference, found {self.likelihood!r}")
        self.optimise = flag("optimise", optimise)
        self._gp: Any

    def _kernel(self, num_features: int, batch_shape: torch.Size, seed: int) -> Kernel:
        """The kernel of scaled inputs, with its priors."""
        raise TypeError(f"{type(self).__name__} doesn't define its kernel")

    def _other_starts(self) -> list[dict[str, float]]:
        """Where the search for hyperparameters begins anew, see :func:`minimise`."""
        return []

    def _max_steps(self) -> int:
        """After which that search ends wherever it is."""
        return 15_000

    def _build(self, data: Data, fixed: dict[str, Tensor], seed: int = 0) -> SingleTaskGP:
        num_outputs = data.Y.shape[-1]
        batch = torch.Size([num_outputs]) if num_outputs > 1 else torch.Size([])
        kernel = self._kernel(data.X.shape[-1], batch, seed)
        noise_var = (2 * fixed["log_noise_std"]).exp().expand_as(data.Y) if fixed else None
        X, Y = data.X.double(), data.Y.double()
        with min_fixed_noise(double_value=MIN_NOISE_VAR):
            gp = SingleTaskGP(X, Y, noise_var, covar_module=kernel, outcome_transform=None)
        if noise_var is None:
            by_logarithm(gp.likelihood.noise_covar, "noise", MIN_LEARNED_NOISE_VAR)
        return gp.to(X)

    def _fit(self, data: Data, outcome_scale: Tensor, **options: Any) -> None:
        check_memory(
            type(self).__name__, len(data), MATRICES * data.Y.shape[-1], "SparseNNGP", torch.float64, data.X.device
        )
        self._fixed = self.likelihood.fixed_parameters(outcome_scale.double())
        gp = self._build(data, self._fixed, options["seed"])
        if self.optimise:

            def loss() -> Tensor:
                return -log_evidence(gp) / len(data)

            minimise(type(self).__name__, loss, gp, options["time_budget"], self._other_starts(), self._max_steps())
        self._gp = gp.eval().requires_grad_(False)

    def _latent(self, X: Tensor) -> GaussianPosterior:
        with _exact():
            return GaussianPosterior(self._gp.posterior(X.double()).distribution).of_dtype(X.dtype)

    def _latent_beside(self, shared: Tensor) -> Callable[[Tensor], Posterior]:
        if self._conditioned:  # fantasies have observations of their own
            return super()._latent_beside(shared)
        with _exact(), torch.no_grad():
            observed = observations_of(self._gp, self._require_fitted().X.double())
        beside = Beside(PriorOf(self._gp), observed, shared.double())
        return lambda X: GaussianPosterior.from_moments(*beside(X.double())).of_dtype(X.dtype)

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


def by_logarithm(module: Any, name: str, least: float) -> None:
    """Find a variance by steps in its logarithm: it may lie decades from where it starts, and its own steps are then tiny."""
    start = getattr(module, name).detach().clone()
    module.register_constraint(f"raw_{name}", GreaterThan(least, transform=torch.exp, inv_transform=torch.log))
    module.initialize(**{name: start})


@contextmanager
def _exact() -> Iterator[None]:
    """Cholesky factors whatever the size: GPyTorch would switch to conjugate gradients at 800 rows."""
    with gpytorch.settings.fast_computations(False, False, False), gpytorch.settings.max_cholesky_size(100_000):
        yield
