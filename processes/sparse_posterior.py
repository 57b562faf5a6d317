"""What the models with inducing points share: predictions, further observations and files."""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import torch
from botorch.utils.sampling import draw_sobol_normal_samples
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Tensor
from torch.distributions import Normal

from bayesnn.checks import flag
from bayesnn.data import Data
from bayesnn.likelihoods import Categorical, Gaussian, Histogram, Likelihood
from bayesnn.model import Model
from bayesnn.posteriors import Gaussian as GaussianPosterior
from bayesnn.predictive import Predictive
from bayesnn.processes.kernels import KernelFactory, MLPKernel
from bayesnn.processes.sparse_prior import Inducing, Parameters, Projection, SparsePrior, network_prior

ROWS = 4096  # of a prediction in work at once


def even_normals(num_draws: int, size: int) -> Tensor:
    """Standard normals (S, 1, L) for a prediction's draws, one quasi-random set for all rows: equal rows get equal answers."""
    return draw_sobol_normal_samples(size, num_draws, dtype=torch.float64, seed=0).unsqueeze(-2)


class InducingValues(NamedTuple):
    """Inducing inputs Z (M, d), and q of the whitened values: means (L, M) and a factor W of S = W W^T, (L, M, M)."""

    points: Tensor
    mean: Tensor
    root: Tensor


class _Further(NamedTuple):
    """Further observations X (*batch, e, d); the factor of their covariance (*batch, L, e, e), and what it whitens."""

    X: Tensor
    root: Tensor
    whitened: Tensor  # (*fantasies, *batch, L, e)


