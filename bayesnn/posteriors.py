"""Posteriors over function values at points, p(f(X) | D), always joint over the q points.

Each kind is a BoTorch posterior with a sampler of its own, so that an acquisition function sees the same function
at every point, in every t-batch element and in every later call:

* :class:`FunctionDraws`: weighted draws of whole functions (networks, ensembles, particles);
* :class:`Gaussian`: BoTorch's ``GPyTorchPosterior``, so that everything specific to GPs works natively;
* :class:`StudentT`: multivariate t, one chi-squared variable per function;
* :class:`Copula`: marginals of any shape (a histogram, a Gaussian) tied together by a Gaussian copula;
* :func:`gaussian_view`: any of them, moment-matched to a Gaussian, for acquisition functions that insist.
"""

from __future__ import annotations

from typing import Any

import scipy.stats
import torch
from botorch.posteriors import GPyTorchPosterior, Posterior
from botorch.sampling.base import MCSampler
from botorch.sampling.get_sampler import GetSampler
from botorch.sampling.normal import NormalMCSampler, SobolQMCNormalSampler
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from linear_operator.operators import BlockDiagLinearOperator, DiagLinearOperator, to_linear_operator
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Tensor
from torch.distributions import Distribution, Normal

from bayesnn.distributions import affine
from bayesnn.histogram import Histogram


class FunctionDraws(Posterior):
    r"""S draws of a function at q points, with optional log-weights: :math:`p(f) = \sum_s w_s \delta_{f_s}`.

    Draw ``s`` is one function: the same member for every point, every t-batch element and every later call.

    Args:
        values: (*batch, S, q, m).
        log_weights: (*batch, S) or (S,), unnormalised; None means equal weights.

    Raises:
        ValueError: if the shapes don't fit.
    """

    def __init__(self, values: Tensor, log_weights: Tensor | None = None) -> None:
        if values.dim() < 3:
            raise ValueError(f"values must have shape (*batch, S, q, m), found {tuple(values.shape)}")
        if log_weights is not None and log_weights.shape[-1] != values.shape[-3]:
            raise ValueError(f"log_weights must end in S={values.shape[-3]}, found {tuple(log_weights.shape)}")
        self.values = values
        self.log_weights = None if log_weights is None else torch.log_softmax(log_weights, -1)

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def batch_shape(self) -> torch.Size:
        return self.values.shape[:-3]

    @property
    def num_draws(self) -> int:
        """How many functions."""
        return self.values.shape[-3]

    @property
    def base_sample_shape(self) -> torch.Size:
        return torch.Size([])

    @property
    def batch_range(self) -> tuple[int, int]:
        return (0, 0)

    def _extended_shape(self, sample_shape: torch.Size = torch.Size()) -> torch.Size:  # noqa: B008
        return torch.Size(sample_shape) + self.batch_shape + self.values.shape[-2:]

    @property
    def weights(self) -> Tensor:
        """Normalised weights, broadcastable against ``values``: (*batch, S, 1, 1)."""
        if self.log_weights is None:
            return self.values.new_full((self.num_draws, 1, 1), 1 / self.num_draws)
        return self.log_weights.exp()[..., None, None]

    @property
    def mean(self) -> Tensor:
        return (self.weights * self.values).sum(-3)

    @property
    def variance(self) -> Tensor:
        """Variance between the draws, (*batch, q, m): of the mixture of point masses, without Bessel's correction."""
        return (self.weights * (self.values - self.mean.unsqueeze(-3)).square()).sum(-3)

    def rsample_from_base_samples(self, sample_shape: torch.Size, base_samples: Tensor) -> Tensor:
        """Functions picked by uniforms of shape ``sample_shape``: (*sample_shape, *batch, q, m)."""
        uniforms = base_samples.reshape(-1).to(self.values)
        if self.log_weights is None:
            index = (uniforms * self.num_draws).long().clamp_max(self.num_draws - 1)
            picked = self.values.index_select(-3, index)
        else:
            cdf = self.log_weights.exp().cumsum(-1).expand(self.values.shape[:-2]).contiguous()
            index = torch.searchsorted(cdf, uniforms.expand(*cdf.shape[:-1], -1).contiguous())
            index = index.clamp_max(self.num_draws - 1)[..., None, None]
            picked = self.values.gather(-3, index.expand(*index.shape[:-2], *self.values.shape[-2:]))
        return picked.movedim(-3, 0).reshape(self._extended_shape(sample_shape))

    def rsample(self, sample_shape: torch.Size | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Functions picked at random; as everywhere in BoTorch, without a generator torch's default one is used."""
        shape = torch.Size([1]) if sample_shape is None else torch.Size(sample_shape)
        return self.rsample_from_base_samples(shape, torch.rand(shape, generator=generator, dtype=torch.float64))

    def affine(self, loc: Tensor, scale: Tensor) -> FunctionDraws:
        """The posterior of ``loc + scale * f``; loc and scale broadcast against (q, m)."""
        return FunctionDraws(loc + scale * self.values, self.log_weights)

    def outputs(self, indices: list[int]) -> FunctionDraws:
        """The posterior of some of the outputs."""
        return FunctionDraws(self.values[..., indices], self.log_weights)

    def transformed(self, transform: Any, X: Tensor) -> FunctionDraws:
        """The posterior of a BoTorch ``PosteriorTransform``'s value, applied to each draw: one output."""
        return FunctionDraws(transform.evaluate(self.values, X=X.unsqueeze(-3)).unsqueeze(-1), self.log_weights)


class FunctionSampler(MCSampler):
    """One stratified uniform per draw, shared by the whole t-batch and never redrawn."""

    def forward(self, posterior: FunctionDraws) -> Tensor:
        """Draws of shape (*sample_shape, *batch, q, m)."""
        if self.base_samples is None:
            count = self.sample_shape.numel()
            generator = torch.Generator().manual_seed(self.seed)
            strata = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator).double()
            self.register_buffer("base_samples", (strata / count).reshape(self.sample_shape))
        return posterior.rsample_from_base_samples(self.sample_shape, self.base_samples)

    def _update_base_samples(self, posterior: Posterior, base_sampler: MCSampler) -> None:
        self.base_samples = base_sampler.base_samples


