r"""Gaussian processes whose hyperparameters a network reads off the context, beside the network's own answer.

Attention approximates the solution of a linear system in as many steps as it has layers; where observations are precise and
many, that is most of what a set transformer stays behind the exact answer. Here H learned tokens attend to the context, as
queries do, and each then says what process the data may come from (``WarpedProcesses``), whose answer is exact. The law at a
query is a mixture of the network's own histogram and the H normals, as their probabilities :math:`q_{hk}` of its buckets:

.. math:: p_k = w_0 \, \mathrm{softmax}(\mathrm{logits})_k + \sum_h w_h \, q_{hk}.

The weights come from the query's token, which is told what the processes say, and from their evidence
:math:`\log p(y \mid h)`, so that together they stand for the posterior over hyperparameters. Where outcomes don't look like
any of these processes, the weights and the histogram have learned to say so, as far as the prior has such tasks.

Source: amortised hyperparameters, Liu et al., Task-agnostic amortized inference of Gaussian process hyperparameters
(NeurIPS 2020); Bitzer et al., Amortized inference for Gaussian process hyperparameters of structured kernels (UAI 2023); both
from memory. The tokens that read and the mixture with a histogram are ours.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bayesnn.inference.amortized.warped_processes import DEGREES, LEAST_VARIANCE, WarpedProcesses

# At the start: lengthscales of about sqrt(d), as the prior of search objectives has them, and noise of a tenth.
LOG_SHARPNESS, LOG_NOISE = -1.0, -2.3
MOST_LOG_SHARPNESS, LOG_NOISE_RANGE, MOST_LOG_AMPLITUDE = 4.0, (-7.0, 2.0), 3.0
WARP = 0.3  # times what is read: the warp's terms begin small
OWN_LOGIT = 3.0  # of the histogram's weight at the start; the processes' are 0
TRUST = 0.5  # in the evidence at the start; 1 is Bayes' rule for draws of the prior
NUM_TOLD = 5  # numbers that a query's token is told of each process
SMALLEST = 1e-30  # probability, in place of 0


class ProcessHeads(nn.Module):
    """H processes, and the mixture of their answers with a histogram.

    Args:
        width: of the tokens.
        num_processes: H.
        max_features: most features.
    """

    def __init__(self, width: int, num_processes: int, max_features: int) -> None:
        super().__init__()
        self.num_processes, self.max_features = num_processes, max_features
        self.tokens = nn.Parameter(torch.zeros(num_processes, width))
        self.norm = nn.LayerNorm(width)
        num_read = (1 + len(DEGREES)) * max_features + 2
        self.reading = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, num_read))
        self.tell = nn.Linear(NUM_TOLD * num_processes, width)
        self.weigh = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * (num_processes + 1)))
        self.trust = nn.Parameter(torch.zeros(()))

    def start(self, generator: torch.Generator) -> None:
        """Processes that differ, a query's token untouched, and most of the probability the histogram's."""
        last, weigh = self.reading[-1], self.weigh[-1]
        assert isinstance(last, nn.Linear) and isinstance(weigh, nn.Linear)
        with torch.no_grad():
            self.tokens.normal_(generator=generator)
            last.weight.mul_(0.3)
            for linear in (self.tell, weigh):
                linear.weight.zero_()
                linear.bias.zero_()
            weigh.bias[:: self.num_processes + 1] = OWN_LOGIT
            self.trust.fill_(TRUST)

    def read(self, tokens: Tensor, num_features: Tensor, offset: float = 0.0) -> WarpedProcesses:
        """What tokens (*batch, H, width) that have attended to a context of (*batch,) features say, given no rows yet."""
        d = self.max_features
        read = self.reading(self.norm(tokens)).double()
        log_sharpness, warp, log_amplitude, log_noise = read.split([d, len(DEGREES) * d, 1, 1], -1)
        features = num_features.double()[..., None, None]
        log_sharpness = (LOG_SHARPNESS + log_sharpness - 0.5 * features.log()).clamp(max=MOST_LOG_SHARPNESS)
        counts = torch.arange(d, device=tokens.device) < features
        noise = (LOG_NOISE + log_noise[..., 0]).clamp(*LOG_NOISE_RANGE).exp()
        return WarpedProcesses.prior(
            log_sharpness.exp() * counts,
            WARP * warp.unflatten(-1, (d, len(DEGREES))),
            log_amplitude[..., 0].clamp(-MOST_LOG_AMPLITUDE, MOST_LOG_AMPLITUDE).exp(),
            noise,
            torch.full_like(noise, offset),
        )

    def told(self, processes: WarpedProcesses, mean: Tensor, variance: Tensor) -> Tensor:
        """What is added to tokens (B, q, width) at queries where the processes answer (B, H, q)."""
        of_all = (processes.noise.log() + 1, _relative_evidence(processes, -10.0), processes.amplitude.log())
        parts = [mean, 0.3 * variance.log(), *(part[..., None].expand_as(mean) for part in of_all)]
        added: Tensor = self.tell(torch.stack(parts, -1).movedim(-3, -2).flatten(-2).to(self.tell.weight))
        return added

    def mixed(
        self, logits: Tensor, tokens: Tensor, processes: WarpedProcesses, mean: Tensor, variance: Tensor, inner: Tensor
    ) -> Tensor:
        """Log probabilities of buckets, for f and for y or for f alone.

        Args:
            logits: (B, q, L, K) of the histograms of f and y, L = 2, or of f, L = 1.
            tokens: (B, q, width), told of the processes.
            processes: of batch shape (B,).
            mean, variance: (B, H, q) of f.
            inner: (K-1,) the borders between buckets.
        """
        weights = self.weigh(tokens).unflatten(-1, (2, self.num_processes + 1))[..., : logits.shape[-2], :].to(logits)
        trusted = self.trust.to(logits) * _relative_evidence(processes, -30.0).to(logits)
        log_weights = (weights + F.pad(trusted, (1, 0))[:, None, None]).log_softmax(-1)
        observed = variance + processes.noise.square()[..., None]
        std = torch.stack([variance, observed][: logits.shape[-2]], -1).sqrt().to(logits).movedim(1, -1)  # (B, q, L, H)
        mean = mean.to(logits).movedim(1, -1)[..., None, :].expand_as(std)
        with torch.autocast(logits.device.type, enabled=False):
            probs = bucket_probabilities(log_weights[..., 1:].exp(), mean, std, inner)
        return torch.logaddexp(log_weights[..., :1] + logits.log_softmax(-1), probs.clamp_min(SMALLEST).log())

    def correlations(self, processes: WarpedProcesses, X: Tensor, q: int) -> Tensor:
        r"""Correlations (B, E, q, q) of f within groups of q rows of X (B, E q, d).

        Of the mixture of processes alone, weighted by their evidence as far as it is trusted:
        :math:`\mathrm{Cov}(f_i, f_j) = \sum_h w_h (c_{hij} + (m_{hi} - \bar m_i)(m_{hj} - \bar m_j))`.
        """
        weights = (self.trust.double() * _relative_evidence(processes, -30.0)).softmax(-1)[:, :, None, None]
        mean, covariance = processes.joint(X, q)
        away = mean - (weights * mean).sum(1, keepdim=True)
        covariance = (weights[..., None] * (covariance + away[..., :, None] * away[..., None, :])).sum(1)
        std = covariance.diagonal(dim1=-2, dim2=-1).clamp_min(LEAST_VARIANCE).sqrt()
        return (covariance / (std[..., :, None] * std[..., None, :])).clamp(-1, 1).to(X)


def _relative_evidence(processes: WarpedProcesses, least: float) -> Tensor:
    """Log posterior probabilities (B, H) of the processes under a uniform prior, clamped."""
    return processes.log_evidence.log_softmax(-1).clamp_min(least)


class _BucketProbabilities(torch.autograd.Function):
    r"""See :func:`bucket_probabilities`; by hand, since autograd would keep and pass over several times as much.

    With :math:`c(z) = \Phi(z) - 1[z > 0]`, which has all its digits in both tails, a bucket's probability is the difference of
    c at its borders, and 1 more for the bucket that holds the mean. So differences of whole mixtures keep the digits of small
    components beside large ones.
    """

    @staticmethod
    def forward(weights: Tensor, mean: Tensor, std: Tensor, inner: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z = (inner - mean[..., None]).div_(std[..., None])
        c = torch.special.ndtr(-z.abs()).copysign_(-z)
        holds_mean = torch.searchsorted(inner, mean.contiguous())
        probs = F.pad((weights[..., None, :] @ c)[..., 0, :], (1, 1)).diff(dim=-1)
        return probs.scatter_add_(-1, holds_mean, weights), z, c, holds_mean

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(inputs[0], inputs[2], *output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        if grad is None:
            return None, None, None, None
        weights, std, z, c, holds_mean = ctx.saved_tensors
        # A border that moves takes from one bucket what it gives to the next.
        flow = (grad[..., :-1] - grad[..., 1:])[..., None]
        with torch.autocast(grad.device.type, enabled=False):
            of_weights = (c @ flow)[..., 0] + grad.gather(-1, holds_mean)
            density = z.square().mul_(-0.5).exp_()
            of_mean = (density @ flow)[..., 0]
            of_std = (density.mul_(z) @ flow)[..., 0]
        factor = -weights / (math.sqrt(2 * math.pi) * std)
        return of_weights, factor * of_mean, factor * of_std, None


def bucket_probabilities(weights: Tensor, mean: Tensor, std: Tensor, inner: Tensor) -> Tensor:
    """Of mixtures of H normals (*batch, H): those of the K buckets that K-1 borders part, (*batch, K).

    Has first derivatives only.
    """
    probs: Tensor = _BucketProbabilities.apply(weights, mean, std, inner)[0]
    return probs