class SparseProcess(Model):
    """Base class of the models with inducing points.

    Args:
        likelihood: p(y | f).
        depth: of the network.
        activation: of the network.
        kernel: in place of the network's.
        optimise: whether hyperparameters are learned.
    """

    num_draws = 512

    def __init__(
        self,
        likelihood: Likelihood | None,
        depth: int,
        activation: str,
        kernel: KernelFactory | None,
        optimise: bool,
    ) -> None:
        super().__init__(likelihood)
        MLPKernel(depth, activation)  # raises its errors
        self.depth, self.activation, self.kernel = depth, activation, kernel
        self.optimise = flag("optimise", optimise)
        self._prior: SparsePrior
        self._inducing: Inducing
        self._values: InducingValues
        self._noise: Parameters
        self._further: _Further | None = None

    @property
    def _description(self) -> str:
        return "" if self.kernel is not None else f"depth={self.depth}, activation={self.activation}"

    def _prior_of(self, data: Data) -> SparsePrior:
        # Classes and buckets are alike before the data; outputs, or a mean and a noise, aren't.
        shared = isinstance(self.likelihood, Categorical | Histogram)
        num_latents = self.likelihood.latent_size(data.Y.shape[-1])
        return network_prior(data.X.shape[-1], num_latents, shared, self.kernel, self.depth, self.activation)

    def _take(self, prior: SparsePrior, parameters: Parameters, values: InducingValues, noise: Parameters) -> None:
        with torch.no_grad():
            self._prior, self._values, self._noise = prior.take(parameters), values, noise
            self._inducing = prior.inducing(values.points)
        self._further = None

    def _project(self, X: Tensor, joint: bool) -> tuple[Projection, Tensor, Tensor]:
        """How X hangs on the inducing values, W^T A, and the mean (*batch, L, n)."""
        projection = self._prior.project(self._inducing, X, joint)
        spread = self._values.root.mT @ projection.base
        mean = self._prior.mean.unsqueeze(-1) + (projection.base.mT @ self._values.mean.unsqueeze(-1)).squeeze(-1)
        return projection, spread, mean

    def _moments(self, X: Tensor, joint: bool) -> tuple[Tensor, Tensor]:
        """Means (*batch, L, q), and covariances (*batch, L, q, q) or variances (*batch, L, q)."""
        (base, own, left), spread, mean = self._project(X, joint)
        spread_var = spread.square().sum(-2)
        covariance = own - base.mT @ base + spread.mT @ spread if joint else left + spread_var
        if self._further is None:
            return mean, covariance
        other, other_spread, _ = self._project(self._further.X, False)
        cross = self._prior.covariance(self._further.X, X) - other.base.mT @ base + other_spread.mT @ spread
        half = torch.linalg.solve_triangular(self._further.root, cross, upper=False)
        mean = mean + (half.mT @ self._further.whitened.unsqueeze(-1)).squeeze(-1)
        covariance = covariance - (half.mT @ half if joint else half.square().sum(-2))
        return mean, covariance if joint else covariance.clamp_min(0)

    def _latent(self, X: Tensor) -> GaussianPosterior:
        mean, covariance = self._moments(X.double(), joint=True)
        covariance = covariance.expand(*mean.shape, mean.shape[-1])
        return GaussianPosterior.from_moments(mean.mT.to(X), covariance.to(X))

    def _predictive(self, X: Tensor) -> Predictive:
        """In closed form for Gaussian noise; else over function values drawn point by point, from the same normals."""
        moments = [self._moments(rows, joint=False) for rows in X.double().split(ROWS, -2)]
        mean, var = (
            torch.cat(values, -1).mT.unsqueeze(-3) for values in zip(*moments, strict=True)
        )  # (*batch, 1, q, L)
        if isinstance(self.likelihood, Gaussian):
            std = (var + (2 * self._noise["log_noise_std"]).exp()).sqrt()
            return Predictive(Normal(mean.to(X), std.to(X)), function_var=var.to(X))
        f = mean + var.clamp_min(0).sqrt() * even_normals(self.num_draws, mean.shape[-1])
        return self.likelihood.predictive_class(self.likelihood(f.to(X), self._likelihood_parameters()))

    def _likelihood_parameters(self) -> Parameters:
        data = self._require_fitted()
        return {name: value.to(data.X) for name, value in self._noise.items()}

    @property
    def batch_shape(self) -> torch.Size:
        """Empty, or one entry for each set of fantasies."""
        return torch.Size([]) if self._further is None else self._further.whitened.shape[:-2]

    def condition_on_observations(self, X: Tensor, Y: Tensor, **kwargs: Any) -> Self:
        """Exact conditioning of this posterior, a Gaussian process, with hyperparameters and inducing values' q kept.

        Raises:
            TypeError: if the likelihood isn't Gaussian.
        """
        if not isinstance(self.likelihood, Gaussian):
            return super().condition_on_observations(X, Y, **kwargs)
        scaled, standardised = (value.double() for value in self._observed(X, Y))
        mean, covariance = self._moments(scaled, joint=True)
        noise = (2 * self._noise["log_noise_std"]).exp().reshape(-1, 1)
        root = psd_safe_cholesky(covariance + torch.diag_embed(noise.expand(covariance.shape[:-1])))
        residual = (standardised.mT - mean).unsqueeze(-1)
        whitened = torch.linalg.solve_triangular(root, residual, upper=False).squeeze(-1)
        conditioned = self._copy()
        conditioned._conditioned = True
        conditioned._further = _Further(scaled, root, whitened)
        if self._further is not None:
            conditioned._further = self._joined(self._further, conditioned._further)
        return conditioned

    def _joined(self, old: _Further, new: _Further) -> _Further:
        """Both sets of further observations: the factor of their joint covariance has that of the old ones in its corner."""
        batch = torch.broadcast_shapes(old.X.shape[:-2], new.X.shape[:-2])
        first, second = (x.expand(*batch, *x.shape[-2:]) for x in (old.X, new.X))
        (base, _, _), spread, _ = self._project(first, False)
        (other, _, _), other_spread, _ = self._project(second, False)
        cross = self._prior.covariance(first, second) - base.mT @ other + spread.mT @ other_spread
        corner = torch.linalg.solve_triangular(old.root, cross, upper=False).mT
        shape = corner.shape[:-2]
        upper = torch.cat([old.root.expand(*shape, *old.root.shape[-2:]), torch.zeros_like(corner.mT)], -1)
        lower = torch.cat([corner, new.root.expand(*shape, *new.root.shape[-2:])], -1)
        fantasies = torch.broadcast_shapes(old.whitened.shape[:-1], new.whitened.shape[:-1])
        whitened = torch.cat([w.expand(*fantasies, w.shape[-1]) for w in (old.whitened, new.whitened)], -1)
        return _Further(torch.cat([first, second], -2), torch.cat([upper, lower], -2), whitened)

    def _state(self) -> dict[str, Tensor]:
        state = {f"prior.{name}": value for name, value in self._prior.named_parameters()}
        state |= {f"values.{name}": value for name, value in self._values._asdict().items()}
        return state | {f"likelihood.{name}": value for name, value in self._noise.items()}

    def _set_state(self, tensors: dict[str, Tensor]) -> None:
        assert self._data is not None

        def part(name: str) -> Parameters:
            return {key.removeprefix(name): value for key, value in tensors.items() if key.startswith(name)}

        self._take(self._prior_of(self._data), part("prior."), InducingValues(**part("values.")), part("likelihood."))
