"""Deep kernel learning: a Gaussian process on features that a small network learns with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import gpytorch
import torch
from botorch.models.utils.gpytorch_modules import get_covar_module_with_dim_scaled_prior
from gpytorch.kernels import Kernel
from gpytorch.priors import NormalPrior
from torch import Tensor, nn

from bayesnn.checks import count
from bayesnn.data import Scaling
from bayesnn.inference.amortized.ranges import Bounds, pairs
from bayesnn.likelihoods import Gaussian
from bayesnn.processes.exact import ExactProcess
from bayesnn.processes.gp import in_the_unit_cube, unit_cube
from bayesnn.registry import register


class DeepKernel(ExactProcess):
    r"""Exact Gaussian process regression with a squared-exponential kernel of learned features (Wilson et al. 2016).

    .. math:: f \sim GP\left(c,\ \exp\left(-\tfrac12 \sum_j (\phi_j(x) - \phi_j(x'))^2 / \ell_j^2\right)\right),

    with :math:`\phi` a multilayer perceptron with tanh between its layers, which all outputs share. Its weights and all that
    :class:`GaussianProcess` learns maximise the marginal likelihood together, times the same priors and, for the weights,
    :math:`N(0, 1)` where each layer divides by the root of its number of inputs (our choice; the paper has no prior).

    The trap: with few rows the marginal likelihood is overfitted through the features, which collapse the rows onto few
    places so that everything correlates with everything, and the variances between rows become far too small; worse than a
    plain Gaussian process, or than the network alone (Ober, Rasmussen and van der Wilk 2021). The prior and the small network
    lessen that but don't end it: compare with "gp" on held-out rows (:func:`bayesnn.evidence.log_scores`) before using it
    with fewer than hundreds of rows.

    Args:
        widths: of the layers; the last is the number of features. (50, 4) (our choice: small, see above); none at all, (): the
            features are the inputs, and the model is ``GaussianProcess``.
        likelihood: Gaussian with learned (default) or fixed noise.
        bounds: as in :class:`GaussianProcess`.
        optimise: False keeps all at random weights and the priors' modes.
        num_steps: of L-BFGS, at most. 200 (our choice: thousands would be needed for the maximum, which overfits).

    Raises:
        TypeError: if the likelihood isn't Gaussian, or widths aren't whole numbers.
        ValueError: for widths below 1, and bounds that don't increase.
        MemoryError: in ``fit``, if the matrices won't fit.

    Source: Wilson, Hu, Salakhutdinov and Xing, Deep kernel learning (AISTATS 2016); Ober, Rasmussen and van der Wilk, The
    promises and pitfalls of deep kernel learning (UAI 2021).
    """

    def __init__(
        self,
        widths: Sequence[int] = (50, 4),
        likelihood: Gaussian | None = None,
        bounds: Bounds | None = None,
        optimise: bool = True,
        num_steps: int = 200,
    ) -> None:
        super().__init__(likelihood, optimise)
        self.num_steps = count("num_steps", num_steps)
        self.widths = tuple(count("widths", width) for width in widths)
        self.bounds = None if bounds is None else pairs(bounds)

    def _input_scaling(self, X: Tensor) -> Scaling:
        return unit_cube(self.bounds, X)

    def _max_steps(self) -> int:
        return self.num_steps

    def _kernel(self, num_features: int, batch_shape: torch.Size, seed: int) -> Kernel:
        last = (num_features, *self.widths)[-1]
        kernel = get_covar_module_with_dim_scaled_prior(last, batch_shape)
        if not self.widths:
            return kernel
        return FeatureKernel(_Features((num_features, *self.widths), torch.Generator().manual_seed(seed)), kernel)


class FeatureKernel(Kernel):
    """A kernel of features: k(phi(x), phi(x')).

    Args:
        features: phi, from (…, n, d) to (…, n, k).
        base_kernel: k, of k inputs.
    """

    def __init__(self, features: nn.Module, base_kernel: Kernel) -> None:
        super().__init__(batch_shape=base_kernel.batch_shape)
        self.features, self.base_kernel = features, base_kernel

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        """Covariances of inputs (…, n, d) and (…, n', d): (…, n, n'), or (…, n) for the diagonal."""
        return self.base_kernel.forward(self.features(x1), self.features(x2), diag=diag, **params)


class _Features(gpytorch.Module):
    """A perceptron on the unit cube with tanh between its layers, and standard normal weights."""

    def __init__(self, widths: Sequence[int], generator: torch.Generator) -> None:
        super().__init__()
        self.num_layers = len(widths) - 1
        for index, (fan_in, fan_out) in enumerate(pairwise(widths)):
            for name, shape in ((f"weight_{index}", (fan_in, fan_out)), (f"bias_{index}", (fan_out,))):
                values = torch.randn(shape, generator=generator, dtype=torch.float64)
                self.register_parameter(name, nn.Parameter(values))
                self.register_prior(f"{name}_prior", NormalPrior(0.0, 1.0), name)

    def forward(self, X: Tensor) -> Tensor:
        """(…, n, d) -> (…, n, k)."""
        values = 2 * X - 1
        for index in range(self.num_layers):
            weight, bias = getattr(self, f"weight_{index}"), getattr(self, f"bias_{index}")
            values = values.tanh() if index else values
            values = values @ weight / math.sqrt(len(weight)) + bias
        return values


register("dkl", DeepKernel, in_the_unit_cube(DeepKernel))
