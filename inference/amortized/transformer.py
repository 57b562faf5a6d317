"""Set transformers that map a data set and query inputs to what is known of the outcomes at the queries.

Rows are tokens without positions, so the order of the context doesn't matter. Context rows attend to context rows,
queries to context rows only, in separate attention calls: no N x N mask is ever built, queries can't see each other,
and the context's keys and values can be computed once and reused for any queries. Each attention has one learned null
key and value besides the rows', so that an empty context is an ordinary one; the mass on it also tells the network
how many rows there are.

Heads look at distances too, see ``attention``.

Source: Müller et al., Transformers can do Bayesian inference (ICLR 2022). For regression there are two heads over one trunk:
the histogram of the latent function value and that of an observation, so that epistemic and aleatoric uncertainty come apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical

from bayesnn.checks import count, positives
from bayesnn.configured import Configured
from bayesnn.histogram import Histogram
from bayesnn.inference.amortized.attention import DistanceLayer


class ContextCache(NamedTuple):
    """What queries need of the context: for each layer keys and values, (*batch, heads, n+1, width of keys).

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

    def expand(self, batch: Sequence[int]) -> ContextCache:
        """The same for a larger batch shape."""
        keys, values = ([part.expand(*batch, *part.shape[-3:]) for part in parts] for parts in (self.keys, self.values))
        summary = self.summary.expand(*batch, *self.summary.shape[-2:])
        return ContextCache(tuple(keys), tuple(values), summary, self.num_features.expand(*batch))


