"""Models whose network has learned to answer from data: ``fit`` sets the context, a forward pass is the posterior.

The networks predict every point by itself. Points are tied together by a Gaussian copula, whose correlations the network
gives too: how far the prediction at one point moves when an observation at another comes out one standard deviation high.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal

from bayesnn.data import Data
from bayesnn.distributions import affine
from bayesnn.histogram import Histogram
from bayesnn.inference.amortized.meta_training import MetaTarget, MetaTraining
from bayesnn.inference.amortized.tasks import TaskPrior, standardise_context
from bayesnn.inference.amortized.weights import load_pretrained
from bayesnn.inference.run import run
from bayesnn.likelihoods import Likelihood
from bayesnn.model import Model
from bayesnn.posteriors import Copula, correlation_root
from bayesnn.predictive import Predictive

MIN_SHARE = 0.01
"""Least share of the variance of f that a network's answer to an observation at the same point implies; guards a root."""


class Context(NamedTuple):
    """Observations, encoded: inputs (*batch, n, d), outcomes (*batch, m, n, 1), the network's cache, and the units."""

    X: Tensor
    Y: Tensor
    cache: Any
    loc: Tensor
    scale: Tensor


class AmortizedModel(Model):
    """Base class of PFNs and neural processes; subclasses say which network ships.

    Args:
        network: a module with ``encode``, ``query`` and ``distributions`` (see ``SetTransformer`` and
            ``DeepSetNetwork``), or the name of one that ships with the package.
        likelihood: what the network's head stands for.
        max_context: more rows than it was trained on are refused; None: as the shipped network's card says, or no limit.

    Raises:
        ValueError: if no network of that name ships.
    """

    prefix: ClassVar[str] = ""

    def __init__(self, network: nn.Module | str, likelihood: Likelihood, max_context: int | None) -> None:
        super().__init__(likelihood)
        if isinstance(network, str):
            network, card = load_pretrained(f"{self.prefix}-{network}")
            max_context = card["max_context"] if max_context is None else max_context
        self.network: Any
        self._own: Any
        self.network, self.max_context = network, max_context
        self._context: Context

    @classmethod
    def from_pretrained(cls, name: str = "gp-small") -> Self:
        """The model with a network that ships with the package; needs no connection.

        Raises:
            ValueError: if there is none of this name.
        """
        return cls(name)  # type: ignore[call-arg]

    def meta_fit(
        self,
        prior: TaskPrior,
        training: MetaTraining | None = None,
        *,
        seed: int = 0,
        progress: bool = False,
        checkpoint: str | Path | None = None,
    ) -> Self:
        """Train the network further on tasks drawn from a prior over functions.

        Args:
            prior: ``(batch_size, num_points, generator) -> TaskBatch``.
            training: steps, context sizes, learning rate …
            seed: of all draws.
            progress: show a progress bar.
            checkpoint: a folder from which an interrupted training goes on with the same result.

        Returns:
            The model itself, with a trained copy of the network.
        """
        training = MetaTraining() if training is None else training
        network = copy.deepcopy(self.network).train().requires_grad_(False)
        run(training, MetaTarget(network, prior), seed=seed, progress=progress, checkpoint=checkpoint)
        self.network, self.max_context = network.eval(), training.max_context
        return self

    def _fit(self, data: Data, outcome_scale: Tensor, **options: Any) -> None:
        num_rows, num_features = data.X.shape
        limit = self.network.max_features
        if num_features > limit:
            raise ValueError(
                f"X must have at most {limit} columns, as many as the network was trained on; found {num_features}"
            )
        if self.max_context is not None and num_rows > self.max_context:
            raise ValueError(
                f"X must have at most {self.max_context} rows, as many as the network was trained on; found {num_rows}. "
                "Take a subset, or train a network with a larger max_context"
            )
        self._set_context(data)

    def _set_context(self, data: Data) -> None:
        # In the data's dtype, so that gradients of a float64 acquisition function are float64.
        self._own = copy.deepcopy(self.network).to(data.X).eval().requires_grad_(False)
        self._context = self._encode(data.X, data.Y.T.unsqueeze(-1))

    def _encode(self, X: Tensor, Y: Tensor) -> Context:
        loc, scale = standardise_context(Y)
        rows = X.unsqueeze(-3).expand(*Y.shape[:-2], *X.shape[-2:])
        return Context(X, Y, self._own.encode(rows, (Y - loc) / scale), loc, scale)

    def _marginals(self, context: Context, X: Tensor) -> tuple[Distribution, Distribution]:
        """The distributions of f and y at X (*batch, q, d) by themselves, batch shape (*batch, q, m)."""
        output = self._own.query(context.cache, X.unsqueeze(-3))  # (*batch, m, q, …)
        outputs_at = max(X.dim() - 2, context.loc.dim() - 3)
        units = (context.loc.squeeze(-1).mT, context.scale.squeeze(-1).mT)
        f, y = self._own.distributions(output.transpose(outputs_at, outputs_at + 1))
        return affine(f, *units), affine(y, *units)

    def _latent(self, X: Tensor) -> Copula:
        return self._joint(X, of_observations=False)

    def _observations(self, latent: Any, X: Tensor) -> Copula:
        return self._joint(X, of_observations=True)

    def _joint(self, X: Tensor, of_observations: bool) -> Copula:
        f, y = self._marginals(self._context, X)
        correlation = self._correlation(X, f, y)
        if of_observations:
            # Noise is independent from point to point: it only dilutes the correlations.
            share = (f.variance / y.variance).clamp_max(1).sqrt().mT
            diluted = correlation * share.unsqueeze(-1) * share.unsqueeze(-2)
            return Copula(y, correlation_root(diluted + torch.diag_embed(1 - share.square())))
        root = correlation_root(correlation)
        # A point that comes again is the same function value, to the last bit.
        first = _same_points(X).to(torch.int8).argmax(-1).unsqueeze(-1)
        return Copula(f, root.gather(-2, first.expand(root.shape)))

    def _predictive(self, X: Tensor) -> Predictive:
        f, y = self._marginals(self._context, X)
        function_var = torch.minimum(f.variance, y.variance).unsqueeze(-3)
        return Predictive(_with_draw_dimension(y), function_var=function_var)

    def _correlation(self, X: Tensor, f: Distribution, y: Distribution) -> Tensor:
        r"""Correlations of f between the points of each t-batch element, (*batch, m, q, q).

        :math:`\mathrm{Cov}(f_i, f_j) = \sigma_{y_i} (E[f_j \mid y_i = \mu_i + \sigma_{y_i}] - E[f_j])` for jointly
        Gaussian values. A network needn't agree with itself on i and j exchanged, nor on the variance at i = j; the mean
        of both and that variance are taken. So the order of points doesn't matter, and points that come close to each
        other have a correlation that goes to one: draws are continuous. Points with the same inputs are the same point.
        """
        q = X.shape[-2]
        if q == 1:
            return f.mean.new_ones(f.mean.mT.unsqueeze(-1).shape)
        num_shared = _num_shared_rows(X) if self._context.X.dim() == 2 else 0
        columns = []
        for rows in (slice(0, num_shared), slice(num_shared, q)):
            if rows.start == rows.stop:
                continue
            # Rows that all t-batch elements share (a baseline, pending points) are conditioned on once for all of them.
            one = (0,) * (X.dim() - 2) if rows.start < num_shared else (...,)
            own_mean, own_std = y.mean[one][..., rows, :], y.stddev[one][..., rows, :]
            shifted = self._conditional_mean(X, X[one][..., rows, :], own_mean + own_std)
            shift = shifted - f.mean.mT.unsqueeze(-2)  # (*batch, m, rows, q)
            columns.append((shift * own_std.mT.unsqueeze(-1)).mT)
        covariance = torch.cat(columns, -1)
        covariance = 0.5 * (covariance + covariance.mT)
        own = covariance.diagonal(dim1=-2, dim2=-1)
        scale = torch.maximum(own, MIN_SHARE * f.variance.mT).sqrt()
        correlation = (covariance / (scale.unsqueeze(-1) * scale.unsqueeze(-2))).clamp(-1, 1)
        return torch.where(_same_points(X), torch.ones_like(correlation), correlation)

    def _conditional_mean(self, X: Tensor, rows: Tensor, values: Tensor) -> Tensor:
        """E[f(X) | D and y = values at one of the rows], for each row: (*batch, m, rows, q)."""
        old = self._context
        m, n = old.Y.shape[-3], old.X.shape[-2]
        batch = torch.broadcast_shapes(rows.shape[:-2], old.X.shape[:-2])
        k, d = rows.shape[-2:]
        more_X = torch.cat(
            [old.X.unsqueeze(-3).expand(*batch, k, n, d), rows.unsqueeze(-2).expand(*batch, k, 1, d)], -2
        )
        old_Y = old.Y.unsqueeze(-4).expand(*batch, k, m, n, 1)
        more_Y = torch.cat([old_Y, values[..., None, None].expand(*batch, k, m, 1, 1)], -2)
        f, _ = self._marginals(self._encode(more_X, more_Y), X.unsqueeze(-3))
        return f.mean.movedim(-1, -3)  # (*batch, rows, q, m) -> (*batch, m, rows, q)

    @property
    def batch_shape(self) -> torch.Size:
        """Empty, or one entry for each set of fantasies."""
        return self._context.X.shape[:-2] if self._data is not None else torch.Size([])

    def condition_on_observations(self, X: Tensor, Y: Tensor, **kwargs: Any) -> Self:
        """The model with more rows in its context: X (*batch, q, d), Y (*fantasies, *batch, q, m). Needs no training."""
        scaled, observed = self._observed(X, Y)
        standardised, old = observed.mT.unsqueeze(-1), self._context  # (*fantasies, *batch, m, q, 1)
        batch = standardised.shape[:-3]
        rows = torch.cat([old.X.expand(*batch, *old.X.shape[-2:]), scaled.expand(*batch, *scaled.shape[-2:])], -2)
        outcomes = torch.cat([old.Y.expand(*batch, *old.Y.shape[-3:]), standardised], -2)
        conditioned = self._copy()
        conditioned._context, conditioned._conditioned = self._encode(rows, outcomes), True
        return conditioned

    def _saved_arguments(self) -> dict[str, Any]:
        return {"network": self.network, "max_context": self.max_context}

    def _state(self) -> dict[str, Tensor]:
        return dict(self.network.state_dict())

    def _set_state(self, tensors: dict[str, Tensor]) -> None:
        self.network.load_state_dict(tensors)
        assert self._data is not None
        self._set_context(self._data)


def _same_points(X: Tensor) -> Tensor:
    """Which points have the same inputs, (*batch, 1, q, q)."""
    return (X.unsqueeze(-2) == X.unsqueeze(-3)).all(-1).unsqueeze(-3)


def _num_shared_rows(X: Tensor) -> int:
    """How many leading rows all t-batch elements have in common, X (*batch, q, d)."""
    flat = X.detach().reshape(-1, *X.shape[-2:])
    differs = (flat != flat[:1]).any(-1).any(0)
    return int(differs.nonzero()[0]) if bool(differs.any()) else X.shape[-2]


def _with_draw_dimension(distribution: Distribution) -> Distribution:
    """Batch shape (*batch, q, m) -> (*batch, 1, q, m): one component of a mixture."""
    if isinstance(distribution, Histogram):
        borders, tails = (
            value if value.dim() == 1 else value.unsqueeze(-4)
            for value in (distribution.borders, distribution.tail_scale)
        )
        return Histogram(borders, distribution.logits.unsqueeze(-4), tails, validate_args=False)
    return Normal(distribution.mean.unsqueeze(-3), distribution.stddev.unsqueeze(-3), validate_args=False)