@GetSampler.register(FunctionDraws)
def _function_sampler(
    posterior: FunctionDraws, sample_shape: torch.Size, *, seed: int | None = None
) -> FunctionSampler:
    # With as many samples as equally weighted draws, each is used exactly once: the expectation is exact.
    count = sample_shape.numel()
    if posterior.log_weights is None:
        count = min(count, posterior.num_draws)
    return FunctionSampler(sample_shape=torch.Size([count]), seed=0 if seed is None else seed)


class Gaussian(GPyTorchPosterior):
    """A joint Gaussian over the q points, and over m independent outputs: BoTorch's GPyTorchPosterior."""

    @classmethod
    def from_moments(cls, mean: Tensor, covariance: Any) -> Gaussian:
        """From means (*batch, q, m) and a covariance for each output (*batch, m, q, q), tensor or lazy."""
        covariance = to_linear_operator(covariance)
        if mean.shape[-1] == 1:
            return cls(MultivariateNormal(mean.squeeze(-1), covariance[..., 0, :, :]))
        blocks = BlockDiagLinearOperator(covariance, block_dim=-3)
        return cls(MultitaskMultivariateNormal(mean, blocks, interleaved=False))

    @property
    def output_covariance(self) -> Any:
        """The covariance over points of each output, (*batch, m, q, q), lazy."""
        return output_covariance(self.distribution)

    def affine(self, loc: Tensor, scale: Tensor) -> Gaussian:
        """The posterior of ``loc + scale * f``; loc and scale are (1, m)."""
        squared = scale.square().squeeze(-2)[..., None, None]
        mean = loc + scale * self.mean
        if mean.shape[-1] == 1:
            return Gaussian(MultivariateNormal(mean.squeeze(-1), self.distribution.lazy_covariance_matrix * squared[0]))
        return Gaussian.from_moments(mean, self.output_covariance * squared)

    def outputs(self, indices: list[int]) -> Gaussian:
        """The posterior of some of the outputs."""
        return Gaussian.from_moments(self.mean[..., indices], self.output_covariance.to_dense()[..., indices, :, :])

    def with_noise(self, noise_var: Tensor) -> Gaussian:
        """The posterior of the observations: noise variances (*batch, q, m) on the diagonal."""
        noise = DiagLinearOperator(noise_var.transpose(-1, -2).expand(*self.mean.shape[:-2], *noise_var.mT.shape[-2:]))
        return Gaussian.from_moments(self.mean, self.output_covariance + noise)

    def transformed(self, transform: Any, X: Tensor) -> Posterior:
        """The posterior of a BoTorch ``PosteriorTransform``'s value."""
        return transform(self, X=X)


