r"""Structured stochastic-gradient MCMC (Alexos, Boyd and Mandt, ICML 2022): parameters of different groups made independent.

The parameters fall into K groups. Any stochastic-gradient sampler follows the energy in which, for the sake of group i, the
others take values :math:`\tilde\theta` from the chain's own past,

.. math:: U_S(\theta) = \sum_{i=1}^K E_{\tilde\theta_{-i}} \big[ U(\theta_i, \tilde\theta_{-i}) \big],

so that its density falls apart into one factor for each group: the optimum of structured mean-field inference. For a
Gaussian :math:`N(\mu, \Lambda^{-1})` it is :math:`N(\mu, D^{-1})`, where D has the diagonal blocks of :math:`\Lambda`.
The sum takes K gradients a step, one for each group.

The dropout form (Sd) takes L gradients instead, whatever K: it draws masks r, each group on with probability
:math:`\rho`, and follows

.. math:: U_{Sd}(\theta) = \tfrac1\rho\, E_{r, \tilde\theta} \big[ U(r \theta + (1 - r) \tilde\theta) \big],

for a Gaussian :math:`N\big(\mu, (D + \rho (\Lambda - D))^{-1}\big)`: between the posterior (:math:`\rho = 1`) and the
factorised law.

Both are biased by construction, not only by the step size. And averages over a chain's own past forget a bad start slowly,
like :math:`t^{-\lambda}`, with :math:`\lambda` the smallest eigenvalue of :math:`D^{-1} \Lambda`: begin at a trained
network (``WarmStarted``), and keep a window of the past, not all of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bayesnn.checks import check_fields, count, flag, fraction
from bayesnn.configured import Configured
from bayesnn.data import Data
from bayesnn.inference.draws import WeightPosterior
from bayesnn.inference.flat import unravel
from bayesnn.inference.sgmcmc.chain import SGMCMC, SGMCMCState
from bayesnn.inference.sgmcmc.control_variates import Gradient, plain
from bayesnn.inference.sgmcmc.groups import Grouping, assign, check_grouping
from bayesnn.inference.target import Target


class StructuredState(NamedTuple):
    """The base sampler's state; groups (P,); a ring of past positions (R, C, P) and how many were written; random stream."""

    base: SGMCMCState
    groups: Tensor
    past: Tensor
    num_written: Tensor
    stream: Tensor


