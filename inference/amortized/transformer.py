"""A set transformer that maps a data set and query inputs to histograms of f and of y at the queries.

Rows are tokens without positions, so the order of the context doesn't matter. Context rows attend to context rows,
queries to context rows only, in separate attention calls: no N x N mask is ever built, queries can't see each other,
and the context's keys and values can be computed once and reused for any queries. Each attention has one learned null
key and value besides the rows', so that an empty context is an ordinary one; the mass on it also tells the network
how many rows there are.

Source: Müller et al., Transformers can do Bayesian inference (ICLR 2022). Two heads over one trunk: the histogram of
the latent function value and that of an observation, so that epistemic and aleatoric uncertainty come apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesnn.configured import Configured
from bayesnn.histogram import Histogram


class ContextCache(NamedTuple):
    """What queries need of the context: for each layer keys and values, (*batch, heads, n+1, width per head).

    Attributes:
        keys: one per layer, the null key last.
        values: likewise.
        summary: (*batch, 1, width) embedding of the numbers of rows and of features, added to every query.
        num_features: (*batch,) how many features count.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    summary: Tensor
    num_features: Tensor


class SetTransformer(Configured, nn.Module):
    """Transformer from (context, query inputs) to two histograms per query.

    X is multiplied by :math:`\\sqrt{d_\\max / d}` and padded with zeros to :math:`d_\\max` columns, so that a row's
    squared norm doesn't depend on the number d of features in use. Inputs are expected with columns of about mean 0
    and standard deviation 1, outcomes standardised by :func:`bayesnn.inference.amortized.tasks.standardise_context`.

    Args:
        max_features: :math:`d_\\max`.
        borders: K+1 bucket borders in standardised units of the outcome.
        tail_scales: lower and upper tail scale of the histograms.
        width: size of a token.
        num_layers: blocks of attention and MLP, normalised before each (pre-norm).
        num_heads: attention heads; divides ``width``.
        expansion: hidden size of the MLPs over ``width``.
        seed: of the initial weights.

    Raises:
        ValueError: if ``num_heads`` doesn't divide ``width``.
    """

    def __init__(
        self,
        max_features: int,
        borders: Sequence[float],
        tail_scales: Sequence[float],
        width: int = 96,
        num_layers: int = 6,
        num_heads: int = 4,
        expansion: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"num_heads must divide width, got {num_heads} and {width}")
        self.max_features, self.num_buckets = max_features, len(borders) - 1
        self.borders: Tensor
        self.tail_scales: Tensor
        self.register_buffer("borders", torch.tensor(borders))
        self.register_buffer("tail_scales", torch.tensor(tail_scales))
        self.embed_x = nn.Sequential(nn.Linear(max_features, width), nn.GELU(), nn.Linear(width, width))
        self.embed_y = nn.Linear(1, width)
        self.embed_size = nn.Linear(2, width)
        self.query_token = nn.Parameter(torch.zeros(width))
        self.layers = nn.ModuleList(_Layer(width, num_heads, expansion) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 2 * self.num_buckets))
        generator = torch.Generator().manual_seed(seed)
        _initialise(self, generator)
        for layer in self._blocks:
            layer.start_as_identity()

    def forward(
        self, context_X: Tensor, context_y: Tensor, X: Tensor, num_features: Tensor | None = None
    ) -> tuple[Histogram, Histogram]:
        """Predict every query by itself.

        Args:
            context_X: (*batch, n, d), n may be 0.
            context_y: (*batch, n, 1), standardised.
            X: (*batch, q, d).
            num_features: (*batch,) for padded inputs; default: all d count.

        Returns:
            Histograms of f and of y with batch shape (*batch, q), in standardised units.
        """
        return self.distributions(self.query(self.encode(context_X, context_y, num_features), X))

    def distributions(self, logits: Tensor) -> tuple[Histogram, Histogram]:
        """The histograms of f and of y, batch shape (*batch, q), of logits (*batch, q, 2, K)."""
        f, y = logits.unbind(-2)
        return (
            Histogram(self.borders, f, self.tail_scales, validate_args=False),
            Histogram(self.borders, y, self.tail_scales, validate_args=False),
        )

    def encode(self, context_X: Tensor, context_y: Tensor, num_features: Tensor | None = None) -> ContextCache:
        """Run the context through the network once; the arguments are those of :meth:`forward`."""
        batch, n, d = context_X.shape[:-2], context_X.shape[-2], context_X.shape[-1]
        if num_features is None:
            num_features = torch.full(batch, d, device=context_X.device)
        features = num_features.to(context_X)
        size = torch.stack([torch.full_like(features, math.log1p(n) / 6), features / self.max_features], -1)
        summary = self.embed_size(size)[..., None, :]
        tokens = self._embed(context_X, features) + self.embed_y(context_y) + summary
        tokens = tokens.reshape(math.prod(batch), n, tokens.shape[-1])
        keys, values = [], []
        for index, layer in enumerate(self._blocks):
            key, value = layer.keys_and_values(tokens)
            keys.append(key.reshape(*batch, *key.shape[1:]))
            values.append(value.reshape(*batch, *value.shape[1:]))
            if index + 1 < len(self._blocks):
                tokens = layer(tokens, key, value)
        return ContextCache(tuple(keys), tuple(values), summary, num_features)

    def query(self, cache: ContextCache, X: Tensor) -> Tensor:
        """Logits at queries.

        Args:
            cache: from :meth:`encode`, for contexts with batch shape ``batch``.
            X: (*extra, *batch, q, d); dimensions of size 1 in place of ``batch`` broadcast.

        Returns:
            (*extra, *batch, q, 2, K): for each query unnormalised log probabilities of f's and of y's buckets.
        """
        batch = cache.num_features.shape
        shape = torch.broadcast_shapes(X.shape[:-2], batch)
        q, d = X.shape[-2:]
        num_batch, num_extra = math.prod(batch), math.prod(shape[: len(shape) - len(batch)])
        rows = X.expand(*shape, q, d).reshape(num_extra, num_batch, q, d).movedim(0, 1).reshape(num_batch, -1, d)
        features = cache.num_features.to(X).reshape(num_batch)
        tokens = self._embed(rows, features) + self.query_token + cache.summary.reshape(num_batch, 1, -1)
        for layer, key, value in zip(self._blocks, cache.keys, cache.values, strict=True):
            tokens = layer(tokens, key.reshape(num_batch, *key.shape[-3:]), value.reshape(num_batch, *value.shape[-3:]))
        logits = self.head(self.norm(tokens))
        logits = logits.reshape(num_batch, num_extra, q, 2, self.num_buckets).movedim(1, 0)
        return logits.reshape(*shape, q, 2, self.num_buckets)

    @property
    def _blocks(self) -> list[_Layer]:
        return [layer for layer in self.layers if isinstance(layer, _Layer)]

    def _embed(self, X: Tensor, num_features: Tensor) -> Tensor:
        scaled = X * (self.max_features / num_features).sqrt()[..., None, None]
        return self.embed_x(F.pad(scaled, (0, self.max_features - X.shape[-1])))


