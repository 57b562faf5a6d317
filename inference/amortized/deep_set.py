"""The network of a conditional neural process: a deep set encodes the context, an MLP decodes it at each query.

.. math::
    r = \\frac1n \\sum_i \\phi(x_i, y_i), \\qquad (\\mu, \\log \\sigma_f, \\log \\sigma_n) = \\psi(x, r, \\log(1 + n)),
    \\qquad f \\sim N(\\mu, \\sigma_f^2), \\quad y \\sim N(\\mu, \\sigma_f^2 + \\sigma_n^2).

Source: Garnelo et al., Conditional neural processes (ICML 2018). The mean forgets how many rows there are, so the
decoder gets the count as well; an empty context has r = 0 and count 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal

from bayesnn.configured import Configured


class ContextSummary(NamedTuple):
    """What queries need of the context.

    Attributes:
        representation: (*batch, 1, width + 2): r, the scaled log count, and the share of features in use.
        num_features: (*batch,) how many features count.
        num_rows: n.
    """

    representation: Tensor
    num_features: Tensor
    num_rows: int

    def expand(self, batch: Sequence[int]) -> ContextSummary:
        """The same for a larger batch shape."""
        representation = self.representation.expand(*batch, *self.representation.shape[-2:])
        return ContextSummary(representation, self.num_features.expand(*batch), self.num_rows)


class DeepSetNetwork(Configured, nn.Module):
    """Deep-set encoder and MLP decoder; inputs are scaled and padded as in the set transformer.

    Args:
        max_features: most features.
        width: hidden size, and size of r.
        encoder_layers: hidden layers of :math:`\\phi`.
        decoder_layers: hidden layers of :math:`\\psi`.
        smallest_std: lower bound of :math:`\\sigma_f` and :math:`\\sigma_n` in standardised units.
        largest: magnitudes of the inputs and of the outcomes beyond which it isn't trained; None: not known.
        seed: of the initial weights.
    """

    def __init__(
        self,
        max_features: int,
        width: int = 192,
        encoder_layers: int = 3,
        decoder_layers: int = 4,
        smallest_std: float = 1e-3,
        largest: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.largest = largest
        self.max_features, self.smallest_std = max_features, smallest_std
        self.encoder = _mlp(max_features + 1, width, encoder_layers, width)
        self.decoder = _mlp(max_features + width + 2, width, decoder_layers, 3)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for linear in (child for child in self.modules() if isinstance(child, nn.Linear)):
                linear.weight.normal_(std=(2 / linear.in_features) ** 0.5, generator=generator)
                linear.bias.zero_()
            last = self.decoder[-1]
            assert isinstance(last, nn.Linear)
            last.weight.mul_(0.1)  # start near the same prediction everywhere

    @property
    def hidden_matrices(self) -> frozenset[str]:
        """Names of the weight matrices between the first and the last of the encoder and of the decoder."""
        names = [
            f"{part}.{2 * index}.weight"
            for part, depth in (("encoder", len(self.encoder)), ("decoder", len(self.decoder)))
            for index in range(1, depth // 2)
        ]
        return frozenset(names)

    def forward(
        self, context_X: Tensor, context_y: Tensor, X: Tensor, num_features: Tensor | None = None
    ) -> tuple[Normal, Normal]:
        """Predict every query by itself.

        Args:
            context_X: (*batch, n, d), n may be 0.
            context_y: (*batch, n, 1), standardised by the context.
            X: (*batch, q, d).
            num_features: (*batch,) for padded inputs; default: all d count.

        Returns:
            Normals of f and of y with batch shape (*batch, q), in standardised units.
        """
        return self.distributions(self.query(self.encode(context_X, context_y, num_features), X))

    def distributions(self, output: Tensor) -> tuple[Normal, Normal]:
        """The normals of f and of y, batch shape (*batch, q), of (mean, std of f, std of the noise) (*batch, q, 3)."""
        mean, f_std, noise_std = output.unbind(-1)
        y_std = (f_std.square() + noise_std.square()).sqrt()
        return Normal(mean, f_std, validate_args=False), Normal(mean, y_std, validate_args=False)

    def encode(self, context_X: Tensor, context_y: Tensor, num_features: Tensor | None = None) -> ContextSummary:
        """Summarise the context; the arguments are those of :meth:`forward`."""
        batch, n, d = context_X.shape[:-2], context_X.shape[-2], context_X.shape[-1]
        if num_features is None:
            num_features = torch.full(batch, d, device=context_X.device)
        return self._summary(self._total(context_X, context_y, num_features), n, num_features)

    def extend(self, summary: ContextSummary, X: Tensor, y: Tensor) -> ContextSummary:
        """The summary with more rows, (*batch, k, d) and (*batch, k, 1): the same as of all rows at once."""
        width = summary.representation.shape[-1] - 2
        total = summary.representation[..., 0, :width] * max(summary.num_rows, 1)
        total = total + self._total(X, y, summary.num_features)
        return self._summary(total, summary.num_rows + X.shape[-2], summary.num_features)

    def _total(self, X: Tensor, y: Tensor, num_features: Tensor) -> Tensor:
        return self.encoder(torch.cat([self._pad(X, num_features.to(X)), y], -1)).sum(-2)

    def _summary(self, total: Tensor, n: int, num_features: Tensor) -> ContextSummary:
        features = num_features.to(total)
        count = torch.full_like(features, math.log1p(n) / 6)
        representation = torch.cat([total / max(n, 1), count[..., None], features[..., None] / self.max_features], -1)
        return ContextSummary(representation[..., None, :], num_features, n)

    def query(self, summary: ContextSummary, X: Tensor) -> Tensor:
        """Mean, std of f and std of the noise at queries.

        Args:
            summary: from :meth:`encode`, for contexts with batch shape ``batch``.
            X: (*extra, *batch, q, d).

        Returns:
            (*extra, *batch, q, 3), in standardised units.
        """
        rows = self._pad(X, summary.num_features.to(X))
        shape = torch.broadcast_shapes(rows.shape[:-1], summary.representation.shape[:-1])
        inputs = torch.cat([rows.expand(*shape, -1), summary.representation.expand(*shape, -1)], -1)
        mean, f_std, noise_std = self.decoder(inputs).unbind(-1)
        return torch.stack([mean, self.smallest_std + F.softplus(f_std), self.smallest_std + F.softplus(noise_std)], -1)

    def _pad(self, X: Tensor, num_features: Tensor) -> Tensor:
        if X.shape[-1] > self.max_features:
            raise ValueError(f"X must have at most {self.max_features} columns, found {X.shape[-1]}")
        scaled = X * (self.max_features / num_features).sqrt()[..., None, None]
        return F.pad(scaled, (0, self.max_features - X.shape[-1]))


def _mlp(inputs: int, width: int, hidden_layers: int, outputs: int) -> nn.Sequential:
    sizes = [inputs] + [width] * hidden_layers
    layers: list[nn.Module] = []
    for size_in, size_out in pairwise(sizes):
        layers += [nn.Linear(size_in, size_out), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))
