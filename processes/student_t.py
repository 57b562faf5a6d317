r"""The Student-t process: an infinitely wide network whose last layer's variance is unknown, with exact inference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from botorch.posteriors import Posterior
from torch import Tensor
from torch.distributions import StudentT as StudentTDistribution

from bayesnn.checks import flag, positive
from bayesnn.data import Data
from bayesnn.likelihoods import Gaussian
from bayesnn.model import Model
from bayesnn.posteriors import StudentT
from bayesnn.predictive import Predictive
from bayesnn.processes.beside import Beside
from bayesnn.processes.evidence import Quadratic
from bayesnn.processes.kernels import KernelFactory, MLPKernel
from bayesnn.processes.kernels.factories import checked_factory, for_searches, made
from bayesnn.processes.maximum import LARGE_LOG_NOISE_VAR, minimise
from bayesnn.processes.memory import check_memory
from bayesnn.processes.shared_scale import (
    Conditioned,
    MixturePrior,
    condition,
    fit_of,
    gaussian,
    inflation,
    log_evidence,
    no_observations,
    predict_marginals,
    student_t,
)
from bayesnn.registry import register

MATRICES = 7  # of n x n for each output that a fit holds at its peak, measured


class StudentTPredictive(Predictive):
    """A Student-t prediction, whose variances are infinite where the degrees of freedom are 2 or fewer."""

    def _finite(self, values: Tensor) -> Tensor:
        df = self.components.df.squeeze(-3)
        return torch.where(df > 2, values, torch.full_like(values, math.inf))

    @property
    def aleatoric(self) -> Tensor:
        """The noise's variance, in the mean over the posterior of the shared factor."""
        return self._finite(super().aleatoric)

    @property
    def epistemic(self) -> Tensor:
        """The function's variance."""
        return self._finite(super().epistemic)


