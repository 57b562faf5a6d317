r"""Stochastic-gradient Markov chains: what all samplers without an acceptance step share.

A sampler is one function, its *update*: from the chains' variables (positions, momenta …), an estimate of the gradient of
the log density at the positions, a step size and standard normal noise to the new variables. It is made of tensor
operations alone, so that it can be compiled, and so that its stationary law can be read off it. :class:`SGMCMC` makes a
method of an update.

No step is rejected: the law is that of the discretised chain, stated for each sampler, which differs from the posterior by
an order of the step size, plus what the minibatches' noise adds. All chains see the same minibatch, so that a network runs
on one batch for all of them; each chain's law is right, but chains share the gradients' noise.

A chain that leaves the finite numbers, as too large a step size makes it, stops where its last draw was or would have been,
with a warning. The result is that of the other chains alone. The run goes on while at least half of the chains do.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from bayesnn.checks import check_fields, count, flag, positive
from bayesnn.configured import Configured
from bayesnn.data import BayesnnWarning, Data
from bayesnn.inference.draws import WeightPosterior
from bayesnn.inference.flat import log_density_and_gradient, ravel, unravel
from bayesnn.inference.sgmcmc.control_variates import Anchor, Gradient, around, plain
from bayesnn.inference.sgmcmc.inner_loop import Update, Variables, chunk_size, core_for_noise, follow, noise_for
from bayesnn.inference.sgmcmc.minibatches import Minibatches, draw_rows
from bayesnn.inference.sgmcmc.noise import start_stream
from bayesnn.inference.sgmcmc.preconditioners import RMS, Metric
from bayesnn.inference.sgmcmc.schedules import Constant, Schedule
from bayesnn.inference.target import Target

HOT = 100.0  # a mean kinetic temperature taken for a runaway (our choice): in one fit seven chains had 3 to 7, one had 9e5


class SGMCMCState(NamedTuple):
    """The chains' variables, each with C rows; which of them go on, (C,); minibatch steps taken; and what else it takes."""

    variables: Variables
    alive: Tensor
    num_updates: Tensor
    minibatches: Minibatches
    noise: Tensor
    second_moment: Tensor
    anchor: Anchor


