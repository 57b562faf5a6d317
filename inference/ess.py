r"""The effective sample size of Markov chains (Vehtari et al., Rank-normalization, folding, and localization, 2021).

.. math:: \mathrm{ESS} = \frac{C N}{-1 + 2 \sum_{t=0}^{T} \hat P_t}, \qquad \hat P_t = \hat\rho_{2t} + \hat\rho_{2t+1},

for C chains of N draws, each split in halves, with autocorrelations :math:`\hat\rho` that count differences between chains as
correlation, and Geyer's initial monotone sequence of :math:`\hat P`. Without rank normalisation: that of means.
"""

from __future__ import annotations

import torch
from torch import Tensor


def effective_sample_size(values: Tensor) -> Tensor:
    """Of the mean of each column: values (C, N, k) -> (k,). NaN for fewer than 8 draws or a column that isn't finite.

    Raises:
        ValueError: if values isn't (C, N, k).
    """
    if values.dim() != 3:
        raise ValueError(f"values must be (chains, draws, k), found {tuple(values.shape)}")
    values = values.double()
    num_chains, num_draws, columns = values.shape
    if num_draws < 8:
        return values.new_full((columns,), torch.nan)
    half = num_draws // 2
    chains = torch.cat([values[:, :half], values[:, num_draws - half :]])  # (2C, N/2, k)
    centred = chains - chains.mean(1, keepdim=True)
    spectrum = torch.fft.rfft(centred, 2 * half, dim=1)
    covariance = torch.fft.irfft(spectrum.abs().square(), 2 * half, dim=1)[:, :half] / half
    within = covariance[:, 0].mean(0) * half / (half - 1)
    total = within * (half - 1) / half + chains.mean(1).var(0)
    correlation = 1 - (within - covariance.mean(0)) / total  # (N/2, k)
    correlation[0] = 1
    pairs = correlation[: half // 2 * 2].unflatten(0, (-1, 2)).sum(1)
    positive = (pairs > 0).cumprod(0).bool()
    monotone = torch.where(positive, pairs, 0.0).cummin(0).values
    # The first pair that isn't positive still gives its even lag, once, where that is positive.
    after = (2 * positive.sum(0)).clamp_max(half - 1)
    length = -1 + 2 * monotone.sum(0) + correlation.gather(0, after.unsqueeze(0))[0].clamp_min(0)
    size = 2 * num_chains * half / length.clamp_min(1 / torch.tensor(2.0 * num_chains * half).log10())
    return torch.where(total > 0, size, torch.nan)
