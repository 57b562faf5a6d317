"""The command line: models in ``bayesnn.cli.models``, the search for configurations in ``bayesnn.cli.search``."""

from __future__ import annotations

import typer

from bayesnn.cli import models, search

# Without Rich's markup, which would take [low, high] for a style.
app = typer.Typer(
    help="Models that know what they don't know.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

for command in (
    models.demo,
    models.models,
    models.fit,
    models.pretrain,
    models.predict,
    search.optimize,
    search.report,
    search.dashboard,
):
    app.command()(command)
