"""What a model's outputs mean to a search: objectives to minimise or maximise, and limits to keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Direction = Literal["minimize", "maximize"]
Limit = tuple[Literal["<=", ">="], float]


class Outcomes(NamedTuple):
    """The meaning of each output.

    Fields:
        objectives: their outputs' indices.
        directions: "minimize" or "maximize" for each objective.
        limits: (index, "<=" or ">=", bound) of the constrained outputs.
    """

    objectives: tuple[int, ...]
    directions: tuple[Direction, ...]
    limits: tuple[tuple[int, str, float], ...] = ()

    @property
    def signs(self) -> Tensor:
        """1 for each objective to maximise, -1 for each to minimise."""
        return torch.tensor([1.0 if d == "maximize" else -1.0 for d in self.directions], dtype=torch.float64)

    def merits(self, values: Tensor) -> Tensor:
        """The objectives among values (…, m), signed so that more is better: (…, number of objectives)."""
        return self.signs * values[..., list(self.objectives)].double()

    def excesses(self, values: Tensor) -> Tensor:
        """By how much values (…, m) are beyond each limit, negative inside: (…, number of limits)."""
        signs, bounds = (
            torch.tensor(list(column), dtype=torch.float64)
            for column in ([1.0 if sign == "<=" else -1.0 for _, sign, _ in self.limits], [b for *_, b in self.limits])
        )
        return signs * (values[..., [index for index, *_ in self.limits]].double() - bounds)


def outcomes_of(
    num_outputs: int, direction: Direction | Sequence[Direction], constraints: Mapping[int, Limit] | None = None
) -> Outcomes:
    """Outputs named in ``constraints`` are constrained, all others are objectives, in order.

    Args:
        num_outputs: of the model.
        direction: one for all objectives, or one for each.
        constraints: for an output's index ("<=", bound) or (">=", bound), in the output's own units.

    Raises:
        TypeError, ValueError: for what doesn't fit the outputs.
    """
    limits = _limits(num_outputs, {} if constraints is None else constraints)
    taken = {index for index, *_ in limits}
    objectives = tuple(index for index in range(num_outputs) if index not in taken)
    if not objectives:
        raise ValueError(f"constraints must leave an objective, but name all {num_outputs} output(s)")
    if not isinstance(direction, str | Sequence):
        raise TypeError(f'direction must be "minimize" or "maximize", or a list of them, found {direction!r}')
    directions = (direction,) * len(objectives) if isinstance(direction, str) else tuple(direction)
    if len(directions) != len(objectives) or any(each not in ("minimize", "maximize") for each in directions):
        raise ValueError(
            f'direction must be "minimize" or "maximize" for each of the {len(objectives)} output(s) without a constraint, '
            f"found {list(directions)}"
        )
    return Outcomes(objectives, directions, limits)


def _limits(num_outputs: int, constraints: Any) -> tuple[tuple[int, str, float], ...]:
    if not isinstance(constraints, Mapping):
        raise TypeError(f'constraints must be {{index: ("<=", bound)}}, found {type(constraints).__name__}')
    limits = []
    for index, limit in sorted(constraints.items()):
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < num_outputs:
            raise ValueError(f"constraints must name outputs 0 … {num_outputs - 1}, found {index!r}")
        form = isinstance(limit, tuple) and len(limit) == 2 and limit[0] in ("<=", ">=")
        if not form or not isinstance(limit[1], Real) or not math.isfinite(limit[1]):
            raise ValueError(f'constraints[{index}] must be ("<=", bound) or (">=", bound), found {limit!r}')
        limits.append((index, limit[0], float(limit[1])))
    return tuple(limits)


class Scales(NamedTuple):
    """Units of about one for merits and excesses: BoTorch smooths improvements and limits on an absolute scale.

    Fields:
        loc, scale: of the merits, (number of objectives,).
        excess_scale: of the excesses, (number of limits,); those have their own zero.
    """

    loc: Tensor
    scale: Tensor
    excess_scale: Tensor

    @classmethod
    def of(cls, outcomes: Outcomes, means: Tensor) -> Scales:
        """By the spread of predicted means (n, m)."""
        merits = outcomes.merits(means)
        return cls(merits.mean(0), _spread(merits), _spread(outcomes.excesses(means)))

    def standardise(self, outcomes: Outcomes) -> Callable[[Tensor], Tensor]:
        """Values (…, m) -> merits in units of about one."""
        return lambda values: (outcomes.merits(values) - self.loc) / self.scale

    def constraints(self, outcomes: Outcomes) -> list[Callable[[Tensor], Tensor]] | None:
        """As BoTorch wants them: values (…, m) -> (…), negative where the limit is kept."""
        if not outcomes.limits:
            return None

        def excess(column: int) -> Callable[[Tensor], Tensor]:
            return lambda values: outcomes.excesses(values)[..., column] / self.excess_scale[column]

        return [excess(column) for column in range(len(outcomes.limits))]


def _spread(values: Tensor) -> Tensor:
    if not values.shape[-1]:  # no limits
        return values.new_ones(0)
    scale = values.std(0, correction=0)
    return torch.where(scale > 1e-12 * values.abs().amax(0), scale, torch.ones_like(scale))
