"""Resampling: which particles live on, and how often.

Each scheme draws ancestors from log weights (J,), unnormalised, such that particle j is expected ``num`` w_j times. They
differ in how much the counts vary: least with systematic resampling, which takes one random number.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Resampling = Callable[[Tensor, torch.Generator, int], Tensor]


def normalised(log_weights: Tensor) -> Tensor:
    """The weights, (J,) in float64, summing to one.

    Raises:
        ValueError: if one is NaN or plus infinity, or none is above minus infinity.
    """
    log_weights = log_weights.double()
    if not bool(torch.isfinite(log_weights.max())):
        raise ValueError(
            f"log_weights must have a finite maximum and no NaN, found {float(log_weights.max())}: no particle has a weight"
        )
    return torch.softmax(log_weights, -1)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """1 / sum of squared normalised weights: J for equal weights, 1 for a single particle (Kong, Liu and Wong 1994)."""
    log_weights = log_weights.double()
    return (2 * torch.logsumexp(log_weights, -1) - torch.logsumexp(2 * log_weights, -1)).exp()


def multinomial(log_weights: Tensor, generator: torch.Generator, num: int) -> Tensor:
    """Independent draws, (num,)."""
    return _inverse_cdf(log_weights, torch.rand(num, generator=generator, dtype=torch.float64))


def stratified(log_weights: Tensor, generator: torch.Generator, num: int) -> Tensor:
    """One draw in each of ``num`` equal strata of the distribution function (Kitagawa 1996)."""
    uniform = torch.rand(num, generator=generator, dtype=torch.float64)
    return _inverse_cdf(log_weights, (torch.arange(num, dtype=torch.float64) + uniform) / num)


def systematic(log_weights: Tensor, generator: torch.Generator, num: int) -> Tensor:
    """The same place in each stratum: counts differ from ``num`` w_j by less than one (Carpenter et al. 1999).

    Not consistent for every order of the particles, though no practical counterexample is known.
    """
    uniform = torch.rand((), generator=generator, dtype=torch.float64)
    return _inverse_cdf(log_weights, (torch.arange(num, dtype=torch.float64) + uniform) / num)


def _inverse_cdf(log_weights: Tensor, places: Tensor) -> Tensor:
    weights = normalised(log_weights)
    cdf = weights.cumsum(-1)
    # Rounding may leave the end of the distribution function below a place near 1: it belongs to the last living particle.
    ancestors = torch.searchsorted(cdf, places * cdf[-1], right=True)
    return ancestors.clamp_max(int(weights.nonzero().max()))


SCHEMES: dict[str, Resampling] = {"multinomial": multinomial, "stratified": stratified, "systematic": systematic}