class StudentTProcess(Model):
    r"""Exact regression with a scale mixture of infinitely wide networks (Lee, Yun, Yang and Lee 2022): a Student-t process.

    The last layer's weight variance is unknown, :math:`\sigma^2 \sim IG(a, b)`, and
    :math:`f \mid \sigma^2 \sim GP(c, \sigma^2 K)` with the NNGP kernel K or any other. Observations are
    :math:`y = f + \epsilon` with noise on the same scale, :math:`\epsilon \mid \sigma^2 \sim N(0, \sigma^2 \tau^2)`; that is
    what makes everything closed form (Shah, Wilson and Ghahramani 2014):

    .. math::
        y \sim MVT_{2a}(c, \Sigma), \quad \Sigma = \tfrac ba (K + \tau^2 I), \qquad
        f_* \mid y \sim MVT_{2a+n}\!\left(\mu_*, \tfrac{2a + d^2}{2a + n} S_*\right), \quad d^2 = (y-c)^\top \Sigma^{-1} (y-c),

    with :math:`\mu_*` and :math:`S_*` the mean and covariance of the Gaussian process of covariance :math:`\Sigma`. The mean
    is that Gaussian process's; the width follows how well the data agree with the prior's scale. Function and noise share one
    :math:`\chi^2`, so that outliers in y widen both. For a to infinity with b/a fixed it is the Gaussian process.

    The noise's size is meant as :math:`\eta = \tau \sqrt{b/a}`, its part of the scale matrix: the standard deviation that it
    has where :math:`\sigma^2` is at b/a, and in the limit of a Gaussian process.

    The hyperparameters (kernel's, c, a, b/a, noise) maximise :math:`\log MVT(y)` plus log-normal priors. One set of
    observations hardly tells a: with b/a free the density grows towards a to infinity, by about half a nat for each factor
    of e, so that a stays near its prior, :math:`\log a \sim N(\log 2, 0.5^2)` (our choice; the paper fixes a and b at 1 to 3).

    Outputs are independent, each with its own hyperparameters and its own mixing variable. One shared by all would tie the
    widths of outputs that are standardised one by one, and make the prediction of an output depend on which others are there.

    Time is O(n^3), memory O(n^2). Computed in float64 whatever the data's dtype.

    As the surrogate "student-t" its kernel is ``FourierKernel()``, for the reason that :class:`NNGP` gives.

    Args:
        depth: hidden layers, at least 1.
        activation: of the network.
        likelihood: Gaussian with learned (default) or fixed noise.
        optimise: False keeps the hyperparameters at their defaults (a = b = 2, the paper's).
        kernel: ``kernel(num_features, batch_shape)`` returns the GPyTorch kernel that takes the place of the network's
            (which then has no depth and activation); inputs are standardised.
        shape: a; None: learned.
        scale: b, in units of the standardised outcomes' variance; None: learned.
        restart: search for the hyperparameters twice and keep the better, as :class:`NNGP` does.

    Raises:
        ValueError: for an unknown activation, a depth below 1, an a or b that isn't positive.
        TypeError: if the likelihood isn't Gaussian.
        MemoryError: at fit, for more rows than fit.
    """

    def __init__(
        self,
        depth: int = 3,
        activation: str = "relu",
        likelihood: Gaussian | None = None,
        optimise: bool = True,
        kernel: KernelFactory | None = None,
        shape: float | None = None,
        scale: float | None = None,
        restart: bool = True,
    ) -> None:
        super().__init__(likelihood)
        if not isinstance(self.likelihood, Gaussian):
            raise TypeError(f"likelihood must be likelihoods.Gaussian for exact inference, found {self.likelihood!r}")
        for name, value in (("shape", shape), ("scale", scale)):
            if value is not None:
                positive(name, value)
        MLPKernel(depth, activation)  # raises the errors above
        if kernel is not None:
            checked_factory(kernel)
        self.depth, self.activation, self.kernel = depth, activation, kernel
        self.optimise, self.restart = flag("optimise", optimise), flag("restart", restart)
        self.shape, self.scale = shape, scale
        self._prior: MixturePrior
        self._known: Conditioned

    def _build(self, data: Data, outcome_scale: Tensor) -> MixturePrior:
        fixed = self.likelihood.fixed_parameters(outcome_scale.double())
        noise = (2 * fixed["log_noise_std"]).exp().squeeze(0) if fixed else None
        d, batch = data.X.shape[-1], torch.Size([data.Y.shape[-1]])
        kernel = made(self.kernel or MLPKernel(self.depth, self.activation), d, batch)
        return MixturePrior(kernel, data.Y.shape[-1], self.shape, self.scale, noise)

    def _fit(self, data: Data, outcome_scale: Tensor, **options: Any) -> None:
        matrices = (MATRICES if self.optimise else 4) * data.Y.shape[-1]
        check_memory(type(self).__name__, len(data), matrices, "SparseNNGP")
        prior = self._build(data, outcome_scale)
        if self.optimise:
            self._maximise(prior, data, options["time_budget"])
        self._take(prior, data)

    def _maximise(self, prior: MixturePrior, data: Data, time_budget: float | None) -> None:
        X, Y = data.X.double(), data.Y.double()

        def loss() -> Tensor:
            return -(self._log_evidence(prior, fit_of(prior, X, Y)) + prior.log_prior()) / len(data)

        restart = self.restart and hasattr(prior, "log_noise_var")
        noisy = [{"log_noise_var": LARGE_LOG_NOISE_VAR}] if restart else []
        minimise(type(self).__name__, loss, prior, time_budget, noisy)

    def _log_evidence(self, prior: MixturePrior, known: Conditioned | Quadratic) -> Tensor:
        return log_evidence(prior, known)

    def _take(self, prior: MixturePrior, data: Data) -> None:
        self._prior = prior.eval().requires_grad_(False)
        self._known = _seen(self._prior, data)

    def _latent(self, X: Tensor) -> Posterior:
        return self._mixed(*gaussian(self._prior, self._known, X.double()), X.dtype)

    def _latent_beside(self, shared: Tensor) -> Callable[[Tensor], Posterior]:
        if self._conditioned:  # fantasies have observations of their own
            return super()._latent_beside(shared)
        beside = Beside(self._prior, self._known, shared.double())
        return lambda X: self._mixed(*beside(X.double()), X.dtype)

    def _mixed(self, loc: Tensor, covariance: Tensor, dtype: torch.dtype) -> Posterior:
        """The posterior whose Gaussian process has means (*batch, q, m) and covariances (*batch, m, q, q)."""
        found = student_t(self._prior, self._known, loc, covariance)
        return StudentT(found.loc.to(dtype), found.scale.to(dtype), found.df)

    def _observations(self, latent: Posterior, X: Tensor) -> Any:
        """Function and noise under one chi-squared variable."""
        assert isinstance(latent, StudentT)
        noise = inflation(self._prior, self._known) * self._prior.noise_var
        diagonal = torch.diag_embed(noise.unsqueeze(-1).expand(*latent.scale.shape[:-1])).to(latent.scale)
        return StudentT(latent.loc, latent.scale + diagonal, latent.df)

    def _predictive(self, X: Tensor) -> Predictive:
        loc, var = predict_marginals(self._prior, self._known, X.double())
        noise = (inflation(self._prior, self._known) * self._prior.noise_var).unsqueeze(-2)
        df = (2 * self._prior.shape + self._known.size).expand_as(loc)
        df, loc, std, function_var = (
            value.unsqueeze(-3).to(X) for value in (df, loc, (var + noise).sqrt(), var * df / (df - 2))
        )
        components = StudentTDistribution(df, loc, std, validate_args=False)
        return StudentTPredictive(components, function_var=function_var)

    def _likelihood_parameters(self) -> dict[str, Tensor]:
        data = self._require_fitted()
        return {"log_noise_std": 0.5 * self._prior.noise_var.log().unsqueeze(0).to(data.X)}

    @property
    def batch_shape(self) -> torch.Size:
        """Empty, or one entry for each set of fantasies."""
        return self._known.whitened.shape[:-2] if self._data is not None else torch.Size([])

    def condition_on_observations(self, X: Tensor, Y: Tensor, **kwargs: Any) -> Self:
        """Exact conditioning on more observations, with the hyperparameters kept: their noise is the model's own."""
        scaled, standardised = self._observed(X, Y)
        conditioned = self._copy()
        conditioned._conditioned = True
        conditioned._known = condition(self._prior, self._known, scaled.double(), standardised.double())
        return conditioned

    def _state(self) -> dict[str, Tensor]:
        return dict(self._prior.state_dict())

    def _set_state(self, tensors: dict[str, Tensor]) -> None:
        assert self._data is not None
        prior = self._build(self._data, self._outcomes.scale)
        prior.load_state_dict(tensors)
        self._take(prior, self._data)


def _seen(prior: MixturePrior, data: Data) -> Conditioned:
    X = data.X.double()
    return condition(prior, no_observations(prior, X.shape[-1]), X, data.Y.double())


register("student-t", StudentTProcess, for_searches(StudentTProcess))
