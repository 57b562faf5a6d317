r"""Tempered sequential Monte Carlo (Del Moral, Doucet and Jasra 2006), and its data-tempered form for streams (Chopin 2002).

J particles begin as draws from the prior and follow the densities

.. math:: \pi_{k,\beta}(\theta) \propto p(\theta) \prod_{i \le k} p(y_i \mid \theta)
          \Big[ \prod_{k < i \le k + B} p(y_i \mid \theta) \Big]^\beta

as :math:`\beta` grows from 0 to 1, then k by B, and so on; with B = N, the default, this is tempering of the whole likelihood.
Each step raises :math:`\beta` as far as the effective sample size allows, resamples, and moves every particle by a
Metropolis-corrected kernel that leaves the new density invariant. The product of the mean weights on the way estimates the
evidence :math:`p(y)`: without bias where the temperatures and the kernels are fixed beforehand; choosing them by the particles
brings a bias that vanishes as J grows.

The waste-free form (Dau and Chopin 2022) resamples J / (m + 1) particles, moves each m times, and keeps all the points of
their paths as the new particles.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from bayesnn.checks import check_fields, count, flag, fraction
from bayesnn.configured import Configured
from bayesnn.data import Data
from bayesnn.inference.draws import WeightPosterior
from bayesnn.inference.flat import Density, log_joint, ravel, unravel
from bayesnn.inference.mcmc.chain import MarkovChain, Point
from bayesnn.inference.mcmc.hmc import HMC
from bayesnn.inference.mcmc.mass import Diagonal
from bayesnn.inference.smc.resampling import SCHEMES, effective_sample_size, normalised
from bayesnn.inference.target import Parameters, Target


class SMCState(NamedTuple):
    """The particles (J, P), how far they've come, and the moves' step size; all else are scalars."""

    position: Tensor
    num_seen: Tensor
    inverse_temperature: Tensor
    num_rows: Tensor
    log_evidence: Tensor
    step_size: Tensor


class SMCInfo(NamedTuple):
    """Of one step, scalars: data seen, beta, effective sample size, log of the mean weight, acceptance, step size."""

    num_seen: Tensor
    inverse_temperature: Tensor
    effective_sample_size: Tensor
    log_evidence: Tensor
    acceptance: Tensor
    step_size: Tensor


@dataclass(frozen=True)
class SMC(Configured):
    """Tempered sequential Monte Carlo.

    Args:
        num_particles: J.
        ess_fraction: each step leaves an effective sample size of this share of J; 0.5.
        sampler: its move is the kernel, its ``initial_step_size`` the first step size and its ``target_acceptance`` what that
            is adapted to, its ``mass`` "diagonal" or "identity"; HMC with paths of 8 leapfrog steps on average.
        num_moves: moves of each particle after each resampling.
        waste_free: keep all points of the moves' paths; ``num_particles`` must be a multiple of ``num_moves + 1``.
        resampling: "systematic", "stratified" or "multinomial".
        batch_size: rows to take in at a time, in their order; None: all.
        num_seen: rows that the initial particles know already. To go on with a stream, run a target with the new rows added
            and ``StartingAt(target, posterior.parameters)``.
        inverse_temperatures: fixed values of beta, rising to 1, instead of adaptive ones.
        adapt: learn the step size (from the acceptance) and a diagonal mass (from the weighted particles) on the way.
        max_steps: an error is raised when beta isn't 1 after so many.

    Raises:
        TypeError: if the sampler has no acceptance step, or a setting is of the wrong type.
        ValueError: if a setting is out of its range; at the start of a run, if the target can't draw from its prior or has a
            temperature other than 1; later, if the weights collapse.
    """

    num_particles: int = 512
    ess_fraction: float = 0.5
    sampler: MarkovChain = field(default_factory=lambda: HMC(num_leapfrog=8, initial_step_size=0.1))
    num_moves: int = 3
    waste_free: bool = False
    resampling: str = "systematic"
    batch_size: int | None = None
    num_seen: int = 0
    inverse_temperatures: tuple[float, ...] | None = None
    adapt: bool = True
    max_steps: int = 1000

    def __post_init__(self) -> None:
        check_fields(self, count, "num_moves", "max_steps")
        check_fields(self, count, "num_particles", least=2)
        check_fields(self, count, "num_seen", least=0)
        check_fields(self, fraction, "ess_fraction")
        check_fields(self, flag, "waste_free", "adapt")
        if self.batch_size is not None:
            check_fields(self, count, "batch_size")
        if not isinstance(self.sampler, MarkovChain):
            raise TypeError(
                f"sampler must be a sampler with an acceptance step (HMC(), MALA() …), found {self.sampler!r}"
            )
        if self.sampler.mass == "low-rank":
            raise ValueError(
                "sampler's mass must be 'diagonal' or 'identity': low-rank ones aren't learned from particles"
            )
        if self.resampling not in SCHEMES:
            raise ValueError(f"resampling must be one of {', '.join(SCHEMES)}, found {self.resampling!r}")
        if self.waste_free and self.num_particles % (self.num_moves + 1):
            raise ValueError(
                f"num_particles must be a multiple of num_moves + 1 = {self.num_moves + 1} in the waste-free form, found "
                f"{self.num_particles}"
            )
        betas = self.inverse_temperatures
        if betas is not None and (list(betas) != sorted(set(betas)) or not betas or betas[0] <= 0 or betas[-1] != 1):
            raise ValueError(f"inverse_temperatures must rise from above 0 to 1, found {betas}")

    @property
    def num_steps(self) -> int:
        """At most."""
        return self.max_steps

    def init(self, target: Target, generator: torch.Generator) -> SMCState:
        """Particles from the prior."""
        draw = getattr(target, "sample_prior", None)
        if draw is None:
            raise ValueError(
                "SMC needs a target that can draw from its prior: give FunctionTarget log_prior and sample_prior"
            )
        if target.temperature != 1:
            raise ValueError(f"SMC needs a target of temperature 1, found {target.temperature}")
        num_rows = len(target.data)
        if self.num_seen > num_rows or (self.num_seen == num_rows > 0):
            raise ValueError(f"num_seen must be below the target's {num_rows} rows, found {self.num_seen}")
        position = ravel(draw(self.num_particles, generator), target.shapes())
        zero = torch.zeros((), dtype=torch.float64)
        return SMCState(
            position,
            torch.tensor(self.num_seen),
            zero,
            torch.tensor(num_rows),
            zero,
            torch.tensor(self.sampler.initial_step_size, dtype=torch.float64),
        )

    def finished(self, state: SMCState) -> bool:
        """Whether all data are taken in."""
        return bool(state.num_seen >= state.num_rows) and float(state.inverse_temperature) == 1

    def step(self, target: Target, state: SMCState, generator: torch.Generator) -> tuple[SMCState, SMCInfo]:
        """Raise beta, reweight, resample, move."""
        if float(state.inverse_temperature) == 1:  # on to the next rows
            state = state._replace(inverse_temperature=torch.zeros_like(state.inverse_temperature))
        seen, new = self._rows(target, state)
        with torch.no_grad():
            log_likelihood = _log_likelihood(target, unravel(state.position, target.shapes()), new)
        log_likelihood = log_likelihood.double().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        beta = self._next_inverse_temperature(log_likelihood, float(state.inverse_temperature))
        # The particles have equal weights before: they were resampled.
        log_weights = (beta - state.inverse_temperature) * log_likelihood
        weights = normalised(log_weights)
        increment = torch.logsumexp(log_weights, -1) - torch.tensor(float(len(log_weights))).log()

        mass = Diagonal(self._inverse_mass(state.position, weights))
        num_ancestors = self.num_particles // (self.num_moves + 1) if self.waste_free else self.num_particles
        ancestors = SCHEMES[self.resampling](log_weights, generator, num_ancestors)
        density = _tempered(target, seen, new, beta)
        position, step_size, acceptance = self._move(
            density, state.position[ancestors], state.step_size, mass, generator
        )

        complete = beta == 1
        num_new = self._batch_size(state)
        state = SMCState(
            position,
            torch.minimum(state.num_seen + num_new, state.num_rows) if complete else state.num_seen,
            torch.tensor(beta, dtype=torch.float64),
            state.num_rows,
            state.log_evidence + increment,
            step_size,
        )
        size = effective_sample_size(log_weights)
        info = SMCInfo(state.num_seen, state.inverse_temperature, size, state.log_evidence, acceptance, step_size)
        return state, info

    def _batch_size(self, state: SMCState) -> int:
        return int(state.num_rows) if self.batch_size is None else self.batch_size

    def _rows(self, target: Target, state: SMCState) -> tuple[Data | None, Data | None]:
        """The rows seen already (None: none), and the new ones (None: whatever the likelihood is of)."""
        data, start = target.data, int(state.num_seen)
        if len(data) == 0 or (start == 0 and self.batch_size is None):
            return None, None
        end = start + self._batch_size(state)
        seen = Data(data.X[:start], data.Y[:start]) if start else None
        return seen, Data(data.X[start:end], data.Y[start:end])

    def _next_inverse_temperature(self, log_likelihood: Tensor, beta: float) -> float:
        if self.inverse_temperatures is not None:
            return next(value for value in self.inverse_temperatures if value > beta)
        wanted = self.ess_fraction * len(log_likelihood)

        def enough(increment: float) -> bool:
            return float(effective_sample_size(increment * log_likelihood)) >= wanted

        if enough(1 - beta):
            return 1.0
        # The smallest step first: where even that loses too many particles, no temperature will help.
        low, high = 1e-12 * (1 - beta), 1 - beta
        if not enough(low):
            alive = int(torch.isfinite(log_likelihood).sum())
            raise ValueError(
                f"SMC's weights collapse at inverse temperature {beta:.3g}: {alive} of {len(log_likelihood)} particles have a "
                "finite likelihood, and the smallest step leaves fewer than ess_fraction of them. Use more particles, more "
                "moves, or a prior under which the data are possible"
            )
        while high - low > 1e-6 * high:
            middle = (low * high) ** 0.5
            low, high = (middle, high) if enough(middle) else (low, middle)
        return beta + low

    def _inverse_mass(self, position: Tensor, weights: Tensor) -> Tensor:
        if not self.adapt or self.sampler.mass == "identity":
            return torch.ones_like(position[:1])
        column = weights.to(position).unsqueeze(-1)
        mean = (column * position).sum(0, keepdim=True)
        variance = (column * (position - mean).square()).sum(0, keepdim=True)
        return variance.clamp_min(1e-10 * float(variance.max().clamp_min(1e-30)))

    def _move(
        self, density: Density, position: Tensor, step_size: Tensor, mass: Diagonal, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        point = Point(position, *density(position))
        path, acceptances = [position], []
        for _ in range(self.num_moves):
            sizes = step_size.to(position).expand(len(position))
            point, info = self.sampler.move(density, point, sizes, mass, generator)
            acceptances.append(info.acceptance.mean())
            if self.adapt:
                step_size = step_size * (acceptances[-1] - self.sampler.target_acceptance).exp()
            path.append(point.position)
        moved = torch.cat(path) if self.waste_free else point.position
        return moved, step_size, torch.stack(acceptances).mean()

    def keep(self, state: SMCState, index: int) -> None:
        """Nothing: the particles are read off the last state."""

    def result(
        self, target: Target, state: SMCState, draws: dict[str, Tensor], infos: dict[str, Tensor]
    ) -> WeightPosterior:
        """The particles, equally weighted; among the statistics, ``log_evidence``, a number."""
        if not self.finished(state):
            raise ValueError(
                f"SMC has reached max_steps = {self.max_steps} with {int(state.num_seen)} of {int(state.num_rows)} rows seen "
                f"and inverse temperature {float(state.inverse_temperature):.3g}: raise max_steps, or lower ess_fraction"
            )
        statistics = infos | {"log_evidence": state.log_evidence}
        return WeightPosterior(unravel(state.position, target.shapes()), statistics=statistics)


def _log_likelihood(target: Target, parameters: Parameters, rows: Data | None) -> Tensor:
    return target.log_likelihood(parameters, rows)


def _tempered(target: Target, seen: Data | None, new: Data | None, beta: float) -> Density:
    """p(theta) p(seen | theta) p(new | theta)^beta."""

    def log_likelihood(parameters: Parameters) -> Tensor:
        value = beta * target.log_likelihood(parameters, new)
        return value if seen is None else value + target.log_likelihood(parameters, seen)

    return lambda position: log_joint(target, position, log_likelihood).tempered(1.0)
