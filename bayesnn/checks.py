"""Checks of settings: each names the setting, what was found and what is wanted, and gives the value as a plain number.

NumPy's scalars are numbers like any other; truth values aren't, nor are NaN and infinities.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

INTERVALS: dict[str, tuple[Callable[[float, float], bool], Callable[[float, float], bool]]] = {
    "(0, 1)": (operator.lt, operator.lt),
    "[0, 1)": (operator.le, operator.lt),
    "(0, 1]": (operator.lt, operator.le),
    "[0, 1]": (operator.le, operator.le),
}


def count(name: str, value: Any, least: int = 1) -> int:
    """An integer that is ``least`` or more.

    Raises:
        TypeError: if it isn't an integer (2.0 isn't one).
        ValueError: if it is less.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, found {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, found {value}")
    return int(value)


def number(name: str, value: Any) -> float:
    """A finite number.

    Raises:
        TypeError: if it isn't a number.
        ValueError: if it is infinite or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, found {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, found {value}")
    return float(value)


def positive(name: str, value: Any) -> float:
    """A positive, finite number.

    Raises:
        TypeError: if it isn't a number.
        ValueError: if it isn't positive and finite.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a positive number, found {value!r}")
    if not 0 < float(value) < math.inf:
        raise ValueError(f"{name} must be positive and finite, found {value}")
    return float(value)


def nonnegative(name: str, value: Any) -> float:
    """A finite number, 0 or more.

    Raises:
        TypeError: if it isn't a number.
        ValueError: if it is negative, infinite or NaN.
    """
    found = number(name, value)
    if found < 0:
        raise ValueError(f"{name} must be a number from 0 on, found {value}")
    return found


def fraction(name: str, value: Any, interval: str = "(0, 1)") -> float:
    """A number between 0 and 1; the interval says which of the ends belong to it, "[0, 1)" say.

    Raises:
        TypeError: if it isn't a number.
        ValueError: if it lies outside.
    """
    above, below = INTERVALS[interval]
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number in {interval}, found {value!r}")
    if not (above(0, float(value)) and below(float(value), 1)):
        raise ValueError(f"{name} must lie in {interval}, found {value}")
    return float(value)


def interval(name: str, value: Any) -> tuple[float, float]:
    """Two finite numbers, the second above the first.

    Raises:
        TypeError: if they aren't two numbers.
        ValueError: if they don't increase, or aren't finite.
    """
    try:
        low, high = value
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be two numbers, found {value!r}") from None
    low, high = number(name, low), number(name, high)
    if not low < high:
        raise ValueError(f"{name} must be two increasing numbers, found {(low, high)}")
    return low, high


def positive_range(name: str, value: Any) -> tuple[float, float]:
    """Two positive, finite numbers, the second at least the first.

    Raises:
        TypeError: if they aren't two numbers.
        ValueError: if they aren't positive and finite, or decrease.
    """
    try:
        low, high = value
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be two numbers, found {value!r}") from None
    low, high = positive(name, low), positive(name, high)
    if low > high:
        raise ValueError(f"{name} must be two increasing positive numbers, found {(low, high)}")
    return low, high


def positives(name: str, values: Any) -> tuple[float, ...]:
    """At least one positive, finite number.

    Raises:
        TypeError: if it isn't a sequence of numbers.
        ValueError: if there is none, or one isn't positive and finite.
    """
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        raise TypeError(f"{name} must be a sequence of numbers, found {values!r}")
    found = tuple(positive(name, value) for value in values)
    if not found:
        raise ValueError(f"{name} must have at least one value")
    return found


def flag(name: str, value: Any) -> bool:
    """True or False.

    Raises:
        TypeError: if it is anything else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, found {value!r}")
    return value


def check_fields(owner: Any, check: Callable[..., Any], *names: str, **options: Any) -> None:
    """Check fields of a frozen dataclass, and keep what the check gives: plain numbers in place of NumPy's.

    Raises:
        TypeError: as the check does.
        ValueError: as the check does.
    """
    for name in names:
        object.__setattr__(owner, name, check(name, getattr(owner, name), **options))
