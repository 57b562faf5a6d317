r"""Stochastic-gradient Nosé–Hoover thermostat (Ding et al. 2014), vectorised over chains.

Minibatches heat the momenta by an amount that nobody knows; the thermostat :math:`\xi`, a friction that grows while the
momenta are too hot, takes that much away again. With injected noise A, metric :math:`S^2`, an estimate g of
:math:`\nabla\log\pi` and P parameters, equation 7 there is

.. math:: d\theta = S r\, dt, \quad dr = (S g - \xi r)\, dt + \sqrt{2A}\, dW, \quad d\xi = (r^\top r / P - 1)\, dt.

If the noise of g amounts to another :math:`\sqrt{2B}\, dW`, white and the same for all parameters, the stationary law is
:math:`\pi(\theta)` times :math:`r \sim N(0, I)` times :math:`\xi \sim N(A + B, 1/P)`, whatever B.

Minibatches drawn with replacement make white noise, and are the default here. In reshuffled epochs (``replacement=False``)
their noise adds up to nothing over an epoch: motion slower than that doesn't feel it, while the thermostat takes off what the
momenta feel, and is too cold for it. For A = B = 1 and epochs of 3.2 units of time (64 steps) the variances of Gaussians
of precision 0.1, 1 and 10 were 0.57, 0.70 and 1.01 times what they should be, with replacement 1.01, 0.99 and 1.00; epochs
of 0.4 units gave 0.85, 0.85 and 0.94, of 25.6 units 0.67, 0.93 and 1.00. The kinetic temperature doesn't show it.

The thermostat is slow: it relaxes over about :math:`(A + B) / \epsilon` steps, 10 000 with the default settings, and a start
far from the posterior heats the momenta and charges it far beyond that. So it is held in the first half of burn-in, in
which the friction is A, and released then; if it has much noise to take off, the second half should be several times as
long as that, and a run whose kinetic temperature stays off warns.

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

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesnn.checks import check_fields, positive
from bayesnn.data import BayesnnWarning
from bayesnn.inference.draws import WeightPosterior
from bayesnn.inference.sgmcmc.chain import SGMCMC, SGMCMCState, Update, Variables, standard_normal
from bayesnn.inference.sgmcmc.schedules import Cyclical
from bayesnn.inference.target import Target

SMALL = 1e-12  # in place of a friction of zero, by which the noise's variance would be divided


@dataclass(frozen=True)
class SGNHT(SGMCMC):
    r"""Stochastic-gradient Nosé–Hoover thermostat, one for each chain.

    The stationary law is :math:`\pi(\theta)\, N(r; 0, I)\, N(\xi; A + B, 1/P)` but for an error of second order in the step
    size, if the gradient's noise is white, of the same strength B for all parameters, and unknown (see the module's
    equations). Minibatches of reshuffled epochs aren't white: with them it is too narrow.

    Args:
        num_chains: chains, vectorised; 4 so that R-hat can be trusted.
        num_burn_in: minibatch steps that are thrown away, rounded up to a multiple of ``thinning``; the thermostat is held
            in the first half of them.
        num_draws: draws kept, for each chain.
        thinning: minibatch steps between two draws.
        step_size: epsilon, or a schedule of it; 1e-3.
        batch_size: rows of a minibatch; None, or at least N: all.
        replacement: draw minibatches independently of each other, so that their noise is white; otherwise in reshuffled
            epochs, from whose noise the thermostat takes too much.
        preconditioner: learns a diagonal metric during burn-in; None: the identity.
        control_variates: centre the gradient's estimate at each chain's mean position over the second half of burn-in.
        friction: A, the injected noise, and the mean friction where the gradient's estimate has none. 10 is our choice, as
            for SGHMC. The thermostat relaxes over about (A + B) / epsilon steps.

    Raises:
        TypeError: if a setting is of the wrong type.
        ValueError: if a count, step size or friction isn't positive, or the schedule doesn't go with ``thinning``.
    """

    friction: float = 10.0
    replacement: bool = True

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

    def result(
        self, target: Target, state: SGMCMCState, draws: dict[str, Tensor], infos: dict[str, Tensor]
    ) -> WeightPosterior:
        """The draws of all chains; warns if their mean kinetic temperature is off by over 10 % and what chance explains."""
        posterior = super().result(target, state, draws, infos)
        if not isinstance(self.schedule, Cyclical):  # which has no stationary law
            self._check_temperature(posterior.statistics, draws["position"].shape[-1])
        return posterior

    def _check_temperature(self, statistics: dict[str, Tensor], num_parameters: int) -> None:
        friction, step_size = float(statistics["thermostat"].mean()), float(statistics["step_size"].mean())
        # Of the noise of a step's gradient, half is there on average, and none after the friction: when this is measured.
        cooling = (1 - self.friction / friction) * math.tanh(step_size * friction)
        mean = float(statistics["kinetic_temperature"].double().mean()) + cooling
        # Each momentum's square has variance 2 and is forgotten over 1 / (2 A). Draws of a transient can't tell their error.
        duration = statistics["step_size"].numel() * self.thinning * step_size  # of all chains
        error = math.sqrt(2 / (num_parameters * self.friction * duration))
        if abs(mean - 1) > 0.1 + 3 * error:
            warnings.warn(
                f"{type(self).__name__}: the mean kinetic temperature after burn-in is {mean:.2f} ± {error:.2f} and should be "
                f"1: the draws are too {'wide' if mean > 1 else 'narrow'}. The thermostat relaxes over about thermostat / "
                f"step_size = {friction / step_size:.0f} minibatch steps: num_burn_in should be several times that (now "
                f"{self.num_burn_in}), or step_size larger, or friction smaller",
                BayesnnWarning,
                stacklevel=2,
            )

    def update_at(self, step: int) -> Update:
        """With the thermostat held in the first half of burn-in, and free then."""
        return self.update_held if step < self.num_burn_in_steps // 2 * self.thinning else self.update

    def update(
        self, variables: Variables, gradient: Tensor, step_size: Tensor, scale: Tensor, noise: Tensor
    ) -> Variables:
        """One step of every chain."""
        half = 0.5 * step_size
        momentum = variables["momentum"] + step_size * scale * gradient
        position = variables["position"] + half * scale * momentum
        thermostat = variables["thermostat"] + half * (momentum.square().mean(-1, keepdim=True) - 1)
        momentum = self._thermalised(momentum, thermostat, step_size, noise[0])
        thermostat = thermostat + half * (momentum.square().mean(-1, keepdim=True) - 1)
        position = position + half * scale * momentum
        return {"position": position, "momentum": momentum, "thermostat": thermostat}

    def update_held(
        self, variables: Variables, gradient: Tensor, step_size: Tensor, scale: Tensor, noise: Tensor
    ) -> Variables:
        """One step of every chain with the friction A, whatever the thermostat, which waits where it is."""
        half, friction = 0.5 * step_size, torch.full_like(variables["thermostat"], self.friction)
        momentum = variables["momentum"] + step_size * scale * gradient
        position = variables["position"] + half * scale * momentum
        momentum = self._thermalised(momentum, friction, step_size, noise[0])
        return variables | {"position": position + half * scale * momentum, "momentum": momentum}

    def _thermalised(self, momentum: Tensor, friction: Tensor, step_size: Tensor, noise: Tensor) -> Tensor:
        decay = step_size * friction
        decay = torch.where(decay.abs() < SMALL, SMALL, decay)
        injected = (-self.friction * step_size * torch.expm1(-2 * decay) / decay).sqrt()
        return (-decay).exp() * momentum + injected * noise
