r"""NeuralUCB and neural Thompson sampling: the network's gradients as features of a Bayesian linear model.

With g the gradient of the arm's value at the present weights and U summed over the observations,

.. math:: \sigma_a^2 = \lambda \sum_j g_{a,j}^2 / U_j, \qquad U_j = \lambda + \sum_i g_{i,j}^2, \qquad
    \text{UCB: } \arg\max_a f_a + \nu \sigma_a, \qquad \text{TS: draws from } N(f_a, \nu^2 \sigma_a^2).

U is the diagonal of the design matrix only, as in the authors' own code; the papers' matrix has a row for every weight.
(Their code has :math:`\sqrt\nu` where the papers and we have :math:`\nu`.) It grows when a reward is told, not when an
arm is asked for, so that logged data count and lost rewards don't.

The network is fitted to rewards by Adam on minibatches of everything told so far, with the penalty
:math:`\lambda \lVert\theta - \theta_0\rVert^2 / (2 t)`. Ours, for rounds that cost the same however many came
before: the papers descend anew on all observations in every round. Ours too: predictions that start at the largest
reward, so that no arm is given up untried (theirs start at 0), tanh for their ReLU, and the defaults.

Source: Zhou, Li and Gu, Neural contextual bandits with UCB-based exploration (ICML 2020), algorithm 1; Zhang, Zhou, Li
and Gu, Neural Thompson sampling (ICLR 2021), algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bayesnn.bo.arms import Arms
from bayesnn.bo.exploration import greedy, thompson
from bayesnn.checks import check_fields, count, positive
from bayesnn.configured import Configured
from bayesnn.inference.optimizer import AdamState, adam_init, adam_step


class History(NamedTuple):
    """Inputs (n, d), weights that pick the output (n, out), rewards (n,); rows from ``observed`` on are room to grow."""

    inputs: Tensor
    picks: Tensor
    rewards: Tensor


class GradientState(NamedTuple):
    """Weights, initial weights and the design's diagonal (p,), Adam's memory, observations and their number."""

    theta: Tensor
    anchor: Tensor
    design: Tensor
    adam: AdamState
    history: History
    observed: Tensor


@dataclass(frozen=True)
class NeuralUCB(Configured):
    r"""NeuralUCB: the arm of the largest :math:`f_a + \nu \sigma_a`.

    Args:
        exploration: :math:`\nu`.
        regularization: :math:`\lambda`.
        step_size: Adam's.
        batch_size: rows drawn from the past for the step of each round; the newest row is always one of them.

    Raises:
        TypeError, ValueError: for settings that aren't positive.
    """

    exploration: float = 0.1
    regularization: float = 1.0
    step_size: float = 0.01
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_fields(self, positive, "exploration", "regularization", "step_size")
        check_fields(self, count, "batch_size")

    def start(self, arms: Arms, generator: torch.Generator, dtype: torch.dtype) -> GradientState:
        """The state before the first observation."""
        theta = arms.network.initial(generator, dtype)
        num_outputs = arms.network.shapes[-1][0]
        room = [torch.zeros(shape, dtype=dtype) for shape in ((64, arms.num_features), (64, num_outputs), (64,))]
        return GradientState(
            theta,
            theta,
            torch.full_like(theta, self.regularization),
            adam_init({"theta": theta}),
            History(*room),
            torch.zeros((), dtype=torch.int64),
        )

    def losses(self, arms: Arms, state: GradientState, contexts: Tensor) -> Tensor:
        """Predicted losses (B, K)."""
        return -arms.values(state.theta, contexts)

    def rewards_and_stds(self, arms: Arms, state: GradientState, contexts: Tensor) -> tuple[Tensor, Tensor]:
        r"""Predicted rewards and :math:`\nu \sigma_a`, (B, K) both."""
        values, norms = arms.values_and_norms(state.theta, contexts, self.regularization / state.design)
        return 1 + values, self.exploration * norms.sqrt()

    def probabilities(self, arms: Arms, state: GradientState, contexts: Tensor) -> Tensor:
        """Of the arms (B, K): all on one."""
        rewards, stds = self.rewards_and_stds(arms, state, contexts)
        return greedy(rewards + stds)

    def observe(
        self, arms: Arms, state: GradientState, row: tuple[Tensor, Tensor, Tensor], generator: torch.Generator
    ) -> GradientState:
        """Take in a context (1, ...), its arm (1,) and the loss (1,), and go one step."""
        context, arm, loss = row
        inputs, picks = arms.chosen(context, arm)
        passed = arms.network.run(state.theta, inputs)
        state = state._replace(
            design=state.design + arms.network.squared_gradient(state.theta, passed, picks),
            history=_appended(state.history, int(state.observed), (inputs, picks, 1 - loss)),
            observed=state.observed + 1,
        )
        gradient = self._gradient(arms, state, generator)
        params, adam = adam_step({"theta": state.theta}, {"theta": gradient}, state.adam, self.step_size)
        return state._replace(theta=params["theta"], adam=adam)

    def _gradient(self, arms: Arms, state: GradientState, generator: torch.Generator) -> Tensor:
        number = int(state.observed)
        drawn = torch.randint(number, (self.batch_size,), generator=generator)
        drawn[0] = number - 1
        inputs, picks, rewards = (part[drawn] for part in state.history)
        passed = arms.network.run(state.theta, inputs)
        residuals = 1 + (passed.outputs * picks).sum(-1) - rewards
        gradient = arms.network.gradient(state.theta, passed, residuals.unsqueeze(-1) / self.batch_size * picks)
        return gradient + self.regularization / number * (state.theta - state.anchor)


@dataclass(frozen=True)
class NeuralThompson(NeuralUCB):
    r"""Neural Thompson sampling: the arm whose draw of :math:`N(f_a, \nu^2 \sigma_a^2)` is the largest.

    Args:
        exploration, regularization, step_size, batch_size: as for :class:`NeuralUCB`.
    """

    def probabilities(self, arms: Arms, state: GradientState, contexts: Tensor) -> Tensor:
        """Of the arms (B, K)."""
        rewards, stds = self.rewards_and_stds(arms, state, contexts)
        return thompson(rewards, stds.clamp_min(torch.finfo(stds.dtype).tiny))


def _appended(history: History, number: int, row: tuple[Tensor, Tensor, Tensor]) -> History:
    """The row written at ``number``; the room doubles when it is full."""
    if number == len(history.rewards):
        history = History(*(torch.cat([part, torch.zeros_like(part)]) for part in history))
    for part, value in zip(history, row, strict=True):
        part[number] = value[0]
    return history
