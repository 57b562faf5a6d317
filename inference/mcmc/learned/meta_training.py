r"""Meta-training of a block proposal: on blocks of random models, by maximum likelihood,

.. math:: \min_\theta E\big[-\log q_\theta(x_B \mid x_C, \phi)\big],

which is the expected Kullback–Leibler divergence from the exact conditionals, up to their entropy.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from bayesnn.configured import Configured
from bayesnn.inference.mcmc.learned.models import Grid
from bayesnn.inference.mcmc.learned.proposal import BlockProposal
from bayesnn.inference.optimizer import AdamState, adam_init, adam_step, warmup_cosine


class Examples(NamedTuple):
    """Blocks of random models: values (n, b), values around (n, c), which exist (n, c), local parameters (n, k)."""

    values: Tensor
    condition: Tensor
    present: Tensor
    parameters: Tensor


ExampleSource = Callable[[int, torch.Generator], Examples]


class ProposalTarget:
    """A proposal to train, and where its examples come from: (count, generator) to :class:`Examples`."""

    def __init__(self, proposal: BlockProposal, examples: ExampleSource) -> None:
        self.proposal, self.examples, self.fingerprint = proposal, examples, ""


class TrainingState(NamedTuple):
    """The proposal's parameters and Adam's moments."""

    parameters: dict[str, Tensor]
    adam: AdamState


class TrainingInfo(NamedTuple):
    """Of one step: minus the mean log q."""

    loss: Tensor


@dataclass(frozen=True)
class ProposalTraining(Configured):
    """Adam on fresh examples.

    Args:
        num_steps: steps, with a short warm-up and a cosine decay of the learning rate.
        batch_size: examples for each step.
        learning_rate: Adam's at its peak.

    Raises:
        ValueError: if a number isn't positive.
    """

    num_steps: int = 2000
    batch_size: int = 256
    learning_rate: float = 2e-3

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, found {getattr(self, name)}")

    def init(self, target: ProposalTarget, generator: torch.Generator) -> TrainingState:
        """The proposal as it is."""
        parameters = {name: value.detach().clone() for name, value in target.proposal.named_parameters()}
        return TrainingState(parameters, adam_init(parameters))

    def step(
        self, target: ProposalTarget, state: TrainingState, generator: torch.Generator
    ) -> tuple[TrainingState, TrainingInfo]:
        """One step."""
        examples, proposal = target.examples(self.batch_size, generator), target.proposal
        features = proposal.features(examples.condition, examples.present, examples.parameters)
        leaves = {name: value.detach().requires_grad_() for name, value in state.parameters.items()}
        loss = -functional_call(
            _LogProb(proposal), {f"proposal.{n}": v for n, v in leaves.items()}, (examples.values, features)
        )
        loss = loss.mean()
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        rate = self.learning_rate * warmup_cosine(int(state.adam.step), self.num_steps, min(50, self.num_steps // 10))
        return TrainingState(*adam_step(state.parameters, gradients, state.adam, rate)), TrainingInfo(loss.detach())

    def keep(self, state: TrainingState, index: int) -> None:
        """Nothing: the last parameters are the answer."""

    def result(
        self, target: ProposalTarget, state: TrainingState, draws: dict[str, Tensor], infos: dict[str, Tensor]
    ) -> BlockProposal:
        """The proposal with the trained parameters."""
        target.proposal.load_state_dict(state.parameters)
        return target.proposal


class _LogProb(torch.nn.Module):
    def __init__(self, proposal: BlockProposal) -> None:
        super().__init__()
        self.proposal = proposal

    def forward(self, values: Tensor, features: Tensor) -> Tensor:
        return self.proposal.log_prob(values, features)


def grid_blocks(height: int, width: int, cardinality: int, coupling: float, field: float = 0.5) -> ExampleSource:
    """Blocks of random grids: normal potentials, some neighbours missing as at an edge, exact draws of the block.

    The values around are uniform, and couplings are of a random scale up to twice ``coupling``, so that the proposal is of
    use in grids unlike those it was trained on. Draws are by enumeration: height x width is at most about 12 for two values.
    """
    size = height * width
    outcomes = torch.tensor(list(itertools.product(range(cardinality), repeat=size)))

    def source(count: int, generator: torch.Generator) -> Examples:
        # One row of one-block grids: the block sits in the middle of a grid with a margin on each side.
        reference = Grid.random(height + 2, width + 2, cardinality, 1.0, generator)
        block = reference._block(1, 1, height, width)
        num_pairs = (len(block.parameters) - size * cardinality) // cardinality**2
        unary = field * torch.randn(count, size, cardinality, generator=generator, dtype=torch.float64)
        scale = 2 * coupling * torch.rand(count, 1, 1, 1, generator=generator, dtype=torch.float64)
        pairs = scale * torch.randn(
            count, num_pairs, cardinality, cardinality, generator=generator, dtype=torch.float64
        )
        around = torch.randint(cardinality, (count, len(block.condition)), generator=generator)
        sides = torch.rand(count, 4, generator=generator) < 0.85  # above, below, left, right
        present = torch.cat([sides[:, :1].expand(-1, width), sides[:, 1:2].expand(-1, width)], 1)
        present = torch.cat([present, sides[:, 2:3].expand(-1, height), sides[:, 3:].expand(-1, height)], 1)
        log_p = _conditional(unary, pairs, around, present, outcomes, height, width)
        chosen = torch.multinomial(log_p.softmax(-1), 1, generator=generator).squeeze(-1)
        pairs = _without_missing(pairs, present, height, width)
        return Examples(outcomes[chosen], around, present, torch.cat([unary.flatten(1), pairs.flatten(1)], 1))

    return source


def _edges(height: int, width: int) -> list[tuple[int, int]]:
    """The pairs of a block in the order of its parameters: places inside are 0 …, those around follow as -1, -2 …"""
    inside = {(i, j): i * width + j for i in range(height) for j in range(width)}
    around = [(-1, j) for j in range(width)] + [(height, j) for j in range(width)]
    around += [(i, -1) for i in range(height)] + [(i, width) for i in range(height)]
    number = inside | {place: -1 - index for index, place in enumerate(around)}
    across = [(number[i, j], number[i, j + 1]) for i in range(height) for j in range(-1, width)]
    return across + [(number[i, j], number[i + 1, j]) for i in range(-1, height) for j in range(width)]


def _conditional(
    unary: Tensor, pairs: Tensor, around: Tensor, present: Tensor, outcomes: Tensor, height: int, width: int
) -> Tensor:
    """log p of every outcome of the block up to a constant, (n, K^b)."""
    places = torch.arange(outcomes.shape[1])
    total = unary[:, places, outcomes].sum(-1)
    rows = torch.arange(len(around))
    for index, (first, second) in enumerate(_edges(height, width)):
        potential = pairs[:, index]
        if first >= 0 and second >= 0:
            total = total + potential[:, outcomes[:, first], outcomes[:, second]]
        elif first < 0:
            known = potential[rows, around[:, -1 - first]] * present[:, -1 - first, None]
            total = total + known[:, outcomes[:, second]]
        else:
            known = potential[rows, :, around[:, -1 - second]] * present[:, -1 - second, None]
            total = total + known[:, outcomes[:, first]]
    return total


def _without_missing(pairs: Tensor, present: Tensor, height: int, width: int) -> Tensor:
    """Potentials to neighbours that don't exist are zero, as in a grid's blocks."""
    keep = [
        torch.ones(len(pairs), dtype=torch.bool) if min(edge) >= 0 else present[:, -1 - min(edge)]
        for edge in _edges(height, width)
    ]
    return pairs * torch.stack(keep, 1)[..., None, None]
