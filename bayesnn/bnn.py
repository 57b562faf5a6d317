"""Bayesian neural networks: a network, a likelihood, a prior and a method, each replaceable."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from bayesnn.data import BayesnnWarning, Data, Scaling, check_inputs
from bayesnn.inference.draws import WeightPosterior
from bayesnn.inference.ensembles.deep import DeepEnsemble
from bayesnn.inference.mcmc.hmc import HMC
from bayesnn.inference.network_target import NetworkTarget
from bayesnn.inference.partial import Stochastic, partial_target, stochastic_names
from bayesnn.inference.run import Method, check_method, run
from bayesnn.inference.vi.mean_field import MeanField
from bayesnn.likelihoods import Likelihood
from bayesnn.model import Model
from bayesnn.networks import mlp
from bayesnn.posteriors import FunctionDraws
from bayesnn.priors import Normal, PerLayer, Prior
from bayesnn.registry import register

NetworkBuilder = Callable[[int, int], nn.Module]


class BNN(Model):
    r"""A Bayesian neural network: :math:`y \sim p(y \mid f_w(x)),\; w \sim p(w)`, and a method that finds p(w | D).

    Args:
        network: any module whose output for a row depends on that row and its parameters alone, from (n, d) to (n, p),
            where p is the likelihood's ``latent_size(m)``; or a function (d, p) -> module, called at fit. None:
            ``networks.mlp(d, p, hidden=(50, 50))``. It is copied, never changed.
        likelihood: p(y | f); Gaussian with learned noise by default.
        prior: p(w); ``priors.Normal()`` by default.
        method: HMC, MeanField, DeepEnsemble …; HMC by default.
        stochastic: which of the network's parameters are sampled: "all"; "last", those of the last module (in the order of
            registration) that has any of its own; or names or patterns (as in a shell: ``["head.*", "*.bias"]``). The others
            are learned first, at the joint mode of all (``DeepEnsemble(num_members=1, held_out=0.0)``), and stay there. The
            likelihood's parameters are sampled in any case; frozen weights (``requires_grad_(False)``) never are.
        max_draws: at most so many draws, evenly spaced, answer ``posterior`` and ``predict``: their cost is linear in it.
        temperature: 1 for the Bayes posterior; below 1 a cold one.
        scale_inputs: standardise the columns of X.

    Raises:
        TypeError: if the method isn't one.
        ValueError: if max_draws or the temperature isn't positive; at fit, if the network uses batch statistics or random
            numbers, or has the wrong number of outputs, or ``stochastic`` names none of its parameters.
    """

    def __init__(
        self,
        network: nn.Module | NetworkBuilder | None = None,
        likelihood: Likelihood | None = None,
        prior: Prior | PerLayer | None = None,
        method: Method | None = None,
        max_draws: int = 256,
        temperature: float = 1.0,
        scale_inputs: bool = True,
        stochastic: Stochastic = "all",
    ) -> None:
        super().__init__(likelihood, scale_inputs)
        if max_draws < 1:
            raise ValueError(f"max_draws must be at least 1, found {max_draws}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, found {temperature}")
        self.network = network
        self.prior = Normal() if prior is None else prior
        self.method = HMC() if method is None else method
        check_method(self.method)
        self.max_draws, self.temperature, self.stochastic = max_draws, temperature, stochastic
        self._weights: WeightPosterior
        self._answering: WeightPosterior
        self._reweighting: Tensor | None = None
        self._seed = 0
        self._parts: tuple[int, ...] = ()  # how many rows came at each fit
        self._earlier: BNN | None = None  # while a fit goes on from it

    def refit(self, X: Any, Y: Any, **options: Any) -> Self:
        """A model with the same settings, fitted to more data from where this one's fit ended.

        Ensembles, mean-field fits and Metropolis-corrected chains go on, with inputs and outcomes scaled as they were: with a
        fifth of the steps, or a fifth of the draws after a warm-up that adapts step sizes alone. Chains leave the new
        posterior invariant, and forget where they come from as they move; for much other data than before, fit from scratch.
        All other methods do, and so do networks that are only partly stochastic.

        Args:
            X: inputs (n, d), of which the first are those that this model was fitted to.
            Y: outcomes (n, m).
            **options: those of ``fit``, but the seed: it is that of this model's fit.

        Raises:
            NotFittedError: before fit.
            TypeError, ValueError: for data that can't be used, fewer rows than before, other first rows, or other numbers of
                columns.
        """
        data, twin, rows = self._require_fitted(), type(self)(**self._arguments), check_inputs(X)
        if len(rows) < len(data) or rows.shape[1:] != data.X.shape[1:]:
            raise ValueError(
                f"X must have {len(data)} rows or more, and {data.X.shape[-1]} columns, as before; found {tuple(rows.shape)}"
            )
        before = self.train_inputs[0]
        if not torch.allclose(
            rows[: len(data)].to(before), before, rtol=1e-4, atol=1e-4 * float(self._inputs.scale.max())
        ):
            raise ValueError(
                "X must begin with the rows that this model was fitted to, in the same order; found others"
            )
        if hasattr(self.method, "continued") and self.stochastic == "all":
            twin._earlier = self
        try:
            return twin.fit(X, Y, seed=self._seed, **options)
        finally:
            twin._earlier = None

    def _input_scaling(self, X: Tensor) -> Scaling:
        return super()._input_scaling(X) if self._earlier is None else self._earlier._inputs.to(X)

    def _outcome_scaling(self, Y: Tensor) -> Scaling:
        if self._earlier is None:
            return super()._outcome_scaling(Y)
        before = self._earlier._outcomes
        if Y.shape[-1] != before.loc.shape[-1]:
            raise ValueError(f"Y must have {before.loc.shape[-1]} column(s), as before; found {Y.shape[-1]}")
        return before.to(Y)

    def _fit(self, data: Data, outcome_scale: Tensor, **options: Any) -> None:
        target = self._target(data, outcome_scale)
        names = stochastic_names(target.network, self.stochastic)
        if len(names) < len(stochastic_names(target.network, "all")):
            learning, options = _two_runs(options)
            learned = run(DeepEnsemble(num_members=1, held_out=0.0), target, **learning).parameters
            target = partial_target(target, names, {name: value[0] for name, value in learned.items()})
        self._seed = options["seed"]
        method: Any = self.method
        start: Any = target
        earlier = self._earlier
        if earlier is not None:
            method, start = method.continued(target, earlier.weights.to(data.X), earlier._parts)
        parts = () if earlier is None else earlier._parts
        self._parts = (*parts, len(data) - sum(parts))
        self._take(target, run(method, start, **options).completed(target.frozen))

    def _target(self, data: Data, outcome_scale: Tensor) -> NetworkTarget:
        network = self.network
        if not isinstance(network, nn.Module):
            builder: NetworkBuilder = mlp if network is None else network
            # Initial weights, which aren't used, are drawn from torch's global generator.
            with torch.random.fork_rng(devices=[]):
                network = builder(data.X.shape[-1], self.likelihood.latent_size(data.Y.shape[-1]))
        return NetworkTarget(network, self.likelihood, self.prior, data, outcome_scale, self.temperature)

    def _take(self, target: NetworkTarget, weights: WeightPosterior) -> None:
        self._fitted_network, self._fixed = target.network, target.fixed
        self._weights, self._answering = weights, weights.draws(self.max_draws)
        self._reweighting = None

    @property
    def weights(self) -> WeightPosterior:
        """The posterior over the parameters: all draws, with the run's statistics. Raises NotFittedError before fit."""
        self._require_fitted()
        return self._weights

    def diagnostics(self, X: Tensor | None = None) -> dict[str, float]:
        """R-hat and effective sample sizes of the function values, and the run's statistics.

        Args:
            X: where to look; the first 50 training inputs by default.
        """
        X = self.train_inputs[0][:50] if X is None else X
        with torch.no_grad():
            latent = self.weights.posterior(self._fitted_network, self._scaled(X))
        return self._weights.diagnostics(latent.values.flatten(-2))

    def _latent(self, X: Tensor) -> FunctionDraws:
        draws = self._answering.posterior(self._fitted_network, X)
        return draws if self._reweighting is None else FunctionDraws(draws.values, self._reweighting)

    def _likelihood_parameters(self) -> dict[str, Tensor]:
        own = {
            n.removeprefix("likelihood."): v
            for n, v in self._answering.parameters.items()
            if n.startswith("likelihood.")
        }
        return self._fixed | own

    @property
    def batch_shape(self) -> torch.Size:
        """Empty, or one entry for each set of fantasies."""
        return torch.Size([]) if self._reweighting is None else self._reweighting.shape[:-1]

    def condition_on_observations(self, X: Tensor, Y: Tensor, **kwargs: Any) -> Self:
        """Multiply each draw's weight by its likelihood of the new observations (importance sampling).

        Exact as the number of draws grows, but only for a few, not too surprising observations: with an effective sample
        size below 2 it warns, and the model should be refitted.
        """
        scaled, observed = self._observed(X, Y)
        draws = self._latent(scaled)
        log_likelihood = self.likelihood.log_prob(draws.values, observed.unsqueeze(-3), self._likelihood_parameters())
        log_weights = log_likelihood.sum(-1) + (0.0 if draws.log_weights is None else draws.log_weights)
        log_weights = torch.log_softmax(log_weights, -1)
        effective = float((-torch.logsumexp(2 * log_weights, -1)).exp().min())
        if effective < 2:
            warnings.warn(
                f"conditioning left an effective sample size of {effective:.1f} draws: refit with these observations",
                BayesnnWarning,
                stacklevel=2,
            )
        conditioned = self._copy()
        conditioned._reweighting, conditioned._conditioned = log_weights, True
        return conditioned

    def _state(self) -> dict[str, Tensor]:
        state = {f"draws.{name}": values for name, values in self._weights.sampled.items()}
        state |= {f"fixed.{name}": values for name, values in self._weights.fixed.items()}
        state |= {f"statistics.{name}": values for name, values in self._weights.statistics.items()}
        state |= {f"groups.{name}": values for name, values in self._weights.groups.items()}
        state |= {f"buffers.{name}": values for name, values in self._fitted_network.named_buffers()}
        state["num_chains"] = torch.tensor(self._weights.num_chains)
        state["seed"], state["parts"] = torch.tensor(self._seed), torch.tensor(self._parts)
        if self._weights.log_weights is not None:
            state["log_weights"] = self._weights.log_weights
        return state

    def _saved_arguments(self) -> dict[str, Any]:
        # What was built at fit, not the function that built it.
        return dict(self._arguments) | {"network": self._fitted_network}

    def _set_state(self, tensors: dict[str, Tensor]) -> None:
        parts: dict[str, dict[str, Tensor]] = {"draws": {}, "fixed": {}, "statistics": {}, "groups": {}, "buffers": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            if part in parts:
                parts[part][rest] = tensor
        assert self._data is not None
        self._seed = int(tensors.get("seed", 0))
        self._parts = tuple(tensors.get("parts", torch.tensor([len(self._data)])).tolist())
        target = self._target(self._data, self._outcomes.scale)
        target.network.load_state_dict(parts["buffers"], strict=False)
        self._take(
            target,
            WeightPosterior(
                parts["draws"],
                int(tensors["num_chains"]),
                tensors.get("log_weights"),
                parts["statistics"],
                parts["fixed"],
                parts["groups"],
            ),
        )


def _two_runs(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of the run that learns and of the one that samples, half of the time each.

    The user's callbacks are for the second.
    """
    folder, seconds = options.get("checkpoint"), options.get("time_budget")
    options = options | {"time_budget": seconds and seconds / 2}
    learning, sampling = ({"checkpoint": folder and Path(folder) / part} for part in ("learned", "sampled"))
    return options | learning | {"callbacks": (), "target_ess": None}, options | sampling


def _surrogate(method: Method) -> Callable[..., BNN]:
    return lambda **options: BNN(**({"method": method} | options))


register("hmc", _surrogate(HMC()))
register("mean-field", _surrogate(MeanField()))
register("ensemble", _surrogate(DeepEnsemble(anchored=True)))
