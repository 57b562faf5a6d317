"""Parameters as one flat vector per chain: what samplers do their arithmetic on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from bayesnn.data import Data
from bayesnn.inference.process_wide import ProcessWide
from bayesnn.inference.target import Parameters, Target, log_density

Density = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From positions (C, P) to their log density, (C,), and its gradient, (C, P)."""


def ravel(parameters: Parameters, shapes: dict[str, torch.Size]) -> Tensor:
    """Parameters, each (C, *shape), as (C, P), in the order of ``shapes`` whatever their own.

    Raises:
        ValueError: if a parameter is missing, has another shape or is none of ``shapes``.
    """
    missing, extra = shapes.keys() - parameters.keys(), parameters.keys() - shapes.keys()
    if missing or extra:
        raise ValueError(
            f"points must have the target's parameters {', '.join(shapes)}: "
            + "; ".join(
                f"{', '.join(sorted(names))} {what}"
                for names, what in ((missing, "missing"), (extra, "unknown"))
                if names
            )
        )
    first = next(iter(parameters.values()))
    count = first.shape[0] if first.dim() else 1
    for name, shape in shapes.items():
        if parameters[name].shape != (count, *shape):
            raise ValueError(
                f"parameter {name} of {count} points must have shape {(count, *shape)}, found {tuple(parameters[name].shape)}"
            )
    return torch.cat([parameters[name].reshape(count, -1) for name in shapes], 1)


def unravel(flat: Tensor, shapes: dict[str, torch.Size]) -> Parameters:
    """Inverse of :func:`ravel`: (C, P) to parameters of shape (C, *shape), as views."""
    pieces = flat.split([shape.numel() for shape in shapes.values()], 1)
    return {name: piece.reshape(-1, *shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}


def density_of(target: Target) -> Density:
    """The target's full-data log density as a function of flat positions."""
    compiled: Density | None = getattr(target, "density", None)
    return compiled or partial(log_density_and_gradient, target)


def fused(density: Density, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function(density, ...)`` as a function of its other arguments: one program, where the density is compiled."""
    fuse: Callable[[Callable[..., Any]], Callable[..., Any]] | None = getattr(density, "fuse", None)
    return partial(function, density) if fuse is None else fuse(function)


def log_density_and_gradient(target: Target, position: Tensor, batch: Data | None = None) -> tuple[Tensor, Tensor]:
    """The target's log density of every chain, (C,), and its gradient, (C, P); a minibatch is scaled up to all N data.

    The pieces of the position are leaves by themselves: differentiating through the flat vector would write a padded
    copy of it for every tensor. A prior that is Gaussian in every parameter is added in closed form.
    """
    compiled: Callable[..., tuple[Tensor, Tensor]] | None = getattr(target, "log_density_and_gradient", None)
    if compiled is not None:
        return compiled(position, batch)
    leaves = {name: values.detach().requires_grad_() for name, values in unravel(position, target.shapes()).items()}
    with torch.enable_grad(), without_validation:
        value = without_gaussian_prior(target, leaves, batch)
        # Zero for a parameter that the network doesn't use.
        gradients = torch.autograd.grad(value.sum(), list(leaves.values()), materialize_grads=True)
    gradient = torch.cat([piece.reshape(piece.shape[0], -1) for piece in gradients], 1)
    return with_gaussian_prior(target, position, value.detach(), gradient)


@contextmanager
def _validation_off() -> Iterator[None]:
    previous = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(previous)


# A trajectory that diverges asks for a density at NaN, or with a scale of zero: a move to reject, not an error.
without_validation = ProcessWide(_validation_off)
"""Within it, torch.distributions take any arguments."""


def without_gaussian_prior(target: Target, parameters: Parameters, batch: Data | None) -> Tensor:
    """The part of the log density that is to be differentiated, (C,): all of it, or the likelihood alone."""
    if target.flat_gaussian_prior is None:
        return log_density(target, parameters, batch)
    value = target.log_likelihood(parameters, batch)
    return value if batch is None else value * (len(target.data) / len(batch))


def with_gaussian_prior(target: Target, position: Tensor, value: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Add what :func:`without_gaussian_prior` left out, in closed form."""
    gaussian = target.flat_gaussian_prior
    if gaussian is None:
        return value, gradient
    centred = position - gaussian.loc
    pull = centred * gaussian.precision
    log_prior = gaussian.log_normaliser - 0.5 * (pull * centred).sum(-1)
    return (value + log_prior) / target.temperature, (gradient - pull) / target.temperature


class LogJoint(NamedTuple):
    """Log prior and log-likelihood, (C,) each, and their gradients, (C, P) each."""

    log_prior: Tensor
    log_likelihood: Tensor
    prior_gradient: Tensor
    likelihood_gradient: Tensor

    def tempered(self, inverse_temperature: float | Tensor) -> tuple[Tensor, Tensor]:
        """Of p(theta) p(y | theta)^beta: the log density and its gradient."""
        return (
            self.log_prior + inverse_temperature * self.log_likelihood,
            self.prior_gradient + inverse_temperature * self.likelihood_gradient,
        )


def log_joint(target: Target, position: Tensor, log_likelihood: Callable[[Parameters], Tensor]) -> LogJoint:
    """The log prior and any log-likelihood of the parameters, apart from each other, with their gradients."""
    parts = []
    for function in (target.log_prior, log_likelihood):
        leaves = {name: values.detach().requires_grad_() for name, values in unravel(position, target.shapes()).items()}
        with torch.enable_grad(), without_validation:
            value = function(leaves)
            if not value.requires_grad:  # a constant
                parts.append((value, torch.zeros_like(position)))
                continue
            gradients = torch.autograd.grad(value.sum(), list(leaves.values()), materialize_grads=True)
        parts.append((value.detach(), torch.cat([piece.reshape(piece.shape[0], -1) for piece in gradients], 1)))
    (log_prior, prior_gradient), (likelihood, likelihood_gradient) = parts
    return LogJoint(log_prior, likelihood, prior_gradient, likelihood_gradient)
