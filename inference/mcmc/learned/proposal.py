r"""Neural block proposals (Wang, Wu, Moore and Russell, Meta-Learning MCMC Proposals, 2018).

A mixture density network: from the values around a block and the model's local parameters, the weights :math:`\pi_m` of M
components in which the block's variables are independent,

.. math:: q(x_B \mid x_C, \phi) = \sum_m \pi_m \prod_{i \in B} q_{m,i}(x_i),

categorical for discrete variables, Gaussian for real ones. Used within Metropolis–Hastings, so that it needn't be right.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from bayesnn.configured import Configured, build, describe
from bayesnn.files import read_tensors, write_tensors
from bayesnn.inference.mcmc.learned.models import Block

FLOOR = 1e-3  # of the probability spread evenly over a variable's values: no value is ever out of reach


class BlockProposal(Configured, nn.Module):
    """A proposal for one motif.

    Args:
        block_size: b, variables in the block.
        condition_size: c, variables it depends on.
        num_parameters: k, the model's local parameters.
        cardinality: K of discrete variables; None: real variables.
        num_components: M; 8.
        hidden: width of the two hidden layers; 128.
    """

    def __init__(
        self,
        block_size: int,
        condition_size: int,
        num_parameters: int,
        cardinality: int | None,
        num_components: int = 8,
        hidden: int = 128,
    ) -> None:
        super().__init__()
        self.block_size, self.condition_size, self.num_parameters = block_size, condition_size, num_parameters
        self.cardinality, self.num_components = cardinality, num_components
        # Each neighbour is one-hot, or its value and whether there is one.
        inputs = condition_size * (cardinality or 2) + num_parameters
        outputs = num_components * (1 + block_size * (cardinality or 2))
        self.layers = nn.Sequential(
            nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
        ).double()

    def check(self, block: Block) -> None:
        """Raise ValueError if this proposal is of another motif than the block."""
        found = (len(block.variables), len(block.condition), len(block.parameters))
        wanted = (self.block_size, self.condition_size, self.num_parameters)
        if found != wanted:
            raise ValueError(
                f"this proposal is for blocks with (variables, condition, parameters) {wanted}, found {found}"
            )

    def features(self, condition: Tensor, present: Tensor, parameters: Tensor) -> Tensor:
        """The network's inputs: values around (C, c), which of them exist (c,) or (C, c), parameters (k,) or (C, k)."""
        present = present.expand(condition.shape)
        if self.cardinality is None:
            around = torch.stack([condition * present, present.double()], -1)
        else:
            around = nn.functional.one_hot(condition.clamp_min(0), self.cardinality).double() * present.unsqueeze(-1)
        return torch.cat([around.flatten(1), parameters.expand(len(condition), -1)], 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Log mixture weights (C, M), and the variables' raw parameters (C, M, b, K or 2)."""
        out = self.layers(features).unflatten(1, (self.num_components, -1))
        return out[..., 0].log_softmax(-1), out[..., 1:].unflatten(-1, (self.block_size, -1))

    def log_prob(self, values: Tensor, features: Tensor) -> Tensor:
        """log q of a block's values: (C, b) -> (C,)."""
        log_weights, raw = self(features)
        if self.cardinality is None:
            loc, log_scale = raw.unbind(-1)
            z = (values.unsqueeze(1) - loc) * (-log_scale).exp()
            each = -0.5 * z.square() - log_scale - 0.5 * torch.log(torch.tensor(2 * torch.pi))
        else:
            index = values.unsqueeze(1).unsqueeze(-1).expand(*raw.shape[:-1], 1)
            each = self._probabilities(raw).gather(-1, index).squeeze(-1).log()
        return torch.logsumexp(log_weights + each.sum(-1), -1)

    def sample(self, features: Tensor, generator: torch.Generator) -> Tensor:
        """A block's values for every chain, (C, b)."""
        log_weights, raw = self(features)
        component = torch.multinomial(log_weights.exp(), 1, generator=generator)
        own = raw.gather(1, component[..., None, None].expand(-1, 1, *raw.shape[2:])).squeeze(1)  # (C, b, ·)
        if self.cardinality is None:
            loc, log_scale = own.unbind(-1)
            return loc + log_scale.exp() * torch.randn(loc.shape, generator=generator, dtype=loc.dtype)
        flat = self._probabilities(own).flatten(0, 1)
        return torch.multinomial(flat, 1, generator=generator).view(own.shape[:-1])

    def _probabilities(self, raw: Tensor) -> Tensor:
        assert self.cardinality is not None
        return (1 - FLOOR) * raw.softmax(-1) + FLOOR / self.cardinality

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
        proposal.load_state_dict(tensors)
        return proposal
