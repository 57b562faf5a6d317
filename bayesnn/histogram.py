"""A histogram with half-normal tails as a distribution: the output of prior-data fitted networks.

Bucket probabilities :math:`p_k = \\mathrm{softmax}(\\mathrm{logits})_k` over borders :math:`b_0 < \\dots < b_K`. The
buckets :math:`1 \\dots K-2` are uniform. The first bucket is a half-normal that points down from :math:`b_1`, the last
one a half-normal that points up from :math:`b_{K-1}`, so that the support is the whole line:

.. math::
    V = b_1 - s_0 |Z| \\text{ with probability } p_0, \\qquad
    V = b_{K-1} + s_1 |Z| \\text{ with probability } p_{K-1}.

The tail scales :math:`s_0, s_1` don't depend on the widths of the outermost buckets. (Where they do, many buckets make
thin tails, and one outlier costs more than all other points together.)

Source: Müller et al., Transformers can do Bayesian inference (ICLR 2022), the "Riemann" distribution. Their closed-form
expected improvement, cdf and quantiles leave parts of the tails out; here every quantity contains them.
"""

from __future__ import annotations

import math
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from bayesnn.checks import positive

_HALF_NORMAL_MEAN = math.sqrt(2 / math.pi)


def prior_borders(samples: Tensor, num_buckets: int, *, coverage: float = 0.998) -> Tensor:
    """Borders for outcomes that look like ``samples``: half-way between quantiles and a uniform grid.

    With the empirical quantile function :math:`q` and the central interval :math:`[l, u]` that holds ``coverage`` of
    the samples, :math:`b_k = \\frac12 q(c_k) + \\frac12 (l + (u - l) k / K)`. Quantiles alone make wide buckets in
    the tails, where a narrow prediction is then cut off; a uniform grid alone wastes its buckets there. The mean of
    the two is fine where the samples are dense, and every width is at least half a uniform one, so that repeated
    samples make no empty bucket.

    Args:
        samples: any shape; draws of the outcomes in the units in which the histogram will be used.
        num_buckets: K, at least 3.
        coverage: share of the samples between the outermost borders.

    Returns:
        (K+1,) increasing borders.

    Raises:
        ValueError: if there are fewer than 3 buckets, or the samples have no spread or aren't finite.
    """
    if num_buckets < 3:
        raise ValueError(f"num_buckets must be at least 3 (two tails and one between), got {num_buckets}")
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage must be in (0, 1], found {coverage}")
    if not samples.is_floating_point():
        raise ValueError(f"samples must be of a floating-point dtype, found {samples.dtype}")
    ordered = samples.detach().flatten().sort().values
    if len(ordered) < 2 or not bool(ordered.isfinite().all()):
        raise ValueError("samples must be at least two finite numbers")
    level = (1 - coverage) / 2
    levels = torch.linspace(level, 1 - level, num_buckets + 1, dtype=samples.dtype, device=samples.device)
    position = levels * (len(ordered) - 1)
    below = position.floor().long().clamp_max(len(ordered) - 2)
    quantiles = torch.lerp(ordered[below], ordered[below + 1], position - below)
    if not quantiles[-1] > quantiles[0]:
        raise ValueError(f"samples must have some spread, but {coverage:.3g} of them equal {float(quantiles[0])}")
    grid = torch.linspace(0, 1, num_buckets + 1, dtype=samples.dtype, device=samples.device)
    return 0.5 * quantiles + 0.5 * torch.lerp(quantiles[0], quantiles[-1], grid)


