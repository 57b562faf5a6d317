r"""Meta-training of a block proposal: on blocks of random models, by maximum likelihood,

.. math:: \min_\theta E\big[-\log q_\theta(x_B \mid x_C, \phi)\big],

which is the expected Kullback–Leibler divergence from the exact conditionals, up to their entropy.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from bayesnn.configured import Configured, describe
from bayesnn.files import fingerprint
from bayesnn.inference.mcmc.learned.examples import Examples
from bayesnn.inference.mcmc.learned.proposal import BlockProposal
from bayesnn.inference.optimizer import AdamState, adam_init, adam_step, warmup_cosine

ExampleSource = Callable[[int, torch.Generator], Examples]


class ProposalTarget:
    """A proposal to train, and where its examples come from.

    Args:
        proposal: where training starts; it isn't changed.
        examples: (count, generator) to :class:`Examples`, such as :class:`GridBlocks`. What another function computes can't be
            told from outside: a checkpoint is tied to its name alone.

    Raises:
        ValueError: if the examples are of another motif than the proposal's.
    """

    def __init__(self, proposal: BlockProposal, examples: ExampleSource) -> None:
        example = examples(1, torch.Generator().manual_seed(0))
        proposal.check(example.values.shape[-1], example.conditional.features.shape[-1], proposal.cardinality)
        if example.values.is_floating_point() != (proposal.cardinality is None):
            raise ValueError(f"a proposal of cardinality {proposal.cardinality} has examples of {example.values.dtype}")
        if proposal.cardinality is not None:
            many = examples(256, torch.Generator().manual_seed(0)).values
            if int(many.max()) >= proposal.cardinality:
                raise ValueError(
                    f"a proposal of cardinality {proposal.cardinality} has examples of value {int(many.max())}"
                )
        self.proposal, self.examples = proposal, examples
        source = json.dumps(describe(examples)) if isinstance(examples, Configured) else repr(type(examples))
        self.fingerprint = fingerprint(proposal.fingerprint, source)


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
        examples = target.examples(self.batch_size, generator)
        leaves = {name: value.detach().requires_grad_() for name, value in state.parameters.items()}
        loss = -functional_call(target.proposal, leaves, (examples.conditional,)).log_prob(examples.values).mean()
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        rate = self.learning_rate * warmup_cosine(int(state.adam.step), self.num_steps, min(50, self.num_steps // 10))
        return TrainingState(*adam_step(state.parameters, gradients, state.adam, rate)), TrainingInfo(loss.detach())

    def keep(self, state: TrainingState, index: int) -> None:
        """Nothing: the last parameters are the answer."""

    def result(
        self, target: ProposalTarget, state: TrainingState, draws: dict[str, Tensor], infos: dict[str, Tensor]
    ) -> BlockProposal:
        """A copy of the proposal with the trained parameters."""
        trained = copy.deepcopy(target.proposal)
        trained.load_state_dict(state.parameters)
        return trained
