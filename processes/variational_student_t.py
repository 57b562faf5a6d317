r"""Sparse variational inference in a Student-t process whose outputs share one scale (Lee, Yun, Yang and Lee 2022, SVTP).

C latent functions :math:`f_c \mid s \sim GP(0, s K)` with one :math:`s \sim IG(\alpha, \beta)` for all of them, the variance
of the last layer's weights, and any likelihood :math:`p(y \mid f_1, \ldots, f_C)`. With M inducing values
:math:`u_c = f_c(Z)`,

.. math:: q(u, s) = IG(s; a, b) \prod_c N(u_c; m_c, s S_c),

.. math::
    KL(q \| p) = \tfrac12 \sum_c \Big[\ln|K_{ZZ}| - \ln|S_c| - M + \mathrm{tr}(K_{ZZ}^{-1} S_c)
        + \tfrac ab m_c^\top K_{ZZ}^{-1} m_c\Big] + KL(IG(a, b) \| IG(\alpha, \beta)).

The scale counts once in the divergence, and a draw of it serves all C functions: they are large together. The inducing
values are whitened, :math:`u_c = L v_c` with :math:`L L^\top = K_{ZZ}`, which leaves the divergence as it is and makes
:math:`K_{ZZ}` the identity in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from gpytorch.kernels import Kernel
from gpytorch.priors import LogNormalPrior
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Tensor, nn
from torch.func import functional_call

from bayesnn.checks import check_fields, count, positive
from bayesnn.configured import Configured
from bayesnn.data import Data, minibatch
from bayesnn.files import fingerprint
from bayesnn.inference.optimizer import AdamState, adam_init, adam_step, warmup_cosine
from bayesnn.inference.run import run
from bayesnn.likelihoods import Likelihood
from bayesnn.model import Model
from bayesnn.posteriors import StudentT
from bayesnn.predictive import Predictive
from bayesnn.processes.evidence import log_prior
from bayesnn.processes.kernels import KernelFactory, MLPKernel
from bayesnn.processes.kernels.factories import checked_factory, made
from bayesnn.processes.scale_mixtures import InverseGamma
from bayesnn.processes.sparse_posterior import even_normals

RATIO_PRIOR = LogNormalPrior(0.0, 1.0)  # of beta / alpha, weak, ours
JITTER = 1e-6  # of the inducing covariance, as a share of its mean diagonal


def inverse_gamma_divergence(shape: Tensor, scale: Tensor, prior_shape: Tensor, prior_scale: Tensor) -> Tensor:
    r"""KL(IG(a, b) || IG(α, β)).

    .. math:: \alpha \ln\frac b\beta - \ln\Gamma(a) + \ln\Gamma(\alpha) + (a - \alpha) \psi(a) + (\beta - b) \frac ab
    """
    gammas = torch.lgamma(prior_shape) - torch.lgamma(shape) + (shape - prior_shape) * torch.digamma(shape)
    return prior_shape * (scale / prior_scale).log() + gammas + (prior_scale - scale) * shape / scale


def divergence(
    mean: Tensor, root: Tensor, shape: Tensor, scale: Tensor, prior_shape: Tensor, prior_scale: Tensor
) -> Tensor:
    """KL(q || p) of whitened inducing values and their shared scale: the equation above with the identity for K.

    Args:
        mean: m_c, (C, M).
        root: lower-triangular factors of S_c with a positive diagonal, (C, M, M).
        shape, scale: a and b.
        prior_shape, prior_scale: α and β.
    """
    log_det = 2 * root.diagonal(dim1=-2, dim2=-1).log().sum()
    gaussian = root.square().sum() - log_det - mean.numel() + shape / scale * mean.square().sum()
    return 0.5 * gaussian + inverse_gamma_divergence(shape, scale, prior_shape, prior_scale)


class SparseTarget:
    """What the variational method works on.

    Args:
        data: inputs and targets.
        kernel: of the latent functions, with its parameters where they start.
        likelihood: p(y | f).
        prior_shape: α.
        description: of the kernel, to tell a checkpoint of another one.
    """

    def __init__(
        self, data: Data, kernel: Kernel, likelihood: Likelihood, prior_shape: float, description: str = ""
    ) -> None:
        self.data = data
        self.likelihood = likelihood
        self.num_latents = likelihood.latent_size(data.Y.shape[-1])
        self.prior_shape = prior_shape
        self.covariances = _Covariances(kernel).double()
        described = repr((kernel, description, likelihood, prior_shape))
        self.fingerprint = fingerprint(described, data.X, data.Y, *kernel.parameters(), *kernel.buffers())


class SparseState(NamedTuple):
    """Inducing inputs, q, and the hyperparameters, all unconstrained and by name; and Adam's moments."""

    variational: dict[str, Tensor]
    adam: AdamState


class SparseInfo(NamedTuple):
    """Of one step: the estimate of the evidence lower bound."""

    elbo: Tensor


class SparseFit(NamedTuple):
    """The fitted parameters, and the trace of the evidence lower bound."""

    variational: dict[str, Tensor]
    elbo: Tensor


