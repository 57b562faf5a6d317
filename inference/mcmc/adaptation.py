"""Warm-up of step sizes and mass matrices, shared by the Metropolis-corrected samplers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from bayesnn.inference.flat import Density
from bayesnn.inference.mcmc.mass import Mass

if TYPE_CHECKING:
    from bayesnn.inference.mcmc.chain import Point

MAX_DOUBLINGS = 33  # a factor of 1e10
FEWEST_TO_LEARN_FROM = 20  # steps of a warm-up that learns a mass matrix


class DualAveraging(NamedTuple):
    """Step sizes, one for each chain, that bring the mean acceptance to a target; every field is (C,)."""

    log_step_size: Tensor
    log_average: Tensor
    error: Tensor
    centre: Tensor
    num_updates: Tensor

    @classmethod
    def start(cls, step_size: Tensor) -> DualAveraging:
        """Begin (or begin anew) at these step sizes.

        They are what it shrinks towards. The paper shrinks towards ten times as much, which is good for a blind first guess;
        a size that was searched for is better itself, and all the more where few updates follow.
        """
        zero = torch.zeros_like(step_size)
        return cls(step_size.log(), step_size.log(), zero, step_size.log(), zero)

    def update(self, acceptance: Tensor, target: float) -> DualAveraging:
        """One step of Nesterov's dual averaging (Hoffman and Gelman 2014, eq. 6; gamma 0.05, t0 10, kappa 0.75)."""
        count = self.num_updates + 1
        weight = 1 / (count + 10)
        error = (1 - weight) * self.error + weight * (target - acceptance)
        log_step_size = self.centre - count.sqrt() / 0.05 * error
        decay = count**-0.75
        log_average = decay * log_step_size + (1 - decay) * self.log_average
        return DualAveraging(log_step_size, log_average, error, self.centre, count)


def reasonable_step_size(
    density: Density, point: Point, step_size: Tensor, mass: Mass, generator: torch.Generator
) -> Tensor:
    """Each chain's step size, doubled or halved until one leapfrog step's acceptance crosses 1/2, (C,).

    Hoffman and Gelman 2014, algorithm 4: a good place for dual averaging to begin, from any first guess.

    Raises:
        ValueError: if no step size is small enough, or none too large, for every chain.
    """
    noise = torch.randn(point.position.shape, generator=generator, dtype=point.position.dtype)
    momentum = mass.momentum(noise)
    energy = mass.kinetic(momentum) - point.log_density.double()

    def accepted(step_size: Tensor) -> Tensor:
        step = step_size.unsqueeze(-1)
        halfway = momentum + 0.5 * step * point.gradient
        position = point.position + step * mass.velocity(halfway)
        log_density, gradient = density(position)
        error = mass.kinetic(halfway + 0.5 * step * gradient) - log_density.double() - energy
        error = error.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf)
        # A step too small for the floating-point numbers leads nowhere, and isn't a good one.
        return (error < math.log(2)) & (position != point.position).any(-1)

    growing = accepted(step_size)
    searching, factor = torch.ones_like(growing), torch.where(growing, 2.0, 0.5).to(step_size)
    for _ in range(MAX_DOUBLINGS):
        step_size = torch.where(searching, step_size * factor, step_size)
        searching = searching & (accepted(step_size) == growing)
        if not bool(searching.any()):
            break
    if bool((searching & ~growing).all()):
        raise ValueError(
            "step sizes can't be adapted: every chain rejects the smallest of steps. The log density isn't smooth, or its "
            "gradient isn't its own"
        )
    if bool((searching & growing).all()):
        raise ValueError(
            "step sizes can't be adapted: every chain accepts the largest of steps. The log density is flat, or improper"
        )
    return step_size


class Welford(NamedTuple):
    """Running mean and sum of squared deviations of each chain's positions, (C, P); ``num_updates`` is a scalar."""

    mean: Tensor
    squares: Tensor
    num_updates: Tensor

    @classmethod
    def start(cls, position: Tensor) -> Welford:
        """Nothing seen yet."""
        return cls(torch.zeros_like(position), torch.zeros_like(position), torch.zeros((), dtype=position.dtype))

    def update(self, position: Tensor) -> Welford:
        """Take in one position of every chain."""
        count = self.num_updates + 1
        delta = position - self.mean
        mean = self.mean + delta / count
        return Welford(mean, self.squares + delta * (position - mean), count)

    def variance(self) -> Tensor:
        """Variance within chains, pooled over them and shrunk towards 1e-3 as Stan does, (1, P)."""
        pooled = self.squares.mean(0, keepdim=True) / (self.num_updates - 1).clamp_min(1)
        share = self.num_updates / (self.num_updates + 5)
        return share * pooled + (1 - share) * 1e-3


def window_ends(num_warmup: int) -> list[int]:
    """The warm-up steps after which the mass matrix is renewed.

    As in Stan: step sizes alone for the first 15 %, then windows that double, then step sizes alone for the last 10 %.
    """
    if num_warmup < FEWEST_TO_LEARN_FROM:
        return []
    first, last = int(0.15 * num_warmup), num_warmup - int(0.1 * num_warmup)
    ends, size, end = [], max(10, int(0.05 * num_warmup)), first
    while end < last:
        end += size
        size *= 2
        if end + size > last:
            end = last
        ends.append(end)
    return [end for end in ends if end <= last]
