"""The parameters of a search space: a number, or a category."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

Scalar = None | bool | int | float | str


@dataclass(frozen=True)
class Numeric:
    """A number from low to high, both included.

    Args:
        low, high: the range.
        log: code it on the log scale.
        step: the distance between its values; None if it is continuous.
        integer: its values are whole numbers.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None
    integer: bool = False

    @property
    def num_values(self) -> float:
        """How many values there are; infinite if it is continuous."""
        return math.inf if self.step is None else math.floor((self.high - self.low) / self.step + 1e-8) + 1

    def _transform(self, value: float) -> float:
        return math.log(value) if self.log else value

    def code(self, value: Any) -> float:
        """Value -> [0, 1]. Raises ValueError for anything but a value of this parameter."""
        inside = _is_number(value) and self.low <= value <= self.high
        if inside and self.step is not None:
            steps = (float(value) - self.low) / self.step
            inside = abs(steps - round(steps)) < 1e-8
        if not inside:
            raise ValueError(f"{value!r} isn't {self}")
        low, high = self._transform(self.low), self._transform(self.high)
        return (self._transform(float(value)) - low) / (high - low)

    def value(self, code: float) -> float | int:
        """[0, 1] -> the nearest value."""
        low, high = self._transform(self.low), self._transform(self.high)
        value = low + min(max(code, 0.0), 1.0) * (high - low)
        value = math.exp(value) if self.log else value
        if self.step is not None:
            value = self.low + self.step * round((value - self.low) / self.step)
        value = min(max(value, self.low), self.high)
        return round(value) if self.integer else value

    def spread(self, uniform: float) -> float:
        """The code of the value at a quantile, where all values (on the log scale: all ratios) are equally likely."""
        if self.step is None:
            return uniform
        if not self.log:
            return self.code(self.value(math.floor(uniform * self.num_values) / (self.num_values - 1)))
        low, high = math.log(self.low - 0.5 * self.step), math.log(self.high + 0.5 * self.step)
        nearest = round(math.exp(low + uniform * (high - low)))
        return self.code(min(max(nearest, self.low), self.high))

    def distribution(self) -> BaseDistribution:
        """The same as an Optuna distribution."""
        if self.integer:
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)

    def __str__(self) -> str:
        kind = "a whole number" if self.integer else "a number"
        step = f" in steps of {self.step:g}" if self.step is not None and self.step != 1 else ""
        return f"{kind} from {self.low:g} to {self.high:g}{step}"


@dataclass(frozen=True)
class Categorical:
    """One of several values without an order."""

    choices: tuple[Scalar, ...]

    @property
    def num_values(self) -> float:
        """How many choices there are."""
        return len(self.choices)

    def code(self, value: Any) -> float:
        """Choice -> its index. Raises ValueError for anything else."""
        for index, choice in enumerate(self.choices):
            if choice is value or choice == value:
                return float(index)
        raise ValueError(f"{value!r} isn't {self}")

    def value(self, code: float) -> Scalar:
        """Index -> choice."""
        return self.choices[min(max(round(code), 0), len(self.choices) - 1)]

    def spread(self, uniform: float) -> float:
        """The index at a quantile, where all choices are equally likely."""
        return float(min(math.floor(uniform * len(self.choices)), len(self.choices) - 1))

    def distribution(self) -> BaseDistribution:
        """The same as an Optuna distribution."""
        return CategoricalDistribution(self.choices)

    def __str__(self) -> str:
        return "one of " + ", ".join(repr(choice) for choice in self.choices)


@dataclass(frozen=True)
class Ordinal:
    """One of several values in an order: neighbours are alike, all steps count the same. Optuna keeps it as a category.

    Args:
        choices: from one end to the other: ``Ordinal(["small", "medium", "large"])``.

    Raises:
        TypeError, ValueError: for choices that make no sense.
    """

    choices: Sequence[Scalar]

    def __post_init__(self) -> None:
        if isinstance(self.choices, str) or not isinstance(self.choices, Sequence):
            raise TypeError(f"the choices of an Ordinal must be a list, found {self.choices!r}")
        object.__setattr__(self, "choices", _categorical("an Ordinal", list(self.choices)).choices)

    @property
    def num_values(self) -> float:
        """How many choices there are."""
        return len(self.choices)

    def code(self, value: Any) -> float:
        """Choice -> its place in [0, 1]. Raises ValueError for anything else."""
        return Categorical(tuple(self.choices)).code(value) / (len(self.choices) - 1)

    def value(self, code: float) -> Scalar:
        """[0, 1] -> the nearest choice."""
        return Categorical(tuple(self.choices)).value(code * (len(self.choices) - 1))

    def spread(self, uniform: float) -> float:
        """The code at a quantile, where all choices are equally likely."""
        return Categorical(tuple(self.choices)).spread(uniform) / (len(self.choices) - 1)

    def distribution(self) -> BaseDistribution:
        """The same as an Optuna distribution, which knows no order."""
        return CategoricalDistribution(self.choices)

    def __str__(self) -> str:
        return "one of " + " < ".join(repr(choice) for choice in self.choices)