def refined_borders(borders: Tensor, samples: Tensor, max_width: float, *, coverage: float = 0.9999) -> Tensor:
    """Borders that split buckets, and add some outside, until none of the inner ones is wider than ``max_width``.

    Args:
        borders: (K+1,). The inner ones, ``borders[1:-1]``, are kept.
        samples: any shape; draws of the outcomes, as for :func:`prior_borders`.
        max_width: of a bucket between tails.
        coverage: the new tails begin where they leave this share of the samples between them, or where the old ones do,
            whichever is farther out.

    Returns:
        (K'+1,) increasing borders, the outermost ones ``max_width`` beyond the tails' beginnings.

    Raises:
        ValueError: if ``max_width`` isn't positive, or the samples aren't finite.
    """
    positive("max_width", max_width)
    if not bool(samples.isfinite().all()):
        raise ValueError("samples must be finite")
    ordered, level = samples.detach().flatten().double().sort().values, (1 - coverage) / 2
    low, high = (float(ordered[round(share * (len(ordered) - 1))]) for share in (level, 1 - level))
    inner = borders[1:-1].double().tolist()
    # Whole steps outwards, so that the old borders are among the new ones.
    before, after = (max(0, math.ceil(gap / max_width)) for gap in (inner[0] - low, high - inner[-1]))
    knots = [inner[0] - before * max_width, *inner, inner[-1] + after * max_width]
    refined: list[float] = []
    for left, right in pairwise(knots):
        parts = math.ceil((right - left) / max_width - 1e-9)  # 0 for the ends where nothing is added
        refined += [left + (right - left) * part / parts for part in range(parts)]
    refined = [knots[0] - max_width, *refined, knots[-1], knots[-1] + max_width]
    return torch.tensor(refined, dtype=torch.float64).to(borders)


def prior_tail_scales(samples: Tensor, borders: Tensor) -> Tensor:
    """Scales (2,) of the half-normal tails that fit the samples outside the inner borders.

    Each is the median excess over the median of a standard half-normal, which a few extreme samples don't move. A
    side with fewer than 10 samples takes :func:`default_tail_scale`.
    """
    flat = samples.detach().flatten()
    scales = []
    for excess in (borders[1] - flat, flat - borders[-2]):
        outside = excess[excess > 0]
        scales.append(outside.median() / 0.6744897501960817 if len(outside) >= 10 else default_tail_scale(borders))
    return torch.stack(scales)


def default_tail_scale(borders: Tensor) -> Tensor:
    """An eighth of the span of the inner borders (*batch,): one standard deviation where they span ±4."""
    return (borders[..., -2] - borders[..., 1]) / 8


