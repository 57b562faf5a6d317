"""How the command line says what went wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from safetensors import SafetensorError


@contextmanager
def one_line_errors() -> Iterator[None]:
    """What a user can mend is told in one line, with exit code 2."""
    try:
        yield
    except (ValueError, TypeError, OSError, KeyError, SafetensorError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
