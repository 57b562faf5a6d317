"""What tells a target's checkpoints from another's: functions can't be compared, but their values can."""

from __future__ import annotations

from typing import Any

import torch

from bayesnn.inference.flat import without_validation


def probe(target: Any) -> dict[str, Any]:
    """A target's parameters, temperature and log densities, as JSON.

    The densities, log p(theta) and log p(y | theta), are those at two points near its initial ones; NaN where they can't be
    evaluated. They equal those of another machine or number of threads only up to rounding. Empty for what isn't a density
    of parameters.
    """
    while hasattr(target, "target"):  # a wrapper, whose own starting points are no part of the density
        target = target.target
    if not hasattr(target, "shapes"):
        return {}
    with torch.random.fork_rng(devices=[]), without_validation:
        # For initial points that come from the global generator in spite of the given one.
        torch.default_generator.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        points = target.initial(2, generator)
        for name, values in points.items():
            # Chains may begin at the mode of the density, which it has in common with others.
            shift = 0.1 * torch.randn(values.shape[1:], generator=generator, dtype=torch.float64)
            points[name] = values + torch.stack([torch.zeros_like(shift), shift]).to(values)
        densities = []
        for function in (target.log_prior, target.log_likelihood):
            try:
                densities += function(points).tolist()
            except (RuntimeError, ValueError):
                densities += [float("nan")] * 2
    return {
        "parameters": {name: [str(values.dtype), *values.shape[1:]] for name, values in points.items()},
        "temperature": float(target.temperature),
        "log density at two points": densities,
    }
