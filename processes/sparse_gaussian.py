r"""Gaussian process regression for many rows: inducing points, with their distribution integrated out (Titsias 2009).

With the notation of ``sparse_prior``, r = y - c and :math:`B = I + A A^\top / \sigma^2`, the evidence lower bound of one
output is largest, over all q, at

.. math::
    q(v) &= N(B^{-1} A r / \sigma^2,\; B^{-1}), \\
    \log p(y) \ge{} & -\tfrac n2 \log 2\pi\sigma^2 - \tfrac12 \log|B| - \tfrac{r^\top r}{2\sigma^2}
        + \tfrac{1}{2\sigma^4} r^\top A^\top B^{-1} A r - \tfrac{1}{2\sigma^2} \mathrm{tr}(K_{XX} - A^\top A).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bayesnn.checks import check_fields, count
from bayesnn.configured import Configured
from bayesnn.data import Data
from bayesnn.files import fingerprint
from bayesnn.inference.lbfgs import LBFGSState, Objective, lbfgs_init, lbfgs_step
from bayesnn.inference.run import run
from bayesnn.likelihoods import Gaussian
from bayesnn.processes.kernels import KernelFactory
from bayesnn.processes.sparse_posterior import InducingValues, SparseProcess
from bayesnn.processes.sparse_prior import Inducing, Parameters, SparsePrior
from bayesnn.registry import register

ROWS = 4096  # in work at once, with M numbers each for every output
KEPT = 2**25  # numbers that a gradient may find there; of larger problems it computes them again
MIN_NOISE_VAR = 1e-6  # in standardised units


class Statistics(NamedTuple):
    """Of all rows: A A^T (L, M, M), A r (L, M), r^T r (L,) and tr(K - A^T A), (L,)."""

    gram: Tensor
    projected: Tensor
    squares: Tensor
    left: Tensor


class CollapsedTarget:
    """The collapsed bound as a function of hyperparameters and inducing inputs.

    Args:
        data: standardised.
        prior: over functions.
        likelihood: Gaussian.
        fixed: its ``fixed_parameters``.
        optimise: whether hyperparameters are learned.
        description: of the kernel, to tell a checkpoint of another one.
    """

    def __init__(
        self,
        data: Data,
        prior: SparsePrior,
        likelihood: Gaussian,
        fixed: Parameters,
        optimise: bool = True,
        description: str = "",
    ) -> None:
        self.X, self.Y = data.X.double(), data.Y.double()
        self.prior, self.optimise = prior, optimise
        self.fixed = {name: value.double() for name, value in fixed.items()}
        self.noise_prior = likelihood.parameter_priors().get("log_noise_std")
        described = repr((prior.kernel, description, likelihood, optimise))
        self.fingerprint = fingerprint(described, data.X, data.Y, *prior.parameters(), *prior.buffers())

    def start(self) -> Parameters:
        """The hyperparameters' starts: the prior's, and the noise's as a share of the outcomes' spread."""
        noise = {} if self.fixed else {"log_noise_std": torch.full((1, self.Y.shape[-1]), -2.0, dtype=torch.float64)}
        return self.prior.start() | noise

    def noise_var(self, parameters: Parameters) -> Tensor:
        """Of each output, (m,)."""
        known = self.fixed or parameters
        return MIN_NOISE_VAR * (not self.fixed) + (2 * known["log_noise_std"]).exp().reshape(-1)

    def _statistics(self, parameters: Parameters, inducing: Inducing, X: Tensor, Y: Tensor) -> Statistics:
        def of_rows(X: Tensor, Y: Tensor) -> Statistics:
            base, _, left = self.prior.at(parameters, "project", inducing, X)
            m = Y.shape[-1]
            residual = Y.mT - parameters["mean"].unsqueeze(-1)
            base, left = base.expand(m, *base.shape[-2:]), left.expand(m, -1)
            projected = (base @ residual.unsqueeze(-1)).squeeze(-1)
            return Statistics(base @ base.mT, projected, residual.square().sum(-1), left.sum(-1))

        blocks = list(zip(X.split(ROWS), Y.split(ROWS), strict=True))
        # Rows that aren't in work then leave nothing behind but their sums.
        again = torch.is_grad_enabled() and Y.numel() * len(inducing.points) > KEPT
        parts = [checkpoint(of_rows, X, Y, use_reentrant=False) if again else of_rows(X, Y) for X, Y in blocks]
        return Statistics(*(torch.stack(list(values)).sum(0) for values in zip(*parts, strict=True)))

    def bound(self, parameters: Parameters, Z: Tensor, rows: Tensor | None = None) -> Tensor:
        """The evidence lower bound of each output, (m,), for some of the rows or all."""
        X, Y = (self.X, self.Y) if rows is None else (self.X[rows], self.Y[rows])
        statistics = self._statistics(parameters, self.prior.at(parameters, "inducing", Z), X, Y)
        noise_var, n = self.noise_var(parameters), len(X)
        root = _precision_root(statistics, noise_var)
        half = torch.linalg.solve_triangular(root, statistics.projected.unsqueeze(-1), upper=False).squeeze(-1)
        log_det = n * noise_var.log() + 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        fit = (statistics.squares + statistics.left) / noise_var - half.square().sum(-1) / noise_var.square()
        return -0.5 * (n * math.log(2 * math.pi) + log_det + fit)

    def objective(self, Z: Tensor, rows: Tensor | None = None) -> Objective:
        """Minus the bound with the hyperparameters' log densities, for each observation, and its gradient."""
        size = len(self.X) if rows is None else len(rows)

        def value_and_gradient(parameters: Parameters) -> tuple[Tensor, Parameters]:
            leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
            try:
                log_density = self.bound(leaves, Z, rows).sum() + self.prior.at(leaves, "log_prior")
                if self.noise_prior is not None:
                    loc, scale, _ = self.noise_prior
                    log_density = log_density - 0.5 * ((leaves["log_noise_std"] - loc) / scale).square().sum()
                value = -log_density / size
                gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
            except RuntimeError:  # not positive definite, or not a number: torch's and linear_operator's errors
                nothing = {name: torch.full_like(value, math.nan) for name, value in parameters.items()}
                return torch.full((), math.inf, dtype=torch.float64), nothing
            known = (torch.zeros_like(v) if g is None else g for v, g in zip(leaves.values(), gradients, strict=True))
            return value.detach(), dict(zip(leaves, known, strict=True))

        return value_and_gradient

    def optimum(self, parameters: Parameters, Z: Tensor) -> InducingValues:
        """The best q."""
        with torch.no_grad():
            noise_var = self.noise_var(parameters)
            statistics = self._statistics(parameters, self.prior.at(parameters, "inducing", Z), self.X, self.Y)
            root = _precision_root(statistics, noise_var)
            mean = torch.cholesky_solve((statistics.projected / noise_var.unsqueeze(-1)).unsqueeze(-1), root)
            eye = torch.eye(root.shape[-1], dtype=root.dtype)
            inverse = torch.linalg.solve_triangular(root, eye.expand_as(root), upper=False)
        return InducingValues(Z, mean.squeeze(-1), inverse.mT.contiguous())