class _SetTransformer(Configured, nn.Module):
    """The trunk, from embedded rows to ``num_outputs`` numbers for each query; subclasses say what these are.

    X is multiplied by :math:`\\sqrt{d_\\max / d}` and padded with zeros to :math:`d_\\max` columns, so that a row's
    squared norm doesn't depend on the number d of features in use. Inputs are expected with columns of about mean 0
    and standard deviation 1.
    """

    def __init__(
        self,
        max_features: int,
        outcome_size: int,
        num_outputs: int,
        width: int,
        num_layers: int,
        num_heads: int,
        expansion: int,
        largest: Sequence[float] | None,
        seed: int,
    ) -> None:
        super().__init__()
        sizes = {"max_features": max_features, "width": width, "num_layers": num_layers, "num_heads": num_heads}
        sizes |= {"expansion": expansion}
        count("seed", seed, least=0)
        if largest is not None:
            positives("largest", largest)
        for name, value in sizes.items():
            count(name, value)
        self.largest = largest
        if width % num_heads:
            raise ValueError(f"num_heads must divide width, got {num_heads} and {width}")
        self.max_features, self.num_outputs = max_features, num_outputs
        self.embed_x = nn.Sequential(nn.Linear(max_features, width), nn.GELU(), nn.Linear(width, width))
        self.embed_y = nn.Linear(outcome_size, width)
        self.embed_size = nn.Linear(2, width)
        self.query_token = nn.Parameter(torch.zeros(width))
        self.layers = nn.ModuleList(DistanceLayer(width, num_heads, expansion, max_features) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, num_outputs))
        generator = torch.Generator().manual_seed(seed)
        _initialise(self, generator)
        for layer in self._blocks:
            layer.start()

    def forward(self, context_X: Tensor, context_y: Tensor, X: Tensor, num_features: Tensor | None = None) -> Any:
        """The distributions at every query by itself.

        Args:
            context_X: (*batch, n, d), n may be 0.
            context_y: (*batch, n, 1).
            X: (*batch, q, d).
            num_features: (*batch,) for padded inputs; default: all d count.
        """
        return self.distributions(self.query(self.encode(context_X, context_y, num_features), X))

    def distributions(self, output: Tensor) -> Any:
        """Of the numbers that :meth:`query` gives."""
        raise NotImplementedError

    def _outcomes(self, y: Tensor) -> Tensor:
        """What is embedded of outcomes (*batch, n, 1)."""
        return y

    def encode(self, context_X: Tensor, context_y: Tensor, num_features: Tensor | None = None) -> ContextCache:
        """Run the context through the network once; the arguments are those of :meth:`forward`."""
        batch, n, d = context_X.shape[:-2], context_X.shape[-2], context_X.shape[-1]
        if num_features is None:
            num_features = torch.full(batch, d, device=context_X.device)
        features = num_features.to(context_X)
        summary = self._summary(n, features)
        places = self._places(context_X, features)
        tokens = self.embed_x(places) + self.embed_y(self._outcomes(context_y)) + summary
        tokens, places = (part.reshape(math.prod(batch), n, part.shape[-1]) for part in (tokens, places))
        keys, values = [], []
        for index, layer in enumerate(self._blocks):
            key, value = layer.keys_and_values(tokens, places)
            keys.append(key.reshape(*batch, *key.shape[1:]))
            values.append(value.reshape(*batch, *value.shape[1:]))
            if index + 1 < len(self._blocks):
                tokens = layer(tokens, places, key, value)
        return ContextCache(tuple(keys), tuple(values), summary, num_features)

    def extend(self, cache: ContextCache, X: Tensor, y: Tensor) -> ContextCache:
        """The cache with more rows, (*batch, k, d) and (*batch, k, 1), which attend to the context and to each other.

        The context's own keys and values stay as they are, without having seen the new rows; so this is cheaper than encoding
        everything anew, and not quite the same unless the context was empty.
        """
        batch, n = cache.num_features.shape, cache.keys[0].shape[-2] - 1 + X.shape[-2]
        features = cache.num_features.to(X)
        summary, places = self._summary(n, features), self._places(X, features)
        tokens = self.embed_x(places) + self.embed_y(self._outcomes(y)) + summary
        tokens, places = (part.reshape(math.prod(batch), *part.shape[-2:]) for part in (tokens, places))
        keys, values = [], []
        for layer, old_key, old_value in zip(self._blocks, cache.keys, cache.values, strict=True):
            new = (
                part[..., :-1, :].reshape(*batch, *part.shape[-3:-2], -1, part.shape[-1])
                for part in layer.keys_and_values(tokens, places)
            )
            key, value = (torch.cat([one, old], -2) for one, old in zip(new, (old_key, old_value), strict=True))
            tokens = layer(tokens, places, *(part.reshape(len(tokens), *part.shape[-3:]) for part in (key, value)))
            keys.append(key)
            values.append(value)
        return ContextCache(tuple(keys), tuple(values), summary, cache.num_features)

    def query(self, cache: ContextCache, X: Tensor) -> Tensor:
        """What the head gives at queries.

        Args:
            cache: from :meth:`encode`, for contexts with batch shape ``batch``.
            X: (*extra, *batch, q, d); dimensions of size 1 in place of ``batch`` broadcast.

        Returns:
            (*extra, *batch, q, num_outputs).
        """
        batch = cache.num_features.shape
        shape = torch.broadcast_shapes(X.shape[:-2], batch)
        q, d = X.shape[-2:]
        num_batch, num_extra = math.prod(batch), math.prod(shape[: len(shape) - len(batch)])
        rows = X.expand(*shape, q, d).reshape(num_extra, num_batch, q, d).movedim(0, 1).reshape(num_batch, -1, d)
        features = cache.num_features.to(X).reshape(num_batch)
        places = self._places(rows, features)
        tokens = self.embed_x(places) + self.query_token + cache.summary.reshape(num_batch, 1, -1)
        for layer, key, value in zip(self._blocks, cache.keys, cache.values, strict=True):
            key, value = (part.reshape(num_batch, *part.shape[-3:]) for part in (key, value))
            tokens = layer(tokens, places, key, value)
        output = self.head(self.norm(tokens)).reshape(num_batch, num_extra, q, self.num_outputs).movedim(1, 0)
        return output.reshape(*shape, q, self.num_outputs)

    def deepened(self, num_layers: int, seed: int = 0) -> Self:
        """The same network with more layers at its end, each the identity to begin with, so that its answers stay the same.

        Args:
            num_layers: how many more.
            seed: of their initial weights.

        Raises:
            ValueError: if ``num_layers`` isn't a whole number, at least 1.
        """
        count("num_layers", num_layers)
        arguments = self._arguments | {"num_layers": len(self.layers) + num_layers, "seed": seed}
        twin = type(self)(**arguments)
        twin.load_state_dict(twin.state_dict() | self.state_dict())
        return twin.to(self.query_token)

    @property
    def hidden_matrices(self) -> frozenset[str]:
        """Names of the weight matrices between the embeddings and the head."""
        return frozenset(f"layers.{name}" for name, value in self.layers.named_parameters() if value.ndim == 2)

    @property
    def _blocks(self) -> list[DistanceLayer]:
        return [layer for layer in self.layers if isinstance(layer, DistanceLayer)]

    def _summary(self, n: int, num_features: Tensor) -> Tensor:
        size = [torch.full_like(num_features, math.log1p(n) / 6), num_features / self.max_features]
        return self.embed_size(torch.stack(size, -1))[..., None, :]

    def _places(self, X: Tensor, num_features: Tensor) -> Tensor:
        if X.shape[-1] > self.max_features:
            raise ValueError(f"X must have at most {self.max_features} columns, found {X.shape[-1]}")
        scaled = X * (self.max_features / num_features).sqrt()[..., None, None]
        return F.pad(scaled, (0, self.max_features - X.shape[-1]))


