r"""Stochastic-gradient Langevin dynamics (Welling and Teh 2011), vectorised over chains.

With step size :math:`\epsilon`, an estimate g of :math:`\nabla\log\pi`, metric :math:`S^2` and standard normal z

.. math:: \theta \leftarrow \theta + \epsilon\, S^2 g(\theta) + \sqrt{2 \epsilon}\, S z.

The paper's step size is twice this one. For :math:`\pi = N(\mu, P^{-1})` and exact gradients the stationary law is

.. math:: N\!\left( \mu,\ \left( P - \tfrac{\epsilon}{2} P S^2 P \right)^{-1} \right)

while :math:`\epsilon S P S < 2`: wider than the target by a factor :math:`1 / (1 - \epsilon \lambda / 2)` along an
eigenvector of SPS with eigenvalue :math:`\lambda`. A gradient with noise of covariance V adds about
:math:`\epsilon S V S / 2` to a covariance in units of S.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesnn.inference.sgmcmc.chain import SGMCMC, Variables
from bayesnn.inference.sgmcmc.schedules import Schedule


@dataclass(frozen=True)
class SGLD(SGMCMC):
    r"""Stochastic-gradient Langevin dynamics; with ``preconditioner=RMS()``, pSGLD.

    The stationary law is the target's but for an error of first order in the step size: for :math:`N(\mu, P^{-1})` it is
    :math:`N(\mu, (P - \tfrac{\epsilon}{2} P S^2 P)^{-1})`, too wide, and minibatches widen it by about
    :math:`\epsilon S V S / 2` (see the module's equations).

    Args:
        num_chains: chains, vectorised; 4 so that R-hat can be trusted.
        num_burn_in: minibatch steps that are thrown away, rounded up to a multiple of ``thinning``.
        num_draws: draws kept, for each chain.
        thinning: minibatch steps between two draws.
        step_size: epsilon, or a schedule of it; 1e-4 is our choice for small networks, with a preconditioner 1e-3.
        batch_size: rows of a minibatch; None, or at least N: all.
        replacement: draw minibatches independently of each other; otherwise in reshuffled epochs.
        preconditioner: learns a diagonal metric during burn-in; None: the identity.
        control_variates: centre the gradient's estimate at each chain's mean position over the second half of burn-in.

    Raises:
        TypeError: if a setting is of the wrong type.
        ValueError: if a count or step size isn't positive, or the schedule doesn't go with ``thinning``.
    """

    step_size: float | Schedule = 1e-4

    def initial_variables(self, position: Tensor, generator: torch.Generator) -> Variables:
        """The positions, nothing else."""
        return {"position": position}

    def update(
        self, variables: Variables, gradient: Tensor, step_size: Tensor, scale: Tensor, noise: Tensor
    ) -> Variables:
        """One step of every chain."""
        move = step_size * scale * gradient + (2 * step_size).sqrt() * noise[0]
        return {"position": variables["position"] + scale * move}