def _precision_root(statistics: Statistics, noise_var: Tensor) -> Tensor:
    """The lower factor of B."""
    gram = statistics.gram / noise_var[:, None, None]
    return torch.linalg.cholesky(gram + torch.eye(gram.shape[-1], dtype=gram.dtype))


class CollapsedState(NamedTuple):
    """Rows in use and inducing inputs, the descent over hyperparameters, and how often these inputs have been chosen."""

    rows: Tensor
    inducing: Tensor
    descent: LBFGSState
    selections: Tensor


class CollapsedInfo(NamedTuple):
    """Of one step: the bound with the hyperparameters' log densities, for each observation."""

    bound: Tensor


class CollapsedFit(NamedTuple):
    """Hyperparameters, and q."""

    parameters: Parameters
    values: InducingValues


@dataclass(frozen=True)
class CollapsedBound(Configured):
    """Maximise the collapsed bound over hyperparameters by L-BFGS, inducing inputs being rows of the data.

    These are chosen by pivoted Cholesky, which depends on the hyperparameters: when the bound doesn't rise any more, they are
    chosen again, and kept if they are better (Burt, Rasmussen & van der Wilk 2020). The first descent takes some of the rows,
    at random; all that follow, and q, take all.

    Args:
        num_inducing: M, at most the number of rows; fewer where those explain all variance.
        num_steps: of L-BFGS, each with one evaluation of the bound or a few; a descent that has converged rests.
        num_selections: how often inducing inputs are chosen for all rows.
        num_first_rows: how many rows the first descent takes.

    Raises:
        TypeError: if one isn't an integer.
        ValueError: if one isn't positive.
    """

    num_inducing: int = 512
    num_steps: int = 200
    num_selections: int = 2
    num_first_rows: int = 8192

    def __post_init__(self) -> None:
        check_fields(self, count, "num_inducing", "num_steps", "num_selections", "num_first_rows")

    def init(self, target: CollapsedTarget, generator: torch.Generator) -> CollapsedState:
        """Inducing inputs for the hyperparameters' starts."""
        n = len(target.X)
        some = n > self.num_first_rows and target.optimise
        rows = torch.randperm(n, generator=generator)[: self.num_first_rows] if some else torch.arange(n)
        parameters = target.start()
        Z = self._landmarks(target, parameters, rows)
        descent = lbfgs_init(parameters, target.objective(Z, rows))
        return CollapsedState(rows, Z, descent, torch.tensor(0 if some else 1))

    def step(
        self, target: CollapsedTarget, state: CollapsedState, generator: torch.Generator
    ) -> tuple[CollapsedState, CollapsedInfo]:
        """One step of L-BFGS, or another choice of inducing inputs."""
        if target.optimise:
            if not bool(state.descent.converged):
                objective = target.objective(state.inducing, state.rows)
                state = state._replace(descent=lbfgs_step(state.descent, objective))
            elif int(state.selections) < self.num_selections:
                state = self._chosen_again(target, state)
        return state, CollapsedInfo(-state.descent.value)

    def _landmarks(self, target: CollapsedTarget, parameters: Parameters, rows: Tensor) -> Tensor:
        return target.prior.at(parameters, "landmarks", target.X[rows], min(self.num_inducing, len(rows)))

    def _chosen_again(self, target: CollapsedTarget, state: CollapsedState) -> CollapsedState:
        parameters, rows = state.descent.params, torch.arange(len(target.X))
        Z = self._landmarks(target, parameters, rows)
        objective = target.objective(Z, rows)
        comparable = len(rows) == len(state.rows)
        if comparable and not bool(objective(parameters)[0] < state.descent.value):
            return state._replace(selections=torch.full_like(state.selections, self.num_selections))
        return CollapsedState(rows, Z, lbfgs_init(parameters, objective), state.selections + 1)

    def keep(self, state: CollapsedState, index: int) -> None:
        """Nothing: the state is the answer."""

    def result(
        self, target: CollapsedTarget, state: CollapsedState, draws: dict[str, Tensor], infos: dict[str, Tensor]
    ) -> CollapsedFit:
        """The hyperparameters, and the best q for them."""
        parameters = state.descent.params
        return CollapsedFit(parameters, target.optimum(parameters, state.inducing))