@dataclass(frozen=True)
class SGMCMC(Configured, ABC):
    """A method made of an update; see the samplers for the arguments.

    The stationary law is the update's, without correction: each sampler states its own.
    """

    num_chains: int = 4
    num_burn_in: int = 2000
    num_draws: int = 200
    thinning: int = 10
    step_size: float | Schedule = 1e-3
    batch_size: int | None = 32
    replacement: bool = False
    preconditioner: RMS | None = None
    control_variates: bool = False

    num_noises: ClassVar[int] = 1
    """How many standard normal (C, P) an update takes."""

    def __post_init__(self) -> None:
        check_fields(self, count, "num_chains", "num_draws", "thinning")
        check_fields(self, count, "num_burn_in", least=0)
        check_fields(self, flag, "replacement", "control_variates")
        if self.batch_size is not None:
            check_fields(self, count, "batch_size")
        if not isinstance(self.step_size, Schedule):
            check_fields(self, positive, "step_size")
        if self.preconditioner is not None and not isinstance(self.preconditioner, RMS):
            raise TypeError(f"preconditioner must be RMS(…) or None, found {self.preconditioner!r}")
        if self.preconditioner is not None and self.num_burn_in == 0:
            raise ValueError("num_burn_in must be at least 1 with a preconditioner, which learns in it, found 0")
        self.schedule.check(self.thinning)

    @abstractmethod
    def initial_variables(self, position: Tensor, generator: torch.Generator) -> Variables:
        """All variables at positions (C, P): ``position`` itself, and others at their stationary law."""

    @abstractmethod
    def update(
        self, variables: Variables, gradient: Tensor, step_size: Tensor, scale: Tensor, noise: Tensor
    ) -> Variables:
        """One step of every chain; no random draws and no branches on values.

        Args:
            variables: each with C rows, ``position`` (C, P) among them.
            gradient: an estimate of the gradient of the log density at the positions, (C, P).
            step_size: a scalar.
            scale: S, where S^2 is the diagonal metric: (C, P), or (1, 1) of ones.
            noise: standard normal, (num_noises, C, P).
        """

    def update_at(self, step: int) -> Update:
        """The update that a call of ``step`` follows from this minibatch step on; a sampler may begin with another one."""
        return self.update

    def statistics(self, variables: Variables) -> dict[str, Tensor]:
        """What else to report of a step, each (C,)."""
        return {}

    @cached_property
    def schedule(self) -> Schedule:
        """The step size as a function of the step."""
        return self.step_size if isinstance(self.step_size, Schedule) else Constant(self.step_size)

    @property
    def num_burn_in_steps(self) -> int:
        """Calls of ``step`` that burn in: each takes ``thinning`` minibatch steps."""
        return -(-self.num_burn_in // self.thinning)

    @cached_property
    def num_steps(self) -> int:
        """Calls of ``step`` until the last draw is kept."""
        index, kept = 0, 0
        while kept < self.num_draws:
            kept += self._keeps(index)
            index += 1
        return index

    def _keeps(self, index: int) -> bool:
        return index >= self.num_burn_in_steps and self.schedule.sampling((index + 1) * self.thinning - 1)

    def init(self, target: Target, generator: torch.Generator) -> SGMCMCState:
        """Chains at the target's initial points.

        Raises:
            ValueError: if a batch size is asked of a target without data, or the gradient isn't finite at these points.
        """
        num_rows = len(target.data)
        if self.batch_size is not None and num_rows == 0:
            raise ValueError(f"batch_size must be None for a target without data, found {self.batch_size}")
        position = ravel(target.initial(self.num_chains, generator), target.shapes())
        if not bool(torch.isfinite(log_density_and_gradient(target, position)[1]).all()):
            raise ValueError("the gradient of the log density isn't finite at the initial points")
        empty = position[:, :0]
        return SGMCMCState(
            self.initial_variables(position, generator),
            torch.ones(self.num_chains, dtype=torch.bool, device=position.device),
            torch.zeros((), dtype=torch.long),
            Minibatches.start(num_rows, self._batch_size(num_rows), self.replacement),
            start_stream(generator),
            empty if self.preconditioner is None else torch.zeros_like(position),
            Anchor(position, torch.zeros_like(position)) if self.control_variates else Anchor(empty, empty),
        )

    def _batch_size(self, num_rows: int) -> int:
        return num_rows if self.batch_size is None else min(self.batch_size, num_rows)

    def step(
        self, target: Target, state: SGMCMCState, generator: torch.Generator
    ) -> tuple[SGMCMCState, dict[str, Tensor]]:
        """``thinning`` minibatch steps of every chain.

        Raises:
            ValueError: if more than half of the chains have left the finite numbers.
        """
        if not self.control_variates:
            return self.advance(plain(target), target.data, state, generator)
        index = int(state.num_updates) // self.thinning
        state = state._replace(anchor=self._anchor(target, state, index))
        burning_in = index < self.num_burn_in_steps
        gradient = plain(target) if burning_in else around(target, state.anchor)
        return self.advance(gradient, target.data, state, generator)

    def _anchor(self, target: Target, state: SGMCMCState, index: int) -> Anchor:
        """The mean position over the second half of burn-in, and at the end of it the full gradient there."""
        first, last = self.num_burn_in_steps // 2, self.num_burn_in_steps
        if not first <= index <= last:
            return state.anchor
        mean = torch.lerp(state.anchor.position, state.variables["position"], 1 / (index - first + 1))
        gradient = log_density_and_gradient(target, mean)[1] if index == last else state.anchor.gradient
        return Anchor(mean, gradient)

    def advance(
        self, gradient: Gradient, data: Data, state: SGMCMCState, generator: torch.Generator
    ) -> tuple[SGMCMCState, dict[str, Tensor]]:
        """``thinning`` minibatch steps of every chain with any estimate of the gradient.

        Raises:
            ValueError: if more than half of the chains have left the finite numbers.
        """
        with core_for_noise(gradient):
            return self._advance(gradient, data, state, generator)

    def _advance(
        self, gradient: Gradient, data: Data, state: SGMCMCState, generator: torch.Generator
    ) -> tuple[SGMCMCState, dict[str, Tensor]]:
        first = int(state.num_updates)
        update, variables, stream = self.update_at(first), state.variables, state.noise
        if self.schedule.restarts(first):
            variables = self.initial_variables(variables["position"], generator)
        minibatches, rows = self._rows(data, state.minibatches, generator)
        step_sizes = variables["position"].new_tensor([self.schedule(first + step) for step in range(self.thinning)])
        metric = Metric(self.preconditioner, state.second_moment, first, self.num_burn_in_steps * self.thinning)
        shape = (self.num_noises, *variables["position"].shape)
        size = chunk_size(self.thinning, math.prod(shape))
        for index in range(0, self.thinning, size):
            now, later = self._noisy(first + index, size), self._noisy(first + index + size, size)
            noises, stream = noise_for(gradient, stream, shape, now, later, variables["position"])
            chunk = slice(index, index + size)
            batches = None if rows is None else Data(data.X[rows[chunk]], data.Y[rows[chunk]])
            variables, slope = follow(update, gradient, variables, batches, step_sizes[chunk], metric, noises)
        alive = self._alive(state.alive, variables, first)
        if not bool(alive.all()):
            moved = variables
            variables = {name: _where(alive, moved[name], before) for name, before in state.variables.items()}
            slope = _where(alive, slope, torch.zeros_like(slope))
        num_updates = state.num_updates + self.thinning
        state = SGMCMCState(variables, alive, num_updates, minibatches, stream, metric.second_moment, state.anchor)
        return state, self._info(variables, slope, step_sizes[-1])

    def _rows(
        self, data: Data, minibatches: Minibatches, generator: torch.Generator
    ) -> tuple[Minibatches, Tensor | None]:
        num_rows, batch_size = len(data), self._batch_size(len(data))
        if batch_size == num_rows:
            return minibatches, None
        minibatches, rows = draw_rows(minibatches, num_rows, batch_size, self.thinning, generator)
        return minibatches, rows.to(data.X.device)

    def _noisy(self, first: int, count: int) -> list[bool]:
        return [self.schedule.noisy(step) for step in range(first, first + count)]

    def _alive(self, alive: Tensor, variables: Variables, first: int) -> Tensor:
        finite = torch.stack([torch.isfinite(values).all(-1) for values in variables.values()]).all(0)
        lost, alive = (alive & ~finite).nonzero().flatten().tolist(), alive & finite
        if not lost:
            return alive
        chains = ("chain " if len(lost) == 1 else "chains ") + ", ".join(map(str, lost))
        found = (
            f"{type(self).__name__}: {chains} left the finite numbers in minibatch steps {first} to "
            f"{first + self.thinning - 1}, at step size {self.schedule(first):.3g}"
        )
        num_alive = int(alive.sum())
        if 2 * num_alive < self.num_chains:
            raise ValueError(f"{found}; {num_alive} of {self.num_chains} are left. Use a smaller step_size")
        warnings.warn(
            f"{found}. The result will be that of the other {num_alive} of {self.num_chains}. Use a smaller step_size to keep "
            "them all",
            BayesnnWarning,
            stacklevel=2,
        )
        return alive

    def _info(self, variables: Variables, gradient: Tensor, step_size: Tensor) -> dict[str, Tensor]:
        """Of the last minibatch step, each (C,)."""
        info = {"mean_squared_gradient": gradient.square().mean(-1), "step_size": step_size.expand(self.num_chains)}
        return info | self.statistics(variables)

    def keep(self, state: SGMCMCState, index: int) -> dict[str, Tensor] | None:
        """The positions after burn-in, where the schedule samples."""
        return {"position": state.variables["position"]} if self._keeps(index) else None

    def result(
        self, target: Target, state: SGMCMCState, draws: dict[str, Tensor], infos: dict[str, Tensor]
    ) -> WeightPosterior:
        """The draws of all chains that weren't lost, one after the other, weighted by step sizes if the schedule says so.

        A chain that runs away without an overflow keeps its draws, with a warning: its momenta tell, of mean square 1 by law.
        """
        num_chains = int(state.alive.sum())
        position = draws["position"][:, state.alive].transpose(0, 1).flatten(0, 1)
        statistics = {name: values[:, state.alive] for name, values in infos.items()}
        if "kinetic_temperature" in statistics:
            self._warn_of_heat(state.alive.nonzero().flatten(), statistics["kinetic_temperature"].double().mean(0))
        log_weights = None
        if self.schedule.weighs_draws:
            kept = [index for index in range(self.num_steps) if self._keeps(index)][: len(draws["position"])]
            sizes = position.new_tensor([self.schedule((index + 1) * self.thinning - 1) for index in kept])
            log_weights = sizes.log().repeat(num_chains)
        return WeightPosterior(unravel(position, target.shapes()), num_chains, log_weights, statistics)

    def _warn_of_heat(self, chains: Tensor, temperature: Tensor) -> None:
        hot = temperature > HOT
        if bool(hot.any()):
            pairs = zip(chains[hot].tolist(), temperature[hot].tolist(), strict=True)
            found = ", ".join(f"{value:.3g} in chain {chain}" for chain, value in pairs)
            warnings.warn(
                f"{type(self).__name__}: the mean kinetic temperature after burn-in should be near 1 and is {found}, of which "
                "the draws say little of the posterior. Use a smaller step_size, larger batches or more friction",
                BayesnnWarning,
                stacklevel=3,
            )


def _where(alive: Tensor, values: Tensor, others: Tensor) -> Tensor:
    """Rows of the one where a chain goes on, of the other where it doesn't."""
    return torch.where(alive.unsqueeze(-1), values, others)


def standard_normal(shape: torch.Size, like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers of the type, and where, ``like`` is."""
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=generator.device).to(like.device)
