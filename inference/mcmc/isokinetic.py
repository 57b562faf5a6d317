r"""Microcanonical (isokinetic) dynamics: momentum of a fixed size whose direction alone is steered by the gradient.

In the coordinates :math:`z = S^{-1}\theta` of an inverse mass :math:`S S^\top`, with P parameters, unit direction u, and time
measured so that a path has the speed :math:`\sqrt P` that HMC's has on average,

.. math:: \dot z = \sqrt P u, \qquad \dot u = \tfrac{\sqrt P}{P - 1} (I - u u^\top)\, \nabla_z \log\pi(z)

leaves the density :math:`\pi(z)` times the uniform law of u on the sphere invariant (Robnik, De Luca, Silverstein and Seljak,
Microcanonical Hamiltonian Monte Carlo, JMLR 2023; Ver Steeg and Galstyan, Hamiltonian dynamics with non-Newtonian momentum,
2021). A step is half a turn, a drift, and half a turn, each solved exactly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bayesnn.inference.flat import Density
from bayesnn.inference.mcmc.chain import Point
from bayesnn.inference.mcmc.mass import Mass


def random_direction(like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform on the unit sphere, (C, P)."""
    noise = torch.randn(like.shape, generator=generator, dtype=like.dtype)
    return noise / noise.norm(dim=-1, keepdim=True)


def refresh(direction: Tensor, share: Tensor, generator: torch.Generator) -> Tensor:
    r"""Partial refreshment, u <- (u + nu z) / |u + nu z| with standard normal z; nu (C, 1) is ``share``."""
    noise = torch.randn(direction.shape, generator=generator, dtype=direction.dtype)
    mixed = direction + share * noise
    return mixed / mixed.norm(dim=-1, keepdim=True)


def isokinetic_step(
    density: Density, point: Point, direction: Tensor, step: Tensor, mass: Mass
) -> tuple[Point, Tensor, Tensor]:
    r"""One step of every chain: the new point, its direction, and the change of energy.

    The energy changes by :math:`-\log\pi` and, for each half turn, by

    .. math:: (P - 1) \log(\cosh\delta + e^\top u \sinh\delta), \quad
              \delta = \tfrac\epsilon2 \tfrac{\sqrt P}{P-1} |g|, \quad e = g / |g|,

    minus the log of the turn's change of volume. Zero for exact dynamics, it's the error of the step, and the log ratio
    that Metropolis and Hastings ask for.

    Args:
        density: gives log densities and gradients.
        point: where the chains are.
        direction: unit vectors u, (C, P).
        step: epsilon, (C, 1).
        mass: of the inverse mass S S^T.
    """
    direction, first = _turn(direction, mass.scale_transposed(point.gradient), 0.5 * step)
    position = point.position + step * math.sqrt(direction.shape[-1]) * mass.scale(direction)
    new = Point(position, *density(position))
    direction, second = _turn(direction, mass.scale_transposed(new.gradient), 0.5 * step)
    change = first + second - (new.log_density.double() - point.log_density.double())
    return new, direction, change


def _turn(direction: Tensor, gradient: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """The direction after a time under a constant gradient, and the change of kinetic energy, (C,) in float64."""
    size = direction.shape[-1]
    norm = gradient.norm(dim=-1, keepdim=True)
    towards = gradient / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    delta = step * math.sqrt(size) / (size - 1) * norm
    cosine = (towards * direction).sum(-1, keepdim=True)
    # cosh and sinh, both times 2 exp(-delta), which cancels below and keeps long turns finite.
    decay = (-delta).exp()
    turned = 2 * decay * direction + (1 - decay) * (1 + decay + cosine * (1 - decay)) * towards
    # The exact norm is 1 + cosine + (1 - cosine) decay^2; dividing by the norm itself keeps u a unit vector.
    turned = turned / turned.norm(dim=-1, keepdim=True)
    cosine, delta, decay = cosine.double(), delta.double(), decay.double()
    growth = 0.5 * (1 + cosine + (1 - cosine) * decay.square())
    change = (size - 1) * (delta + growth.clamp_min(1e-300).log())
    return turned, change.squeeze(-1)
