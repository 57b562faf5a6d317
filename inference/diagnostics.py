r"""Whether chains can be trusted, in ArviZ's terms: summaries of the draws and of the run.

R-hat and effective sample sizes are rank-normalised (Vehtari et al. 2021). The energy diagnostic is the estimated Bayesian
fraction of missing information of a chain (Betancourt, Diagnosing suboptimal cotangent disintegrations, 2016, eq. 5),

.. math:: \text{E-BFMI} = \frac{\sum_n (E_n - E_{n-1})^2}{\sum_n (E_n - \bar E)^2}:

near 1 if a new momentum changes the energy as much as the whole posterior does, small if the chain walks slowly through the
energies; ArviZ and Stan take 0.3 as the bound. It is meant for samplers that draw momenta (HMC, NUTS); the energy of others is
:math:`-\log\pi` or has no momentum in it, and a low value says only that it is autocorrelated.

Weighted draws are resampled systematically within each chain, in their order. For independent draws that gives Kish's
effective sample size, since a draw of large weight counts as a run of copies.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bayesnn.inference.draws import WeightPosterior

ARVIZ_NAMES = {"acceptance": "acceptance_rate", "num_gradients": "n_steps"}
"""What ArviZ calls the statistics that it knows by another name."""
MIN_DRAWS = 4
"""Of each chain, below which ArviZ gives NaN and says so in its log."""
PROGRESS = ("inverse_temperature", "num_seen")
"""Statistics that say how far a run has come: it's their last value that counts, not their mean."""


def diagnose(posterior: WeightPosterior, function_values: Tensor) -> dict[str, float]:
    """R-hat, effective sample sizes, divergences and energy; see :meth:`WeightPosterior.diagnostics`."""
    values = function_values.detach()
    if values.dim() != 2 or len(values) != len(posterior):
        raise ValueError(f"function_values must be ({len(posterior)}, k), found {tuple(values.shape)}")
    arviz = _arviz()
    dataset = arviz.convert_to_dataset({"f": _by_chain(posterior, values).double().cpu().numpy()})
    nan, long_enough = float("nan"), len(posterior) // posterior.num_chains >= MIN_DRAWS
    results = {
        "r_hat": float(arviz.rhat(dataset)["f"].max()) if long_enough and posterior.num_chains > 1 else nan,
        "ess_bulk": float(arviz.ess(dataset, method="bulk")["f"].min()) if long_enough else nan,
        "ess_tail": float(arviz.ess(dataset, method="tail")["f"].min()) if long_enough else nan,
    }
    for name, values in posterior.statistics.items():
        results[name] = float(values[-1] if name in PROGRESS and values.dim() else values.double().mean())
    if "diverging" in posterior.statistics:
        results["num_diverging"] = float((posterior.statistics["diverging"] > 0).sum())
    energy = posterior.statistics.get("energy")
    if energy is not None and energy.dim() == 2:
        results["e_bfmi"] = float(arviz.bfmi(energy.double().cpu().numpy().T).min())
    return results


def summarise(posterior: WeightPosterior, patterns: str | Sequence[str] = "*") -> Any:
    """A table of parameters; see :meth:`WeightPosterior.summary`."""
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    names = [name for name in posterior.sampled if any(fnmatchcase(name, pattern) for pattern in wanted)]
    if not names:
        raise ValueError(f"patterns must match one of {', '.join(posterior.sampled)}, found {patterns!r}")
    arviz = _arviz()
    return arviz.summary(arviz.from_dict(posterior=_parameters(posterior, names)))


def inference_data(posterior: WeightPosterior) -> Any:
    """An ArviZ ``InferenceData``; see :meth:`WeightPosterior.to_arviz`."""
    statistics = {}
    num_draws = len(posterior) // posterior.num_chains
    for name, values in posterior.statistics.items():
        if values.shape != (num_draws, posterior.num_chains):
            continue  # of the run, not of each draw
        flags = values > 0 if name == "diverging" else values
        statistics[ARVIZ_NAMES.get(name, name)] = _by_chain(posterior, flags.T.flatten()).cpu().numpy()
    constants = {name: values.detach().cpu().numpy() for name, values in posterior.fixed.items()}
    return _arviz().from_dict(
        posterior=_parameters(posterior, list(posterior.sampled)), sample_stats=statistics, constant_data=constants
    )


def _parameters(posterior: WeightPosterior, names: list[str]) -> dict[str, Any]:
    return {name: _by_chain(posterior, posterior.parameters[name].detach()).cpu().numpy() for name in names}


def _by_chain(posterior: WeightPosterior, values: Tensor) -> Tensor:
    """Values of each draw, (S, …), as (chains, draws, …) of equal weights."""
    chains = posterior.by_chain(values)
    if posterior.log_weights is None:
        return chains
    log_weights = posterior.by_chain(posterior.log_weights.double())
    totals = torch.logsumexp(log_weights, 1)
    if not torch.allclose(totals, totals[:1].expand_as(totals), rtol=0, atol=1e-6):
        raise ValueError(
            "chains of different total weights can't be compared, as R-hat and ArviZ do: found log_weights that sum to "
            f"{[round(total, 3) for total in torch.log_softmax(totals, 0).exp().tolist()]} of the whole in each chain"
        )
    num_draws = log_weights.shape[1]
    grid = (torch.arange(num_draws, dtype=torch.float64, device=log_weights.device) + 0.5) / num_draws
    cdf = torch.softmax(log_weights, -1).cumsum(-1)
    index = torch.searchsorted(cdf, grid.expand_as(cdf).contiguous()).clamp_max(num_draws - 1)
    return torch.stack([chain[own] for chain, own in zip(chains, index, strict=True)])


def _arviz() -> Any:
    # Imported when asked for: it takes seconds, and is an extra.
    try:
        return importlib.import_module("arviz")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("diagnostics need ArviZ: pip install 'bayesnn[diagnostics]'") from error
