r"""The covariance of a sum of exponential decays, over a resource that an experiment spends.

.. math:: k(r, r') = \int e^{-\lambda r}\, e^{-\lambda r'}\, \mathrm{Gamma}(\lambda \mid \alpha, \beta)\, d\lambda
    = \left(\frac{\beta}{r + r' + \beta}\right)^\alpha

Functions with it fall (or rise) towards 0 as r grows, at rates :math:`\lambda` that the Gamma distribution has: fast at
first, then slowly, with a variance that decays as they do.

Source: Swersky, Snoek and Adams, Freeze-thaw Bayesian optimization (2014), equation 6 (its number is from memory).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from gpytorch.constraints import Positive
from gpytorch.kernels import Kernel
from gpytorch.priors import LogNormalPrior
from torch import Tensor, nn

from bayesnn.checks import positive


class ExponentialDecay(Kernel):
    r"""Of one column t in [0, 1], a resource on the log scale: :math:`r = \rho^{t-1}`, in units of the whole.

    BoTorch has the same function of r with an offset (``ExponentialDecayKernel``); its offset can't be 0, and it gives the
    power the offset's constraint.

    Learned are ``rate_shape`` :math:`\alpha` and ``rate`` :math:`\beta`, with priors
    :math:`\log \alpha \sim N(0, 1)` and :math:`\log \beta \sim N(\log 0.1, 1.5)` (our choice: at :math:`\alpha = 1`, half of
    the covariance with the beginning is left after a tenth of the whole, give or take a factor of five).

    Args:
        ratio: :math:`\rho`, the whole resource over the least, above 1.
        batch_shape: of independent kernels.
    """

    def __init__(self, ratio: float, batch_shape: torch.Size | None = None, **kwargs: Any) -> None:
        super().__init__(batch_shape=torch.Size([]) if batch_shape is None else batch_shape, **kwargs)
        self.log_ratio = math.log(positive("ratio", ratio))
        for name, start, prior in (
            ("rate_shape", 1.0, LogNormalPrior(0.0, 1.0)),
            ("rate", 0.1, LogNormalPrior(math.log(0.1), 1.5)),
        ):
            values = torch.full((*self.batch_shape, 1, 1), math.log(start), dtype=torch.float64)
            self.register_parameter(f"raw_{name}", nn.Parameter(values))
            self.register_constraint(f"raw_{name}", Positive(torch.exp, torch.log))
            self.register_prior(f"{name}_prior", prior, lambda kernel, name=name: getattr(kernel, name))

    @property
    def rate_shape(self) -> Tensor:
        r""":math:`\alpha`, (*batch, 1, 1)."""
        return self.raw_rate_shape.exp()

    @property
    def rate(self) -> Tensor:
        r""":math:`\beta`, (*batch, 1, 1)."""
        return self.raw_rate.exp()

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        """Covariances of columns (…, n, 1) and (…, n', 1): (…, n, n'), or (…, n) for the diagonal."""
        first, second = (((x - 1) * self.log_ratio).exp() for x in (x1, x2))
        total = first + second if diag else first + second.mT
        covariance = (1 + total / self.rate).pow(-self.rate_shape)
        return covariance.squeeze(-1) if diag else covariance
