r"""The continuous ranked probability score, :math:`\int (F(z) - 1[y \le z])^2 dz`.

A proper score in the units of y: the absolute error, generalised to predictions that are distributions.
Source: Gneiting and Raftery, Strictly proper scoring rules, prediction, and estimation (2007).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Normal

from bayesnn.metrics.checks import observations
from bayesnn.predictive import COUNTS, Predictive


def crps(p: Predictive, y: Tensor) -> float:
    r"""Continuous ranked probability score, :math:`\int (F(z) - 1[y \le z])^2 dz`, the mean over points and outputs.

    In closed form for mixtures of Gaussians, a sum over the whole numbers for counts, else by quadrature of the cdf.

    Raises:
        TypeError: for class labels.
        ValueError: if y doesn't have the prediction's shape.
    """
    return float(pointwise_crps(p, y).mean())


def pointwise_crps(p: Predictive, y: Tensor) -> Tensor:
    """:func:`crps` of each point and output, (*batch, q, m)."""
    y = observations(p, y)
    if isinstance(p.components, COUNTS):
        return _crps_counts(p, y)
    if isinstance(p.components, Normal):
        means, stds = p.component_moments
        if means.shape[-3] == 1:
            return crps_gaussian(means.squeeze(-3), stds.squeeze(-3), y)
        return crps_gaussian_mixture(means, stds, p.log_weights.exp()[..., None, None], y)
    return _crps_quadrature(p, y)


def crps_gaussian(mean: Tensor, std: Tensor, y: Tensor) -> Tensor:
    r"""CRPS of N(mean, std^2), elementwise: :math:`\sigma [z (2\Phi(z) - 1) + 2\phi(z) - 1/\sqrt\pi]`."""
    return _expected_distance(y - mean, std) - std / math.sqrt(math.pi)


def crps_gaussian_mixture(means: Tensor, stds: Tensor, weights: Tensor, y: Tensor) -> Tensor:
    r"""CRPS of a mixture of S Gaussians (Grimit et al. 2006).

    With :math:`A(\mu, \sigma) = E|N(\mu, \sigma^2)|`,

    .. math:: \sum_s w_s A(y - \mu_s, \sigma_s)
        - \tfrac12 \sum_{s,t} w_s w_t A(\mu_s - \mu_t, \sqrt{\sigma_s^2 + \sigma_t^2})

    Args:
        means, stds: (*batch, S, q, m).
        weights: broadcastable against them, summing to 1 over S.
        y: (*batch, q, m).

    Returns:
        (*batch, q, m).
    """
    weights = weights.expand(torch.broadcast_shapes(weights.shape, means.shape))
    accuracy = (weights * _expected_distance(y.unsqueeze(-3) - means, stds)).sum(-3)
    spread = torch.zeros_like(accuracy)
    for s in range(means.shape[-3]):  # one row of the S x S pairs at a time keeps memory linear in S
        mean, std, weight = (tensor[..., s : s + 1, :, :] for tensor in (means, stds, weights))
        distance = _expected_distance(mean - means, (std.square() + stds.square()).sqrt())
        spread += (weight * weights * distance).sum(-3)
    return accuracy - spread / 2


def crps_draws(samples: Tensor, y: Tensor, fair: bool = True) -> Tensor:
    r"""CRPS from S draws of y: :math:`\frac1S \sum_s |y - x_s| - \frac{1}{2 c} \sum_{s,t} |x_s - x_t|`, in O(S log S).

    Args:
        samples: (S, *shape), S at least 2 (1 if not fair).
        y: (*shape).
        fair: c = S (S - 1), an unbiased estimate of the score of the distribution that the draws come from (Ferro
            2014); it can be negative. False: c = S^2, the exact score of the draws themselves as a distribution.

    Returns:
        (*shape).

    Raises:
        ValueError: if there are too few draws.
    """
    num_draws = samples.shape[0]
    if num_draws < 1 + fair:
        raise ValueError(f"samples must hold at least {1 + fair} draws along the first dimension, found {num_draws}")
    # In order, x_(i) is the larger one in i - 1 of the pairs and the smaller one in S - i.
    rank = torch.arange(num_draws, dtype=samples.dtype, device=samples.device)
    signs = (2 * rank - (num_draws - 1)).reshape(-1, *(1 for _ in range(samples.dim() - 1)))
    half_pair_sum = (signs * samples.sort(0).values).sum(0)
    pairs = num_draws * (num_draws - 1) if fair else num_draws**2
    return (samples - y).abs().mean(0) - half_pair_sum / pairs


def _expected_distance(mean: Tensor, std: Tensor) -> Tensor:
    """E|N(mean, std^2)|."""
    z = mean / std
    density = (-0.5 * z.square()).exp() / math.sqrt(2 * math.pi)
    return std * (2 * density + z * torch.erf(z / math.sqrt(2)))


def _crps_quadrature(p: Predictive, y: Tensor, num_nodes: int = 100) -> Tensor:
    r"""CRPS from the cdf alone.

    From a centre c, :math:`CRPS(c) = \int_{-\infty}^c F^2 + \int_c^\infty (1 - F)^2`, and the score's derivative in y
    is :math:`2 F(y) - 1`. Both parts use Gauss-Legendre nodes t of :math:`z = c \pm s\, t / (1 - t)`.
    """
    low, high = p.interval(0.5)
    centre, scale = (low + high) / 2, ((high - low) / 2).clamp_min(torch.finfo(y.dtype).tiny ** 0.5)
    end = ((y - centre).abs() / scale).clamp_min(0)
    end = end / (1 + end)
    side = torch.where(y < centre, -1.0, 1.0).to(y)
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
    at_centre, way = torch.zeros_like(y), torch.zeros_like(y)
    for t, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        step, jacobian = scale * t / (1 - t), scale * weight / (1 - t) ** 2
        at_centre += jacobian * (p.cdf(centre - step).square() + (1 - p.cdf(centre + step)).square())
        share = end * t
        beyond = p.cdf(centre + side * scale * share / (1 - share))
        tail = torch.where(side > 0, 1 - beyond, beyond)
        way += scale * weight * end / (1 - share).square() * tail
    return at_centre + (y - centre).abs() - 2 * way


def _crps_counts(p: Predictive, y: Tensor) -> Tensor:
    """The integral is a sum over the whole numbers between the extreme quantiles, and out to y."""
    first = int(torch.minimum(p.quantile(1e-7), y).min())
    last = int(torch.maximum(p.quantile(1 - 1e-7), y).max())
    total = torch.zeros_like(y)
    for count in range(first, last + 1):
        total += (p.cdf(torch.full_like(y, count)) - (y <= count).to(y)).square()
    return total
