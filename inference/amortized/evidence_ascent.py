r"""A few gradient steps on what a network has read off a context.

The hyperparameters :math:`\theta` of Gaussian processes that a network reads in one pass are near those it would read with
more layers and training; from enough rows, the evidence itself says in which direction. So they are moved a little way up

.. math:: \log p(y \mid \theta) - \frac{1}{2 s^2} \lVert \theta - \theta_{\mathrm{read}} \rVert^2

by steps of Adam, in logarithms of lengthscales, amplitude and noise and in the warp's coefficients. The second term stands for
how exact the reading is. From few rows the evidence says less than the network, which knows the prior: then they stay.

Source: semi-amortised inference, Kim et al., Semi-amortized variational autoencoders (ICML 2018), from memory; here at the
maximum a posteriori of hyperparameters. Steps, rates and s were chosen on draws of the prior of "bo": at 50 and 100 rows they
are worth 0.04 nats per observation, at 20 nothing yet, and ten steps are hardly better than five.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayesnn.inference.amortized.warped_processes import WarpedProcesses
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
    n = X.shape[-2]
    if n < LEAST_ROWS:
        return processes
    if n > MOST_ROWS:
        ranks = torch.linspace(0, n - 1, MOST_ROWS, device=y.device).round().long()
        chosen = _by_rank(X, y)[..., ranks].unsqueeze(-1)
        X, y = X.gather(-2, chosen.expand(*chosen.shape[:-1], X.shape[-1])), y.gather(-2, chosen)
    read = {
        "log_sharpness": processes.sharpness.clamp_min(torch.finfo(processes.sharpness.dtype).tiny).log(),
        "warp": processes.warp,
        "log_amplitude": processes.amplitude.log(),
        "log_noise": processes.noise.log(),
    }
    counts, offset = processes.sharpness > 0, processes.offset

    def of(values: dict[str, Tensor]) -> WarpedProcesses:
        return WarpedProcesses.prior(
            values["log_sharpness"].exp() * counts,
            values["warp"],
            values["log_amplitude"].exp(),
            values["log_noise"].clamp_min(LEAST_LOG_NOISE).exp(),
            offset,
        )

    # Also where the caller wants no gradients.
    with torch.inference_mode(False), torch.enable_grad():
        start = {name: value.detach().clone() for name, value in read.items()}
        X, y, counts, offset = (part.detach().clone() for part in (X, y, counts, offset))
        values, state = start, adam_init(start)
        for _ in range(NUM_STEPS):
            values = {name: value.detach().requires_grad_() for name, value in values.items()}
            away = sum(
                ((values[name] - start[name]) / (WARP_STD if name == "warp" else READING_STD)).square().sum()
                for name in values
            )
            objective = of(values).given(X, y).log_evidence.sum() - 0.5 * away
            gradients = torch.autograd.grad(-objective, list(values.values()))
            with torch.no_grad():
                values, state = adam_step(values, dict(zip(values, gradients, strict=True)), state, RATE)
    counts, offset = processes.sharpness > 0, processes.offset
    return of({name: value + (values[name].detach() - start[name]) for name, value in read.items()})


def _by_rank(X: Tensor, y: Tensor) -> Tensor:
    """Indices (*batch, n) of the rows by y, and where that is the same by the columns of X."""
    order = torch.arange(X.shape[-2], device=X.device).expand(X.shape[:-1])
    for key in (*X.unbind(-1)[::-1], y[..., 0]):
        order = order.gather(-1, key.gather(-1, order).argsort(dim=-1, stable=True))
    return order