class Histogram(Distribution):
    """Uniform buckets between half-normal tails.

    Args:
        borders: (K+1,), or (*batch, K+1) where the units differ; increasing, K at least 3. The density starts its
            tails at ``borders[1]`` and ``borders[-2]``; the outermost borders are kept for plots and for the default
            tail scale.
        logits: (*batch, K) unnormalised log probabilities of the buckets.
        tail_scale: (2,) or (*batch, 2), scales of the lower and the upper tail; a number serves both. Default:
            :func:`default_tail_scale`.

    Raises:
        ValueError: if the shapes don't match, the borders don't increase or a tail scale isn't positive.
    """

    arg_constraints: ClassVar = {"logits": constraints.independent(constraints.real, 1)}
    support = constraints.real
    has_rsample = True

    def __init__(
        self,
        borders: Tensor,
        logits: Tensor,
        tail_scale: Tensor | float | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if logits.shape[-1] < 3 or borders.shape[-1] != logits.shape[-1] + 1:
            raise ValueError(
                f"borders must have one entry more than logits, and logits at least 3, along the last dimension; got "
                f"shapes {tuple(borders.shape)} and {tuple(logits.shape)}"
            )
        if validate_args is not False and not bool((borders.diff(dim=-1) > 0).all()):
            raise ValueError("borders must increase")
        if tail_scale is None:
            scale = default_tail_scale(borders)
            scale = torch.stack([scale, scale], -1)
        else:
            scale = torch.as_tensor(tail_scale, dtype=logits.dtype, device=logits.device)
            scale = scale.expand(2) if scale.ndim == 0 else scale
        if validate_args is not False and not bool(((scale > 0) & scale.isfinite()).all()):
            raise ValueError("tail_scale must be positive and finite")
        self.borders = borders.to(logits)
        self.tail_scale = scale.to(logits)
        self._unnormalised = logits
        super().__init__(logits.shape[:-1], validate_args=validate_args)

    @cached_property
    def logits(self) -> Tensor:
        """(*batch, K) log probabilities of the buckets."""
        return self._unnormalised.log_softmax(-1)

    @staticmethod
    def of_log_probs(borders: Tensor, log_probs: Tensor, tail_scale: Tensor) -> Histogram:
        """The histogram of log probabilities that are normalised already, which isn't checked."""
        found = Histogram(borders, log_probs, tail_scale, validate_args=False)
        found.logits = log_probs
        return found

    @property
    def probs(self) -> Tensor:
        """(*batch, K) probabilities of the buckets."""
        return self.logits.exp()

    @property
    def widths(self) -> Tensor:
        """(K,) or (*batch, K) differences of the borders."""
        return self.borders.diff(dim=-1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Histogram:
        """The same distribution with a larger batch shape."""
        batch = torch.Size(batch_shape)
        return Histogram.of_log_probs(self.borders, self.logits.expand(*batch, -1), self.tail_scale)

    def affine(self, loc: Tensor | float, scale: Tensor | float) -> Histogram:
        """The distribution of ``loc + scale * V``: the same probabilities over moved borders.

        Args:
            loc: a number, or a tensor that broadcasts against the batch shape.
            scale: likewise; not zero. A negative one turns the histogram around (then it must be one sign throughout).
        """
        loc, scale = (self._like_logits(value) for value in (loc, scale))
        borders = loc[..., None] + scale[..., None] * self.borders
        tails = scale.abs()[..., None] * self.tail_scale
        if bool((scale < 0).all()):
            return Histogram.of_log_probs(borders.flip(-1), self.logits.flip(-1), tails.flip(-1))
        return Histogram.of_log_probs(borders, self.logits, tails)

    # -- moments -------------------------------------------------------------------------------------------------

    @property
    def _bucket_means(self) -> Tensor:
        borders, offset = self.borders, _HALF_NORMAL_MEAN * self.tail_scale
        inner = (borders[..., 1:-2] + borders[..., 2:-1]) / 2
        lower, upper = borders[..., 1:2] - offset[..., :1], borders[..., -2:-1] + offset[..., 1:]
        return _cat(lower, inner, upper)

    @property
    def mean(self) -> Tensor:
        """(*batch,) expectation, tails included."""
        return (self.probs * self._bucket_means).sum(-1)

    @property
    def variance(self) -> Tensor:
        """(*batch,) variance, tails included: within the buckets plus between them."""
        tails = (1 - 2 / math.pi) * self.tail_scale.square()
        within = _cat(tails[..., :1], self.widths[..., 1:-1].square() / 12, tails[..., 1:])
        between = (self._bucket_means - self.mean[..., None]).square()
        return (self.probs * (within + between)).sum(-1)

    @property
    def median(self) -> Tensor:
        """(*batch,) the value with half of the probability on either side."""
        return self.icdf(torch.full_like(self.logits[..., 0], 0.5))

    def entropy(self) -> Tensor:
        """(*batch,) differential entropy in nats: of the choice of bucket, plus the mean of the buckets' own."""
        tails = 0.5 * torch.log(math.pi / 2 * self.tail_scale.square()) + 0.5
        inside = _cat(tails[..., :1], self.widths[..., 1:-1].log(), tails[..., 1:])
        return (self.probs * inside + torch.special.entr(self.probs)).sum(-1)

    def expected_improvement(self, best: Tensor | float) -> Tensor:
        """:math:`E[\\max(V - \\mathrm{best}, 0)]` in closed form, tails included; (*batch,) broadcast with ``best``."""
        best = self._like_logits(best)
        level = best[..., None]
        left, right = self.borders[..., 1:-2], self.borders[..., 2:-1]
        start = torch.maximum(torch.minimum(level, right), left)
        inner = (right - start) * ((start + right) / 2 - level) / (right - left)
        above, below = level - self.borders[..., -2:-1], self.borders[..., 1:2] - level
        lower_scale, upper_scale = self.tail_scale[..., :1], self.tail_scale[..., 1:]
        upper = _half_normal_excess(above.clamp_min(0), upper_scale) + (-above).clamp_min(0)
        gap = below.clamp_min(0)
        lower = gap - _HALF_NORMAL_MEAN * lower_scale + _half_normal_excess(gap, lower_scale)
        return (self.probs * _cat(lower, inner, upper)).sum(-1)

    def probability_of_improvement(self, best: Tensor | float) -> Tensor:
        """:math:`P(V > \\mathrm{best})`, tails included; (*batch,) broadcast with ``best``."""
        best = _broadcast(self._like_logits(best), self.batch_shape)
        # That of the mirror image below -best: one minus the cdf has no digits left where little is above.
        return self.affine(0.0, -1.0).cdf(-best)

    # -- density, cdf and quantiles ------------------------------------------------------------------------------

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, (*sample, *batch)."""
        if self._validate_args:
            self._validate_sample(value)
        value, index = self._locate(value)
        lower, upper = self._tail_distances(value)
        distance = torch.where(index == 0, lower, upper)
        scale = _take(self.tail_scale, (index > 0).long())
        tail = 0.5 * math.log(2 / math.pi) - scale.log() - 0.5 * (distance / scale).square()
        density = torch.where(self._in_tail(index), tail, -_take(self.widths, index).log())
        return _take(self.logits, index) + density

    def expected_log_prob(self, mean: Tensor, stddev: Tensor) -> Tensor:
        r""":math:`E[\log p(V)]` for :math:`V \sim N(\mathrm{mean}, \mathrm{stddev}^2)`, in closed form; (*batch,).

        With the normal's masses :math:`q_k` of the buckets, :math:`\sum_k q_k \log p_k` plus what doesn't depend on p: of the
        inner buckets minus the logarithms of their widths; of a tail at distance d from the mean, z = d / stddev,
        :math:`E[(V - b)^2; V > b] = \mathrm{stddev}^2 ((1 + z^2) \Phi(z) + z \phi(z))`. A stddev of 0 stands for a known V.
        """
        std = stddev.clamp_min(1e-6)[..., None]
        inner = self.borders[..., 1:-1]
        z = (inner - mean[..., None]) / std
        below = torch.special.ndtr(z)
        mass = _cat(below[..., :1], below.diff(dim=-1), torch.special.ndtr(-z[..., -1:]))
        ends = torch.stack([z[..., 0], -z[..., -1]], -1)
        density = torch.exp(-0.5 * ends.square()) / math.sqrt(2 * math.pi)
        squares = std.square() * ((1 + ends.square()) * torch.special.ndtr(ends) + ends * density)
        outside = _cat(mass[..., :1], mass[..., -1:])
        tails = (
            outside * (0.5 * math.log(2 / math.pi) - self.tail_scale.log()) - 0.5 * squares / self.tail_scale.square()
        )
        widths = (mass[..., 1:-1] * self.widths[..., 1:-1].log()).sum(-1)
        return (mass * self.logits).sum(-1) - widths + tails.sum(-1)

    def cdf(self, value: Tensor) -> Tensor:
        """:math:`P(V \\le \\mathrm{value})`, (*sample, *batch)."""
        value, index = self._locate(value)
        probs = self.probs
        lower, upper = self._tail_distances(value)
        scale = _take(self.tail_scale, (index > 0).long())
        distance = torch.where(index == 0, lower, upper)
        outside = torch.special.erfc(distance / (scale * math.sqrt(2)))
        mass = _take(probs, index)
        inside = (value - _take(self.borders, index)) / _take(self.widths, index)
        before = _take(probs.cumsum(-1) - probs, index)
        inner = before + mass * inside.clamp(0, 1)
        return torch.where(index == 0, mass * outside, torch.where(self._in_tail(index), 1 - mass * outside, inner))

    def icdf(self, value: Tensor) -> Tensor:
        """The quantile at probability ``value`` in (0, 1), (*sample, *batch); differentiable in it and the logits."""
        value = _broadcast(self._like_logits(value), self.batch_shape)
        probs = self.probs
        cumulative = probs.cumsum(-1)
        index = _search(cumulative[..., :-1].detach().contiguous(), value.detach(), right=True)
        mass = _take(probs, index)
        tiny = torch.finfo(value.dtype).tiny
        share = ((value - _take(cumulative - probs, index)) / mass.clamp_min(tiny)).clamp(0, 1)
        inner = _take(self.borders, index) + share * _take(self.widths, index)
        tail, is_lower = self._in_tail(index), index == 0
        outside = torch.where(is_lower, value, 1 - value) / mass.clamp_min(tiny)
        safe = torch.where(tail, outside.clamp(tiny, 1), torch.ones_like(outside))
        distance = -torch.special.ndtri(safe / 2) * _take(self.tail_scale, (index > 0).long())
        lower, upper = self.borders[..., 1], self.borders[..., -2]
        return torch.where(tail, torch.where(is_lower, lower - distance, upper + distance), inner)

    def rsample(self, sample_shape: Any = (), generator: torch.Generator | None = None) -> Tensor:
        """(*sample, *batch) inverse-cdf draws, differentiable in the logits."""
        shape = self._extended_shape(torch.Size(sample_shape))
        uniform = torch.rand(shape, generator=generator, dtype=self.logits.dtype, device=self.logits.device)
        tiny = torch.finfo(uniform.dtype).eps / 4
        return self.icdf(uniform.clamp(tiny, 1 - tiny))

    def sample(self, sample_shape: Any = (), generator: torch.Generator | None = None) -> Tensor:
        """(*sample, *batch) draws."""
        with torch.no_grad():
            return self.rsample(sample_shape, generator)

    def _like_logits(self, value: Tensor | float) -> Tensor:
        # A number must not pass through the default dtype, which may have fewer digits.
        return torch.as_tensor(value, dtype=self.logits.dtype, device=self.logits.device)

    def _locate(self, value: Tensor) -> tuple[Tensor, Tensor]:
        value = _broadcast(value.to(self.logits), self.batch_shape)
        return value, _search(self.borders[..., 1:-1].contiguous(), value.detach(), right=False)

    def _in_tail(self, index: Tensor) -> Tensor:
        return (index == 0) | (index == self.logits.shape[-1] - 1)

    def _tail_distances(self, value: Tensor) -> tuple[Tensor, Tensor]:
        return (self.borders[..., 1] - value).clamp_min(0), (value - self.borders[..., -2]).clamp_min(0)


def _half_normal_excess(level: Tensor, scale: Tensor) -> Tensor:
    """:math:`E[\\max(s|Z| - t, 0)]` for :math:`t \\ge 0`: twice the normal's expected improvement."""
    ratio = level / scale
    density = torch.exp(-0.5 * ratio.square()) / math.sqrt(2 * math.pi)
    return 2 * (scale * density - level * 0.5 * torch.special.erfc(ratio / math.sqrt(2)))


def _cat(*parts: Tensor) -> Tensor:
    batch = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*batch, part.shape[-1]) for part in parts], -1)


