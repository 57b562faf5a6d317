r"""Hamiltonian Monte Carlo (Duane et al. 1987; Neal, MCMC using Hamiltonian dynamics, 2011), vectorised over chains.

With momentum :math:`r \sim N(0, M)` and energy :math:`H = -\log\pi(\theta) + \tfrac12 r^\top M^{-1} r`, each step follows L
leapfrog steps

.. math:: r \mathrel{+}= \tfrac\epsilon2 \nabla\log\pi(\theta), \quad \theta \mathrel{+}= \epsilon M^{-1} r,
          \quad r \mathrel{+}= \tfrac\epsilon2 \nabla\log\pi(\theta)

and accepts the end with probability :math:`\min(1, e^{-\Delta H})`. The stationary law is exactly :math:`\pi`. L is drawn
afresh at every step, uniformly from 1 … 2 ``num_leapfrog`` - 1 and independently of the state, which keeps the law and
breaks the resonance of a fixed path with the target's periods. During warm-up each chain adapts its own step size by
dual averaging, and all share a diagonal mass matrix from the pooled variance within chains; then both are frozen.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bayesnn.configured import Configured
from bayesnn.data import BayesnnWarning
from bayesnn.inference.draws import WeightPosterior
from bayesnn.inference.flat import log_density_and_gradient, ravel, unravel
from bayesnn.inference.mcmc.adaptation import DualAveraging, Welford, window_ends
from bayesnn.inference.target import Target

MAX_ENERGY_ERROR = 1000.0  # Stan's threshold for a divergence


class HMCState(NamedTuple):
    """Positions (C, P) with their log density (C,) and gradient (C, P), and what warm-up has learned."""

    position: Tensor
    log_density: Tensor
    gradient: Tensor
    inverse_mass: Tensor
    step_size: DualAveraging
    variance: Welford
    num_steps_done: Tensor


class HMCInfo(NamedTuple):
    """Of one step, each (C,): acceptance probability, whether it diverged, energy, step size."""

    acceptance: Tensor
    diverging: Tensor
    energy: Tensor
    step_size: Tensor


@dataclass(frozen=True)
class HMC(Configured):
    """Hamiltonian Monte Carlo.

    Args:
        num_chains: chains, vectorised; 4 so that R-hat can be trusted.
        num_warmup: steps that adapt and are thrown away.
        num_draws: steps kept, for each chain.
        num_leapfrog: mean number of leapfrog steps (and gradients) per step; 16 is our choice for small networks.
        target_acceptance: what dual averaging aims at; 0.8, Stan's.
        initial_step_size: where dual averaging begins.

    Raises:
        ValueError: if a count isn't positive or the target acceptance doesn't lie in (0, 1).
    """

    num_chains: int = 4
    num_warmup: int = 300
    num_draws: int = 300
    num_leapfrog: int = 16
    target_acceptance: float = 0.8
    initial_step_size: float = 0.01

    def __post_init__(self) -> None:
        for name in ("num_chains", "num_draws", "num_leapfrog"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.num_warmup < 0:
            raise ValueError(f"num_warmup must be at least 0, found {self.num_warmup}")
        if not 0 < self.target_acceptance < 1:
            raise ValueError(f"target_acceptance must lie in (0, 1), found {self.target_acceptance}")
        if not self.initial_step_size > 0:
            raise ValueError(f"initial_step_size must be positive, found {self.initial_step_size}")

    @property
    def num_steps(self) -> int:
        """Warm-up and draws."""
        return self.num_warmup + self.num_draws

    def init(self, target: Target, generator: torch.Generator) -> HMCState:
        """Chains at the target's initial points."""
        position = ravel(target.initial(self.num_chains, generator))
        log_density, gradient = log_density_and_gradient(target, position)
        if not bool(torch.isfinite(log_density).all() and torch.isfinite(gradient).all()):
            raise ValueError("the log density or its gradient isn't finite at the initial points")
        step_size = position.new_full((self.num_chains,), self.initial_step_size)
        return HMCState(
            position,
            log_density,
            gradient,
            torch.ones_like(position[:1]),
            DualAveraging.start(step_size),
            Welford.start(position),
            torch.zeros((), dtype=torch.long),
        )

    def step(self, target: Target, state: HMCState, generator: torch.Generator) -> tuple[HMCState, HMCInfo]:
        """One trajectory of every chain, and while warming up one step of adaptation."""
        index = int(state.num_steps_done)
        adapting = index < self.num_warmup
        log_step_size = state.step_size.log_step_size if adapting else state.step_size.log_average
        step_size = log_step_size.exp() if self.num_warmup else torch.full_like(log_step_size, self.initial_step_size)
        num_leapfrog = self.num_leapfrog_steps(generator)
        momentum = torch.randn(state.position.shape, generator=generator, dtype=state.position.dtype)
        momentum = momentum * state.inverse_mass.rsqrt()
        uniform = torch.rand(self.num_chains, generator=generator, dtype=torch.float64)

        position, end_momentum, log_density, gradient = self._leapfrog(target, state, momentum, step_size, num_leapfrog)
        energy = _kinetic(momentum, state.inverse_mass) - state.log_density.double()
        end_energy = _kinetic(end_momentum, state.inverse_mass) - log_density.double()
        # A NaN energy (an overflow on the way) counts as infinite: the end is rejected and reported as a divergence.
        error = (end_energy - energy).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf)
        acceptance = (-error).clamp_max(0).exp()
        accept = uniform < acceptance
        info = HMCInfo(
            acceptance, (error > MAX_ENERGY_ERROR).double(), torch.where(accept, end_energy, energy), step_size
        )

        def choose(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(accept.reshape(-1, *(1 for _ in range(new.dim() - 1))), new, old)

        state = state._replace(
            position=choose(position, state.position),
            log_density=choose(log_density, state.log_density),
            gradient=choose(gradient, state.gradient),
            num_steps_done=state.num_steps_done + 1,
        )
        return (self._adapt(state, acceptance, index) if adapting else state), info

    def num_leapfrog_steps(self, generator: torch.Generator) -> int:
        """L of one step: uniform on 1 … 2 ``num_leapfrog`` - 1."""
        return int(torch.randint(1, 2 * self.num_leapfrog, (), generator=generator))

    def _leapfrog(
        self, target: Target, state: HMCState, momentum: Tensor, step_size: Tensor, num_steps: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        step = step_size.unsqueeze(-1)
        position, gradient, log_density = state.position, state.gradient, state.log_density
        drift = step * state.inverse_mass
        momentum = momentum + 0.5 * step * gradient
        for remaining in range(num_steps - 1, -1, -1):
            position = position + drift * momentum
            log_density, gradient = log_density_and_gradient(target, position)
            momentum = momentum + (step if remaining else 0.5 * step) * gradient
        return position, momentum, log_density, gradient

    def _adapt(self, state: HMCState, acceptance: Tensor, index: int) -> HMCState:
        step_size = state.step_size.update(acceptance.to(state.position), self.target_acceptance)
        ends = window_ends(self.num_warmup)
        variance, inverse_mass = state.variance, state.inverse_mass
        if ends and index >= int(0.15 * self.num_warmup) and index < ends[-1]:
            variance = variance.update(state.position)
        if index + 1 in ends:
            inverse_mass = variance.variance()
            variance = Welford.start(state.position)
            step_size = DualAveraging.start(step_size.log_average.exp())
        return state._replace(step_size=step_size, variance=variance, inverse_mass=inverse_mass)

    def keep(self, state: HMCState, index: int) -> dict[str, Tensor] | None:
        """The positions after warm-up."""
        return {"position": state.position} if index >= self.num_warmup else None

    def result(
        self, target: Target, state: HMCState, draws: dict[str, Tensor], infos: dict[str, Tensor]
    ) -> WeightPosterior:
        """The draws of all chains, chain by chain; warns if more than 1 % of them diverged."""
        position = draws["position"].transpose(0, 1).flatten(0, 1)
        statistics = {name: values[self.num_warmup :] for name, values in infos.items()}
        share = float(statistics["diverging"].mean())
        if share > 0.01:
            warnings.warn(
                f"HMC: {share:.1%} of the trajectories after warm-up diverged; the draws may miss parts of the posterior. "
                "Raise target_acceptance or num_warmup, or use a prior with lighter tails",
                BayesnnWarning,
                stacklevel=2,
            )
        return WeightPosterior(unravel(position, target.shapes()), self.num_chains, statistics=statistics)


def _kinetic(momentum: Tensor, inverse_mass: Tensor) -> Tensor:
    return 0.5 * (momentum.double().square() * inverse_mass.double()).sum(-1)
