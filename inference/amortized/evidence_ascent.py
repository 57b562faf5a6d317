r"""A few gradient steps on what a network has read off a context.

The hyperparameters :math:`\theta` of Gaussian processes that a network reads in one pass are near those it would read with
more layers and training; from enough rows, the evidence itself says in which direction. So they are moved a little way up

.. math:: \log p(y \mid \theta) - \frac{1}{2 s^2} \lVert \theta - \theta_{\mathrm{read}} \rVert^2

by steps of Adam, in logarithms of lengthscales, amplitude and noise and in the warp's coefficients. The second term stands for
how exact the reading is. From few rows the evidence says less than the network, which knows the prior: then they stay.

Source: semi-amortised inference, Kim et al., Semi-amortized variational autoencoders (ICML 2018), from memory; here at the
maximum a posteriori of hyperparameters. Steps, rates and s were chosen on draws of the prior of "bo": at 50 and 100 rows they
are worth 0.04 nats per observation, at 20 nothing yet, and ten steps are hardly better than five. The gradient is written out:
autograd, with as many operations again for each, would take most of the time of an answer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayesnn.inference.amortized.tasks.covariances import reference_inputs
from bayesnn.inference.amortized.warped_processes import (
    DEGREES,
    LEAST_SPREAD,
    WarpedProcesses,
    matern32,
    powers,
    spread,
)
from bayesnn.inference.optimizer import adam_init, adam_step

LEAST_ROWS, MOST_ROWS = 30, 200
NUM_STEPS, RATE = 5, 0.15
READING_STD, WARP_STD = 0.7, 0.2
LEAST_LOG_NOISE = -7.0  # less would leave a covariance matrix of repeated rows without digits


def towards_evidence(processes: WarpedProcesses, X: Tensor, y: Tensor) -> WarpedProcesses:
    """Processes without rows, moved by what at least 30 rows (*batch, n, d) say, with outcomes (*batch, n, 1).

    Of more than 200 rows those at evenly spaced ranks of y count, whatever the rows' order. Gradients with respect to the rows
    and the network pass as if nothing had been moved.
    """
    n, d = X.shape[-2:]
    if n < LEAST_ROWS:
        return processes
    if n > MOST_ROWS:
        ranks = torch.linspace(0, n - 1, MOST_ROWS, device=y.device).round().long()
        chosen = _by_rank(X, y)[..., ranks].unsqueeze(-1)
        X, y = X.gather(-2, chosen.expand(*chosen.shape[:-1], d)), y.gather(-2, chosen)
    counts, offset, tiny = processes.sharpness > 0, processes.offset, torch.finfo(processes.sharpness.dtype).tiny
    log_scales = torch.stack([processes.amplitude, processes.noise], -1).log()
    read = torch.cat([processes.sharpness.clamp_min(tiny).log(), processes.warp.flatten(-2), log_scales], -1)
    with torch.no_grad():
        places = torch.cat([reference_inputs(d).to(offset).expand(*X.shape[:-2], -1, -1), X.to(offset)], -2)
        terms, values = (places, powers(places)), read.detach()
        precision = torch.full_like(values[..., :1, :], READING_STD**-2)
        precision[..., d:-2] = WARP_STD**-2
        start, state = values, adam_init({"theta": values})
        for _ in range(NUM_STEPS):
            gradient = evidence_gradient(values, terms, y.to(offset), counts, offset) - precision * (values - start)
            stepped, state = adam_step({"theta": values}, {"theta": -gradient}, state, RATE)
            values = stepped["theta"]
    moved = read + (values - start)
    log_sharpness, warp, log_amplitude, log_noise = moved.split([d, len(DEGREES) * d, 1, 1], -1)
    return WarpedProcesses.prior(
        log_sharpness.exp() * counts,
        warp.unflatten(-1, (d, len(DEGREES))),
        log_amplitude[..., 0].exp(),
        log_noise[..., 0].clamp_min(LEAST_LOG_NOISE).exp(),
        offset,
    )


def evidence_gradient(theta: Tensor, terms: tuple[Tensor, Tensor], y: Tensor, counts: Tensor, offset: Tensor) -> Tensor:
    r""":math:`\partial \log p(y \mid \theta) / \partial \theta` of processes (*batch, H).

    With :math:`\alpha = K^{-1} y` and :math:`G = \frac12 (\alpha \alpha^\top - K^{-1})`,
    :math:`\partial \log p(y) = \langle G, \partial K \rangle` (Rasmussen and Williams, equation 5.9). K depends on the
    kernel at the rows and at the reference inputs, whose weights W in that derivative are gathered first; the kernel's own
    derivative is :math:`\partial k = -\frac32 e^{-\sqrt 3 r}\, \partial r^2`.

    Args:
        theta: (*batch, H, 5 d + 2) logarithms of inverse lengthscales, coefficients of the warp, logarithms of amplitude and
            noise.
        terms: the reference inputs and the rows (*batch, R + n, d), and their powers (*batch, R + n, d, 4).
        y: (*batch, n, 1).
        counts: (*batch, H, d) which features count.
        offset: (*batch, H).
    """
    places, power = terms[0].unsqueeze(-3), terms[1].unsqueeze(-4)
    n, d = y.shape[-2], places.shape[-1]
    R = places.shape[-2] - n
    log_sharpness, warp, log_amplitude, log_noise = theta.split([d, len(DEGREES) * d, 1, 1], -1)
    sharpness = (log_sharpness.exp() * counts).unsqueeze(-2)
    z = (places + (power * warp.unflatten(-1, (d, len(DEGREES))).unsqueeze(-3)).sum(-1)) * sharpness
    kernel, decay = matern32(z, z)
    own, within = kernel[..., :R, R:].mean(-2), kernel[..., :R, :R].mean((-1, -2))
    centred = kernel[..., R:, R:] - own[..., :, None] - (own - within[..., None])[..., None, :]
    scale = (2 * log_amplitude[..., 0]).exp() / spread(within)
    noise_var = (2 * log_noise.clamp_min(LEAST_LOG_NOISE)).exp()
    K = scale[..., None, None] * centred + offset.square()[..., None, None]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(K + torch.diag_embed(noise_var.expand(*offset.shape, n))))
    alpha = inverse @ y.unsqueeze(-3)
    G = 0.5 * (alpha @ alpha.mT - inverse)
    W = z.new_empty(kernel.shape)
    W[..., R:, R:] = of_rows = scale[..., None, None] * G
    of_own = of_rows.sum(-1)
    of_log_scale = (of_rows * centred).sum((-1, -2))
    of_within = of_own.sum(-1) + of_log_scale / spread(within) * (1 - within > LEAST_SPREAD)
    W[..., :R, :R] = (of_within / R**2)[..., None, None]
    W[..., :R, R:] = -of_own[..., None, :] / R
    W[..., R:, :R] = -of_own[..., :, None] / R
    flow = W.mul_(decay)
    of_z = 6 * (flow @ z - flow.sum(-1, keepdim=True) * z)
    of_warp = ((of_z * sharpness).unsqueeze(-1) * power).sum(-3).flatten(-2)
    of_noise = 2 * noise_var[..., 0] * G.diagonal(dim1=-2, dim2=-1).sum(-1) * (log_noise[..., 0] >= LEAST_LOG_NOISE)
    return torch.cat([(of_z * z).sum(-2), of_warp, torch.stack([2 * of_log_scale, of_noise], -1)], -1)


def _by_rank(X: Tensor, y: Tensor) -> Tensor:
    """Indices (*batch, n) of the rows by y, and where that is the same by the columns of X."""
    order = torch.arange(X.shape[-2], device=X.device).expand(X.shape[:-1])
    for key in (*X.unbind(-1)[::-1], y[..., 0]):
        order = order.gather(-1, key.gather(-1, order).argsort(dim=-1, stable=True))
    return order
