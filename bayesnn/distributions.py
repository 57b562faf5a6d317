"""What torch.distributions lacks for predictions: seeded sampling, every distribution's cdf, and some of its entries."""

from __future__ import annotations

from functools import singledispatch

import numpy as np
import scipy.special
import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    NegativeBinomial,
    Normal,
    Poisson,
    StudentT,
)

from bayesnn.histogram import Histogram

PARAMETERS: dict[type[Distribution], tuple[str, ...]] = {
    Normal: ("loc", "scale"),
    StudentT: ("df", "loc", "scale"),
    Bernoulli: ("logits",),
    Poisson: ("rate",),
    NegativeBinomial: ("total_count", "logits"),
}
"""What says all about a distribution, each of its batch shape."""


@singledispatch
def sample(
    distribution: Distribution, sample_shape: torch.Size, generator: torch.Generator, num_shared: int = 0
) -> Tensor:
    """Draw from a distribution with a generator: (*sample_shape, *batch_shape). Differentiable where rsample is.

    Args:
        distribution: what to draw from.
        sample_shape: how many draws.
        generator: where randomness comes from.
        num_shared: so many leading dimensions of the batch shape get the same random numbers: a value doesn't depend on
            its place there. (Not so for counts, which have no smooth map from random numbers to values.)

    Raises:
        TypeError: for a distribution without a rule here.
    """
    raise TypeError(f"no seeded sampler for {type(distribution).__name__}")


def _shape(distribution: Distribution, sample_shape: torch.Size, num_shared: int = 0) -> torch.Size:
    batch = distribution.batch_shape
    return torch.Size((*sample_shape, *(1 for _ in batch[:num_shared]), *batch[num_shared:]))


@sample.register
def _(distribution: Normal, sample_shape: torch.Size, generator: torch.Generator, num_shared: int = 0) -> Tensor:
    loc, shape = distribution.loc, _shape(distribution, sample_shape, num_shared)
    noise = torch.randn(shape, generator=generator, dtype=loc.dtype, device=loc.device)
    return loc + distribution.scale * noise


@sample.register
def _(distribution: StudentT, sample_shape: torch.Size, generator: torch.Generator, num_shared: int = 0) -> Tensor:
    loc, shape = distribution.loc, _shape(distribution, sample_shape, num_shared)
    noise = torch.randn(shape, generator=generator, dtype=loc.dtype, device=loc.device)
    df = distribution.df.expand(distribution.batch_shape)[(0,) * num_shared].expand(shape)
    chi2 = 2 * torch._standard_gamma(df / 2, generator=generator)
    return loc + distribution.scale * noise * (df / chi2).sqrt()


@sample.register
def _(distribution: Bernoulli, sample_shape: torch.Size, generator: torch.Generator, num_shared: int = 0) -> Tensor:
    probs, shape = distribution.probs, _shape(distribution, sample_shape, num_shared)
    uniform = torch.rand(shape, generator=generator, dtype=probs.dtype, device=probs.device)
    return (uniform < probs).to(probs)


@sample.register
def _(distribution: Categorical, sample_shape: torch.Size, generator: torch.Generator, num_shared: int = 0) -> Tensor:
    shape = _shape(distribution, sample_shape, num_shared)
    uniform = torch.rand((*shape, 1), generator=generator, dtype=distribution.probs.dtype)
    # Inverse cdf; the last edge is left out, so that rounding never yields a class that doesn't exist.
    edges = distribution.probs.cumsum(-1)[..., :-1]
    return (uniform > edges).sum(-1)


@sample.register
def _(distribution: Poisson, sample_shape: torch.Size, generator: torch.Generator, num_shared: int = 0) -> Tensor:
    return torch.poisson(distribution.rate.expand(_shape(distribution, sample_shape)), generator=generator)


