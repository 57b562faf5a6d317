"""What an optimisation is after: objectives and limits, and how they are read from what the objective function returned."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from bayesnn.bo.outcomes import Direction, Limit

Objectives = Mapping[str, Direction] | Sequence[Direction]


@dataclass(frozen=True)
class Goals:
    """Objectives and limits.

    Fields:
        directions: for each objective's name "minimize" or "maximize".
        limits: for each limited outcome's name ("<=", bound) or (">=", bound), in its own units.
        named: whether the objective function returns outcomes by name; otherwise a number, or a sequence of them.
    """

    directions: dict[str, Direction]
    limits: dict[str, Limit]
    named: bool

    @classmethod
    def of(
        cls, direction: Direction, objectives: Objectives | None = None, constraints: Mapping[str, Limit] | None = None
    ) -> Goals:
        """Goals from what users write.

        Args:
            direction: of the one objective, where ``objectives`` is None.
            objectives: ``{"loss": "minimize", "accuracy": "maximize"}``, or a list of directions.
            constraints: ``{"memory": ("<=", 4.0)}``.

        Raises:
            TypeError, ValueError: for what makes no sense.
        """
        if objectives is None:
            directions: dict[str, Direction] = {"value": direction}
        elif isinstance(objectives, Mapping):
            directions = dict(objectives)
        elif isinstance(objectives, Sequence) and not isinstance(objectives, str):
            directions = {f"value {index + 1}": each for index, each in enumerate(objectives)}
        else:
            raise TypeError(f'objectives must be {{"loss": "minimize"}} or a list of directions, found {objectives!r}')
        if not directions:
            raise ValueError("objectives must have at least one, found none")
        for name, each in directions.items():
            _check_name("objectives", name)
            if each not in ("minimize", "maximize"):
                raise ValueError(f"objectives must each be minimize or maximize, found {each!r} for {name}")
        named = isinstance(objectives, Mapping)
        limits = _limits({} if constraints is None else constraints)
        if limits and not named:
            raise ValueError('constraints need named objectives beside them: objectives={"loss": "minimize"}')
        both = sorted(set(limits) & set(directions))
        if both:
            raise ValueError(f"constraints must be on other outcomes than the objectives, found {', '.join(both)}")
        return cls(directions, limits, named)

    def __str__(self) -> str:
        goals = [f"{direction} {name}" for name, direction in self.directions.items()] if self.named else []
        goals = goals or list(self.directions.values())
        return ", ".join([*goals, *(f"{name} {sign} {bound:g}" for name, (sign, bound) in self.limits.items())])

    @property
    def names(self) -> list[str]:
        """The outcomes' names, the objectives' first."""
        return [*self.directions, *self.limits]

    def read(self, returned: Any) -> dict[str, float]:
        """Each outcome's number, from what an objective function returned.

        Raises:
            ValueError: for anything but finite numbers for all outcomes; it says what was found.
        """
        if isinstance(returned, Generator):
            raise ValueError(
                "the objective returned a generator: say with fidelity=Fidelity(max_resource=…) how often it yields"
            )
        if self.named:
            return self._by_name(returned)
        if len(self.directions) == 1:
            (name,) = self.directions
            value = finite(returned)
            if value is None:
                raise ValueError(f"the objective returned {returned!r:.200}, not a finite number")
            return {name: value}
        entries = returned.tolist() if hasattr(returned, "tolist") else returned
        count = len(self.directions)
        values = [finite(each) for each in entries] if isinstance(entries, list | tuple) else []
        if len(values) != count or None in values:
            raise ValueError(f"the objective returned {returned!r:.200}, not a sequence of {count} finite numbers")
        return {name: value for name, value in zip(self.directions, values, strict=True) if value is not None}

    def _by_name(self, returned: Any) -> dict[str, float]:
        wanted = ", ".join(self.names)
        if not isinstance(returned, Mapping):
            raise ValueError(f"the objective returned {returned!r:.200}, not a dict with {wanted}")
        missing = [name for name in self.names if name not in returned]
        if missing:
            found = ", ".join(str(name) for name in returned) or "nothing"
            raise ValueError(f"the objective returned no {', '.join(missing)}, only {found:.200}")
        numbers = {name: finite(returned[name]) for name in self.names}
        for name, number in numbers.items():
            if number is None:
                raise ValueError(f"the objective returned {returned[name]!r:.200} as {name}, not a finite number")
        return {name: number for name, number in numbers.items() if number is not None}

    def others(self, returned: Any) -> dict[str, float]:
        """Further finite numbers that came by name."""
        if not self.named or not isinstance(returned, Mapping):
            return {}
        found = {name: finite(value) for name, value in returned.items() if name not in self.names}
        return {name: value for name, value in found.items() if isinstance(name, str) and value is not None}

    def values(self, numbers: Mapping[str, float]) -> list[float]:
        """The objectives among the outcomes' numbers, in order."""
        return [numbers[name] for name in self.directions]

    def excesses(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """By how much each limited outcome is beyond its limit, negative or 0 where the limit is kept."""
        signs = {"<=": 1.0, ">=": -1.0}
        return {name: signs[sign] * (numbers[name] - bound) for name, (sign, bound) in self.limits.items()}


def _limits(constraints: Any) -> dict[str, Limit]:
    if not isinstance(constraints, Mapping):
        raise TypeError(f'constraints must be {{"memory": ("<=", bound)}}, found {constraints!r}')
    for name, limit in constraints.items():
        _check_name("constraints", name)
        form = isinstance(limit, Sequence) and len(limit) == 2 and limit[0] in ("<=", ">=")
        if not form or isinstance(limit[1], bool) or not isinstance(limit[1], Real) or not math.isfinite(limit[1]):
            raise ValueError(f'constraints[{name!r}] must be ("<=", bound) or (">=", bound), found {limit!r}')
    return {name: (sign, float(bound)) for name, (sign, bound) in constraints.items()}


def _check_name(argument: str, name: Any) -> None:
    # What can't be printed or is longer, a database may refuse.
    if not isinstance(name, str) or not name or not name.isprintable() or len(name) > 200:
        raise TypeError(f"{argument} must be named by short, printable strings, found {name!r}")


def finite(returned: Any) -> float | None:
    """A number, or an array or tensor of one, as a float; None for anything else."""
    if isinstance(returned, (str, bytes, bytearray)) or returned is None:
        return None
    try:
        value = float(returned.item() if hasattr(returned, "item") else returned)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return value if math.isfinite(value) else None