@dataclass(frozen=True)
class Structured(Configured):
    r"""A stochastic-gradient sampler of the structured energy.

    The stationary law is the base sampler's, of the structured energy in place of the posterior's: for a Gaussian
    :math:`N(\mu, \Lambda^{-1})` it is :math:`N(\mu, (D + \rho(\Lambda - D))^{-1})`, D being the diagonal blocks of
    :math:`\Lambda`, with :math:`\rho = 0` without dropout (see the module's equations). It is too narrow where groups depend
    on each other.

    Args:
        base: any stochastic-gradient sampler without control variates; its own arguments say how many chains, steps, draws.
        groups: "layer" (default), "neuron", "parameter", "random", "permuted", or tuples of name patterns, one for each
            group; see :func:`bayesnn.inference.sgmcmc.groups.assign`.
        num_groups: of "random" and "permuted" groups.
        dropout: rho, the probability that a group is on, of the dropout form; None: a gradient for each group. 0.5 and below
            are close to the factorised law (the paper uses 0.1).
        num_masks: L of the dropout form; the gradient's noise falls with it. 16 in the paper's code.
        past_size: R, positions remembered of each chain, ``thinning`` steps apart; R x chains x parameters numbers.
        independent_groups: predictions take each group from a draw of its own of the same chain, as the paper's do: under
            the exact structured energy groups are independent anyway. The posterior's parameters and diagnostics are the
            chain's, in the order of time; what its ``draws`` gives (and a ``BNN`` predicts with) is mixed. False: nothing is.

    Raises:
        TypeError: if a setting is of the wrong type.
        ValueError: if a count isn't positive, dropout isn't in (0, 1], the groups are unknown, or the base has control
            variates; at the start of a run, if a pattern matches no parameter or a parameter no pattern.
    """

    base: SGMCMC
    groups: Grouping = "layer"
    num_groups: int | None = None
    dropout: float | None = None
    num_masks: int = 16
    past_size: int = 100
    independent_groups: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.base, SGMCMC):
            raise TypeError(f"base must be a stochastic-gradient sampler (SGLD, SGHMC …), found {self.base!r}")
        if self.base.control_variates:
            raise ValueError("base can't have control_variates: its gradient isn't the posterior's")
        if self.num_groups is not None:
            check_fields(self, count, "num_groups")
        check_grouping(self.groups, self.num_groups)
        if self.dropout is not None:
            check_fields(self, fraction, "dropout", interval="(0, 1]")
        check_fields(self, count, "num_masks", "past_size")
        check_fields(self, flag, "independent_groups")

    @property
    def num_chains(self) -> int:
        """The base's."""
        return self.base.num_chains

    @property
    def num_steps(self) -> int:
        """The base's."""
        return self.base.num_steps

    def init(self, target: Target, generator: torch.Generator) -> StructuredState:
        """The base's start, which is all the past there is."""
        base = self.base.init(target, generator)
        own = torch.Generator()  # a copy, so that the base draws what it would draw by itself
        own.set_state(generator.get_state())
        own.manual_seed(int(torch.randint(2**62, (), generator=own)))
        groups = assign(self.groups, target.shapes(), self.num_groups, own)
        past = base.variables["position"].expand(self.past_size, -1, -1).clone()
        return StructuredState(base, groups, past, torch.ones((), dtype=torch.long), own.get_state())

    def step(
        self, target: Target, state: StructuredState, generator: torch.Generator
    ) -> tuple[StructuredState, dict[str, Tensor]]:
        """The base's ``thinning`` steps, then one more position to remember."""
        own = torch.Generator()
        own.set_state(state.stream)
        past = state.past[: min(int(state.num_written), self.past_size)]
        base, info = self.base.advance(
            self._gradient(plain(target), past, state.groups, own), target.data, state.base, generator
        )
        remembered = state.past.clone()
        remembered[int(state.num_written) % self.past_size] = base.variables["position"]
        state = StructuredState(base, state.groups, remembered, state.num_written + 1, own.get_state())
        return state, info

    def _gradient(self, gradient: Gradient, past: Tensor, groups: Tensor, generator: torch.Generator) -> Gradient:
        num_groups = int(groups.max()) + 1

        def estimate(position: Tensor, batch: Data | None) -> Tensor:
            masks = self.draw_masks(num_groups, len(position), generator)
            rows = torch.randint(len(past), masks.shape, generator=generator)
            return structured_gradient(gradient, position, batch, masks, past, rows, groups, self.dropout)

        return estimate

    def draw_masks(self, num_groups: int, num_chains: int, generator: torch.Generator) -> Tensor:
        """Which groups take their present values, (L, C, K): one at a time, or by chance."""
        if self.dropout is None:
            return torch.eye(num_groups, dtype=torch.bool).unsqueeze(1).expand(-1, num_chains, -1)
        shape = (self.num_masks, num_chains, num_groups)
        return torch.rand(shape, generator=generator, dtype=torch.float64) < self.dropout

    def keep(self, state: StructuredState, index: int) -> dict[str, Tensor] | None:
        """The base's."""
        return self.base.keep(state.base, index)

    def result(
        self, target: Target, state: StructuredState, draws: dict[str, Tensor], infos: dict[str, Tensor]
    ) -> WeightPosterior:
        """The base's, with its groups, unless they are to stay together."""
        posterior = self.base.result(target, state.base, draws, infos)
        if self.independent_groups:
            posterior.groups = unravel(state.groups.repeat(posterior.num_chains, 1), target.shapes())
        return posterior


def structured_gradient(
    gradient: Gradient,
    position: Tensor,
    batch: Data | None,
    masks: Tensor,
    past: Tensor,
    rows: Tensor,
    groups: Tensor,
    dropout: float | None,
) -> Tensor:
    """An estimate of the gradient of minus the structured energy, (C, P).

    Args:
        gradient: estimates that of the log density.
        position: (C, P).
        batch: the minibatch.
        masks: which groups take their present values, (L, C, K).
        past: earlier positions, (R, C, P).
        rows: which of them each group takes else, (L, C, K).
        groups: of every parameter, (P,).
        dropout: rho; None: the masks are single groups, and their gradients are added up.
    """
    present, rows = masks[:, :, groups], rows[:, :, groups]  # (L, C, P)
    composite = torch.where(present, position, past.gather(0, rows))
    slopes = gradient(composite.flatten(0, 1), batch).view_as(composite)
    slopes = torch.where(present, slopes, 0.0)
    return slopes.sum(0) if dropout is None else slopes.mean(0) / dropout