Parameter = Numeric | Categorical | Ordinal


@dataclass(frozen=True)
class When:
    """A parameter that exists under a condition only: ``When((0.0, 0.9), optimizer=["sgd", "rmsprop"])``.

    Args:
        form: what :class:`Space` takes: (low, high), a list of choices …
        condition: the values of one other parameter, defined before, under which this one exists.

    Raises:
        ValueError: unless there is one other parameter, with at least one value.
    """

    form: Any
    parent: str
    values: tuple[Scalar, ...]

    def __init__(self, form: Any, /, **condition: Any) -> None:
        if len(condition) != 1:
            raise ValueError(f"When needs the values of one other parameter, found {len(condition)}")
        ((parent, values),) = condition.items()
        values = tuple(values) if isinstance(values, (list, tuple)) else (values,)
        if not values:
            raise ValueError(f"When needs at least one value of {parent}, found none")
        for name, value in (("form", form), ("parent", parent), ("values", values)):
            object.__setattr__(self, name, value)


def all_codes(parameter: Parameter) -> list[float]:
    """The codes of all values of a parameter that isn't continuous."""
    if isinstance(parameter, Categorical):
        return [float(index) for index in range(len(parameter.choices))]
    if isinstance(parameter, Ordinal):
        return [index / (len(parameter.choices) - 1) for index in range(len(parameter.choices))]
    assert parameter.step is not None
    return [parameter.code(parameter.low + k * parameter.step) for k in range(int(parameter.num_values))]


def parameter_from_form(name: str, form: Any) -> Parameter:
    """What the user wrote -> parameter. Raises TypeError or ValueError, naming the parameter."""
    if not isinstance(name, str) or not name:
        raise TypeError(f"a parameter's name is a non-empty string, found {name!r}")
    if isinstance(form, Ordinal):
        return form
    if isinstance(form, list):
        return _categorical(name, form)
    pair = isinstance(form, tuple) and len(form) in (2, 3) and all(_is_number(end) for end in form[:2])
    if not pair or (len(form) == 3 and form[2] != "log"):
        raise TypeError(
            f'{name} must be (low, high), (low, high, "log"), a list of choices or an Ordinal, found {form!r}'
        )
    low, high, log = form[0], form[1], len(form) == 3
    if not math.isfinite(high - low):
        raise ValueError(f"{name} must have finite ends, not too far apart, found {form!r}")
    if not low < high:
        raise ValueError(f"{name} must have low < high, found {form!r}")
    if log and low <= 0:
        raise ValueError(f"{name} is on the log scale, so low must be positive, found {form!r}")
    if isinstance(low, Integral) and isinstance(high, Integral):
        return Numeric(int(low), int(high), log, step=1, integer=True)
    return Numeric(float(low), float(high), log)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _categorical(name: str, choices: Sequence[Any]) -> Categorical:
    wrong = [c for c in choices if not (c is None or isinstance(c, (bool, int, float, str)))]
    if wrong:
        raise TypeError(f"the choices of {name} must be strings, numbers, booleans or None, found {wrong[0]!r}")
    if any(isinstance(choice, float) and not math.isfinite(choice) for choice in choices):
        raise ValueError(f"the choices of {name} must be finite, found {choices!r}")
    # Optuna finds a stored choice by ==, to which 1, 1.0 and True are the same.
    if any(choice in choices[:index] for index, choice in enumerate(choices)):
        raise ValueError(f"the choices of {name} must differ, found {choices!r}")
    if len(choices) < 2:
        raise ValueError(f"{name} needs at least two choices, found {choices!r}")
    return Categorical(tuple(choices))


def parameter_from_distribution(name: str, given: BaseDistribution) -> Parameter:
    """Optuna distribution -> parameter. Raises TypeError, naming the parameter."""
    if isinstance(given, CategoricalDistribution):
        return Categorical(tuple(given.choices))
    if isinstance(given, IntDistribution):
        return Numeric(given.low, given.high, given.log, step=given.step, integer=True)
    if isinstance(given, FloatDistribution):
        return Numeric(given.low, given.high, given.log, step=given.step)
    raise TypeError(f"{name} has a distribution of an unknown kind, {type(given).__name__}")