@dataclass(frozen=True)
class SparseStudentT(Configured):
    """Stochastic variational inference with inducing points and a shared inverse-gamma scale.

    The bound :math:`(N/|B|) \\sum_{i \\in B} E_q \\log p(y_i | f(x_i)) - KL` is maximised over q, the inducing inputs and the
    hyperparameters (with their priors) by Adam. Expectations are Monte Carlo, with gradients through the draws: for each
    row and draw one scale for all functions.

    Args:
        num_inducing: M, at most the number of rows; they start at rows drawn at random.
        num_steps: Adam steps, with a short warm-up and a cosine decay of the learning rate.
        learning_rate: Adam's at its peak; the paper's.
        batch_size: rows for each step, without replacement; None: all.
        num_samples: draws for each row and step.

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

    def init(self, target: SparseTarget, generator: torch.Generator) -> SparseState:
        """q at the prior, with inducing points at some of the rows."""
        X = target.data.X.double()
        M = min(self.num_inducing, len(X))
        zeros, C = X.new_zeros, target.num_latents
        variational = {
            "inducing": X[torch.randperm(len(X), generator=generator)[:M]],
            "mean": zeros(C, M),
            "root": zeros(C, M, M),
            "log_shape": zeros(()) + math.log(target.prior_shape),
            "log_ratio": zeros(()),
            "log_prior_ratio": zeros(()),
        }
        learned = {name: value for name, value in target.covariances.named_parameters() if value.requires_grad}
        variational |= {name: value.detach().clone() for name, value in learned.items()}
        return SparseState(variational, adam_init(variational))

    def step(
        self, target: SparseTarget, state: SparseState, generator: torch.Generator
    ) -> tuple[SparseState, SparseInfo]:
        """One step of Adam on minus the bound for each observation."""
        batch = minibatch(target.data, self.batch_size, generator)
        leaves = {name: value.detach().requires_grad_() for name, value in state.variational.items()}
        q = _unpack(leaves, target.prior_shape)
        base, _, left, log_density = target.covariances.project(leaves, batch.X.double())
        mean = base.mT @ q.mean.mT
        var = (left.unsqueeze(-1) + (q.root.mT @ base).square().sum(-2).mT).clamp_min(1e-12)
        gamma = torch._standard_gamma(q.shape.expand(self.num_samples, len(batch)), generator=generator)
        noise = torch.randn(self.num_samples, *mean.shape, generator=generator, dtype=mean.dtype)
        f = mean + (q.scale / gamma.unsqueeze(-1) * var).sqrt() * noise
        fit = target.likelihood.log_prob(f, batch.Y, {}).mean(0).sum() * len(target.data) / len(batch)
        elbo = fit - divergence(q.mean, q.root, q.shape, q.scale, q.prior_shape, q.prior_scale)
        objective = elbo + log_density + RATIO_PRIOR.log_prob(q.prior_scale / q.prior_shape)
        loss = -objective / len(target.data)
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        rate = self.learning_rate * warmup_cosine(int(state.adam.step), self.num_steps, min(100, self.num_steps // 10))
        variational, adam = adam_step(state.variational, dict(zip(leaves, gradients, strict=True)), state.adam, rate)
        return SparseState(variational, adam), SparseInfo(elbo.detach())

    def keep(self, state: SparseState, index: int) -> None:
        """Nothing: q is the answer."""

    def result(
        self, target: SparseTarget, state: SparseState, draws: dict[str, Tensor], infos: dict[str, Tensor]
    ) -> SparseFit:
        """The fitted q and hyperparameters."""
        return SparseFit(state.variational, infos["elbo"])


class VariationalStudentTProcess(Model):
    r"""Classification, or any likelihood without free parameters, with a scale mixture of infinitely wide networks.

    The equations are at the top of this file. One scale serves all functions and all points, in the posterior's draws as in
    predictions. The latent functions' posterior is a multivariate t with 2a degrees of freedom,

    .. math:: f_c(X) \sim MVT_{2a}\!\left(A m_c, \tfrac ba (A S_c A^\top + K_{XX} - A K_{ZX})\right), \quad
              A = K_{XZ} K_{ZZ}^{-1};

    its variance doesn't exist where a is 1 or less.

    Args:
        likelihood: p(y | f): Categorical, Bernoulli, Poisson …, without free parameters.
        depth: hidden layers, at least 1.
        activation: of the network.
        method: the optimisation.
        kernel: ``kernel(num_features, batch_shape)`` returns the GPyTorch kernel that takes the place of the network's.
        shape: :math:`\alpha` of the prior; 2, the paper's. :math:`\beta/\alpha` is learned.
        num_draws: functions that a prediction averages over.

    Raises:
        TypeError: for a likelihood with free parameters.
        ValueError: for an unknown activation, or a depth, shape or number of draws that isn't positive.
    """

    def __init__(
        self,
        likelihood: Likelihood,
        depth: int = 3,
        activation: str = "relu",
        method: SparseStudentT | None = None,
        kernel: KernelFactory | None = None,
        shape: float = 2.0,
        num_draws: int = 512,
    ) -> None:
        super().__init__(likelihood)
        if likelihood.parameter_priors() or likelihood.standardises:
            raise TypeError(
                f"likelihood must be of labels or counts and without free parameters, found {likelihood!r}; "
                "for real outcomes there is StudentTProcess"
            )
        MLPKernel(depth, activation)  # raises the other errors
        if kernel is not None:
            checked_factory(kernel)
        self.depth, self.activation, self.kernel = depth, activation, kernel
        self.shape, self.num_draws = positive("shape", shape), count("num_draws", num_draws)
        self.method = SparseStudentT() if method is None else method
        self._variational: dict[str, Tensor]
        self._covariances: _Covariances

    def _kernel(self, num_features: int) -> Kernel:
        return made(self.kernel or MLPKernel(self.depth, self.activation), num_features, torch.Size([]))

    def _fit(self, data: Data, outcome_scale: Tensor, **options: Any) -> None:
        options.pop("target_ess")
        described = "" if self.kernel is not None else f"depth={self.depth}, activation={self.activation}"
        target = SparseTarget(data, self._kernel(data.X.shape[-1]), self.likelihood, self.shape, described)
        self._take(target.covariances, run(self.method, target, **options).variational)

    def _take(self, covariances: _Covariances, variational: dict[str, Tensor]) -> None:
        # With what the kernel has frozen.
        variational = {name: value.detach() for name, value in covariances.named_parameters()} | variational
        self._covariances, self._variational = covariances.eval().requires_grad_(False), variational

    def _latent(self, X: Tensor) -> StudentT:
        q = _unpack(self._variational, self.shape)
        base, own, _, _ = self._covariances.project(self._variational, X.double(), joint=True)
        spread = q.root.mT @ base.unsqueeze(-3)
        covariance = (own - base.mT @ base).unsqueeze(-3) + spread.mT @ spread
        loc = base.mT @ q.mean.mT
        return StudentT(loc.to(X), (q.scale / q.shape * covariance).to(X), float(2 * q.shape), shared=True)

    def _predictive(self, X: Tensor) -> Predictive:
        """Over function values drawn point by point, from the same normals and scales."""
        q = _unpack(self._variational, self.shape)
        base, _, left, _ = self._covariances.project(self._variational, X.double())
        mean = base.mT @ q.mean.mT
        var = left.clamp_min(0).unsqueeze(-1) + (q.root.mT @ base.unsqueeze(-3)).square().sum(-2).mT
        normals = even_normals(self.num_draws, 1 + mean.shape[-1])
        levels = torch.special.ndtr(normals[..., :1]).clamp(1e-15, 1 - 1e-15)
        std = InverseGamma(float(q.shape), float(q.scale)).icdf(levels).sqrt()
        f = mean.unsqueeze(-3) + std * var.sqrt().unsqueeze(-3) * normals[..., 1:]
        return self.likelihood.predictive_class(self.likelihood(f.to(X), {}))

    def _state(self) -> dict[str, Tensor]:
        return dict(self._variational)

    def _set_state(self, tensors: dict[str, Tensor]) -> None:
        assert self._data is not None
        self._take(_Covariances(self._kernel(self._data.X.shape[-1])).double(), tensors)


class _Unpacked(NamedTuple):
    mean: Tensor
    root: Tensor
    shape: Tensor
    scale: Tensor
    prior_shape: Tensor
    prior_scale: Tensor


def _unpack(variational: dict[str, Tensor], prior_shape: float) -> _Unpacked:
    raw, shape = variational["root"], variational["log_shape"].exp()
    root = raw.tril(-1) + torch.diag_embed(raw.diagonal(dim1=-2, dim2=-1).exp())
    alpha = torch.full_like(shape, prior_shape)
    scale, beta = variational["log_ratio"].exp() * shape, variational["log_prior_ratio"].exp() * alpha
    return _Unpacked(variational["mean"], root, shape, scale, alpha, beta)


class _Covariances(nn.Module):
    """A kernel at the inducing points and at others, as a function of its parameters."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, Z: Tensor, X: Tensor, joint: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        own = self.kernel(X).to_dense() if joint else self.kernel(X, diag=True)
        cross = self.kernel(Z.expand(*X.shape[:-2], *Z.shape), X).to_dense()
        return self.kernel(Z).to_dense(), cross, own, log_prior(self.kernel, 1).sum()

    def project(
        self, parameters: dict[str, Tensor], X: Tensor, joint: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """L^-1 K_ZX, K_XX (its diagonal unless ``joint``), diag(K_XX - K_XZ K_ZZ^-1 K_ZX), and log p(hyperparameters)."""
        own_names = dict(self.named_parameters())
        own_parameters = {name: value for name, value in parameters.items() if name in own_names}
        within, cross, own, log_density = functional_call(self, own_parameters, (parameters["inducing"], X, joint))
        jitter = JITTER * within.diagonal().mean().detach()
        root = psd_safe_cholesky(within + jitter * torch.eye(len(within), dtype=within.dtype))
        base = torch.linalg.solve_triangular(root, cross, upper=False)
        variance = own.diagonal(dim1=-2, dim2=-1) if joint else own
        return base, own, variance - base.square().sum(-2), log_density
