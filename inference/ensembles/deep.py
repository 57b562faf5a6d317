r"""Deep ensembles (Lakshminarayanan et al. 2017): networks trained from different starting points, as one batched network.

Each member minimises minus its log joint density on its own random share of the data (80 % by default, as in Li, Rudner
and Wilson 2024) and keeps the parameters that were best on the rest, so that it neither overfits nor learns too small a
noise. With few data the prior's mode, all weights zero, beats any fit, and members collapse to a constant; anchored members
(Pearce et al. 2020) have the prior centred at their own starting weights instead: they keep their spread where there are no
data, and fit what there is. An ensemble is not a sample of the posterior: its spread reflects different optima, and tends
to be too narrow far from data.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesnn.checks import check_fields, count, fraction, positive
from bayesnn.configured import Configured
from bayesnn.data import Data
from bayesnn.inference.draws import WeightPosterior
from bayesnn.inference.members import NETWORK
from bayesnn.inference.network_target import NetworkTarget
from bayesnn.inference.optimizer import AdamState, adam_init, adam_step, warmup_cosine
from bayesnn.inference.starting_at import StartingAt
from bayesnn.inference.target import Parameters
from bayesnn.priors import location

MIN_HELD_OUT = 2


class DeepEnsembleState(NamedTuple):
    """Members' parameters (M, …), Adam's moments, each member's held-out rows (M, N), start, and best so far."""

    parameters: Parameters
    adam: AdamState
    held_out: Tensor
    anchors: Parameters
    best: Parameters
    best_score: Tensor


class DeepEnsembleInfo(NamedTuple):
    """Of one step, each (M,): log-likelihood for each row seen in training, and for each held-out row."""

    log_likelihood: Tensor
    held_out_log_likelihood: Tensor


