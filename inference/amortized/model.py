"""Models whose network has learned to answer from data: ``fit`` sets the context, a forward pass is the posterior.

The networks predict every point by itself. Points are tied together by a Gaussian copula, whose correlations the network
gives too: those of its Gaussian processes where it has some, or how far the prediction at one point moves when an observation
at another comes out one standard deviation high. Or points are drawn one after the other, each given those before it.
"""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal

from bayesnn.checks import count
from bayesnn.data import BayesnnWarning, Data, Scaling
from bayesnn.functions import FunctionDraw
from bayesnn.histogram import Histogram
from bayesnn.inference.amortized.autoregressive import Autoregressive
from bayesnn.inference.amortized.correlations import Context, correlations, same_points
from bayesnn.inference.amortized.evidence_ascent import LEAST_ROWS
from bayesnn.inference.amortized.localised import nearest_output
from bayesnn.inference.amortized.meta_training import MetaTarget, MetaTraining
from bayesnn.inference.amortized.ranges import (
    FAR,
    Bounds,
    bounded_scaling,
    check_bounds,
    check_range,
    outlier,
    outside,
    pairs,
)
from bayesnn.inference.amortized.tasks import TaskPrior
from bayesnn.inference.amortized.weights import frozen, pretrained_names, shipped
from bayesnn.inference.run import run
from bayesnn.likelihoods import Likelihood
from bayesnn.model import Model
from bayesnn.posteriors import Copula, correlation_root
from bayesnn.predictive import Predictive

MAX_SHARE = 0.9999
"""Most of the variance of y that is f's: where noise is scarce, a network's two answers may contradict each other."""

OFFSET = 1.0
"""How far, in standard deviations of the outcomes, their mean over the rows may be from the one over all inputs, for networks
with processes: where an optimiser's rows lie together, it is often as much."""

KEPT = 1.2
"""Times as many rows as a network has read hyperparameters off, and at least 30: so far they are kept where a model is
conditioned on more, as when a Gaussian process gets fantasies."""

Joint = Literal["copula", "autoregressive"]


