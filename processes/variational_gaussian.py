r"""Gaussian processes with any likelihood and any number of rows: inducing points and minibatches (Hensman et al. 2013, 2015).

With the notation of ``sparse_prior``, Adam maximises

.. math:: \frac{N}{|B|} \sum_{i \in B} E_{q(f(x_i))} \log p(y_i \mid f(x_i)) - \sum_l KL(N(m_l, S_l) \| N(0, I))

over q, the inducing inputs, hyperparameters and the likelihood's free parameters, with the log densities of their priors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayesnn.checks import check_fields, count, positive
from bayesnn.configured import Configured
from bayesnn.data import Data, minibatch
from bayesnn.files import fingerprint
from bayesnn.inference.optimizer import AdamState, adam_init, adam_step, warmup_cosine
from bayesnn.inference.run import run
from bayesnn.likelihoods import Likelihood
from bayesnn.processes.kernels import KernelFactory
from bayesnn.processes.sparse_posterior import InducingValues, SparseProcess
from bayesnn.processes.sparse_prior import Parameters, SparsePrior

NODES = 20  # of the Gauss-Hermite quadrature, exact for log densities that are polynomials of degree 39
_OWN = "likelihood."


class VariationalTarget:
    """What the variational method works on.

    Args:
        data: inputs and targets.
        prior: over functions.
        likelihood: p(y | f).
        fixed: its ``fixed_parameters``.
        optimise: whether hyperparameters and inducing inputs are learned.
        description: of the kernel, to tell a checkpoint of another one.
    """

    def __init__(
        self,
        data: Data,
        prior: SparsePrior,
        likelihood: Likelihood,
        fixed: Parameters,
        optimise: bool = True,
        description: str = "",
    ) -> None:
        self.data, self.prior, self.likelihood, self.optimise = data, prior, likelihood, optimise
        self.fixed = {name: value.double() for name, value in fixed.items()}
        described = repr((prior.kernel, description, likelihood, optimise))
        self.fingerprint = fingerprint(described, data.X, data.Y, *prior.parameters(), *prior.buffers())

    @property
    def factorises(self) -> bool:
        """Whether each output depends on one function value, of its own."""
        m = self.data.Y.shape[-1]
        return self.likelihood.latent_size(m) == m

    def start(self) -> Parameters:
        """Hyperparameters and the likelihood's free parameters."""
        m = self.data.Y.shape[-1]
        own = {
            _OWN + name: torch.full((1, m), prior.initial, dtype=torch.float64)
            for name, prior in self.likelihood.parameter_priors().items()
        }
        return self.prior.start() | own

    def likelihood_parameters(self, parameters: Parameters) -> Parameters:
        """Fixed and free ones."""
        own = {name.removeprefix(_OWN): v for name, v in parameters.items() if name.startswith(_OWN)}
        return self.fixed | own

    def log_prior(self, parameters: Parameters) -> Tensor:
        """Of hyperparameters and the likelihood's free parameters."""
        total = self.prior.at(parameters, "log_prior")
        for name, (loc, scale, _) in self.likelihood.parameter_priors().items():
            total = total - 0.5 * ((parameters[_OWN + name] - loc) / scale).square().sum()
        return total


class VariationalState(NamedTuple):
    """Inducing inputs, q, hyperparameters and the likelihood's parameters, unconstrained, by name; and Adam's moments."""

    variational: Parameters
    adam: AdamState


class VariationalInfo(NamedTuple):
    """Of one step: the estimate of the evidence lower bound."""

    elbo: Tensor


class VariationalFit(NamedTuple):
    """The fitted parameters, and the trace of the evidence lower bound."""

    variational: Parameters
    elbo: Tensor


