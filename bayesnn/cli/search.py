"""The commands about searches: ``bayesnn optimize | report | dashboard``."""

from __future__ import annotations

import json
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from bayesnn.bo.report import load_study, study_page
from bayesnn.bo.space_file import read_space
from bayesnn.bo.storage import open_storage
from bayesnn.bo.workers import optimize_command
from bayesnn.cli.errors import one_line_errors


def optimize(
    space: Annotated[Path, typer.Option(help="TOML file of the parameters, see above.")],
    command: Annotated[str, typer.Option(help="What to run, with a place {name} for each parameter.")],
    metric: Annotated[str, typer.Option(help="Entry of the JSON line to optimise.")],
    storage: Annotated[str, typer.Option(help="SQLite file that keeps the study, or a database URL.")],
    workers: Annotated[int, typer.Option(help="Runs at once.")] = 1,
    direction: Annotated[str, typer.Option(help="minimize or maximize")] = "minimize",
    trials: Annotated[int, typer.Option(help="In total, with those that the storage has.")] = 30,
    surrogate: Annotated[str, typer.Option(help="A name from `bayesnn models`.")] = "nngp",
    seed: Annotated[int, typer.Option(help="Of the suggestions.")] = 0,
    timeout_per_trial: Annotated[float | None, typer.Option(help="Seconds after which a run is killed.")] = None,
    study_name: Annotated[str, typer.Option(help="In the storage.")] = "bayesnn",
    logs: Annotated[Path | None, typer.Option(help="Folder for the runs' output.  [default: beside the file]")] = None,
) -> None:
    """Look for the configuration for which a command prints the best number; stopped, the same line goes on.

    \b
      bayesnn optimize --space space.toml --metric loss --storage study.db --workers 4 \\
          --command "python train.py {lr} {layers} --optimizer={optimizer} --batch {batch_size} --width {width}"

    \b
    space.toml:
      lr = [1e-5, 1e-1, "log"]                    # a number, on the log scale
      layers = [1, 6]                             # a whole number, as both ends are; both are included
      optimizer = ["adam", "sgd"]                 # choices
      batch_size = { choices = [32, 64, 128] }    # choices that are numbers
      [width]                                     # a range by name
      low = 16
      high = 512
      log = true

    The command runs without a shell; each value stays within its one argument, and {{ }} stand for braces. The last line
    of JSON that it prints holds the metric: {"loss": 0.3, "accuracy": 0.9}. Its other numbers are kept too. A run that
    fails, prints no finite number or takes too long is a failed trial, kept with the reason; the search goes on. What
    the runs print is kept in files, one folder for each trial.

    At the end, the best configuration is printed as one line of JSON.
    """
    with one_line_errors(), stop_signals(), _one_line_warnings():
        try:
            result = optimize_command(
                command,
                read_space(space),
                metric,
                storage=storage,
                logs=logs,
                num_workers=workers,
                direction=direction,  # type: ignore[arg-type]  # checked there
                surrogate=surrogate,
                num_trials=trials,
                seed=seed,
                timeout_per_trial=timeout_per_trial,
                study_name=study_name,
                progress=True,
            )
        except KeyboardInterrupt:
            typer.echo(f"interrupted: the same command line goes on from {storage}", err=True)
            raise typer.Exit(130) from None
        except RuntimeError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error
    typer.echo(json.dumps({"value": result.value, "x": result.x, "trial": result.study.best_trial.number}))


@contextmanager
def stop_signals() -> Iterator[None]:
    """A scheduler's SIGTERM and a closed terminal's SIGHUP stop as Ctrl-C does, unless somebody ignores them (nohup)."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Warnings without the place in the code that gives them."""

    def show(message: Warning | str, *_: Any) -> None:
        typer.echo(f"warning: {message}", err=True)

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield


def report(
    storage: Annotated[str, typer.Argument(help="SQLite file of the study, or a database URL.")],
    study_name: Annotated[str | None, typer.Option(help="If the storage has several.")] = None,
    output: Annotated[Path, typer.Option(help="HTML file.")] = Path("report.html"),
) -> None:
    """Write a page about a study: its trials, convergence, importances, and what a surrogate has learned."""
    with one_line_errors():
        output.write_text(study_page(load_study(storage, study_name)), encoding="utf-8")
    typer.echo(f"report: {output}")


def dashboard(
    storage: Annotated[str, typer.Argument(help="SQLite file of studies, or a database URL.")],
    port: Annotated[int, typer.Option(help="Where it listens, on this machine only.")] = 8080,
) -> None:
    """Look at the studies of a file in a browser, while they run (needs the extra "dashboard")."""
    with one_line_errors():
        if "://" not in storage and not Path(storage).is_file():
            raise ValueError(f"storage {storage!r} is no file")
        opened = open_storage(storage)
        try:
            from optuna_dashboard import run_server
        except ImportError:
            raise ValueError('the dashboard isn\'t installed: pip install "bayesnn[dashboard]"') from None
        typer.echo(f"http://127.0.0.1:{port}/ (Ctrl-C ends it)")
        run_server(opened, host="127.0.0.1", port=port)
