"""Infinitely wide networks trained by gradient flow: what an ensemble of them, each from its own start, predicts."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, Self

import torch
from linear_operator.operators import DiagLinearOperator
from torch import Tensor

from bayesnn.data import Data, as_float, check_inputs
from bayesnn.likelihoods import Gaussian
from bayesnn.model import Model
from bayesnn.posteriors import Gaussian as GaussianPosterior
from bayesnn.predictive import Predictive
from bayesnn.processes.architectures import Layer
from bayesnn.processes.kernels import NTKKernel
from bayesnn.processes.memory import check_memory
from bayesnn.registry import register

# What is tried: the first and last power of ten, and how many. Noise variances are over the prior variance of outputs, ridges
# over the size of Theta.
_RATIOS = (-8.0, 1.0, 37)
_RIDGES = (-8.0, 1.0, 19)
_MAX_FOLDS = 10
ROWS = 1024  # that are predicted at once: a prediction needs no covariances between rows
MATRICES = 8  # of n x n that a fit holds at its peak, measured, beside one for each output


class NetworkKernel(Protocol):
    """A network's covariance at initialisation and its tangent kernel, in the infinite-width limit."""

    def nngp_and_ntk(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        """K and Theta between x1 (*batch, n, d) and x2 (*batch, m, d), (*batch, n, m) each."""
        ...


class TrainedLaw(NamedTuple):
    """The law of the trained networks' function values: a Gaussian, with the same covariance for every output."""

    mean: Tensor
    covariance: Tensor


def gradient_flow(
    kernel: NetworkKernel,
    X: Tensor,
    Y: Tensor,
    X_new: Tensor,
    time: float = math.inf,
    ridge: float = 0.0,
    readout_only: bool = False,
) -> TrainedLaw:
    r"""The law of f_t(x) over random initialisations, for infinitely wide networks trained by gradient flow.

    Training minimises :math:`\frac12 \sum_i (f(x_i) - y_i)^2 + \frac\lambda2 \|\theta - \theta_0\|^2` from
    :math:`f_0 \sim GP(0, K)`; the tangent kernel :math:`\Theta` stays as it was at the start (Jacot et al. 2018). Then

    .. math::
        f_t(x) &= f_0(x) + W_t(x) (y - f_0(X)), \qquad
        W_t(x) = \Theta(x, X) (\Theta + \lambda)^{-1} \left(I - e^{-(\Theta + \lambda) t}\right), \\
        E f_t(x) &= W_t(x) y, \\
        \mathrm{Cov}(f_t(x), f_t(x')) &= K(x, x') + W_t(x) K W_t(x')^T - W_t(x) K(X, x') - K(x, X) W_t(x')^T,

    which for :math:`\lambda = 0` is Lee et al. 2019, eq. 14-16. **Not a Bayesian posterior**: the spread is that of the starts
    which training leaves, and for :math:`\lambda = 0` and :math:`t = \infty` vanishes at the data. With ``readout_only`` the
    last layer alone is trained: :math:`\Theta = K`, and at :math:`t = \infty` with no ridge the law is the posterior of the
    Gaussian process with covariance K and no noise (Lee et al. 2019, sec. 2.3).

    Directions whose eigenvalue is zero up to rounding (below 3e-8 of Theta's diagonal in float64) aren't learned, so that
    repeated inputs do no harm.

    Args:
        kernel: K and Theta.
        X: (n, d).
        Y: (n, m).
        X_new: (*batch, q, d).
        time: of training, times the learning rate; infinity is the end of training.
        ridge: lambda, on the scale of Theta.
        readout_only: only the last layer is trained.

    Returns:
        mean (*batch, q, m) and covariance (*batch, q, q).

    Raises:
        ValueError: for a negative time or ridge, shapes that don't fit, or numbers that aren't finite.
        TypeError: for inputs or targets that aren't numbers.
    """
    _check_settings(time, ridge)
    X = check_inputs(X)
    X_new, Y = check_inputs(X_new, "X_new", X.shape[-1], batched=True), as_float(Y, "Y")
    if Y.dim() != 2 or len(Y) != len(X):
        raise ValueError(f"Y must have shape ({len(X)}, m), found {tuple(Y.shape)}; one output is Y[:, None]")
    K, theta = kernel.nngp_and_ntk(X, X)
    prior, _ = kernel.nngp_and_ntk(X_new, X_new)
    own = X.expand(*X_new.shape[:-2], *X.shape[-2:])
    K_cross, theta_cross = kernel.nngp_and_ntk(X_new, own)
    if readout_only:
        theta, theta_cross = K, K_cross
    weights = theta_cross @ _training_operator(theta, time, K.new_tensor(ridge))
    return TrainedLaw(weights @ Y, _covariance(prior, K_cross, K, weights))


def _check_settings(time: float, ridge: float | None) -> None:
    if not time >= 0:
        raise ValueError(f"time: found {time}, want a number from 0 to infinity.")
    if ridge is not None and not 0 <= ridge < math.inf:
        raise ValueError(f"ridge: found {ridge}, want a finite number from 0 on.")


def _spectrum(theta: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (*batch, n), those that are zero up to rounding set to zero, and eigenvectors."""
    values, vectors = torch.linalg.eigh(theta)
    # ReLU's Theta has a kink at coincident points: the root of an angle's rounding is what it is known to there.
    eps = torch.finfo(values.dtype).eps
    kink = 2 * math.sqrt(eps) * theta.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
    least = torch.maximum(kink, values.amax(-1, keepdim=True) * values.shape[-1] * eps)
    return torch.where(values > least, values, 0), vectors


def _mean_diagonal(matrix: Tensor) -> Tensor:
    """Positive, even for a kernel that is zero at all inputs."""
    return matrix.diagonal().mean().clamp_min(torch.finfo(matrix.dtype).tiny ** 0.5)


def _learned(values: Tensor, time: float, ridge: Tensor) -> Tensor:
    """(1 - e^{-(s + lambda) t}) / (s + lambda) for eigenvalues s > 0, and 0 for s = 0: Theta(x, X) is orthogonal to those."""
    rate = values + ridge
    decayed = -torch.expm1(-rate * time) if math.isfinite(time) else 1.0
    return torch.where(values > 0, decayed / torch.where(values > 0, rate, 1), 0)


def _training_operator(theta: Tensor, time: float, ridge: Tensor) -> Tensor:
    """A with W_t(x) = Theta(x, X) A; the ridge (*batch) broadcasts against the eigenvalues' batch."""
    values, vectors = _spectrum(theta)
    return (vectors * _learned(values, time, ridge.unsqueeze(-1)).unsqueeze(-2)) @ vectors.mT


def _covariance(prior: Tensor, K_cross: Tensor, K: Tensor, weights: Tensor) -> Tensor:
    """Of f_0(x) - W f_0(X), symmetric to the last bit and with no variance below zero."""
    left = weights @ K_cross.mT
    covariance = prior + weights @ K @ weights.mT - left - left.mT
    covariance = (covariance + covariance.mT) / 2
    return covariance + torch.diag_embed((-covariance.diagonal(dim1=-2, dim2=-1)).clamp_min(0))


class NTKEnsemble(Model):
    r"""An infinite ensemble of infinitely wide networks, each trained by gradient flow from its own random start.

    The law of the trained networks is :func:`gradient_flow`'s (Lee et al. 2019). **It is not a Bayesian posterior**: nothing
    is conditioned on, and its spread says where training leaves networks different, not what the data leave unknown. Use
    ``NNGP`` for the posterior of an infinitely wide network.

    Networks start with outputs of covariance :math:`s K`. The output scale s, the noise variance, and the ridge where it isn't
    given, maximise the log density of left-out observations, by cross-validation with up to ten folds, times weak priors: one
    more observation, of average size, for s, and log-normal(-4, 2) for the noise variance over the outputs' prior variance
    (our choices; the latter is centred where BoTorch's prior on noise is). All values on a grid are tried, at the cost of one
    eigendecomposition a fold, so that this can't fail. The kernel's own parameters are kept as they are. Outputs are
    independent. Time is O(n^3), memory O(n^2). Computed in float64 whatever the data's dtype.

    The default kernel's lengthscales stay at 1 for standardised inputs, its variances at the edge of chaos.

    Args:
        kernel: K and Theta; a :class:`NetworkKernel`, such as a GPyTorch kernel with that method. None: the ``NTKKernel`` of
            the next four arguments.
        time: of training, times the learning rate, on the scale of the kernel's Theta and of standardised inputs.
        ridge: of the weights' distance from their start, on the scale of the kernel's Theta; None: as above; 0: training fits
            the data exactly in the end.
        likelihood: Gaussian with learned (default) or fixed noise.
        depth: hidden layers of a multilayer perceptron.
        activation: its activation.
        architecture: another network, in place of those two.
        input_shape: (channels, *positions) of its inputs, where they aren't vectors.

    Raises:
        ValueError: for a negative time or ridge, an unknown activation or a depth below 1.
        TypeError: if the kernel has no ``nngp_and_ntk``, or the likelihood isn't Gaussian.
        MemoryError: at fit, for more rows than fit.
    """

    def __init__(
        self,
        kernel: NetworkKernel | None = None,
        time: float = math.inf,
        ridge: float | None = None,
        likelihood: Gaussian | None = None,
        depth: int = 3,
        activation: str = "relu",
        architecture: Layer | None = None,
        input_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(likelihood)
        if kernel is None:
            kernel = NTKKernel(depth, activation, architecture, input_shape)
        if not callable(getattr(kernel, "nngp_and_ntk", None)):
            raise TypeError(f"kernel: found {type(kernel).__name__}, want one with a method nngp_and_ntk(x1, x2).")
        if not isinstance(self.likelihood, Gaussian):
            raise TypeError(f"likelihood must be likelihoods.Gaussian for exact inference, found {self.likelihood!r}")
        _check_settings(time, ridge)
        self.kernel = kernel
        self.time, self.ridge = time, ridge
        self._kernel: Any
        self._X: Tensor
        self._Y: Tensor
        self._scale: Tensor  # (m,)
        self._noise_var: Tensor  # (m,)
        self._ridge: Tensor  # (m,)
        self._K: Tensor
        self._operator: Tensor

    def _kernels(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        batch = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2])
        x1, x2 = x1.expand(*batch, *x1.shape[-2:]), x2.expand(*batch, *x2.shape[-2:])
        return self._kernel.nngp_and_ntk(x1, x2)

    def _fit(self, data: Data, outcome_scale: Tensor, **options: Any) -> None:
        matrices = MATRICES + data.Y.shape[-1]
        check_memory("NTKEnsemble", len(data), matrices, "SparseNNGP", torch.float64, data.X.device)
        self._adopt_kernel(data)
        data = Data(data.X.double(), data.Y.double())
        fixed = self.likelihood.fixed_parameters(outcome_scale.double())
        noise_var = (2 * fixed["log_noise_std"]).exp().reshape(-1) if fixed else None
        with torch.no_grad():
            self._scale, self._noise_var, self._ridge = self._select(data, noise_var)
            self._train(data.X, data.Y)

    def _adopt_kernel(self, data: Data) -> None:
        """A copy in float64, which no optimiser and no other model touches."""
        self._kernel = copy.deepcopy(self.kernel)
        if isinstance(self._kernel, torch.nn.Module):
            self._kernel = self._kernel.to(data.X.device, torch.float64).requires_grad_(False)

    def _select(self, data: Data, noise_var: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The output scale, the noise variance and the ridge, (m,) each, by cross-validation."""
        K, theta = self._kernels(data.X, data.X)
        size = _mean_diagonal(K)
        ratios = size * torch.logspace(*_RATIOS, dtype=K.dtype, device=K.device)
        ridges = _mean_diagonal(theta) * torch.logspace(*_RIDGES, dtype=K.dtype, device=K.device)
        if self.ridge is not None:
            ridges = torch.full_like(ridges[:1], self.ridge)
        n, m = data.Y.shape
        best = K.new_full((m,), -math.inf)
        chosen = K.new_zeros(3, m)
        for ridge, residual, variance in zip(ridges, *self._left_out(data, K, theta, ridges), strict=True):
            spread = variance + ratios[:, None, None]  # (ratios, n, 1)
            total = size.reciprocal() + (residual.square() / spread).sum(-2)
            scale = total / (n + 1) if noise_var is None else noise_var / ratios.unsqueeze(-1)
            log_density = -0.5 * ((n + 1) * scale.log() + total / scale + spread.log().sum(-2))
            if noise_var is None:
                log_density = log_density - (((ratios / size).log() + 4).square() / 8).unsqueeze(-1)
            found, index = log_density.max(0)
            scale = scale.gather(0, index.unsqueeze(0)).squeeze(0)
            option = torch.stack([scale, scale * ratios[index], ridge.expand(m)])
            chosen = torch.where(found > best, option, chosen)
            best = torch.maximum(best, found)
        return chosen[0], chosen[1], chosen[2]

    def _left_out(self, data: Data, K: Tensor, theta: Tensor, ridges: Tensor) -> tuple[Tensor, Tensor]:
        """For each ridge the residuals (ridges, n, m) of left-out rows, and their variances (ridges, n, 1) for s = 1."""
        n, m = data.Y.shape
        residuals = data.Y.expand(len(ridges), n, m).clone()
        variances = K.diagonal().unsqueeze(-1).expand(len(ridges), n, 1).clone()
        num_folds = min(n, _MAX_FOLDS)
        fold = torch.arange(n, device=K.device) % num_folds
        # Rows often come in an order.
        fold = fold[torch.randperm(n, generator=torch.Generator().manual_seed(0)).to(K.device)]
        for index in range(num_folds if n > 1 else 0):
            out, kept = (fold == index).nonzero().squeeze(-1), (fold != index).nonzero().squeeze(-1)
            values, vectors = _spectrum(theta[kept][:, kept])
            cross, start = theta[out][:, kept] @ vectors, K[out][:, kept] @ vectors
            inner, rotated = vectors.mT @ K[kept][:, kept] @ vectors, vectors.mT @ data.Y[kept]
            for position, ridge in enumerate(ridges):
                weights = cross * _learned(values, self.time, ridge)
                residuals[position, out] -= weights @ rotated
                variance = K[out, out] + ((weights @ inner - 2 * start) * weights).sum(-1)
                variances[position, out] = variance.clamp_min(0).unsqueeze(-1)
        return residuals, variances

    def _train(self, X: Tensor, Y: Tensor) -> None:
        self._X, self._Y = X, Y
        self._K, theta = self._kernels(X, X)
        self._operator = _training_operator(theta.unsqueeze(-3), self.time, self._ridge)

    def _latent(self, X: Tensor) -> GaussianPosterior:
        dtype, X = X.dtype, X.double()
        prior = self._kernels(X, X)[0].unsqueeze(-3)
        K_cross, theta_cross = (value.unsqueeze(-3) for value in self._kernels(X, self._X))
        weights = theta_cross @ self._operator  # (*batch, m, q, n)
        mean = (weights @ self._Y.mT.unsqueeze(-1)).squeeze(-1).mT
        covariance = _covariance(prior, K_cross, self._K.unsqueeze(-3), weights) * self._scale[:, None, None]
        covariance = covariance.expand(*mean.shape[:-2], *covariance.shape[-3:])
        return GaussianPosterior.from_moments(mean.to(dtype), covariance.to(dtype))

    def _predictive(self, X: Tensor) -> Predictive:
        parts = [self._latent(rows) for rows in X.double().split(ROWS, -2)]
        mean, var = (torch.cat([getattr(part, name) for part in parts], -2).to(X) for name in ("mean", "variance"))
        marginals = GaussianPosterior.from_moments(mean, DiagLinearOperator(var.mT))
        return self.likelihood.predictive(marginals, self._likelihood_parameters())

    def _likelihood_parameters(self) -> dict[str, Tensor]:
        return {"log_noise_std": 0.5 * self._noise_var.log().unsqueeze(0).to(self._require_fitted().X)}

    @property
    def batch_shape(self) -> torch.Size:
        """Empty, or one entry for each set of fantasies."""
        return self._Y.shape[:-2] if self._data is not None else torch.Size([])

    def condition_on_observations(self, X: Tensor, Y: Tensor, **kwargs: Any) -> Self:
        """The networks trained from their start on all observations, with scale, noise and ridge kept."""
        scaled, standardised = (values.double() for values in self._observed(X, Y))
        conditioned = self._copy()
        conditioned._conditioned = True
        batch = torch.broadcast_shapes(scaled.shape[:-2], self._X.shape[:-2])
        inputs = torch.cat([value.expand(*batch, *value.shape[-2:]) for value in (self._X, scaled)], -2)
        batch = torch.broadcast_shapes(standardised.shape[:-2], self._Y.shape[:-2], batch)
        outcomes = torch.cat([value.expand(*batch, *value.shape[-2:]) for value in (self._Y, standardised)], -2)
        conditioned._train(inputs, outcomes)
        return conditioned

    def _state(self) -> dict[str, Tensor]:
        state = {"output_scale": self._scale, "noise_var": self._noise_var, "ridge": self._ridge}
        if isinstance(self._kernel, torch.nn.Module):
            state |= {f"kernel.{name}": value for name, value in self._kernel.state_dict().items()}
        return state

    def _set_state(self, tensors: dict[str, Tensor]) -> None:
        assert self._data is not None
        self._adopt_kernel(self._data)
        if isinstance(self._kernel, torch.nn.Module):
            own = {name.removeprefix("kernel."): v for name, v in tensors.items() if name.startswith("kernel.")}
            self._kernel.load_state_dict(own)
        names = ("output_scale", "noise_var", "ridge")
        self._scale, self._noise_var, self._ridge = (tensors[name].double() for name in names)
        with torch.no_grad():
            self._train(self._data.X.double(), self._data.Y.double())


register("ntk", NTKEnsemble)