def _broadcast(value: Tensor, batch_shape: torch.Size) -> Tensor:
    return value.expand(torch.broadcast_shapes(value.shape, batch_shape))


def _take(table: Tensor, index: Tensor) -> Tensor:
    """Entry ``index`` (*sample, *batch) of ``table`` (K,) or (*batch, K)."""
    if table.ndim == 1:
        return table[index]
    return table.expand(*index.shape, table.shape[-1]).gather(-1, index[..., None])[..., 0]


def _search(ordered: Tensor, value: Tensor, right: bool) -> Tensor:
    """For each value (*sample, *batch) the number of entries of ``ordered`` (K,) or (*batch, K) below it."""
    if ordered.ndim == 1:
        return torch.bucketize(value.contiguous(), ordered, right=right)
    batch = ordered.shape[:-1]
    num_samples = value.ndim - len(batch)
    if num_samples == 0:
        return torch.searchsorted(
            ordered.expand(*value.shape, -1).contiguous(), value[..., None].contiguous(), right=right
        )[..., 0]
    ordered = ordered.expand(*value.shape[num_samples:], -1).contiguous()
    flat = value.reshape(-1, *value.shape[num_samples:]).movedim(0, -1).contiguous()
    found = torch.searchsorted(ordered, flat, right=right)
    return found.movedim(-1, 0).reshape(value.shape)
