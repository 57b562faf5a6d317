r"""Stochastic-gradient Nosé–Hoover thermostat (Ding et al. 2014), vectorised over chains.

Minibatches heat the momenta by an amount that nobody knows; the thermostat :math:`\xi`, a friction that grows while the
momenta are too hot, takes that much away again. With injected noise A, metric :math:`S^2`, an estimate g of
:math:`\nabla\log\pi` and P parameters, equation 7 there is

.. math:: d\theta = S r\, dt, \quad dr = (S g - \xi r)\, dt + \sqrt{2A}\, dW, \quad d\xi = (r^\top r / P - 1)\, dt.

If the noise of g amounts to another :math:`\sqrt{2B}\, dW`, the same for all parameters, the stationary law is
:math:`\pi(\theta)` times :math:`r \sim N(0, I)` times :math:`\xi \sim N(A + B, 1/P)`, whatever B.

The paper's Euler steps have an error of first order: the momenta get the right temperature where the positions don't see it.
Here the equations are integrated by the splitting BADODAB (Leimkuhler and Shang, Adaptive thermostats for noisy gradient
systems, 2016), with its two half kicks put together, so that it takes one gradient, too: with step size :math:`\epsilon`

.. math::
    r &\leftarrow r + \epsilon\, S g(\theta), & \theta &\leftarrow \theta + \tfrac\epsilon2 S r, \\
    \xi &\leftarrow \xi + \tfrac\epsilon2 (r^\top r / P - 1), &
    r &\leftarrow e^{-\xi\epsilon} r + \sqrt{A (1 - e^{-2\xi\epsilon}) / \xi}\, z, \\
    \xi &\leftarrow \xi + \tfrac\epsilon2 (r^\top r / P - 1), & \theta &\leftarrow \theta + \tfrac\epsilon2 S r.

Its error is of second order. Whatever the step size and the noise, a stationary chain has a mean kinetic temperature of
exactly 1, averaged before and after the noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesnn.checks import check_fields, positive
from bayesnn.inference.sgmcmc.chain import SGMCMC, Variables, standard_normal

SMALL = 1e-12  # in place of a friction of zero, by which the noise's variance would be divided


@dataclass(frozen=True)
class SGNHT(SGMCMC):
    r"""Stochastic-gradient Nosé–Hoover thermostat, one for each chain.

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
        friction: A, the injected noise, and the mean friction where the gradient's estimate has none. 10 is our choice, as
            for SGHMC.

    Raises:
        ValueError: if a count, step size or friction isn't positive, or the schedule doesn't go with ``thinning``.
    """

    friction: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, positive, "friction")

    def initial_variables(self, position: Tensor, generator: torch.Generator) -> Variables:
        """Standard normal momenta, and thermostats N(A, 1/P), (C, 1): their law with exact gradients."""
        chains, size = position.shape
        spread = standard_normal(torch.Size([chains, 1]), position, generator) / size**0.5
        momentum = standard_normal(position.shape, position, generator)
        return {"position": position, "momentum": momentum, "thermostat": self.friction + spread}

    def statistics(self, variables: Variables) -> dict[str, Tensor]:
        """The kinetic temperature, and the thermostat's friction."""
        temperature = variables["momentum"].square().mean(-1)
        return {"kinetic_temperature": temperature, "thermostat": variables["thermostat"].squeeze(-1)}

    def update(
        self, variables: Variables, gradient: Tensor, step_size: Tensor, scale: Tensor, noise: Tensor
    ) -> Variables:
        """One step of every chain."""
        half = 0.5 * step_size
        momentum = variables["momentum"] + step_size * scale * gradient
        position = variables["position"] + half * scale * momentum
        thermostat = variables["thermostat"] + half * (momentum.square().mean(-1, keepdim=True) - 1)
        decay = step_size * thermostat
        decay = torch.where(decay.abs() < SMALL, SMALL, decay)
        injected = (-self.friction * step_size * torch.expm1(-2 * decay) / decay).sqrt()
        momentum = (-decay).exp() * momentum + injected * noise[0]
        thermostat = thermostat + half * (momentum.square().mean(-1, keepdim=True) - 1)
        position = position + half * scale * momentum
        return {"position": position, "momentum": momentum, "thermostat": thermostat}