class SparseNNGP(SparseProcess):
    r"""Regression with infinitely wide networks for up to some 100,000 rows: inducing points, the equations of this file.

    The approximation is the best with these inducing points in the sense of KL(q || p), and with as many of them as rows the
    exact posterior of :class:`NNGP`'s kind. Hyperparameters (kernel's, a constant mean, noise) maximise the bound times weak
    log-normal priors; few inducing points bias the noise upwards. Outputs are independent, with hyperparameters of their own,
    and share the inducing points.

    Further observations are taken in by exact conditioning of the approximate posterior. Time is O(n M^2), memory
    O(n + M^2). Computed in float64 whatever the data's dtype.

    Args:
        depth: hidden layers, at least 1.
        activation: of the network.
        likelihood: Gaussian with learned (default) or fixed noise.
        optimise: False keeps the hyperparameters at their defaults.
        kernel: ``kernel(num_features, batch_shape)`` returns the GPyTorch kernel that takes the place of the network's, the
            prior covariance of standardised outcomes; inputs are standardised.
        method: the optimisation, with the number of inducing points.

    Raises:
        ValueError: for an unknown activation or a depth below 1.
        TypeError: if the likelihood isn't Gaussian.
    """

    def __init__(
        self,
        depth: int = 3,
        activation: str = "relu",
        likelihood: Gaussian | None = None,
        optimise: bool = True,
        kernel: KernelFactory | None = None,
        method: CollapsedBound | None = None,
    ) -> None:
        super().__init__(likelihood, depth, activation, kernel, optimise)
        if not isinstance(self.likelihood, Gaussian):
            raise TypeError(
                f"likelihood must be likelihoods.Gaussian for the collapsed bound, found {self.likelihood!r}; for others "
                "there is VariationalNNGP"
            )
        self.method = CollapsedBound() if method is None else method

    def _fit(self, data: Data, outcome_scale: Tensor, **options: Any) -> None:
        options.pop("target_ess")
        prior, fixed = self._prior_of(data), self.likelihood.fixed_parameters(outcome_scale)
        assert isinstance(self.likelihood, Gaussian)
        target = CollapsedTarget(data, prior, self.likelihood, fixed, self.optimise, self._description)
        fit = run(self.method, target, **options)
        noise = 0.5 * target.noise_var(fit.parameters).log().unsqueeze(0)
        self._take(prior, fit.parameters, fit.values, {"log_noise_std": noise})


register("sparse-nngp", SparseNNGP)
