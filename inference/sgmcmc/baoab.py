r"""BAOAB Langevin dynamics (Leimkuhler and Matthews 2013) with stochastic gradients, vectorised over chains.

Underdamped Langevin dynamics with friction :math:`\gamma`, split into a kick B, a drift A and an exact
Ornstein–Uhlenbeck step O of the momentum. With step size :math:`\epsilon`, metric :math:`S^2`, an estimate g of
:math:`\nabla\log\pi`, standard normal z and :math:`a = e^{-\gamma\epsilon}`

.. math:: r \leftarrow r + \epsilon\, S g(\theta), \quad \theta \leftarrow \theta + \tfrac\epsilon2 S r, \quad
          r \leftarrow a r + \sqrt{1 - a^2}\, z, \quad \theta \leftarrow \theta + \tfrac\epsilon2 S r.

The half kicks at the end of one step and at the start of the next are put together, so that a step takes one gradient; the
positions are those of BAOAB. For :math:`\pi = N(\mu, P^{-1})` and exact gradients the stationary law of the positions is
:math:`N(\mu, P^{-1})` itself, at every step size with :math:`\epsilon^2 S P S < 4`, and each momentum is standard normal.
Other targets have an error of second order in :math:`\epsilon`, of fourth order as the friction grows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesnn.checks import check_fields, positive
from bayesnn.inference.sgmcmc.chain import SGMCMC, Variables, standard_normal


@dataclass(frozen=True)
class BAOAB(SGMCMC):
    r"""BAOAB Langevin dynamics.

    The stationary law of the positions is the target's but for an error of second order in the step size, and a Gaussian
    target itself while :math:`\epsilon^2 S P S < 4` (see the module's equations); minibatches widen it by a factor of about
    :math:`1 + \epsilon V / (2\gamma)`, V being the variance of an entry of S g.

    Args:
        num_chains: chains, vectorised; 4 so that R-hat can be trusted.
        num_burn_in: minibatch steps that are thrown away, rounded up to a multiple of ``thinning``.
        num_draws: draws kept, for each chain.
        thinning: minibatch steps between two draws.
        step_size: epsilon, or a schedule of it; 1e-3.
        batch_size: rows of a minibatch; None, or at least N: all.
        replacement: draw minibatches independently of each other; otherwise in reshuffled epochs.
        preconditioner: learns a diagonal metric during burn-in; None: the identity.
        control_variates: centre the gradient's estimate at each chain's mean position over the second half of burn-in.
        friction: gamma; momentum is forgotten over 1 / (gamma epsilon) steps. 10 is our choice, as for SGHMC.

    Raises:
        TypeError: if a setting is of the wrong type.
        ValueError: if a count, step size or friction isn't positive, or the schedule doesn't go with ``thinning``.
    """

    friction: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, positive, "friction")

    def initial_variables(self, position: Tensor, generator: torch.Generator) -> Variables:
        """Standard normal momenta."""
        return {"position": position, "momentum": standard_normal(position.shape, position, generator)}

    def statistics(self, variables: Variables) -> dict[str, Tensor]:
        """The kinetic temperature: 1 when momenta follow their law."""
        return {"kinetic_temperature": variables["momentum"].square().mean(-1)}

    def update(
        self, variables: Variables, gradient: Tensor, step_size: Tensor, scale: Tensor, noise: Tensor
    ) -> Variables:
        """One step of every chain."""
        drift = 0.5 * step_size * scale
        momentum = variables["momentum"] + step_size * scale * gradient
        position = variables["position"] + drift * momentum
        kept, injected = (-self.friction * step_size).exp(), (-torch.expm1(-2 * self.friction * step_size)).sqrt()
        momentum = kept * momentum + injected * noise[0]
        return {"position": position + drift * momentum, "momentum": momentum}
