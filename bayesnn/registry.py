"""Surrogates by name. Each family of models puts its own in; the front end looks them up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_FACTORIES: dict[str, Callable[..., Any]] = {}


def register(name: str, factory: Callable[..., Any]) -> None:
    """Let ``factory(**options)``, which returns an unfitted Model, be found as ``name``."""
    _FACTORIES[name] = factory


def surrogates() -> list[str]:
    """The names of the registered surrogate models, in order."""
    return sorted(_FACTORIES)


def surrogate(name: str, **options: Any) -> Any:
    """An unfitted Model by name; the options go to its constructor.

    Raises:
        ValueError: if no surrogate has that name.
    """
    if name not in _FACTORIES:
        raise ValueError(f"no surrogate named {name!r}; there are {', '.join(surrogates())}")
    return _FACTORIES[name](**options)
