r"""Gaussian process classification as regression of transformed labels (Milios et al. 2018).

A label's one-hot code plus :math:`\alpha_\epsilon` are the parameters of a Dirichlet distribution, each of a gamma variable.
Log-normals with the same moments give exact regression of K functions with noise that is known:

.. math::
    \alpha_{ik} = \alpha_\epsilon + [y_i = k], \qquad \tilde\sigma_{ik}^2 = \log(1 + 1/\alpha_{ik}), \qquad
    \tilde y_{ik} = \log \alpha_{ik} - \tilde\sigma_{ik}^2 / 2.

Probabilities are :math:`E\, \mathrm{softmax}(f(x))`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from linear_operator.utils.cholesky import psd_safe_cholesky
from linear_operator.utils.errors import NanError, NotPSDError
from torch import Tensor

from bayesnn.checks import check_fields, count, flag, positive
from bayesnn.configured import Configured
from bayesnn.data import Data
from bayesnn.files import fingerprint
from bayesnn.inference.lbfgs import LBFGSState, lbfgs_init, lbfgs_step
from bayesnn.inference.run import run
from bayesnn.likelihoods import Categorical
from bayesnn.model import Model
from bayesnn.posteriors import Gaussian as GaussianPosterior
from bayesnn.predictive import Predictive
from bayesnn.processes.kernels import KernelFactory, MLPKernel
from bayesnn.processes.memory import check_memory
from bayesnn.processes.sparse_posterior import even_normals
from bayesnn.processes.sparse_prior import Parameters, SparsePrior, network_prior

MATRICES = 8  # of n x n that a fit holds at its peak, measured, beside one for each class when it is done
ROWS = 1024  # of a prediction in work at once


def transformed_labels(labels: Tensor, num_classes: int, alpha_epsilon: float) -> tuple[Tensor, Tensor]:
    """The outcomes and noise variances of the regression, (n, K) both, of labels (n,); float64."""
    alpha = torch.nn.functional.one_hot(labels.long(), num_classes).double() + alpha_epsilon
    noise_var = (1 / alpha).log1p()
    return alpha.log() - noise_var / 2, noise_var


class DirichletTarget:
    """The marginal likelihood of the transformed labels.

    Args:
        X: (n, d).
        Y: transformed labels (n, K).
        noise_var: (n, K).
        prior: over functions, which share one kernel.
        description: of the kernel, to tell a checkpoint of another one.
    """

    def __init__(self, X: Tensor, Y: Tensor, noise_var: Tensor, prior: SparsePrior, description: str = "") -> None:
        self.X, self.Y, self.noise_var, self.prior = X, Y, noise_var, prior
        described = repr((prior.kernel, description))
        self.fingerprint = fingerprint(described, X, Y, noise_var, *prior.parameters(), *prior.buffers())

    def start(self) -> Parameters:
        """The kernel's defaults, and the mean of the transformed labels."""
        return self.prior.start() | {"mean": self.Y.mean(0)}

    def log_evidence(self, covariance: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""log p(y) summed over classes, with its gradients by K and the mean, class by class in the same memory.

        :math:`\tfrac12 \sum_k (a_k a_k^\top - \Sigma_k^{-1})` with :math:`\Sigma_k = K + D_k` and
        :math:`a_k = \Sigma_k^{-1} (y_k - c_k)`.
        """
        total, by_covariance = covariance.new_zeros(()), torch.zeros_like(covariance)
        by_mean = torch.zeros_like(mean)
        for k in range(self.Y.shape[-1]):
            root = psd_safe_cholesky(covariance + self.noise_var[:, k].diag())
            residual = (self.Y[:, k] - mean[k]).unsqueeze(-1)
            solved = torch.cholesky_solve(residual, root)
            by_covariance.add_(solved @ solved.mT, alpha=0.5).sub_(torch.cholesky_inverse(root), alpha=0.5)
            by_mean[k] = solved.sum()
            total = total - 0.5 * (residual * solved).sum() - root.diagonal().log().sum()
        return total - 0.5 * self.Y.numel() * math.log(2 * math.pi), by_covariance, by_mean

    def objective(self, parameters: Parameters) -> tuple[Tensor, Parameters]:
        """Minus log p(y) and the hyperparameters' log densities, for each observation, and its gradient."""
        leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        covariance = self.prior.at(leaves, "covariance", self.X).squeeze(-3)
        try:
            with torch.no_grad():
                evidence, by_covariance, by_mean = self.log_evidence(covariance, leaves["mean"])
        except (NotPSDError, NanError):
            nothing = {name: torch.full_like(value, math.nan) for name, value in parameters.items()}
            return torch.full((), math.inf, dtype=torch.float64), nothing
        log_prior = self.prior.at(leaves, "log_prior")
        # Its value is of no use, its gradient is that of log p(y).
        linear = (by_covariance * covariance).sum() + (by_mean * leaves["mean"]).sum() + log_prior
        gradients = torch.autograd.grad(-linear / len(self.X), list(leaves.values()), allow_unused=True)
        known = (torch.zeros_like(v) if g is None else g for v, g in zip(leaves.values(), gradients, strict=True))
        return -(evidence + log_prior.detach()) / len(self.X), dict(zip(leaves, known, strict=True))


class EvidenceInfo(NamedTuple):
    """Of one step: log p(y) with the hyperparameters' log densities, for each observation."""

    log_evidence: Tensor


@dataclass(frozen=True)
class MaximumEvidence(Configured):
    """L-BFGS over hyperparameters.

    Args:
        num_steps: each with one evaluation of the marginal likelihood or a few; a descent that has converged rests.

    Raises:
        TypeError: if the number of steps isn't an integer.
        ValueError: if it isn't positive.
    """

    num_steps: int = 100

    def __post_init__(self) -> None:
        check_fields(self, count, "num_steps")

    def init(self, target: DirichletTarget, generator: torch.Generator) -> LBFGSState:
        """The defaults."""
        return lbfgs_init(target.start(), target.objective)

    def step(
        self, target: DirichletTarget, state: LBFGSState, generator: torch.Generator
    ) -> tuple[LBFGSState, EvidenceInfo]:
        """One step."""
        state = lbfgs_step(state, target.objective)
        return state, EvidenceInfo(-state.value)

    def keep(self, state: LBFGSState, index: int) -> None:
        """Nothing: the state is the answer."""

    def result(
        self, target: DirichletTarget, state: LBFGSState, draws: dict[str, Tensor], infos: dict[str, Tensor]
    ) -> Parameters:
        """The hyperparameters."""
        return state.params


class DirichletNNGP(Model):
    r"""Classification with infinitely wide networks by exact regression of transformed labels: the equations of this file.

    The K functions are independent and share their hyperparameters, apart from a constant mean of each, which maximise the
    regression's marginal likelihood times weak log-normal priors. Time is O(K n^3), memory O(K n^2); for more rows there is
    :class:`VariationalNNGP` with the same likelihood. Computed in float64 whatever the data's dtype.

    Args:
        likelihood: Categorical.
        depth: hidden layers, at least 1.
        activation: of the network.
        optimise: False keeps the hyperparameters at their defaults.
        kernel: ``kernel(num_features, batch_shape)`` returns the GPyTorch kernel that takes the place of the network's, the
            prior covariance of the functions; inputs are standardised.
        alpha_epsilon: the weight of classes that weren't observed. GPyTorch's 0.01 makes probabilities of many classes too
            cautious: on 1,397 digits after 400 (calibration error, log density): 0.10, -0.21; 0.001: 0.03, -0.13.
        method: the optimisation.
        num_draws: function values at each point that a probability averages over.

    Raises:
        TypeError: if the likelihood isn't Categorical.
        ValueError: for an unknown activation, or a depth, alpha_epsilon or number of draws that isn't positive.
        MemoryError: at fit, for more rows than fit.
    """

    def __init__(
        self,
        likelihood: Categorical,
        depth: int = 3,
        activation: str = "relu",
        optimise: bool = True,
        kernel: KernelFactory | None = None,
        alpha_epsilon: float = 0.001,
        method: MaximumEvidence | None = None,
        num_draws: int = 512,
    ) -> None:
        super().__init__(likelihood)
        if not isinstance(likelihood, Categorical):
            raise TypeError(f"likelihood must be likelihoods.Categorical, found {likelihood!r}")
        MLPKernel(depth, activation)  # raises its errors
        self.depth, self.activation, self.kernel = depth, activation, kernel
        self.optimise = flag("optimise", optimise)
        self.num_classes = likelihood.num_classes
        self.alpha_epsilon = positive("alpha_epsilon", alpha_epsilon)
        self.num_draws = count("num_draws", num_draws)
        self.method = MaximumEvidence() if method is None else method
        self._prior: SparsePrior
        self._X: Tensor
        self._roots: Tensor  # (K, n, n), of the covariances of transformed labels
        self._whitened: Tensor  # (K, n)

    def _target(self, data: Data) -> DirichletTarget:
        outcomes, noise_var = transformed_labels(data.Y.squeeze(-1), self.num_classes, self.alpha_epsilon)
        d, K = data.X.shape[-1], self.num_classes
        prior = network_prior(d, K, True, self.kernel, self.depth, self.activation)
        description = "" if self.kernel is not None else f"depth={self.depth}, activation={self.activation}"
        return DirichletTarget(data.X.double(), outcomes, noise_var, prior, description)

    def _fit(self, data: Data, outcome_scale: Tensor, **options: Any) -> None:
        options.pop("target_ess")
        matrices = max(MATRICES, self.num_classes + 2)
        check_memory("DirichletNNGP", len(data), matrices, f"VariationalNNGP({self.likelihood!r})")
        target = self._target(data)
        self._take(target, run(self.method, target, **options) if self.optimise else target.start())

    def _take(self, target: DirichletTarget, parameters: Parameters) -> None:
        with torch.no_grad():
            self._prior, self._X = target.prior.take(parameters), target.X
            covariance = self._prior.covariance(target.X).squeeze(-3)
            roots = [psd_safe_cholesky(covariance + noise.diag()) for noise in target.noise_var.mT]
            residuals = (target.Y - self._prior.mean).mT.unsqueeze(-1)
            self._roots = torch.stack(roots)
            self._whitened = torch.linalg.solve_triangular(self._roots, residuals, upper=False).squeeze(-1)

    def _moments(self, X: Tensor, joint: bool) -> tuple[Tensor, Tensor]:
        """Means (*batch, K, q), and covariances (*batch, K, q, q) or variances (*batch, K, q)."""
        half = torch.linalg.solve_triangular(self._roots, self._prior.covariance(self._X, X), upper=False)
        mean = self._prior.mean.unsqueeze(-1) + (half.mT @ self._whitened.unsqueeze(-1)).squeeze(-1)
        if joint:
            return mean, self._prior.covariance(X) - half.mT @ half
        return mean, (self._prior.variance(X) - half.square().sum(-2)).clamp_min(0)

    def _latent(self, X: Tensor) -> GaussianPosterior:
        mean, covariance = self._moments(X.double(), joint=True)
        return GaussianPosterior.from_moments(mean.mT.to(X), covariance.to(X))

    def _predictive(self, X: Tensor) -> Predictive:
        """Over function values drawn point by point, from the same normals."""
        noise, parts = even_normals(self.num_draws, self.num_classes), []
        for rows in X.double().split(ROWS, -2):
            mean, var = self._moments(rows, joint=False)
            parts.append((mean.mT.unsqueeze(-3) + var.sqrt().mT.unsqueeze(-3) * noise).to(X))
        return self.likelihood.predictive_class(self.likelihood(torch.cat(parts, -2), {}))

    def _state(self) -> dict[str, Tensor]:
        return dict(self._prior.named_parameters())

    def _set_state(self, tensors: dict[str, Tensor]) -> None:
        assert self._data is not None
        self._take(self._target(self._data), tensors)