def output_covariance(distribution: MultivariateNormal) -> Any:
    """Covariance over points of each output of a (multi-task) Gaussian with independent outputs, (*batch, m, q, q)."""
    covariance = distribution.lazy_covariance_matrix
    if not isinstance(distribution, MultitaskMultivariateNormal):
        return covariance.unsqueeze(-3)
    q, m = distribution.event_shape
    dense = covariance.to_dense().reshape(
        *covariance.batch_shape, *((q, m, q, m) if distribution._interleaved else (m, q, m, q))
    )
    equation = "...qmrm->...mqr" if distribution._interleaved else "...mqmr->...mqr"
    return to_linear_operator(torch.einsum(equation, dense))


class _SharedNormalPosterior(Posterior):
    """Posteriors that are a fixed map of standard normals: what BoTorch's normal samplers need to know of them."""

    _mean_like: Tensor

    @property
    def device(self) -> torch.device:
        return self._mean_like.device

    @property
    def dtype(self) -> torch.dtype:
        return self._mean_like.dtype

    @property
    def batch_shape(self) -> torch.Size:
        return self._mean_like.shape[:-2]

    @property
    def base_sample_shape(self) -> torch.Size:
        return self._mean_like.shape

    @property
    def batch_range(self) -> tuple[int, int]:
        return (0, -2)

    def _extended_shape(self, sample_shape: torch.Size = torch.Size()) -> torch.Size:  # noqa: B008
        return torch.Size(sample_shape) + self._mean_like.shape

    def rsample_from_base_samples(self, sample_shape: torch.Size, base_samples: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} doesn't say how base samples become function values")

    def rsample(self, sample_shape: torch.Size | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Random functions; as everywhere in BoTorch, without a generator torch's default one is used."""
        shape = torch.Size([1]) if sample_shape is None else torch.Size(sample_shape)
        # One set of normals for the whole t-batch: a draw is one function.
        per_function = (*shape, *(1 for _ in self.batch_shape), *self.base_sample_shape[-2:])
        normals = torch.randn(per_function, generator=generator, dtype=torch.float64)
        return self.rsample_from_base_samples(shape, normals.to(self._mean_like))


@GetSampler.register(_SharedNormalPosterior)
def _normal_sampler(
    posterior: _SharedNormalPosterior, sample_shape: torch.Size, *, seed: int | None = None
) -> NormalMCSampler:
    return SobolQMCNormalSampler(sample_shape=sample_shape, seed=0 if seed is None else seed)


class StudentT(_SharedNormalPosterior):
    r"""A joint multivariate t, :math:`f = \mu + L z \sqrt{\nu / \chi^2_\nu}`, one :math:`\chi^2` per function and output.

    Args:
        mean: (*batch, q, m).
        scale: scale matrices (*batch, m, q, q): the covariance is ``scale * df / (df - 2)``.
        df: degrees of freedom, a positive number.

    Raises:
        ValueError: if df isn't positive.
    """

    def __init__(self, mean: Tensor, scale: Tensor, df: float) -> None:
        if not df > 0:
            raise ValueError(f"df must be positive, found {df}")
        self.loc, self.scale, self.df = mean, scale, float(df)
        self._mean_like = mean

    @property
    def base_sample_shape(self) -> torch.Size:
        # Row 0 becomes the chi-squared variable. It comes first so that a cached baseline keeps it when points follow.
        *batch, q, m = self.loc.shape
        return torch.Size([*batch, q + 1, m])

    @property
    def mean(self) -> Tensor:
        """Raises ValueError if df <= 1, where there is none."""
        if self.df <= 1:
            raise ValueError(f"a Student-t posterior with df={self.df} has no mean")
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Raises ValueError if df <= 2, where it is infinite or undefined."""
        if self.df <= 2:
            raise ValueError(f"a Student-t posterior with df={self.df} has no finite variance")
        return self.scale.diagonal(dim1=-2, dim2=-1).mT * (self.df / (self.df - 2))

    def rsample_from_base_samples(self, sample_shape: torch.Size, base_samples: Tensor) -> Tensor:
        """Functions from normals of shape (*sample_shape, *batch, 1 + q, m): (*sample_shape, *batch, q, m)."""
        uniforms = scipy.stats.norm.cdf(base_samples[..., :1, :].double().cpu().numpy())
        chi2 = torch.from_numpy(scipy.stats.chi2.ppf(uniforms, self.df)).to(self.loc)
        root = psd_safe_cholesky(self.scale)
        normals = (root @ base_samples[..., 1:, :].mT.unsqueeze(-1)).squeeze(-1).mT
        return self.loc + normals * (self.df / chi2).sqrt()

    def affine(self, loc: Tensor, scale: Tensor) -> StudentT:
        """The posterior of ``loc + scale * f``; loc and scale are (1, m)."""
        squared = scale.square().squeeze(-2)[..., None, None]
        return StudentT(loc + scale * self.loc, squared * self.scale, self.df)

    def outputs(self, indices: list[int]) -> StudentT:
        """The posterior of some of the outputs."""
        return StudentT(self.loc[..., indices], self.scale[..., indices, :, :], self.df)

    def transformed(self, transform: Any, X: Tensor) -> FunctionDraws:
        """The posterior of a BoTorch ``PosteriorTransform``'s value, through draws."""
        return transformed_draws(self, transform, X)


class Copula(_SharedNormalPosterior):
    r"""Marginals of any shape tied together by a Gaussian copula: :math:`f_j = F_j^{-1}(\Phi((L\epsilon)_j))`.

    The draws are differentiable in the marginals' parameters and in L. Rows of L must have unit norm. Since L is lower
    triangular, points that follow never change the draws at the points before them. Outputs are independent.

    Args:
        marginals: a Histogram or Normal of batch shape (*batch, q, m).
        root: L for each output, (*batch, m, q, q).
    """

    def __init__(self, marginals: Distribution, root: Tensor) -> None:
        self.marginals, self.root = marginals, root
        self._mean_like = marginals.mean

    @property
    def mean(self) -> Tensor:
        return self.marginals.mean

    @property
    def variance(self) -> Tensor:
        return self.marginals.variance

    def rsample_from_base_samples(self, sample_shape: torch.Size, base_samples: Tensor) -> Tensor:
        """Functions from normals of shape (*sample_shape, *batch, q, m)."""
        normals = (self.root @ base_samples.to(self.root).mT.unsqueeze(-1)).squeeze(-1).mT
        if isinstance(self.marginals, Normal):
            return self.marginals.loc + self.marginals.scale * normals
        eps = torch.finfo(normals.dtype).eps
        return self.marginals.icdf(torch.special.ndtr(normals).clamp(eps, 1 - eps))

    def affine(self, loc: Tensor, scale: Tensor) -> Copula:
        """The posterior of ``loc + scale * f``; loc and scale are (1, m)."""
        return Copula(affine(self.marginals, loc, scale), self.root)

    def outputs(self, indices: list[int]) -> Copula:
        """The posterior of some of the outputs."""
        if isinstance(self.marginals, Normal):
            marginals: Distribution = Normal(self.marginals.loc[..., indices], self.marginals.scale[..., indices])
        else:
            own = self.marginals
            borders = own.borders if own.borders.dim() == 1 else own.borders[..., indices, :]
            tails = own.tail_scale if own.tail_scale.dim() == 1 else own.tail_scale[..., indices, :]
            marginals = Histogram(borders, own.logits[..., indices, :], tails, validate_args=False)
        return Copula(marginals, self.root[..., indices, :, :])

    def transformed(self, transform: Any, X: Tensor) -> FunctionDraws:
        """The posterior of a BoTorch ``PosteriorTransform``'s value, through draws."""
        return transformed_draws(self, transform, X)


def correlation_root(correlation: Tensor) -> Tensor:
    """A lower-triangular L with unit rows and L L^T close to a correlation matrix that needn't be positive definite.

    Cholesky's algorithm, where a pivot that rounding or an inconsistent matrix has made non-positive counts as zero.
    Row j depends on the first j rows and columns only: points that follow never change the points before them. Only the
    lower triangle is read.

    Args:
        correlation: (*batch, q, q), ones on the diagonal.
    """
    rest, columns = correlation.tril(), []
    tolerance = 1e-6
    for k in range(correlation.shape[-1]):
        pivot = rest[..., k, k]
        alive = (pivot > tolerance)[..., None]
        safe = torch.where(alive, pivot[..., None], torch.ones_like(pivot[..., None]))
        column = torch.where(alive, rest[..., :, k] / safe.sqrt(), torch.zeros_like(rest[..., :, k]))
        column = torch.where(torch.arange(column.shape[-1]) >= k, column, torch.zeros_like(column))
        columns.append(column)
        rest = rest - column[..., :, None] * column[..., None, :]
    root = torch.stack(columns, -1)
    norm = root.square().sum(-1, keepdim=True)
    return root / torch.where(norm > tolerance, norm, torch.ones_like(norm)).sqrt()


def function_draws(posterior: Posterior, num_draws: int, seed: int = 0) -> FunctionDraws:
    """Any posterior as function draws: quasi-random functions, the same for every t-batch element."""
    if isinstance(posterior, FunctionDraws):
        return posterior
    sampler = SobolQMCNormalSampler(sample_shape=torch.Size([num_draws]), seed=seed)
    return FunctionDraws(sampler(posterior).movedim(0, -3))


def transformed_draws(posterior: Posterior, transform: Any, X: Tensor, num_draws: int = 256) -> FunctionDraws:
    """A BoTorch ``PosteriorTransform`` of a posterior that isn't Gaussian: applied to 256 fixed quasi-random draws."""
    return function_draws(posterior, num_draws).transformed(transform, X)


def gaussian_view(posterior: Posterior) -> Gaussian:
    """Moment-match a posterior to a joint Gaussian: the same mean and, over points, the same covariance.

    Exact for :class:`Gaussian`; for function draws and the others it is the Gaussian closest in Kullback–Leibler
    divergence (from the posterior to the view). Copulas keep their marginal moments and the copula's correlation.
    """
    if isinstance(posterior, GPyTorchPosterior):
        return posterior if isinstance(posterior, Gaussian) else Gaussian(posterior.distribution)
    if isinstance(posterior, FunctionDraws):
        centred = (posterior.values - posterior.mean.unsqueeze(-3)).movedim(-1, -3)  # (*batch, m, S, q)
        weights = posterior.weights.squeeze(-1).unsqueeze(-3)
        covariance = centred.mT @ (weights * centred)
    elif isinstance(posterior, StudentT):
        covariance = posterior.scale * (
            posterior.variance / posterior.scale.diagonal(dim1=-2, dim2=-1).mT
        ).mT.unsqueeze(-1)
    elif isinstance(posterior, Copula):
        root = posterior.variance.sqrt().mT.unsqueeze(-1) * posterior.root
        covariance = root @ root.mT
    else:
        raise TypeError(f"no Gaussian view of {type(posterior).__name__}")
    return Gaussian.from_moments(posterior.mean, covariance)
