"""The trunk of a set transformer: rows and queries as tokens without positions, attention to the context alone.

Rows are tokens without positions, so the order of the context doesn't matter. Context rows attend to context rows,
queries to context rows only, in separate attention calls: no N x N mask is ever built, queries can't see each other,
and the context's keys and values can be computed once and reused for any queries. Each attention has one learned null
key and value besides the rows', so that an empty context is an ordinary one; the mass on it also tells the network
how many rows there are.

Heads look at distances too, see ``attention``; a network may have Gaussian processes beside, see ``process_heads``.

Source: Müller et al., Transformers can do Bayesian inference (ICLR 2022).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesnn.checks import count, positives
from bayesnn.configured import Configured
from bayesnn.inference.amortized.attention import DistanceLayer
from bayesnn.inference.amortized.evidence_ascent import towards_evidence
from bayesnn.inference.amortized.process_heads import ProcessHeads
from bayesnn.inference.amortized.warped_processes import WarpedProcesses


class ContextCache(NamedTuple):
    """What queries need of the context: for each layer keys and values, (*batch, heads, n+1, width of keys).

    Attributes:
        keys: one per layer, the null key last.
        values: likewise.
        summary: (*batch, 1, width) embedding of the numbers of rows and of features, added to every query.
        num_features: (*batch,) how many features count.
        processes: those of a network that has some, given the context.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    summary: Tensor
    num_features: Tensor
    processes: WarpedProcesses | None = None

    def expand(self, batch: Sequence[int]) -> ContextCache:
        """The same for a larger batch shape."""
        keys, values = ([part.expand(*batch, *part.shape[-3:]) for part in parts] for parts in (self.keys, self.values))
        summary = self.summary.expand(*batch, *self.summary.shape[-2:])
        processes = None if self.processes is None else self.processes.expand(batch)
        return ContextCache(tuple(keys), tuple(values), summary, self.num_features.expand(*batch), processes)


