r"""Stochastic-gradient Hamiltonian Monte Carlo (Chen, Fox and Guestrin 2014), vectorised over chains.

With step size :math:`\epsilon`, friction C, mass m, metric :math:`S^2`, an estimate g of :math:`\nabla\log\pi` and standard
normal z, equation 15 there in the coordinates :math:`S^{-1}\theta`:

.. math:: r \leftarrow \left(1 - \tfrac{\epsilon C}{m}\right) r + \epsilon\, S g(\theta)
                       + \sqrt{\epsilon (2 C - \epsilon \beta)}\, z,
          \qquad \theta \leftarrow \theta + \tfrac{\epsilon}{m}\, S r.

:math:`\beta` is an estimate of the variance of each entry of :math:`S g` (the paper's :math:`\hat B = \epsilon\beta / 2`):
the noise that the minibatches bring already, and that needn't be injected.

The momentum moves first (symplectic order). For :math:`\pi = N(\mu, P^{-1})` and exact gradients the stationary law of the
position is, with :math:`h^2 = \epsilon^2 / m` and :math:`f = \epsilon C / m`,

.. math:: N\!\left( \mu,\ \left( P - \tfrac{h^2}{4 - 2 f} P S^2 P \right)^{-1} \right)

while :math:`h^2 S P S < 4 - 2f`: an error of second order, 0.3 % in the variance of a standard normal at
:math:`\epsilon = 0.1, C = m = 1`. In the order of the paper's equation 9 (``symplectic=False``), where the position
moves by the old momentum, it is of first order: 11 % there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesnn.checks import check_fields, flag, number, positive
from bayesnn.inference.sgmcmc.chain import SGMCMC, Variables, standard_normal


@dataclass(frozen=True)
class SGHMC(SGMCMC):
    r"""Stochastic-gradient Hamiltonian Monte Carlo.

    The stationary law is the target's but for an error of second order in the step size: for :math:`N(\mu, P^{-1})` it is
    :math:`N(\mu, (P - \tfrac{h^2}{4 - 2f} P S^2 P)^{-1})`, :math:`h^2 = \epsilon^2 / m`, :math:`f = \epsilon C / m` (see the
    module's equations); minibatches widen it by a factor of about :math:`1 + \epsilon V / (2C)`.

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
        friction: C; momentum is forgotten over m / (C epsilon) steps, and the minibatches' noise heats it by a factor of
            about 1 + epsilon V / (2 C), V being the variance of an entry of the gradient. 10 is our choice: with the default
            step size it did best on held-out points of a small regression network.
        mass: m; momenta start at their stationary law N(0, m).
        gradient_variance: beta; 0 unless known.
        symplectic: momentum first.

    Raises:
        TypeError: if a setting is of the wrong type.
        ValueError: if a count, step size, friction or mass isn't positive, the schedule doesn't go with ``thinning``, the
            friction stops the momentum in less than a step (C epsilon >= m), or the estimated noise of the gradient is more
            than the friction takes away (epsilon beta >= 2 C).
    """

    friction: float = 10.0
    mass: float = 1.0
    gradient_variance: float = 0.0
    symplectic: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, positive, "friction", "mass")
        check_fields(self, number, "gradient_variance")
        check_fields(self, flag, "symplectic")
        largest = self.schedule.largest
        if self.friction * largest >= self.mass:
            raise ValueError(
                f"friction must be below mass / step_size = {self.mass / largest:.4g}, so that momentum isn't reversed, "
                f"found {self.friction}"
            )
        if not 0 <= largest * self.gradient_variance < 2 * self.friction:
            raise ValueError(
                f"gradient_variance must lie in [0, 2 friction / step_size) = [0, {2 * self.friction / largest:.4g}), so "
                f"that the noise left to inject has a positive variance, found {self.gradient_variance}"
            )

    def initial_variables(self, position: Tensor, generator: torch.Generator) -> Variables:
        """Momenta at N(0, m)."""
        momentum = self.mass**0.5 * standard_normal(position.shape, position, generator)
        return {"position": position, "momentum": momentum}

    def statistics(self, variables: Variables) -> dict[str, Tensor]:
        """The kinetic temperature: 1 when momenta follow their law."""
        return {"kinetic_temperature": variables["momentum"].square().mean(-1) / self.mass}

    def update(
        self, variables: Variables, gradient: Tensor, step_size: Tensor, scale: Tensor, noise: Tensor
    ) -> Variables:
        """One step of every chain."""
        old = variables["momentum"]
        momentum = old + step_size * (scale * gradient - (self.friction / self.mass) * old)
        variance = step_size * (2 * self.friction - step_size * self.gradient_variance)
        momentum = momentum + variance.sqrt() * noise[0]
        velocity = (momentum if self.symplectic else old) / self.mass
        return {"position": variables["position"] + step_size * scale * velocity, "momentum": momentum}
