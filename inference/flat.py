"""Parameters as one flat vector per chain: what samplers do their arithmetic on."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesnn.inference.target import Parameters, Target, log_density


def ravel(parameters: Parameters) -> Tensor:
    """Parameters, each (C, *shape), as (C, P)."""
    return torch.cat([values.flatten(1) for values in parameters.values()], 1)


def unravel(flat: Tensor, shapes: dict[str, torch.Size]) -> Parameters:
    """Inverse of :func:`ravel`: (C, P) to parameters of shape (C, *shape), as views."""
    pieces = flat.split([shape.numel() for shape in shapes.values()], 1)
    return {name: piece.reshape(-1, *shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}


def log_density_and_gradient(target: Target, position: Tensor) -> tuple[Tensor, Tensor]:
    """The target's log density of every chain, (C,), and its gradient, (C, P).

    The pieces of the position are leaves by themselves: differentiating through the flat vector would write a padded
    copy of it for every tensor.
    """
    leaves = {name: values.detach().requires_grad_() for name, values in unravel(position, target.shapes()).items()}
    with torch.enable_grad():
        value = log_density(target, leaves)
        gradients = torch.autograd.grad(value.sum(), list(leaves.values()))
    return value.detach(), torch.cat([gradient.flatten(1) for gradient in gradients], 1)
