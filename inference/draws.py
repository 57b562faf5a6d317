"""A posterior over parameters, as (weighted) draws, and how it answers at points: each draw is one function."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from bayesnn.inference.target import Parameters, apply_network, network_parameters
from bayesnn.posteriors import FunctionDraws


class WeightPosterior:
    """S draws of the parameters.

    Args:
        parameters: each (S, *shape); with several chains, chain by chain (S = chains x draws).
        num_chains: how many chains the draws come from; 1 for independent draws.
        log_weights: (S,), unnormalised; None means equal weights.
        statistics: what the method reports of its run (acceptance, divergences, step sizes …), tensors by name.
    """

    def __init__(
        self,
        parameters: Parameters,
        num_chains: int = 1,
        log_weights: Tensor | None = None,
        statistics: dict[str, Tensor] | None = None,
    ) -> None:
        self.parameters, self.num_chains, self.log_weights = parameters, num_chains, log_weights
        self.statistics = statistics or {}

    def __len__(self) -> int:
        return next(iter(self.parameters.values())).shape[0]

    def draws(self, num_draws: int) -> WeightPosterior:
        """At most ``num_draws`` of the draws, evenly spaced over the chains; weighted draws are resampled systematically."""
        if num_draws >= len(self):
            return self
        grid = (torch.arange(num_draws, dtype=torch.float64) + 0.5) / num_draws
        if self.log_weights is None:
            index = (grid * len(self)).long()
        else:
            cdf = torch.softmax(self.log_weights.double(), -1).cumsum(-1)
            index = torch.searchsorted(cdf, grid).clamp_max(len(self) - 1)
        return WeightPosterior({name: values[index] for name, values in self.parameters.items()})

    def posterior(self, network: nn.Module, X: Tensor) -> FunctionDraws:
        """The latent function values at X: (*batch, q, d) -> draws (*batch, S, q, p).

        The t-batch is folded into rows, so that the weights are never copied for each of its elements.
        """
        rows = X.reshape(-1, X.shape[-1])
        values = apply_network(network, network_parameters(self.parameters), rows)  # (S, rows, p)
        values = values.unflatten(1, X.shape[:-1]).movedim(0, -3)
        return FunctionDraws(values, self.log_weights)

    def by_chain(self, values: Tensor) -> Tensor:
        """Values of each draw, (S, …), as (chains, draws, …)."""
        return values.unflatten(0, (self.num_chains, -1))

    def diagnostics(self, function_values: Tensor) -> dict[str, float]:
        """R-hat and effective sample sizes in function space, and the method's own statistics.

        Weights have permutation symmetries, so that their R-hat says nothing; function values have none.

        Args:
            function_values: (S, k), the draws' values at k places (say, the predictions at k points).

        Returns:
            The worst over the k places of: ``r_hat`` (rank-normalised split R-hat; NaN for one short chain), ``ess_bulk``
            and ``ess_tail`` (Vehtari et al. 2021, through ArviZ); and the mean of each statistic of the run.
        """
        arviz = _arviz()
        array = self.by_chain(function_values.detach()).double().numpy()
        dataset = arviz.convert_to_dataset({"f": array})
        results = {
            "r_hat": float(arviz.rhat(dataset)["f"].max()),
            "ess_bulk": float(arviz.ess(dataset, method="bulk")["f"].min()),
            "ess_tail": float(arviz.ess(dataset, method="tail")["f"].min()),
        }
        return results | {name: float(values.double().mean()) for name, values in self.statistics.items()}

    def to_arviz(self) -> Any:
        """The draws and the run's statistics as an ArviZ ``InferenceData``."""
        arviz = _arviz()
        posterior = {name: self.by_chain(values).numpy() for name, values in self.parameters.items()}
        statistics = {name: values.T.numpy() for name, values in self.statistics.items() if values.dim() == 2}
        return arviz.from_dict(posterior=posterior, sample_stats=statistics)


def _arviz() -> Any:
    # Imported when asked for: it takes seconds, and is an extra.
    try:
        return importlib.import_module("arviz")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("diagnostics need ArviZ: pip install 'bayesnn[diagnostics]'") from error
