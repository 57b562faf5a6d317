"""Search spaces in a TOML file, one entry for each parameter."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from bayesnn.bo.parameters import Ordinal, When
from bayesnn.bo.space import Space

FORMS = '[low, high], [low, high, "log"], an array of choices, or a table of low and high (and log) or of choices'


def read_space(path: str | Path) -> Space:
    """The space that a TOML file describes.

    A parameter is an array or a table. An array that begins with two numbers is a range, both ends included: whole
    numbers if both ends are written as such, on the log scale if it ends in "log"; any other array lists choices. A
    table says the same by name; choices that are numbers need it. In a table, ``ordered = true`` gives choices an order, and
    ``when`` names the values of one parameter before it under which this one exists.

    Args:
        path: the file.

    Raises:
        OSError: if there is no such file.
        ValueError: for anything else than that, naming the parameter.

    Example:
        >>> Path("space.toml").write_text('''
        ... lr = [1e-5, 1e-1, "log"]
        ... layers = [1, 6]
        ... optimizer = ["adam", "sgd"]
        ... batch_size = { choices = [32, 64, 128] }
        ...
        ... [width]
        ... low = 16
        ... high = 512
        ... log = true
        ...
        ... [momentum]
        ... low = 0.0
        ... high = 0.99
        ... when = { optimizer = ["sgd"] }
        ... ''')
        >>> space = read_space("space.toml")
    """
    path = Path(path)
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML file: {error}") from None
    if not entries:
        raise ValueError(f"{path} is empty: a space needs at least one parameter")
    try:
        return Space({name: _form(name, entry) for name, entry in entries.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _form(name: str, entry: Any) -> Any:
    """What the file says -> the form that a space takes."""
    if isinstance(entry, list):
        return _array(name, entry)
    if not isinstance(entry, dict):
        raise ValueError(f"{name} must be {FORMS}, found {entry!r}")
    if "when" not in entry:
        return _table(name, entry)
    condition = entry["when"]
    if not isinstance(condition, dict):
        raise ValueError(f"when of {name} must be a table, as in when = {{ kind = [1] }}, found {condition!r}")
    try:
        return When(_table(name, {key: value for key, value in entry.items() if key != "when"}), **condition)
    except ValueError as error:
        raise ValueError(f"when of {name} makes no sense: {error}") from None


def _table(name: str, entry: dict[str, Any]) -> Any:
    if "choices" in entry:
        _require_keys(name, entry, {"choices"}, {"ordered"})
        if not isinstance(entry["choices"], list):
            raise ValueError(f"the choices of {name} must be an array, found {entry['choices']!r}")
        return Ordinal(entry["choices"]) if _flag(name, entry, "ordered") else entry["choices"]
    _require_keys(name, entry, {"low", "high"}, {"log"})
    log = _flag(name, entry, "log")
    return (entry["low"], entry["high"], "log") if log else (entry["low"], entry["high"])


def _flag(name: str, entry: dict[str, Any], key: str) -> bool:
    value = entry.get(key, False)
    if not isinstance(value, bool):
        raise ValueError(f"{key} of {name} must be true or false, found {value!r}")
    return value


def _array(name: str, entry: list[Any]) -> list[Any] | tuple[Any, ...]:
    if len(entry) < 2 or not all(type(end) in (int, float) for end in entry[:2]):
        return entry
    if entry[2:] not in ([], ["log"]):
        raise ValueError(
            f'{name} begins with two numbers, so it must be [low, high] or [low, high, "log"], found {entry!r}; numbers to '
            f"choose from are written {name} = {{ choices = {entry!r} }}"
        )
    return tuple(entry)


def _require_keys(name: str, entry: dict[str, Any], needed: set[str], allowed: set[str]) -> None:
    unknown, missing = sorted(entry.keys() - needed - allowed), sorted(needed - entry.keys())
    if unknown or missing:
        found = f"unknown: {', '.join(unknown)}" if unknown else f"missing: {', '.join(missing)}"
        raise ValueError(f"{name} must be {FORMS}; {found}")