class SetTransformer(_SetTransformer):
    """From (context, query inputs) to two histograms for each query: of the function value and of an observation.

    X is multiplied by :math:`\\sqrt{d_\\max / d}` and padded with zeros to :math:`d_\\max` columns, so that a row's
    squared norm doesn't depend on the number d of features in use. Inputs are expected with columns of about mean 0
    and standard deviation 1, and so are the outcomes.

    Args:
        max_features: :math:`d_\\max`.
        borders: K+1 bucket borders in standardised units of the outcome.
        tail_scales: lower and upper tail scale of the histograms.
        width: size of a token.
        num_layers: blocks of attention and MLP, normalised before each (pre-norm).
        num_heads: attention heads; divides ``width``.
        expansion: hidden size of the MLPs over ``width``.
        largest: magnitudes of the inputs and of the outcomes beyond which it isn't trained; None: not known.
        seed: of the initial weights.

    Raises:
        ValueError: if ``num_heads`` doesn't divide ``width``, for borders that don't increase or aren't finite, and for tail
            scales that aren't two positive numbers.
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
        largest: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        if len(borders) < 4 or not all(low < high for low, high in pairwise(borders)):
            raise ValueError(f"borders must be at least 4 increasing numbers, found {len(borders)}")
        if not all(math.isfinite(border) for border in borders):
            raise ValueError("borders must be finite")
        if len(tail_scales) != 2 or not all(0 < scale < math.inf for scale in tail_scales):
            raise ValueError(f"tail_scales must be two positive numbers, found {list(tail_scales)}")
        self.num_buckets = len(borders) - 1
        super().__init__(max_features, 1, 2 * self.num_buckets, width, num_layers, num_heads, expansion, largest, seed)
        self.borders: Tensor
        self.tail_scales: Tensor
        self.register_buffer("borders", torch.tensor(list(borders), dtype=torch.get_default_dtype()))
        self.register_buffer("tail_scales", torch.tensor(list(tail_scales), dtype=torch.get_default_dtype()))

    def refined(self, borders: Sequence[float], tail_scales: Sequence[float]) -> SetTransformer:
        """The same network with more buckets: each passes its probability on by the shares of the new ones in it.

        Args:
            borders: with all inner borders of this network among the inner ones.
            tail_scales: of the new tails.

        Raises:
            ValueError: if an old inner border isn't among the new ones.
        """
        old, new = self.borders.cpu().double(), torch.tensor(list(borders), dtype=torch.float64)
        distance = (old[1:-1, None] - new[None, 1:-1]).abs().amin(1)
        if not bool((distance < 1e-5).all()):
            raise ValueError(
                f"borders must have the network's inner ones among them, lacks {int((distance >= 1e-5).sum())}"
            )
        one_hot = torch.full((self.num_buckets, self.num_buckets), -torch.inf, dtype=torch.float64).fill_diagonal_(0.0)
        each = Histogram(old, one_hot, self.tail_scales.cpu().double(), validate_args=False)
        below = each.cdf(new[1:-1, None].expand(-1, self.num_buckets)).T
        shares = torch.cat([below[:, :1], below.diff(dim=-1), 1 - below[:, -1:]], -1)  # of a bucket (row) in new ones
        share, parent = shares.max(0)
        arguments = self._arguments | {"borders": list(borders), "tail_scales": list(tail_scales)}
        twin = SetTransformer(**arguments)
        state = self.state_dict()
        rows = torch.cat([parent, parent + self.num_buckets])
        logs = share.log().repeat(2).to(state["head.2.bias"])
        state["head.2.weight"] = state["head.2.weight"][rows]
        state["head.2.bias"] = state["head.2.bias"][rows] + logs
        state |= dict(twin.named_buffers())
        twin.load_state_dict(state)
        return twin.to(self.borders)

    def distributions(self, output: Tensor) -> tuple[Histogram, Histogram]:
        """The histograms of f and of y, batch shape (*batch, q), of logits (*batch, q, 2 K), f's first."""
        # Borders and sums of probabilities need more digits than half precision has.
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        f, y = output.unflatten(-1, (2, self.num_buckets)).unbind(-2)
        borders, tails = self.borders, self.tail_scales
        if borders.dtype != output.dtype:  # a network in half precision has lost their digits
            borders, tails = (output.new_tensor(list(self._arguments[name])) for name in ("borders", "tail_scales"))
        return (
            Histogram(borders, f, tails, validate_args=False),
            Histogram(borders, y, tails, validate_args=False),
        )


class SetClassifier(_SetTransformer):
    """From (context, query inputs) to the probabilities of classes at each query; labels are whole numbers below C.

    Args:
        max_features: :math:`d_\\max`.
        num_classes: C.
        width, num_layers, num_heads, expansion, largest, seed: as for ``SetTransformer``.

    Raises:
        ValueError: if ``num_heads`` doesn't divide ``width``, or there are fewer than 2 classes.
    """

    def __init__(
        self,
        max_features: int,
        num_classes: int,
        width: int = 96,
        num_layers: int = 6,
        num_heads: int = 4,
        expansion: int = 2,
        largest: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        self.num_classes = num_classes
        super().__init__(max_features, num_classes, num_classes, width, num_layers, num_heads, expansion, largest, seed)

    def distributions(self, output: Tensor) -> tuple[Categorical]:
        """Of the class, batch shape (*batch, q), of logits (*batch, q, C)."""
        return (Categorical(logits=output, validate_args=False),)

    def _outcomes(self, y: Tensor) -> Tensor:
        return F.one_hot(y[..., 0].long(), self.num_outputs).to(self.query_token)


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
            if linear.bias is not None:
                linear.bias.zero_()
        for parameter in module.parameters():
            if id(parameter) not in own:
                parameter.normal_(std=0.02, generator=generator)
