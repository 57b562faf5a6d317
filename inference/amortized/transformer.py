"""Set transformers that map a data set and query inputs to what is known of the outcomes at the queries.

For regression there are two heads over one trunk: the histogram of the latent function value and that of an observation, so
that epistemic and aleatoric uncertainty come apart. Where a network has Gaussian processes beside, both histograms are
mixtures with these.

Source: Müller et al., Transformers can do Bayesian inference (ICLR 2022).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical

from bayesnn.checks import count
from bayesnn.histogram import Histogram
from bayesnn.inference.amortized.trunk import SetTrunk
from bayesnn.inference.amortized.warped_processes import WarpedProcesses


class SetTransformer(SetTrunk):
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
        num_processes: H Gaussian processes beside the histograms, see ``process_heads``.

    Raises:
        ValueError: if ``num_heads`` doesn't divide ``width``, for borders that don't increase or aren't finite, and for tail
            scales that aren't two positive numbers.
    """

    tells_latent_apart = True  # ``query`` knows ``latent_only``

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
        num_processes: int = 0,
    ) -> None:
        if len(borders) < 4 or not all(low < high for low, high in pairwise(borders)):
            raise ValueError(f"borders must be at least 4 increasing numbers, found {len(borders)}")
        if not all(math.isfinite(border) for border in borders):
            raise ValueError("borders must be finite")
        if len(tail_scales) != 2 or not all(0 < scale < math.inf for scale in tail_scales):
            raise ValueError(f"tail_scales must be two positive numbers, found {list(tail_scales)}")
        self.num_buckets = len(borders) - 1
        sizes = (max_features, 1, 2 * self.num_buckets, width, num_layers, num_heads, expansion)
        super().__init__(*sizes, largest, seed, num_processes)
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

    def with_processes(self, num_processes: int, seed: int = 0) -> SetTransformer:
        """The same network with Gaussian processes beside its histograms, which have little of the probability to begin with.

        Args:
            num_processes: H.
            seed: of their initial weights.

        Raises:
            ValueError: if ``num_processes`` isn't a whole number, at least 1, or the network has some already.
        """
        count("num_processes", num_processes)
        if self.process_heads is not None:
            raise ValueError(
                f"num_processes must be of a network without any, found {self.process_heads.num_processes}"
            )
        twin = SetTransformer(**self._arguments | {"num_processes": num_processes, "seed": seed})
        twin.load_state_dict(twin.state_dict() | self.state_dict())
        return twin.to(self.borders)

    def _output(self, tokens: Tensor, X: Tensor, processes: WarpedProcesses | None, latent_only: bool) -> Tensor:
        if self.process_heads is None or processes is None:
            return self._logits(tokens, latent_only).flatten(-2)
        processes = processes.flat()
        mean, variance = processes.at(self._padded(X))
        tokens = tokens + self.process_heads.told(processes, mean, variance)
        logits = self._logits(tokens, latent_only)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        inner = self._borders(logits)[0][1:-1]
        return self.process_heads.mixed(logits, tokens, processes, mean, variance, inner).flatten(-2)

    def _logits(self, tokens: Tensor, latent_only: bool) -> Tensor:
        """(B, q, L, K), those of f first."""
        hidden, last = self.head[:-1](self.norm(tokens)), self.head[-1]
        assert isinstance(last, nn.Linear)
        rows = self.num_buckets if latent_only else 2 * self.num_buckets
        return F.linear(hidden, last.weight[:rows], last.bias[:rows]).unflatten(-1, (-1, self.num_buckets))

    def _borders(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Borders and tail scales; those of a network in half precision have lost their digits."""
        if self.borders.dtype == like.dtype:
            return self.borders, self.tail_scales
        borders, tails = (like.new_tensor(list(self._arguments[name])) for name in ("borders", "tail_scales"))
        return borders, tails

    def distributions(self, output: Tensor) -> tuple[Histogram, ...]:
        """The histograms of f and of y, or of f alone, batch shape (*batch, q), of logits (*batch, q, L K)."""
        # Borders and sums of probabilities need more digits than half precision has.
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        borders, tails = self._borders(output)
        parts = output.unflatten(-1, (-1, self.num_buckets)).unbind(-2)
        return tuple(Histogram(borders, logits, tails, validate_args=False) for logits in parts)


class SetClassifier(SetTrunk):
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