@dataclass(frozen=True)
class DeepEnsemble(Configured):
    """Networks trained side by side.

    Args:
        num_members: networks; 10.
        num_steps: Adam steps, with a short warm-up and a cosine decay of the learning rate.
        learning_rate: Adam's at its peak; 0.01.
        batch_size: rows for each step; None: all.
        held_out: share of the rows that each member sets aside for itself; 0: none, and the last parameters are kept.
            With fewer than two rows to set aside there is nothing to hold out, and the members train on everything.
        check_every: steps between two looks at the held-out rows.
        anchored: centre each member's prior at its own starting weights; best with few data, as in optimisation.

    Raises:
        ValueError: if a count or rate isn't positive, or held_out isn't in [0, 1).
    """

    num_members: int = 10
    num_steps: int = 1000
    learning_rate: float = 0.01
    batch_size: int | None = None
    held_out: float = 0.2
    check_every: int = 10
    anchored: bool = False

    def __post_init__(self) -> None:
        check_fields(self, count, "num_members", "num_steps", "check_every")
        check_fields(self, positive, "learning_rate")
        check_fields(self, fraction, "held_out", interval="[0, 1)")
        if self.batch_size is not None:
            check_fields(self, count, "batch_size")

    def init(self, target: NetworkTarget, generator: torch.Generator) -> DeepEnsembleState:
        """Members at different initial points, each with its own held-out rows."""
        parameters = target.initial(self.num_members, generator)
        held_out = self._held_out_rows(len(target.data), generator)
        score = target.data.X.new_full((self.num_members,), -torch.inf)
        return DeepEnsembleState(parameters, adam_init(parameters), held_out, parameters, parameters, score)

    def _held_out_rows(self, num_rows: int, generator: torch.Generator) -> Tensor:
        """Each member's, (M, N)."""
        num_held_out = int(self.held_out * num_rows)
        ranks = torch.rand(self.num_members, num_rows, generator=generator).argsort(-1)
        return ranks < (num_held_out if num_held_out >= MIN_HELD_OUT else 0)

    def continued(
        self, target: NetworkTarget, earlier: WeightPosterior, parts: tuple[int, ...]
    ) -> tuple[DeepEnsemble, StartingAt]:
        """A fifth of the steps (our choice), from where a run with the same seed on the first rows ended.

        Args:
            target: of all rows.
            earlier: the run's result.
            parts: how many rows came at each time until then.
        """
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        settings |= {"num_steps": -(-self.num_steps // 5)}
        return _Continued(**settings, parts=parts), StartingAt(target, earlier.sampled)

    def step(
        self, target: NetworkTarget, state: DeepEnsembleState, generator: torch.Generator
    ) -> tuple[DeepEnsembleState, DeepEnsembleInfo]:
        """One step of Adam for every member, and now and then a look at the held-out rows."""
        data, size = target.data, self.batch_size or len(target.data)
        rows = torch.randperm(len(data), generator=generator)[:size] if size < len(data) else torch.arange(len(data))
        batch = Data(data.X[rows], data.Y[rows])
        training = (~state.held_out[:, rows]).to(data.X)
        leaves = {name: value.detach().requires_grad_() for name, value in state.parameters.items()}
        log_likelihoods = target.pointwise_log_likelihood(leaves, batch)
        mean = (training * log_likelihoods).sum(-1) / training.sum(-1).clamp_min(1)
        # Each member has seen its own rows only: they are its data set, and N their number.
        num_training = (~state.held_out).sum(-1)
        log_prior = target.log_prior(_from_anchors(leaves, state.anchors) if self.anchored else leaves)
        log_joint = log_prior / num_training + mean
        gradients = torch.autograd.grad(-log_joint.sum() / target.temperature, list(leaves.values()))
        rate = self.learning_rate * warmup_cosine(int(state.adam.step), self.num_steps, min(50, self.num_steps // 10))
        parameters, adam = adam_step(state.parameters, dict(zip(leaves, gradients, strict=True)), state.adam, rate)
        state = state._replace(parameters=parameters, adam=adam)
        if int(adam.step) % self.check_every == 0 or int(adam.step) == self.num_steps:
            state = self._keep_best(target, state)
        return state, DeepEnsembleInfo(mean.detach(), state.best_score)

    def _keep_best(self, target: NetworkTarget, state: DeepEnsembleState) -> DeepEnsembleState:
        if not bool(state.held_out.any()):
            return state._replace(best=state.parameters)
        with torch.no_grad():
            log_likelihoods = target.pointwise_log_likelihood(state.parameters)
        score = torch.where(state.held_out, log_likelihoods, 0.0).sum(-1) / state.held_out.sum(-1)
        better = score > state.best_score

        def choose(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(better.reshape(-1, *(1 for _ in range(new.dim() - 1))), new, old)

        best = {name: choose(value, state.best[name]) for name, value in state.parameters.items()}
        return state._replace(best=best, best_score=torch.where(better, score, state.best_score))

    def keep(self, state: DeepEnsembleState, index: int) -> None:
        """Nothing: the members are read off the last state."""

    def result(
        self, target: NetworkTarget, state: DeepEnsembleState, draws: dict[str, Tensor], infos: dict[str, Tensor]
    ) -> WeightPosterior:
        """One draw for each member."""
        return WeightPosterior(state.best, statistics={name: values[-1] for name, values in infos.items()})


@dataclass(frozen=True)
class _Continued(DeepEnsemble):
    """Members begin where they have been, and keep the anchors and the held-out rows that they had.

    These come from the seed, as they did; of the new rows each sets aside its share. So it never looks at how well it predicts
    what it has been trained on.
    """

    parts: tuple[int, ...] = ()

    def init(self, target: Any, generator: torch.Generator) -> DeepEnsembleState:
        """Trained members, with the anchors of a run on the first rows."""
        anchors = target.target.initial(self.num_members, generator)
        parts = (*self.parts, len(target.data) - sum(self.parts))
        held_out = torch.cat([self._held_out_rows(num_rows, generator) for num_rows in parts], -1)
        parameters = target.initial(self.num_members, generator)
        score = target.data.X.new_full((self.num_members,), -torch.inf)
        return DeepEnsembleState(parameters, adam_init(parameters), held_out, anchors, parameters, score)


def _from_anchors(parameters: Parameters, anchors: Parameters) -> Parameters:
    """Weights moved so that the prior's centre is each member's anchor; the likelihood's parameters as they are."""
    weights = {name: value for name, value in parameters.items() if name.startswith(NETWORK)}
    return parameters | {
        name: value - anchors[name] + location(name, value.shape[1:]) for name, value in weights.items()
    }
