"""Kernels with priors, ready to be fitted: what the process models make of the number of inputs and outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpytorch.kernels import Kernel
from gpytorch.priors import LogNormalPrior

from bayesnn.checks import check_fields, count
from bayesnn.configured import Configured
from bayesnn.processes.dual_activations import DualActivation, dual_activation
from bayesnn.processes.kernels.infinite_width import NNGPKernel
from bayesnn.processes.kernels.stationary import FourierNNGPKernel

KernelFactory = Callable[[int, torch.Size], Kernel]
"""From the number of features and the batch shape to a kernel."""


def checked_factory(factory: object) -> None:
    """Raise TypeError unless it can make a kernel."""
    if not callable(factory) or isinstance(factory, (Kernel, type)):
        raise TypeError(
            "kernel must be a function of the number of features and the batch shape that gives a GPyTorch kernel, such as "
            f"lambda d, batch: RBFKernel(ard_num_dims=d, batch_shape=batch); found {factory!r}"
        )


def made(factory: KernelFactory, num_features: int, batch_shape: torch.Size) -> Kernel:
    """The factory's kernel; a copy, so that a factory may give the same one again.

    Raises:
        TypeError: if the factory isn't one, or gives no GPyTorch kernel.
        ValueError: if it has another batch shape.
    """
    checked_factory(factory)
    kernel = factory(num_features, batch_shape)
    if not isinstance(kernel, Kernel):
        raise TypeError(f"kernel must give a GPyTorch kernel, found {type(kernel).__name__}")
    if kernel.batch_shape != batch_shape and (
        kernel.batch_shape or batch_shape.numel() > 1
    ):  # one output needs no batch
        raise ValueError(
            f"kernel must give a kernel of batch shape {tuple(batch_shape)}, one for each output, found "
            f"{tuple(kernel.batch_shape)}: pass its second argument on, as batch_shape="
        )
    return copy.deepcopy(kernel)


@dataclass(frozen=True)
class MLPKernel(Configured):
    """The NNGP kernel of a multilayer perceptron with weak log-normal priors (our choice), for standardised inputs.

    It isn't stationary: variances grow with the distance from the centre of the data, linearly for ReLU. That suits regression
    on tables.

    Args:
        depth: hidden layers.
        activation: its name, or a dual activation.

    Raises:
        ValueError: for a depth below 1 or an unknown activation.
    """

    depth: int = 3
    activation: str | DualActivation = "relu"

    def __post_init__(self) -> None:
        check_fields(self, count, "depth")
        dual_activation(self.activation)

    def __call__(self, num_features: int, batch_shape: torch.Size) -> NNGPKernel:
        """The kernel; one lengthscale for each feature, one weight and one bias variance."""
        return NNGPKernel(
            depth=self.depth,
            activation=self.activation,
            ard_num_dims=num_features,
            batch_shape=batch_shape,
            lengthscale_prior=LogNormalPrior(0.0, 1.0),
            weight_var_prior=LogNormalPrior(0.5, 0.5),
            bias_var_prior=LogNormalPrior(-2.0, 1.0),
        )


@dataclass(frozen=True)
class FourierKernel(Configured):
    r"""The NNGP kernel of a multilayer perceptron over random Fourier features, for standardised inputs in a box.

    The first hidden layer has sine activations with random phases (Rahimi and Recht 2007), which makes it a Gaussian kernel
    :math:`\exp(-\frac1d \sum_i (x_i - x'_i)^2 / \ell_i^2)`; the others make a kernel of heavier tails of it, as smooth as
    their activation allows: GELU's is smooth, ReLU's has once differentiable draws. It is stationary: its variance doesn't
    grow towards the corners of a search space, as a plain perceptron's does, which would draw an optimiser there. The weights
    have fixed variances: output scale and lengthscales do their work.

    Lengthscales have a log-normal prior with mode 0.8 and median 2.2, of standardised inputs, times the root of the number of
    features, which is in the kernel, as Hvarfner, Hellsten and Nardi 2024 (section 4) advise. It is narrower than theirs
    (our choice, of three tried): with the hyperparameters at their maximum, searches of Ackley's function in 10 dimensions
    and Levy's in 20 were better with it than with theirs, four others worse, each over four seeds only, and with an earlier
    way to the maximum.

    Args:
        depth: hidden layers above the features.
        activation: its name, or a dual activation; "gelu" (our choice: smooth; "erf" does about as well).

    Raises:
        ValueError: for a depth below 1 or an unknown activation.
    """

    depth: int = 1
    activation: str | DualActivation = "gelu"

    def __post_init__(self) -> None:
        check_fields(self, count, "depth")
        dual_activation(self.activation)

    def __call__(self, num_features: int, batch_shape: torch.Size) -> NNGPKernel:
        """The kernel; one lengthscale for each feature is all that is learned."""
        return FourierNNGPKernel(
            self.depth,
            self.activation,
            ard_num_dims=num_features,
            batch_shape=batch_shape,
            lengthscale_prior=LogNormalPrior(0.8, 1.0),
        )


def for_searches(model: Callable[..., Any]) -> Callable[..., Any]:
    """What makes the model as a surrogate: one search for the hyperparameters, unless ``restart`` is asked for, and a
    ``FourierKernel()``, unless a kernel, depth or activation is.
    """

    def make(**options: Any) -> Any:
        asked = options.keys() & {"depth", "activation", "kernel"}
        defaults: dict[str, Any] = {"restart": False} | ({} if asked else {"kernel": FourierKernel()})
        return model(**defaults | options)

    return make
