r"""Neural block proposals (Wang, Wu, Moore and Russell, Meta-Learning MCMC Proposals, 2018).

A mixture density network: from what a block's conditional depends on (the values around it and the model's local
parameters, put together by the model as ``features``), the weights :math:`\pi_m` of M components in which the block's
variables are independent,

.. math:: q(x_B \mid x_C, \phi) = \sum_m \pi_m \prod_{i \in B} q_{m,i}(x_i),

categorical for discrete variables, Gaussian for real ones. Used within Metropolis–Hastings, so that it needn't be right.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bayesnn.configured import Configured, build, describe
from bayesnn.files import fingerprint, read_tensors, write_tensors
from bayesnn.inference.mcmc.learned.models import Block, BlockDistribution, Conditional, Model, draw_index

FLOOR = 1e-3  # of the probability spread evenly over a variable's values: no value is ever out of reach
LOG_SCALE_BOUND = math.log(1e3)  # standard deviations stay within 1e-3 … 1e3, whatever the network says


class CategoricalMixture:
    """Discrete variables, independent within a component: log weights (*n, M), probabilities (*n, K, M, b)."""

    def __init__(self, log_weights: Tensor, probabilities: Tensor) -> None:
        self.log_weights, self.probabilities = log_weights, probabilities

    def sample(self, generator: torch.Generator) -> Tensor:
        """Values, (*n, b)."""
        component = draw_index(self.log_weights.exp(), generator)[..., None, None, None]
        shape = (*self.probabilities.shape[:-2], 1, self.probabilities.shape[-1])
        chosen = self.probabilities.gather(-2, component.expand(shape)).squeeze(-2)
        return draw_index(chosen.transpose(-2, -1), generator)

    def log_prob(self, values: Tensor) -> Tensor:
        """(*n, b) -> (*n)."""
        shape = (*self.probabilities.shape[:-3], 1, *self.probabilities.shape[-2:])
        each = self.probabilities.gather(-3, values[..., None, None, :].expand(shape)).squeeze(-3).log().sum(-1)
        return torch.logsumexp(self.log_weights + each, -1)


class GaussianMixture:
    """Real variables, independent within a component: log weights (*n, M), means and log scales (*n, M, b, 2)."""

    def __init__(self, log_weights: Tensor, moments: Tensor) -> None:
        self.log_weights, self.moments = log_weights, moments

    def sample(self, generator: torch.Generator) -> Tensor:
        """Values, (*n, b)."""
        component = draw_index(self.log_weights.exp(), generator)[..., None, None, None]
        shape = (*self.moments.shape[:-3], 1, *self.moments.shape[-2:])
        loc, log_scale = self.moments.gather(-3, component.expand(shape)).squeeze(-3).unbind(-1)
        return loc + log_scale.exp() * torch.randn(loc.shape, generator=generator, dtype=loc.dtype)

    def log_prob(self, values: Tensor) -> Tensor:
        """(*n, b) -> (*n)."""
        loc, log_scale = self.moments.unbind(-1)
        z = (values.unsqueeze(-2) - loc) * (-log_scale).exp()
        each = -0.5 * z.square() - log_scale - 0.5 * math.log(2 * math.pi)
        return torch.logsumexp(self.log_weights + each.sum(-1), -1)


class BlockProposal(Configured, nn.Module):
    """A proposal for one motif.

    Two hidden layers, and a linear map beside them from the features to the output.

    Args:
        block_size: b, variables in the block.
        num_features: k, numbers that a conditional of this motif depends on.
        cardinality: K of discrete variables; None: real variables, in units in which standard deviations are 1e-3 … 1e3.
        num_components: M; 8.
        hidden: width of the hidden layers; 128.
        seed: of the first weights.

    Raises:
        ValueError: if a size isn't positive.
    """

    def __init__(
        self,
        block_size: int,
        num_features: int,
        cardinality: int | None,
        num_components: int = 8,
        hidden: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(block_size, num_features, num_components, hidden, cardinality or 1) < 1:
            raise ValueError(
                "block_size, num_features, cardinality, num_components and hidden must be at least 1, found "
                f"{(block_size, num_features, cardinality, num_components, hidden)}"
            )
        self.block_size, self.num_features, self.cardinality = block_size, num_features, cardinality
        self.num_components = num_components
        outputs = num_components * (1 + block_size * (cardinality or 2))
        self.layers = nn.Sequential(
            *(nn.Linear(num_features, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()),
            nn.Linear(hidden, outputs),
        )
        self.direct = nn.Linear(num_features, outputs, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in (module for module in self.modules() if isinstance(module, nn.Linear)):
                bound = 1 / math.sqrt(layer.in_features)  # PyTorch's own law, from a generator of our own
                for parameter in layer.parameters():
                    parameter.copy_(bound * (2 * torch.rand(parameter.shape, generator=generator) - 1))

    @classmethod
    def for_blocks(cls, model: Model, blocks: Sequence[Block], **settings: Any) -> BlockProposal:
        """A proposal of the motif of these blocks; ``settings`` are the further arguments."""
        conditional = model.conditionals(blocks[:1])(model.initial(1, torch.Generator().manual_seed(0)))
        return cls(len(blocks[0].variables), conditional.features.shape[-1], model.cardinality, **settings)

    @property
    def fingerprint(self) -> str:
        """A hash of settings and weights."""
        return fingerprint(json.dumps(describe(self)), *self.state_dict().values())

    def check(self, block_size: int, num_features: int, cardinality: int | None) -> None:
        """Raise ValueError if a motif is another than this proposal's."""
        found, wanted = (
            (block_size, num_features, cardinality),
            (self.block_size, self.num_features, self.cardinality),
        )
        if found != wanted:
            raise ValueError(
                f"this proposal is for blocks with (variables, features, cardinality) {wanted}, found {found}"
            )

    def forward(self, conditional: Conditional) -> BlockDistribution:
        """The law that is proposed from, of the conditional's batch shape (*n); in float64 from the network's output on."""
        features = conditional.features.to(self.direct.weight.dtype)
        out = (self.layers(features) + self.direct(features)).double()
        log_weights, raw = out[..., : self.num_components].log_softmax(-1), out[..., self.num_components :]
        if self.cardinality is None:
            loc, log_scale = raw.unflatten(-1, (2, self.num_components, self.block_size)).unbind(-3)
            log_scale = LOG_SCALE_BOUND * torch.tanh(log_scale / LOG_SCALE_BOUND)
            return GaussianMixture(log_weights, torch.stack([loc, log_scale], -1))
        # Values come before components and variables: a softmax over few entries is fast only along an outer dimension.
        probabilities = raw.unflatten(-1, (self.cardinality, self.num_components, self.block_size)).softmax(-3)
        return CategoricalMixture(log_weights, (1 - FLOOR) * probabilities + FLOOR / self.cardinality)

    def save(self, path: str | Path) -> None:
        """Write weights and settings to one file."""
        write_tensors(path, self.state_dict(), {"proposal": describe(self)})

    @staticmethod
    def load(path: str | Path) -> BlockProposal:
        """Read what ``save`` wrote; runs no code from the file.

        Raises:
            ValueError: if the file holds something else.
        """
        tensors, description = read_tensors(path)
        proposal = build(description.get("proposal"))
        if not isinstance(proposal, BlockProposal):
            raise ValueError(f"{str(path)!r} holds no block proposal")
        proposal.to(next(iter(tensors.values())).dtype).load_state_dict(tensors)
        return proposal
