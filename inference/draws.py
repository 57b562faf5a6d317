"""A posterior over parameters, as (weighted) draws, and how it answers at points: each draw is one function."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bayesnn.inference import diagnostics
from bayesnn.inference.members import apply_network, network_parameters
from bayesnn.inference.target import Parameters
from bayesnn.posteriors import FunctionDraws


class WeightPosterior:
    """S draws of the parameters.

    Args:
        parameters: each (S, *shape); with several chains, chain by chain (S = chains x draws).
        num_chains: how many chains the draws come from; 1 for independent draws.
        log_weights: (S,), unnormalised; None means equal weights.
        statistics: what the method reports of its run (acceptance, divergences, step sizes …), tensors by name.
        fixed: parameters that are the same in all draws, (*shape) each: those of a partly stochastic network that were
            learned. Among ``parameters`` they are views, not S copies.
        groups: which of a chain's parameters belong together: numbers from 0, (chains, *shape) for each sampled parameter.
            In the posterior that is meant, parameters of different groups are independent, whatever they are within a
            chain: :meth:`draws` makes them so. None: draws are what they are.
    """

    def __init__(
        self,
        parameters: Parameters,
        num_chains: int = 1,
        log_weights: Tensor | None = None,
        statistics: dict[str, Tensor] | None = None,
        fixed: Parameters | None = None,
        groups: Parameters | None = None,
    ) -> None:
        self.num_chains, self.log_weights = num_chains, log_weights
        self.statistics, self.fixed, self.groups = statistics or {}, fixed or {}, groups or {}
        count = next(iter(parameters.values())).shape[0]
        self.parameters = parameters | {name: value.expand(count, *value.shape) for name, value in self.fixed.items()}

    @property
    def sampled(self) -> Parameters:
        """The parameters that differ between draws."""
        return {name: values for name, values in self.parameters.items() if name not in self.fixed}

    def to(self, like: Tensor) -> WeightPosterior:
        """The same draws in a tensor's dtype and place."""
        moved = copy.copy(self)
        moved.parameters, moved.fixed = (
            {name: value.to(like) for name, value in parameters.items()} for parameters in (self.parameters, self.fixed)
        )
        return moved

    def completed(self, fixed: Parameters) -> WeightPosterior:
        """The same draws, with parameters that all of them have in common."""
        complete = copy.copy(self)
        WeightPosterior.__init__(
            complete, self.sampled, self.num_chains, self.log_weights, self.statistics, self.fixed | fixed, self.groups
        )
        return complete

    def __len__(self) -> int:
        return next(iter(self.parameters.values())).shape[0]

    def draws(self, num_draws: int) -> WeightPosterior:
        """At most ``num_draws`` of the draws, to predict with: evenly spaced over the chains, weighted ones resampled
        systematically. With groups, each group takes those of its chain in a random order of its own, always the same one.
        """
        num_draws = min(num_draws, len(self))
        if num_draws == len(self) and not self.groups:
            return self
        grid = (torch.arange(num_draws, dtype=torch.float64) + 0.5) / num_draws
        if self.log_weights is None:
            index = (grid * len(self)).long()
        else:
            cdf = torch.softmax(self.log_weights.double(), -1).cumsum(-1)
            index = torch.searchsorted(cdf, grid).clamp_max(len(self) - 1)
        chosen = self._mixed(index) if self.groups else {name: values[index] for name, values in self.sampled.items()}
        return WeightPosterior(chosen, fixed=self.fixed)

    def _mixed(self, index: Tensor) -> Parameters:
        """The draws of an ascending index, each group's in another order within its chain."""
        chain = index // (len(self) // self.num_chains)
        num_groups = 1 + max(int(groups.max()) for groups in self.groups.values())
        keys = torch.rand(len(index), num_groups, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        rows = index[(chain.unsqueeze(-1) + keys).argsort(0)]  # (S, groups)
        mixed = {}
        for name, values in self.sampled.items():
            groups = self.groups[name].reshape(self.num_chains, -1)[chain]
            flat = values.reshape(len(values), -1)
            mixed[name] = flat.gather(0, rows.gather(1, groups)).reshape(-1, *values.shape[1:])
        return mixed

    def posterior(self, network: nn.Module, X: Tensor) -> FunctionDraws:
        """The latent function values at X: (*batch, q, d) -> draws (*batch, S, q, p).

        Parameters of the network that aren't among the draws' keep their values in the network. The t-batch is folded into
        rows, so that the weights are never copied for each of its elements.
        """
        rows = X.reshape(-1, X.shape[-1])
        own, shared = network_parameters(self.sampled), network_parameters(self.fixed)
        shared |= {name: value for name, value in network.named_parameters() if name not in own | shared}
        values = apply_network(network, own, rows, shared)  # (S, rows, p)
        values = values.unflatten(1, X.shape[:-1]).movedim(0, -3)
        return FunctionDraws(values, self.log_weights)

    def by_chain(self, values: Tensor) -> Tensor:
        """Values of each draw, (S, …), as (chains, draws, …)."""
        return values.unflatten(0, (self.num_chains, -1))

    def diagnostics(self, function_values: Tensor) -> dict[str, float]:
        """R-hat and effective sample sizes in function space, and what the method says of its run.

        Weights have permutation symmetries, so that their R-hat says nothing; function values have none.

        Args:
            function_values: (S, k), the draws' values at k places (say, the predictions at k points).

        Returns:
            The worst over the k places of ``r_hat`` (rank-normalised split R-hat; NaN for one chain), ``ess_bulk`` and
            ``ess_tail`` (Vehtari et al. 2021, through ArviZ); the mean of each statistic of the run, or the last value of
            those that say how far it has come; where the method reports them, ``num_diverging`` and the smallest ``e_bfmi`` of
            the chains' energies (Betancourt 2016, eq. 5). Weighted draws are resampled systematically within their chains
            first.

        Raises:
            ValueError: if the shape is another, or weighted chains have different total weights.
            ModuleNotFoundError: if ArviZ isn't installed.
        """
        return diagnostics.diagnose(self, function_values)

    def summary(self, patterns: str | Sequence[str] = "*") -> Any:
        """ArviZ's table (a data frame) of named parameters: mean, sd, interval, effective sample sizes, R-hat.

        Args:
            patterns: names or patterns (as in a shell), such as "likelihood.*"; all sampled parameters by default.

        Raises:
            ValueError: if nothing matches.
            ModuleNotFoundError: if ArviZ isn't installed.
        """
        return diagnostics.summarise(self, patterns)

    def to_arviz(self) -> Any:
        """The draws and each draw's statistics as an ArviZ ``InferenceData``, under ArviZ's names; fixed parameters as
        constant data.
        """
        return diagnostics.inference_data(self)