class AmortizedModel(Model):
    """Base class of PFNs and neural processes; subclasses say which network ships.

    Args:
        network: a module with ``encode``, ``query`` and ``distributions`` (see ``SetTransformer`` and
            ``DeepSetNetwork``), or the name of one that ships with the package.
        likelihood: what the network's head stands for.
        max_context: more rows than it was trained on are refused; None: as the shipped network's card says, or no limit.
        bounds: known bounds (low, high) of all inputs, or one pair for each: [low, high] becomes the interval around 0 over
            which a uniform variable has variance 1. None: columns are standardised by their own mean and deviation.
        joint: how points are tied together, "copula" or "autoregressive".
        neighbours: each query sees this many rows, the nearest ones, and there may be any number of rows; None: all.

    Raises:
        ValueError: if no network of that name ships, for bounds that don't increase, another ``joint``, more neighbours than
            the network was trained on, or neighbours of autoregressive draws.
    """

    prefix: ClassVar[str] = ""

    def __init__(
        self,
        network: nn.Module | str,
        likelihood: Likelihood,
        max_context: int | None,
        bounds: Bounds | None = None,
        joint: Joint = "copula",
        neighbours: int | None = None,
    ) -> None:
        super().__init__(likelihood)
        if joint not in ("copula", "autoregressive"):
            raise ValueError(f"joint must be 'copula' or 'autoregressive', found {joint!r}")
        self.joint = joint
        self.bounds = None if bounds is None else pairs(bounds)
        if isinstance(network, str):
            names = [
                name.removeprefix(f"{self.prefix}-")
                for name in pretrained_names()
                if name.startswith(f"{self.prefix}-")
            ]
            if network not in names:
                raise ValueError(f"network must be one of {', '.join(names)}, or a network; found {network!r}")
            network, card = shipped(f"{self.prefix}-{network}")
            # Not as a submodule: what is done to this model doesn't reach others.
            self.__dict__["_shipped"] = network
            max_context = card["max_context"] if max_context is None else max_context
        wanted = ("encode", "query", "distributions", "max_features")
        if not isinstance(network, nn.Module) or not all(hasattr(network, name) for name in wanted):
            raise TypeError(f"network must be a module with {', '.join(wanted)}, found {type(network).__name__}")
        max_context = None if max_context is None else count("max_context", max_context, least=0)
        self._own: Any
        self.max_context = max_context
        if "_shipped" not in self.__dict__:
            self._modules["network"] = network
        self.neighbours = None if neighbours is None else count("neighbours", neighbours)
        if self.neighbours is not None and self.neighbours > (max_context or math.inf):
            raise ValueError(
                f"neighbours must be at most {max_context}, as many rows as the network was trained on, found {neighbours}"
            )
        if self.neighbours is not None and joint == "autoregressive":
            raise ValueError("neighbours must be None for autoregressive draws, whose context is one for all points")
        self._context: Context

    @property
    def network(self) -> Any:
        """Its network; of one that ships, a copy that is this model's own, made when it is first asked for."""
        if "network" not in self._modules:
            self._modules["network"] = copy.deepcopy(self._asked).requires_grad_(True)
        return self._modules["network"]

    @property
    def _asked(self) -> Any:
        """The network, or the one that ships and is shared."""
        return self._modules.get("network", self.__dict__.get("_shipped"))

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
            The model itself, with a trained copy of the network; a fit before is forgotten. The limits of values are not known
            any more, and a histogram's borders are those of the prior before.
        """
        count("seed", seed, least=0)
        training = MetaTraining() if training is None else training
        network = _without_range(self._asked).train().requires_grad_(False)
        run(training, MetaTarget(network, prior), seed=seed, progress=progress, checkpoint=checkpoint)
        self._modules["network"], self.max_context = network.eval(), training.max_context
        if self.neighbours is not None:
            self.neighbours = min(self.neighbours, max(1, training.max_context))
        self._data = None
        return self

    def _fit(self, data: Data, outcome_scale: Tensor, **options: Any) -> None:
        num_rows, num_features = data.X.shape
        limit = self._asked.max_features
        if num_features > limit:
            raise ValueError(
                f"X must have at most {limit} columns, as many as the network was trained on; found {num_features}"
            )
        if self.max_context is not None and self.neighbours is None and num_rows > self.max_context:
            raise ValueError(
                f"X must have at most {self.max_context} rows, its max_context; found {num_rows}. "
                "Take a subset, let each query see some neighbours, or train a network with a larger max_context"
            )
        check_range(self._asked.largest, data.X, data.Y)
        if self._asked.largest is not None:
            # Of inputs, one column is lost; of outcomes, everything.
            found = None if self.bounds is not None else outlier(data.X)
            if found is not None:
                warnings.warn(f"X: {found}", BayesnnWarning, stacklevel=3)
            found = outlier(data.Y) if self.likelihood.standardises else None
            if found is not None:
                raise ValueError(f"Y can't be used: {found}")
        if num_rows == 1 and self.likelihood.standardises:
            warnings.warn("Y has one row, which says nothing of its scale: 1 is taken", BayesnnWarning, stacklevel=3)
        self._set_context(data)

    def _scaled(self, X: Any) -> Tensor:
        scaled = super()._scaled(X)
        most = torch.finfo(scaled.dtype).max ** 0.25  # whose squares' products are numbers still
        if scaled.numel() and not float(scaled.detach().abs().max()) < most:
            raise ValueError(
                f"X must be within {most:.1g} standard deviations of its mean, found values beyond: look at them"
            )
        largest = (self._asked.largest or [math.inf])[0]
        where = None
        if outside(self.bounds, torch.as_tensor(X).detach()):
            where = "outside the bounds"
        elif scaled.numel() and float(scaled.detach().abs().max()) > FAR * largest:
            where = f"over {FAR * largest:.1f} standard deviations from its mean, twice as far as anything in training"
        if where is not None:
            message = f"X is {where}: the network can't say how little it knows there"
            warnings.warn(message, BayesnnWarning, stacklevel=3)
        return scaled

    def _input_scaling(self, X: Tensor) -> Scaling:
        if self.bounds is None:
            return super()._input_scaling(X)
        return bounded_scaling(self.bounds, X)

    def _set_context(self, data: Data) -> None:
        # In the data's dtype, so that gradients of a float64 acquisition function are float64.
        self.__dict__["_own"] = frozen(self._asked, data.X)  # which models share, and so no submodule
        self._context = self._encode(data.X, data.Y.T.unsqueeze(-1))

    def _encode(self, X: Tensor, Y: Tensor, known: Context | None = None) -> Context:
        """Rows as a context; ``known`` is one of the first of them, whose processes are kept."""
        n, k = X.shape[-2], self.neighbours
        if k is None or n <= k:
            found = self._encode_all(X, Y, None if known is None else known.processes)
            return found if known is None else found._replace(num_read=known.num_read)
        some = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:k].sort().values
        return Context(X, Y, None, self._encode_all(X[..., some, :], Y[..., some, :]))

    def _encode_all(self, X: Tensor, Y: Tensor, processes: Any = None) -> Context:
        rows, options = X.unsqueeze(-3).expand(*Y.shape[:-2], *X.shape[-2:]), {}
        if getattr(self._own, "process_heads", None) is not None:
            options = {"processes": processes, "offset": OFFSET if self.likelihood.standardises else 0.0}
        return Context(X, Y, self._own.encode(rows, Y, **options), num_read=X.shape[-2])

    def _marginals(self, context: Context, X: Tensor, latent_only: bool = False) -> tuple[Distribution, ...]:
        """The distributions of f and y, or of f and perhaps y, at X (*batch, q, d), each alone: batch shape (*batch, q, m)."""
        if context.cache is None:
            assert self.neighbours is not None
            # Steps up the evidence for each query would cost several times as much as all else.
            shared = context.common.processes if context.common.num_read >= LEAST_ROWS else None
            return self._own.distributions(nearest_output(self._own, context.X, context.Y, X, self.neighbours, shared))
        alone = {"latent_only": True} if latent_only and getattr(self._own, "tells_latent_apart", False) else {}
        output = self._own.query(context.cache, X.unsqueeze(-3), **alone)  # (*batch, m, q, …)
        outputs_at = max(X.dim(), context.Y.dim() - 1) - 2
        return self._own.distributions(output.transpose(outputs_at, outputs_at + 1))

    def _latent(self, X: Tensor) -> Any:
        return self._joint(X, of_observations=False)

    def _observations(self, latent: Any, X: Tensor) -> Copula | Autoregressive:
        return self._joint(X, of_observations=True)

    def _joint(self, X: Tensor, of_observations: bool) -> Copula | Autoregressive:
        if self.joint == "autoregressive":
            num_rows = self._context.X.shape[-2]
            most = None if self.max_context is None else self.max_context - num_rows + 1
            return Autoregressive(self._own, self._context.cache, X, of_observations, most)
        laws = self._marginals(self._context, X, latent_only=not of_observations)

        def root() -> Tensor:
            correlation = self._correlations(X)
            if of_observations:
                # Noise is independent from point to point: it only dilutes the correlations.
                share = (laws[0].variance / laws[1].variance).clamp_max(1).sqrt().mT
                diluted = correlation * share.unsqueeze(-1) * share.unsqueeze(-2)
                return correlation_root(diluted + torch.diag_embed(1 - share.square()))
            found = correlation_root(correlation)
            # A point that comes again is the same function value, to the last bit.
            first = same_points(X).to(torch.int8).argmax(-1).unsqueeze(-1)
            return found.gather(-2, first.expand(found.shape))

        return Copula(laws[1 if of_observations else 0], root)  # which only draws need: it costs q contexts

    def _correlations(self, X: Tensor) -> Tensor:
        """Of f between the points of each t-batch element, (*batch, m, q, q)."""
        context = self._context if self._context.common is None else self._context.common
        if context.processes is None:
            return correlations(self._marginals, self._encode_all, self._context, X)
        found: Tensor = self._own.correlations(context.cache, X.unsqueeze(-3))
        return torch.where(same_points(X), torch.ones_like(found), found)

    def _predictive(self, X: Tensor) -> Predictive:
        f, y = self._marginals(self._context, X)
        function_var = torch.minimum(f.variance, MAX_SHARE * y.variance).unsqueeze(-3)
        return Predictive(_with_draw_dimension(y), function_var=function_var)

    @property
    def draws_are_functions(self) -> bool:
        """Whether a draw's value at a point is the same whatever other points are asked for."""
        return self.joint == "copula"

    @property
    def answers_locally(self) -> bool:
        """Whether each query has a context of its own, its nearest rows: many queries of a common one cost no more."""
        return self._context.cache is None

    def draw_functions(self, num_draws: int, seed: int = 0) -> FunctionDraw:
        """As ``Model.draw_functions``, of the copula.

        Raises:
            TypeError: for autoregressive draws, which depend on what points are asked for and in what order.
        """
        if self.joint == "autoregressive":
            raise TypeError("autoregressive draws are no functions: they depend on the points and their order")
        return super().draw_functions(num_draws, seed)

    @property
    def batch_shape(self) -> torch.Size:
        """Empty, or one entry for each set of fantasies."""
        return self._context.X.shape[:-2] if self._data is not None else torch.Size([])

    def condition_on_observations(self, X: Tensor, Y: Tensor, **kwargs: Any) -> Self:
        """The model with more rows in its context: X (*batch, q, d), Y (*fantasies, *batch, q, m). Needs no training.

        A network that reads hyperparameters off its context keeps them while there are at most a fifth more rows than it has
        read, and reads them anew beyond, and below 30 rows. Gradients with respect to new rows don't pass through the steps
        that improve what it reads.
        """
        scaled, observed = self._observed(X, Y)
        most, total = self.max_context, self._context.X.shape[-2] + scaled.shape[-2]
        if most is not None and self.neighbours is None and total > most:
            raise ValueError(
                f"X must leave the model with at most {most} rows, its max_context, found {total}: "
                "let each query see some neighbours"
            )
        check_bounds(self.bounds, torch.as_tensor(X))
        check_range(self._asked.largest, scaled, observed)
        standardised, old = observed.mT.unsqueeze(-1), self._context  # (*fantasies, *batch, m, q, 1)
        batch = standardised.shape[:-3]
        rows = torch.cat([old.X.expand(*batch, *old.X.shape[-2:]), scaled.expand(*batch, *scaled.shape[-2:])], -2)
        outcomes = torch.cat([old.Y.expand(*batch, *old.Y.shape[-3:]), standardised], -2)
        conditioned = self._copy()
        kept = old.num_read >= LEAST_ROWS and rows.shape[-2] <= KEPT * old.num_read
        conditioned._context, conditioned._conditioned = self._encode(rows, outcomes, old if kept else None), True
        return conditioned

    def _saved_arguments(self) -> dict[str, Any]:
        names = ("network", "max_context", "bounds", "joint", "neighbours")
        return {name: getattr(self, name) for name in names}

    def _state(self) -> dict[str, Tensor]:
        return dict(self._asked.state_dict())

    def _set_state(self, tensors: dict[str, Tensor]) -> None:
        self.network.load_state_dict(tensors)
        assert self._data is not None
        self._set_context(self._data)


def _without_range(network: nn.Module) -> Any:
    """A copy that knows no largest values: those are of the prior before."""
    arguments = getattr(network, "_arguments", {})
    if "largest" not in arguments:
        return copy.deepcopy(network)
    twin = type(network)(**arguments | {"largest": None})
    twin.load_state_dict(network.state_dict())
    return twin.to(next(network.parameters()))


def _with_draw_dimension(distribution: Distribution) -> Distribution:
    """Batch shape (*batch, q, m) -> (*batch, 1, q, m): one component of a mixture."""
    if isinstance(distribution, Histogram):
        borders, tails = (
            value if value.dim() == 1 else value.unsqueeze(-4)
            for value in (distribution.borders, distribution.tail_scale)
        )
        return Histogram.of_log_probs(borders, distribution.logits.unsqueeze(-4), tails)
    return Normal(distribution.mean.unsqueeze(-3), distribution.stddev.unsqueeze(-3), validate_args=False)
