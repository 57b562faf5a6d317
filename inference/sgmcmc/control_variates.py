r"""Gradient estimates from minibatches, plain and with control variates.

The plain estimate is the target's own: the gradient of :math:`\log p(\theta) + \frac{N}{|B|} \sum_{i \in B} \ell_i(\theta)`,
divided by the temperature. With an anchor :math:`\hat\theta` whose full gradient is known (Baker et al., Control variates
for SG-MCMC, 2019, equation 8)

.. math:: \hat g(\theta) = \nabla \log \pi(\hat\theta) + g_B(\theta) - g_B(\hat\theta),

unbiased as well, with a variance that falls with :math:`|\theta - \hat\theta|^2` and is zero at the anchor. It takes two
gradients of the minibatch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bayesnn.data import Data
from bayesnn.inference.flat import log_density_and_gradient
from bayesnn.inference.target import Target

Gradient = Callable[[Tensor, Data | None], Tensor]
"""From positions (C, P) and a minibatch (None: all data) to estimates of the gradient of the log density, (C, P)."""


class Anchor(NamedTuple):
    """Where each chain's control variate is centred, and the full gradient there; (C, P) each."""

    position: Tensor
    gradient: Tensor


def plain(target: Target) -> Gradient:
    """The minibatch gradient, scaled up to all data."""
    compiled: Gradient | None = getattr(target, "minibatch_gradient", None)
    return compiled or (lambda position, batch: log_density_and_gradient(target, position, batch)[1])


def around(target: Target, anchor: Anchor) -> Gradient:
    """The minibatch gradient with control variates."""

    def gradient(position: Tensor, batch: Data | None) -> Tensor:
        both = torch.cat([position, anchor.position])
        here, there = log_density_and_gradient(target, both, batch)[1].chunk(2)
        return anchor.gradient + here - there

    return gradient