class _Layer(nn.Module):
    """Pre-norm attention to given keys and values, then a pre-norm MLP."""

    def __init__(self, width: int, num_heads: int, expansion: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_query = nn.Linear(width, width)
        self.to_key_value = nn.Linear(width, 2 * width)
        self.null = nn.Parameter(torch.zeros(2, num_heads, 1, width // num_heads))
        self.merge = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, expansion * width), nn.GELU(), nn.Linear(expansion * width, width))

    def start_as_identity(self) -> None:
        for linear in (self.merge, self.mlp[-1]):
            assert isinstance(linear, nn.Linear)
            nn.init.zeros_(linear.weight)

    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Of context tokens (B, n, width): two of (B, heads, n+1, width per head)."""
        both = (
            self.to_key_value(self.norm_attention(context))
            .unflatten(-1, (2, self.num_heads, -1))
            .permute(2, 0, 3, 1, 4)
        )
        key, value = torch.cat([both, self.null[:, None].expand(-1, len(context), -1, -1, -1)], -2)
        return key, value

    def forward(self, tokens: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query = self.to_query(self.norm_attention(tokens)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2)
        tokens = tokens + self.merge(attended)
        return tokens + self.mlp(self.norm_mlp(tokens))


def _initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Weights from N(0, 1/fan-in), biases 0, free parameters from N(0, 0.02^2)."""
    linears = [child for child in module.modules() if isinstance(child, nn.Linear)]
    own = {
        id(parameter)
        for child in module.modules()
        if isinstance(child, (nn.Linear, nn.LayerNorm))
        for parameter in child.parameters()
    }
    with torch.no_grad():
        for linear in linears:
            linear.weight.normal_(std=linear.in_features**-0.5, generator=generator)
            linear.bias.zero_()
        for parameter in module.parameters():
            if id(parameter) not in own:
                parameter.normal_(std=0.02, generator=generator)
