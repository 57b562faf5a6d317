"""Models by name, for tables and for searches. Each family of models puts its own in; the front ends look them up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class _Entry(NamedTuple):
    for_tables: Callable[..., Any]
    for_searches: Callable[..., Any]


_ENTRIES: dict[str, _Entry] = {}


def register(name: str, factory: Callable[..., Any], for_searches: Callable[..., Any] | None = None) -> None:
    """Let ``factory(**options)``, which returns an unfitted Model, be found as ``name``.

    Args:
        name: of the model.
        factory: of the model with the defaults of its class.
        for_searches: likewise with the defaults of a surrogate, whose inputs are in the unit cube; None: the same.
    """
    _ENTRIES[name] = _Entry(factory, factory if for_searches is None else for_searches)


def surrogates() -> list[str]:
    """The names of the registered models, in order."""
    return sorted(_ENTRIES)


def surrogate(name: str, **options: Any) -> Any:
    """An unfitted Model by name, for inputs in the unit cube as search spaces give them; the options go to its constructor.

    Raises:
        ValueError: if no model has that name.
    """
    return _entry(name).for_searches(**options)


def named_model(name: str, **options: Any) -> Any:
    """An unfitted Model by name, with the defaults of its class; the options go to its constructor.

    Raises:
        ValueError: if no model has that name.
    """
    return _entry(name).for_tables(**options)


def _entry(name: str) -> _Entry:
    if name not in _ENTRIES:
        raise ValueError(f"no surrogate named {name!r}; there are {', '.join(surrogates())}")
    return _ENTRIES[name]
