r"""Step sizes as pure functions of the minibatch step, counted from 0 at the first step of burn-in."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from bayesnn.checks import check_fields, count, flag, number, positive
from bayesnn.configured import Configured


class Schedule(Configured, ABC):
    """The step size at every minibatch step, and what else a sampler does there."""

    @abstractmethod
    def __call__(self, step: int) -> float:
        """The step size at a step."""

    @property
    @abstractmethod
    def largest(self) -> float:
        """The largest step size at any step."""

    def sampling(self, step: int) -> bool:
        """Whether the position after this step may be kept as a draw."""
        return True

    def noisy(self, step: int) -> bool:
        """Whether noise is injected at this step."""
        return True

    def restarts(self, step: int) -> bool:
        """Whether momenta are drawn afresh before this step."""
        return False

    @property
    def weighs_draws(self) -> bool:
        """Whether draws are weighted by their step sizes."""
        return False

    def check(self, thinning: int) -> None:
        """Raise a ValueError if the schedule doesn't go with ``thinning`` steps between two draws."""


@dataclass(frozen=True)
class Constant(Schedule, saved_as="ConstantSchedule"):
    """The same step size at every step: a chain with one stationary law, the documented one of its sampler.

    Args:
        value: the step size.

    Raises:
        TypeError: if a setting is of the wrong type.
        ValueError: if it isn't a positive number.
    """

    value: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", positive("step_size", self.value))

    def __call__(self, step: int) -> float:
        return self.value

    @property
    def largest(self) -> float:
        return self.value


@dataclass(frozen=True)
class Polynomial(Schedule, saved_as="PolynomialSchedule"):
    r""":math:`\epsilon_t = a (b + t)^{-\gamma}` (Welling and Teh 2011, section 4).

    The steps sum to infinity and their squares don't, so that the discretisation's bias vanishes as the chain grows long.
    Draws are weighted by their step sizes, as in equation 5 there: each stands for that much of the diffusion's time.

    Args:
        a: the scale.
        b: how many steps the decay is delayed by.
        gamma: the power, in (0.5, 1]; 0.55 is the paper's.

    Raises:
        TypeError: if a setting is of the wrong type.
        ValueError: if a or b isn't positive, or gamma is outside (0.5, 1].
    """

    a: float
    b: float = 1.0
    gamma: float = 0.55

    def __post_init__(self) -> None:
        check_fields(self, positive, "a", "b")
        check_fields(self, number, "gamma")
        if not 0.5 < self.gamma <= 1:
            raise ValueError(f"gamma must lie in (0.5, 1], so that the chain forgets its start, found {self.gamma}")

    def __call__(self, step: int) -> float:
        return self.a * (self.b + step) ** -self.gamma

    @property
    def largest(self) -> float:
        return self(0)

    @property
    def weighs_draws(self) -> bool:
        return True


@dataclass(frozen=True)
class Cosine(Schedule, saved_as="CosineSchedule"):
    """Half a cosine from ``initial`` down to ``final`` over the first ``num_steps`` steps, then ``final``.

    With ``num_steps`` the burn-in, the draws come from a chain with a constant step size.

    Args:
        initial: step size at the first step.
        final: step size at ``num_steps`` and after.
        num_steps: minibatch steps of the decay.

    Raises:
        TypeError: if a setting is of the wrong type.
        ValueError: if a step size isn't positive, or num_steps isn't at least 1.
    """

    initial: float
    final: float
    num_steps: int

    def __post_init__(self) -> None:
        check_fields(self, positive, "initial", "final")
        check_fields(self, count, "num_steps")

    def __call__(self, step: int) -> float:
        progress = min(1.0, step / self.num_steps)
        return self.final + 0.5 * (self.initial - self.final) * (1 + math.cos(math.pi * progress))

    @property
    def largest(self) -> float:
        return max(self.initial, self.final)


@dataclass(frozen=True)
class Cyclical(Schedule, saved_as="CyclicalSchedule"):
    r"""Cosine cycles, each of which explores first and samples then (Zhang et al., Cyclical SG-MCMC, ICLR 2020).

    With :math:`r = (t \bmod L) / L`, equation 1 there:

    .. math:: \epsilon_t = \tfrac{a}{2} \left[ \cos(\pi r) + 1 \right].

    While :math:`r` is below ``exploration`` the sampler injects no noise (algorithm 1 there: an optimiser that looks for
    another mode) and nothing is kept; after it, draws are. Momenta are drawn afresh when a cycle begins. The draws are
    those of a chain whose step size falls to zero within each cycle, and modes are weighted by how often cycles end in
    them, which isn't their posterior mass: there is no stationary law to state.

    Args:
        initial: :math:`a`, the step size when a cycle begins.
        cycle_length: :math:`L`, minibatch steps of a cycle; a multiple of the sampler's ``thinning``.
        exploration: share of each cycle that explores; 0.8, from the paper's figure for CIFAR.
        noise_in_exploration: inject noise while exploring, too.

    Raises:
        TypeError: if a setting is of the wrong type.
        ValueError: if the step size isn't positive, or a cycle has no sampling phase.
    """

    initial: float
    cycle_length: int
    exploration: float = 0.8
    noise_in_exploration: bool = False

    def __post_init__(self) -> None:
        check_fields(self, positive, "initial")
        check_fields(self, count, "cycle_length")
        check_fields(self, number, "exploration")
        check_fields(self, flag, "noise_in_exploration")
        if not 0 <= self.exploration < 1 or not self.sampling(self.cycle_length - 1):
            raise ValueError(
                f"exploration must lie in [0, 1) and leave at least one of the {self.cycle_length} steps of a cycle to "
                f"sample in, found {self.exploration}"
            )

    def __call__(self, step: int) -> float:
        return 0.5 * self.initial * (1 + math.cos(math.pi * self._progress(step)))

    def _progress(self, step: int) -> float:
        return (step % self.cycle_length) / self.cycle_length

    @property
    def largest(self) -> float:
        return self.initial

    def sampling(self, step: int) -> bool:
        return self._progress(step) >= self.exploration

    def noisy(self, step: int) -> bool:
        return self.noise_in_exploration or self.sampling(step)

    def restarts(self, step: int) -> bool:
        return step % self.cycle_length == 0

    def check(self, thinning: int) -> None:
        if self.cycle_length % thinning:
            raise ValueError(f"cycle_length must be a multiple of thinning ({thinning}), found {self.cycle_length}")