class SetTrunk(Configured, nn.Module):
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
        num_processes: int = 0,
    ) -> None:
        super().__init__()
        count("num_processes", num_processes, least=0)
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
        self.process_heads = ProcessHeads(width, num_processes, max_features) if num_processes else None
        generator = torch.Generator().manual_seed(seed)
        _initialise(self, generator)
        for layer in self._blocks:
            layer.start()
        if self.process_heads is not None:
            self.process_heads.start(generator)

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

    def encode(
        self,
        context_X: Tensor,
        context_y: Tensor,
        num_features: Tensor | None = None,
        processes: WarpedProcesses | None = None,
        offset: float = 0.0,
    ) -> ContextCache:
        """Run the context through the network once.

        Args:
            context_X, context_y, num_features: as for :meth:`forward`.
            processes: of a network that has some, those of the first rows by themselves (or of none), whose hyperparameters
                are kept, with a batch shape that broadcasts; None: they are read off the context.
            offset: standard deviation of an unknown constant in processes that are read, for outcomes that aren't in the
                prior's units, but centred by their own mean.
        """
        batch, n, d = context_X.shape[:-2], context_X.shape[-2], context_X.shape[-1]
        if num_features is None:
            num_features = torch.full(batch, d, device=context_X.device)
        features = num_features.to(context_X)
        summary = self._summary(n, features)
        places = self._places(context_X, features)
        tokens = self.embed_x(places) + self.embed_y(self._outcomes(context_y)) + summary
        tokens, places = (part.reshape(math.prod(batch), n, part.shape[-1]) for part in (tokens, places))
        if self.process_heads is not None and processes is None:
            # Readers are queries at the middle of the inputs: beside the rows' tokens, for one pass through each layer.
            tokens = torch.cat([tokens, self._readers(summary)], 1)
            places = F.pad(places, (0, 0, 0, tokens.shape[1] - n))
        keys, values = [], []
        for index, (layer, basis) in enumerate(zip(self._blocks, self._bases(places), strict=True)):
            key, value = layer.keys_and_values(tokens[:, :n], places[:, :n])
            keys.append(key.reshape(*batch, *key.shape[1:]))
            values.append(value.reshape(*batch, *value.shape[1:]))
            if index + 1 == len(self._blocks):
                tokens, basis = tokens[:, n:], (basis[0][:, :, n:], basis[1][:, :, n:])
            if tokens.shape[1]:
                tokens = layer(tokens, basis, key, value)
        cache = ContextCache(tuple(keys), tuple(values), summary, num_features)
        if self.process_heads is None:
            return cache
        padded = self._padded(context_X)
        if processes is not None:
            processes = processes.expand(batch)
        else:
            processes = self.process_heads.read(tokens.reshape(*batch, *tokens.shape[1:]), num_features, offset)
            if (
                not self.training
            ):  # networks that were trained through these steps became worse, by 0.03 nats at 100 rows
                processes = towards_evidence(processes, padded, context_y)
        num_known = processes.root.shape[-1]
        return cache._replace(processes=processes.given(padded[..., num_known:, :], context_y[..., num_known:, :]))

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
        layers = zip(self._blocks, self._bases(places), cache.keys, cache.values, strict=True)
        for layer, basis, old_key, old_value in layers:
            new = (
                part[..., :-1, :].reshape(*batch, *part.shape[-3:-2], -1, part.shape[-1])
                for part in layer.keys_and_values(tokens, places)
            )
            key, value = (torch.cat([one, old], -2) for one, old in zip(new, (old_key, old_value), strict=True))
            tokens = layer(tokens, basis, *(part.reshape(len(tokens), *part.shape[-3:]) for part in (key, value)))
            keys.append(key)
            values.append(value)
        processes = None if cache.processes is None else cache.processes.given(self._padded(X), y)
        return ContextCache(tuple(keys), tuple(values), summary, cache.num_features, processes)

    def query(self, cache: ContextCache, X: Tensor, latent_only: bool = False) -> Tensor:
        """What the head gives at queries.

        Args:
            cache: from :meth:`encode`, for contexts with batch shape ``batch``.
            X: (*extra, *batch, q, d); dimensions of size 1 in place of ``batch`` broadcast.
            latent_only: of a ``SetTransformer``, the K numbers of f without the K of y; of others it makes no difference.

        Returns:
            (*extra, *batch, q, num_outputs), or (*extra, *batch, q, K).
        """
        shape, rows = _rows_of_contexts(X, cache)
        num_batch, num_extra, q = len(rows), math.prod(shape) // max(len(rows), 1), X.shape[-2]
        features = cache.num_features.to(X).reshape(num_batch)
        places = self._places(rows, features)
        tokens = self.embed_x(places) + self.query_token + cache.summary.reshape(num_batch, 1, -1)
        for layer, basis, key, value in zip(self._blocks, self._bases(places), cache.keys, cache.values, strict=True):
            key, value = (part.reshape(num_batch, *part.shape[-3:]) for part in (key, value))
            tokens = layer(tokens, basis, key, value)
        output = self._output(tokens, rows, cache.processes, latent_only)
        output = output.reshape(num_batch, num_extra, q, output.shape[-1]).movedim(1, 0)
        return output.reshape(*shape, *output.shape[-2:])

    def correlations(self, cache: ContextCache, X: Tensor) -> Tensor:
        """Correlations of f between the points X (*extra, *batch, q, d), as for :meth:`query`: (*extra, *batch, q, q).

        Those of the Gaussian processes of a network that has some, see ``ProcessHeads.correlations``.
        """
        assert self.process_heads is not None and cache.processes is not None
        shape, rows = _rows_of_contexts(X, cache)
        found = self.process_heads.correlations(cache.processes.flat(), self._padded(rows), X.shape[-2])
        return found.movedim(1, 0).reshape(*shape, *found.shape[-2:])

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

    def _bases(self, places: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of all layers, which share one unless each combines the features in its own way."""
        blocks = self._blocks
        if any(layer.combines for layer in blocks):
            return [layer.basis(places) for layer in blocks]
        return [blocks[0].basis(places)] * len(blocks) if blocks else []

    def _summary(self, n: int, num_features: Tensor) -> Tensor:
        size = [torch.full_like(num_features, math.log1p(n) / 6), num_features / self.max_features]
        return self.embed_size(torch.stack(size, -1))[..., None, :]

    def _places(self, X: Tensor, num_features: Tensor) -> Tensor:
        return self._padded(X * (self.max_features / num_features).sqrt()[..., None, None])

    def _padded(self, X: Tensor) -> Tensor:
        if X.shape[-1] > self.max_features:
            raise ValueError(f"X must have at most {self.max_features} columns, found {X.shape[-1]}")
        return F.pad(X, (0, self.max_features - X.shape[-1]))

    def _readers(self, summary: Tensor) -> Tensor:
        """The processes' tokens (B, H, width)."""
        assert self.process_heads is not None
        return self.process_heads.tokens + summary.reshape(-1, 1, summary.shape[-1])

    def _output(self, tokens: Tensor, X: Tensor, processes: WarpedProcesses | None, latent_only: bool) -> Tensor:
        """Numbers (B, q, num_outputs) of the tokens of queries at X (B, q, d)."""
        output: Tensor = self.head(self.norm(tokens))
        return output


def _rows_of_contexts(X: Tensor, cache: ContextCache) -> tuple[torch.Size, Tensor]:
    """The broadcast shape (*extra, *batch) of X (*extra, *batch, q, d), and each context's rows (B, extra q, d)."""
    batch = cache.num_features.shape
    shape = torch.broadcast_shapes(X.shape[:-2], batch)
    num_batch, num_extra = math.prod(batch), math.prod(shape[: len(shape) - len(batch)])
    rows = X.expand(*shape, *X.shape[-2:]).reshape(num_extra, num_batch, *X.shape[-2:]).movedim(0, 1)
    return shape, rows.reshape(num_batch, num_extra * X.shape[-2], X.shape[-1])


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