@dataclass(frozen=True)
class SparseVariational(Configured):
    """Stochastic variational inference with inducing points.

    Expectations of likelihoods with one function value for each output are computed by quadrature, those of others by Monte
    Carlo, with gradients through the draws.

    Args:
        num_inducing: M, at most the number of rows; they start at rows chosen by pivoted Cholesky.
        num_steps: Adam steps, with a short warm-up and a cosine decay of the learning rate.
        learning_rate: Adam's at its peak.
        batch_size: rows for each step, without replacement; None: all.
        num_samples: draws for each row and step, where there are any.

    Raises:
        TypeError: if a count isn't an integer, or the rate isn't a number.
        ValueError: if one isn't positive.
    """

    num_inducing: int = 128
    num_steps: int = 2000
    learning_rate: float = 0.01
    batch_size: int | None = 256
    num_samples: int = 8

    def __post_init__(self) -> None:
        check_fields(self, count, "num_inducing", "num_steps", "num_samples")
        check_fields(self, positive, "learning_rate")
        if self.batch_size is not None:
            check_fields(self, count, "batch_size")

    def init(self, target: VariationalTarget, generator: torch.Generator) -> VariationalState:
        """q at the prior."""
        X = target.data.X.double()
        Z = target.prior.landmarks(X, min(self.num_inducing, len(X)))
        L, M = len(target.prior.mean), len(Z)
        variational = {"inducing": Z, "q_mean": Z.new_zeros(L, M), "q_root": Z.new_zeros(L, M, M)}
        variational |= target.start()
        return VariationalState(variational, adam_init(variational))

    def step(
        self, target: VariationalTarget, state: VariationalState, generator: torch.Generator
    ) -> tuple[VariationalState, VariationalInfo]:
        """One step of Adam on minus the bound for each observation."""
        leaves = {name: value.detach().requires_grad_() for name, value in state.variational.items()}
        elbo = self.elbo(target, leaves, minibatch(target.data, self.batch_size, generator), generator)
        loss = -(elbo + target.log_prior(leaves)) / len(target.data)
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        learned = {
            name: torch.zeros_like(leaf) if gradient is None or not self._learns(target, name) else gradient
            for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
        }
        rate = self.learning_rate * warmup_cosine(int(state.adam.step), self.num_steps, min(100, self.num_steps // 10))
        variational, adam = adam_step(state.variational, learned, state.adam, rate)
        return VariationalState(variational, adam), VariationalInfo(elbo.detach())

    @staticmethod
    def _learns(target: VariationalTarget, name: str) -> bool:
        return target.optimise or name in ("q_mean", "q_root")

    def elbo(
        self, target: VariationalTarget, parameters: Parameters, batch: Data, generator: torch.Generator
    ) -> Tensor:
        """An estimate of the evidence lower bound; exact up to quadrature for all rows and one function for each output."""
        inducing = target.prior.at(parameters, "inducing", parameters["inducing"])
        base, _, left = target.prior.at(parameters, "project", inducing, batch.X.double())
        q_mean, root = parameters["q_mean"], unpacked_root(parameters["q_root"])
        mean = (parameters["mean"].unsqueeze(-1) + (base.mT @ q_mean.unsqueeze(-1)).squeeze(-1)).mT
        std = (left + (root.mT @ base).square().sum(-2)).clamp_min(1e-12).sqrt().mT
        if target.factorises:
            # The same nodes for all outputs: the log density is a sum over them.
            nodes, weights = (torch.as_tensor(v) for v in np.polynomial.hermite_e.hermegauss(NODES))
            noise, weights = nodes[:, None, None], weights / math.sqrt(2 * math.pi)
        else:
            noise = torch.randn(self.num_samples, *mean.shape, generator=generator, dtype=mean.dtype)
            weights = torch.full((self.num_samples,), 1 / self.num_samples, dtype=mean.dtype)
        Y = batch.Y.double() if batch.Y.is_floating_point() else batch.Y
        log_prob = target.likelihood.log_prob(mean + std * noise, Y, target.likelihood_parameters(parameters))
        fit = (weights @ log_prob).sum() * len(target.data) / len(batch)
        log_det = 2 * parameters["q_root"].diagonal(dim1=-2, dim2=-1).sum()
        return fit - 0.5 * (root.square().sum() + q_mean.square().sum() - q_mean.numel() - log_det)

    def keep(self, state: VariationalState, index: int) -> None:
        """Nothing: q is the answer."""

    def result(
        self,
        target: VariationalTarget,
        state: VariationalState,
        draws: dict[str, Tensor],
        infos: dict[str, Tensor],
    ) -> VariationalFit:
        """The fitted q and hyperparameters."""
        return VariationalFit(state.variational, infos["elbo"])


def unpacked_root(raw: Tensor) -> Tensor:
    """The lower-triangular factor of S: the diagonal is kept as its logarithm."""
    return raw.tril(-1) + torch.diag_embed(raw.diagonal(dim1=-2, dim2=-1).exp())


class VariationalNNGP(SparseProcess):
    r"""Infinitely wide networks with any likelihood, and any number of rows: the equations of this file.

    With ``likelihoods.Categorical`` this is softmax classification, with K independent functions. These share their
    hyperparameters, as do a histogram's buckets; other functions have hyperparameters of their own. For regression with
    Gaussian noise :class:`SparseNNGP` finds the optimum sooner.

    Args:
        likelihood: p(y | f); Gaussian with learned noise by default.
        depth: hidden layers, at least 1.
        activation: of the network.
        optimise: False keeps hyperparameters, inducing inputs and the likelihood's parameters at their defaults.
        kernel: ``kernel(num_features, batch_shape)`` returns the GPyTorch kernel that takes the place of the network's, the
            prior covariance of the functions; inputs are standardised.
        method: the optimisation, with the number of inducing points.
        num_draws: functions that a prediction averages over, where the likelihood isn't Gaussian.

    Raises:
        TypeError: if the number of draws isn't an integer.
        ValueError: for an unknown activation, or a depth or number of draws that isn't positive.
    """

    def __init__(
        self,
        likelihood: Likelihood | None = None,
        depth: int = 3,
        activation: str = "relu",
        optimise: bool = True,
        kernel: KernelFactory | None = None,
        method: SparseVariational | None = None,
        num_draws: int = 512,
    ) -> None:
        super().__init__(likelihood, depth, activation, kernel, optimise)
        self.num_draws = count("num_draws", num_draws)
        self.method = SparseVariational() if method is None else method

    def _fit(self, data: Data, outcome_scale: Tensor, **options: Any) -> None:
        options.pop("target_ess")
        prior, fixed = self._prior_of(data), self.likelihood.fixed_parameters(outcome_scale)
        target = VariationalTarget(data, prior, self.likelihood, fixed, self.optimise, self._description)
        fitted = run(self.method, target, **options).variational
        values = InducingValues(fitted["inducing"], fitted["q_mean"], unpacked_root(fitted["q_root"]))
        self._take(prior, fitted, values, target.likelihood_parameters(fitted))
