r"""NeuSquareCB and NeuFastCB: online regression of losses by a perturbed network, then inverse gap weighting.

With :math:`\theta_0` the initial weights, m the width and S fixed vectors of random signs :math:`\varepsilon_s`,

.. math:: \tilde f_s(\theta; x) = f(\theta; x) + \frac{c_p}{m^{1/4}} \sum_j \varepsilon_{s,j} (\theta - \theta_0)_j,
    \qquad \mathcal L(\theta) = \frac{1}{S} \sum_s \ell\big(y, \tilde f_s(\theta; x)\big).

The perturbation is the same for every context. It gives the loss one minimum, with quadratic growth around it:
:math:`E\,\mathcal L` with the square loss is :math:`\ell(y, f)` and a ridge penalty
:math:`c_p^2 \lVert\theta - \theta_0\rVert^2 / (2 \sqrt m)`. Each observation is one step of gradient descent on
:math:`\mathcal L`, then the projection on a ball around :math:`\theta_0`; predictions are averages over the copies.

Source: Deb, Ban, Zuo, He and Banerjee, Contextual bandits with online neural regression (ICLR 2024, arXiv 2312.07145),
from memory where the abstract leaves off. Ours: one ball for all layers together (theirs has one for each), a constant
step size (theirs falls as 1/t times an unknown constant), and every number among the defaults.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bayesnn.bo.arms import Arms
from bayesnn.bo.exploration import fast_cb, fast_cb_gamma, square_cb, square_cb_gamma
from bayesnn.checks import check_fields, count, nonnegative, positive
from bayesnn.configured import Configured


class RegressionState(NamedTuple):
    """Weights and initial weights (p,), signs (S, p), observations so far and their losses' sum (scalars)."""

    theta: Tensor
    anchor: Tensor
    signs: Tensor
    observed: Tensor
    total_loss: Tensor


@dataclass(frozen=True)
class NeuSquareCB(Configured):
    r"""NeuSquareCB: the square loss :math:`\tfrac12 (\tilde f_s - y)^2`, explored with :func:`square_cb`.

    :math:`\gamma_t` is ``gamma_scale`` times :func:`square_cb_gamma` of the t observations so far, with
    :math:`\log(1 + t)` for the regression's regret, of which the theory bounds the order only.

    Args:
        gamma_scale: the larger, the greedier.
        step_size: of the gradient descent.
        perturbation: :math:`c_p`; 0 is plain online gradient descent.
        copies: S; the theory wants the order of log m.
        radius: of the ball.

    Raises:
        TypeError, ValueError: for settings out of their range.
    """

    gamma_scale: float = 10.0
    step_size: float = 0.3
    perturbation: float = 0.01
    copies: int = 8
    radius: float = 20.0

    def __post_init__(self) -> None:
        check_fields(self, positive, "gamma_scale", "step_size", "radius")
        check_fields(self, nonnegative, "perturbation")
        check_fields(self, count, "copies")

    def start(self, arms: Arms, generator: torch.Generator, dtype: torch.dtype) -> RegressionState:
        """The state before the first observation."""
        theta = arms.network.initial(generator, dtype)
        signs = torch.randint(2, (self.copies, len(theta)), generator=generator).to(dtype).mul_(2).sub_(1)
        return RegressionState(theta, theta, signs, torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=dtype))

    def losses(self, arms: Arms, state: RegressionState, contexts: Tensor) -> Tensor:
        """Predicted losses (B, K), the average over the copies."""
        outputs = arms.values(state.theta, contexts).unsqueeze(-1)
        return self._link(outputs + self._shifts(arms, state)).mean(-1)

    def probabilities(self, arms: Arms, state: RegressionState, contexts: Tensor) -> Tensor:
        """Of the arms (B, K)."""
        rounds = max(1, int(state.observed))
        gamma = self.gamma_scale * square_cb_gamma(arms.num_arms, rounds, math.log1p(rounds))
        return square_cb(self.losses(arms, state, contexts), gamma)

    def observe(
        self, arms: Arms, state: RegressionState, row: tuple[Tensor, Tensor, Tensor], generator: torch.Generator
    ) -> RegressionState:
        """One projected step on a context (1, ...), its arm (1,) and the loss (1,)."""
        context, arm, loss = row
        gradient = self.gradient(arms, state, context, arm, loss)
        theta = projected(state.theta - self.step_size * gradient, state.anchor, self.radius)
        return state._replace(theta=theta, observed=state.observed + 1, total_loss=state.total_loss + loss.sum())

    def gradient(self, arms: Arms, state: RegressionState, context: Tensor, arm: Tensor, loss: Tensor) -> Tensor:
        r"""The gradient (p,) of the averaged loss: with residuals :math:`r_s = \tilde y_s - y`, which both losses have,
        :math:`\bar r\, \nabla f + c_p m^{-1/4}\, \overline{r_s \varepsilon_s}`.
        """
        inputs, picks = arms.chosen(context, arm)
        passed = arms.network.run(state.theta, inputs)
        output = (passed.outputs * picks).sum(-1)
        residuals = self._link(output + self._shifts(arms, state)) - loss
        gradient = arms.network.gradient(state.theta, passed, residuals.mean() * picks)
        return gradient + self._strength(arms) / self.copies * (residuals @ state.signs)

    def _strength(self, arms: Arms) -> float:
        return self.perturbation / arms.network.width**0.25

    def _shifts(self, arms: Arms, state: RegressionState) -> Tensor:
        return self._strength(arms) * (state.signs @ (state.theta - state.anchor))

    def _link(self, outputs: Tensor) -> Tensor:
        """Losses from outputs: none before anything is known, so that no arm is given up untried."""
        return outputs


@dataclass(frozen=True)
class NeuFastCB(NeuSquareCB):
    r"""NeuFastCB: losses :math:`\sigma(\tilde f_s)`, the logarithmic (KL) loss, explored with :func:`fast_cb`.

    :math:`\gamma_t` is ``gamma_scale`` times :func:`fast_cb_gamma`, with the losses observed so far for :math:`L^*` and
    :math:`\log(1 + t)` for the regression's regret: no horizon is needed, and little loss means little exploration.

    Args:
        gamma_scale, step_size, perturbation, copies, radius: as for :class:`NeuSquareCB`.
    """

    gamma_scale: float = 1.0
    step_size: float = 3.0

    def probabilities(self, arms: Arms, state: RegressionState, contexts: Tensor) -> Tensor:
        """Of the arms (B, K)."""
        regret = math.log1p(max(1, int(state.observed)))
        gamma = self.gamma_scale * fast_cb_gamma(arms.num_arms, float(state.total_loss), regret)
        return fast_cb(self.losses(arms, state, contexts), gamma)

    def _link(self, outputs: Tensor) -> Tensor:
        return outputs.sigmoid()


def projected(theta: Tensor, anchor: Tensor, radius: float) -> Tensor:
    """The point of the ball around the anchor that is nearest to theta."""
    moved = theta - anchor
    return anchor + moved * (radius / moved.norm().clamp_min(radius))
