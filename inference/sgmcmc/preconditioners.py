r"""Diagonal preconditioners: a metric learned while burning in and frozen then.

A sampler with the metric :math:`M^{-1} = S^2` is the plain sampler in the coordinates :math:`S^{-1}\theta`: the drift is
scaled by :math:`S^2`, the noise by :math:`S`, and momenta are kept in those coordinates, in which they are standard normal
whatever S. Samplers are handed S, called ``scale``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesnn.checks import check_fields, fraction, positive
from bayesnn.configured import Configured


@dataclass(frozen=True)
class RMS(Configured, saved_as="RMSPreconditioner"):
    r"""Running root mean square of the gradient (Li et al., Preconditioned SGLD, AAAI 2016), by itself for every chain.

    .. math:: V \leftarrow \alpha V + (1 - \alpha)\, g^2, \quad \hat V_t = V / (1 - \alpha^t), \quad
              S^2 = \left( \sqrt{\hat V} + \lambda \,\overline{\sqrt{\hat V}} \right)^{-1}

    g estimates the gradient of the whole log density; the paper has that divided by N, and half the step size, so that its
    step size :math:`\epsilon` is :math:`N \epsilon / 2` here. Its metric never stops changing, and its drift leaves out the
    term :math:`\Gamma` that would account for it. Here the metric is frozen after burn-in: :math:`\Gamma = 0`, and the only
    bias is that of the step size, stated for each sampler. Burn-in ends with the adaptive chain's law, which the first
    draws still remember: on a Gaussian with scales 0.1, 1 and 10 its variances were 10 to 70 % too large. The bias
    correction and the relative floor :math:`\lambda` (the paper's is absolute) keep the first steps and those of dead units
    in bounds.

    Args:
        decay: :math:`\alpha`; 0.99, the paper's.
        floor: :math:`\lambda`, relative to the mean of :math:`\sqrt{\hat V}` over a chain's parameters; 1e-3 is our choice.

    Raises:
        TypeError: if a setting is of the wrong type.
        ValueError: if decay is outside [0, 1) or floor isn't positive.
    """

    decay: float = 0.99
    floor: float = 1e-3

    def __post_init__(self) -> None:
        check_fields(self, fraction, "decay", interval="[0, 1)")
        check_fields(self, positive, "floor")

    def update(self, second_moment: Tensor, gradient: Tensor) -> Tensor:
        """V after one more gradient; both (C, P)."""
        return torch.lerp(gradient.square(), second_moment, self.decay)

    def scale(self, second_moment: Tensor, num_updates: int) -> Tensor:
        """S after ``num_updates`` updates of V from zero, (C, P); ones before the first."""
        if num_updates == 0:
            return torch.ones_like(second_moment)
        root = (second_moment / (1 - self.decay**num_updates)).sqrt()
        bounded = root + self.floor * root.mean(-1, keepdim=True)
        return bounded.clamp_min(torch.finfo(root.dtype).tiny).rsqrt()


class Metric:
    """The scale S at each step: learned by the preconditioner for the first ``num_adapting`` steps, and frozen then."""

    def __init__(self, preconditioner: RMS | None, second_moment: Tensor, num_updates: int, num_adapting: int) -> None:
        self.preconditioner, self.second_moment = preconditioner, second_moment
        self.num_updates, self.num_adapting = min(num_updates, num_adapting), num_adapting
        if preconditioner is None:
            self.scale = second_moment.new_ones(1, 1)
        else:
            self.scale = preconditioner.scale(second_moment, self.num_updates)

    @property
    def adapting(self) -> bool:
        """Whether the next gradient will change it."""
        return self.preconditioner is not None and self.num_updates < self.num_adapting

    def observe(self, gradient: Tensor) -> Tensor:
        """The scale for a step with this gradient."""
        if self.preconditioner is not None and self.adapting:
            self.num_updates += 1
            self.second_moment = self.preconditioner.update(self.second_moment, gradient)
            self.scale = self.preconditioner.scale(self.second_moment, self.num_updates)
        return self.scale