@sample.register
def _(
    distribution: NegativeBinomial, sample_shape: torch.Size, generator: torch.Generator, num_shared: int = 0
) -> Tensor:
    shape = _shape(distribution, sample_shape)
    gamma = torch._standard_gamma(distribution.total_count.expand(shape), generator=generator)
    return torch.poisson(gamma * distribution.logits.exp(), generator=generator)


@sample.register
def _(distribution: Histogram, sample_shape: torch.Size, generator: torch.Generator, num_shared: int = 0) -> Tensor:
    logits, shape = distribution.logits, _shape(distribution, sample_shape, num_shared)
    uniform = torch.rand(shape, generator=generator, dtype=logits.dtype)
    return distribution.icdf(uniform.expand(_shape(distribution, sample_shape)))


@singledispatch
def cdf(distribution: Distribution, value: Tensor) -> Tensor:
    """P(y <= value), elementwise. Differentiable for the Gaussian and the histogram only."""
    return distribution.cdf(value)


def _special(function: str, *arguments: Tensor) -> Tensor:
    arrays = [argument.detach().double().cpu().numpy() for argument in arguments]
    return torch.from_numpy(np.asarray(getattr(scipy.special, function)(*arrays))).to(arguments[-1])


@cdf.register
def _(distribution: StudentT, value: Tensor) -> Tensor:
    return _special("stdtr", distribution.df, (value - distribution.loc) / distribution.scale)


@cdf.register
def _(distribution: Bernoulli, value: Tensor) -> Tensor:
    return torch.where(
        value < 0, 0.0, torch.where(value < 1, 1 - distribution.probs, torch.ones_like(distribution.probs))
    )


@cdf.register
def _(distribution: Poisson, value: Tensor) -> Tensor:
    floor = value.floor()
    below = _special("gammaincc", floor.clamp_min(0) + 1, distribution.rate)
    return torch.where(floor < 0, torch.zeros_like(below), below)


@cdf.register
def _(distribution: NegativeBinomial, value: Tensor) -> Tensor:
    # torch counts successes of probability p before total_count failures; I_{1-p}(r, k+1).
    floor = value.floor()
    below = _special("betainc", distribution.total_count, floor.clamp_min(0) + 1, 1 - distribution.probs)
    return torch.where(floor < 0, torch.zeros_like(below), below)


@singledispatch
def outputs(distribution: Distribution, indices: list[int]) -> Distribution:
    """The distribution of some entries of the last batch dimension.

    Raises:
        TypeError: for a distribution without a rule here.
    """
    for kind, names in PARAMETERS.items():
        if isinstance(distribution, kind):
            chosen = {
                name: getattr(distribution, name).expand(distribution.batch_shape)[..., indices] for name in names
            }
            return type(distribution)(**chosen, validate_args=False)
    raise TypeError(
        f"a {type(distribution).__name__} has no outputs of their own: predict with the whole model, without subset_output"
    )


@outputs.register
def _(distribution: Histogram, indices: list[int]) -> Distribution:
    def chosen(table: Tensor) -> Tensor:
        return table if table.dim() == 1 else table.expand(*distribution.batch_shape, -1)[..., indices, :]

    borders, logits, tail_scale = map(chosen, (distribution.borders, distribution.logits, distribution.tail_scale))
    return Histogram(borders, logits, tail_scale, validate_args=False)


def from_normals(distribution: Distribution, normals: Tensor) -> Tensor:
    """The values of a Normal or a Histogram at the same probabilities as a standard normal's: (*sample, *batch)."""
    if isinstance(distribution, Normal):
        return distribution.loc + distribution.scale * normals
    eps = torch.finfo(normals.dtype).eps
    return distribution.icdf(torch.special.ndtr(normals).clamp(eps, 1 - eps))


def affine(distribution: Distribution, loc: Tensor, scale: Tensor) -> Distribution:
    """The distribution of ``loc + scale * value`` for a Normal or a Histogram; scale is positive."""
    if isinstance(distribution, Histogram):
        return distribution.affine(loc, scale)
    return Normal(loc + scale * distribution.mean, scale * distribution.stddev, validate_args=False)
