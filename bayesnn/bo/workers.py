"""Optimisation of what a command prints, with several runs of it at once, resumable."""

from __future__ import annotations

import math
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

from optuna.trial import Trial

from bayesnn.bo.attempt import Attempt
from bayesnn.bo.command import Command, Runner
from bayesnn.bo.fitters import Surrogate
from bayesnn.bo.goals import Goals
from bayesnn.bo.loop import run_trials
from bayesnn.bo.minimize import startup_for
from bayesnn.bo.outcomes import Direction
from bayesnn.bo.result import Result, result_of
from bayesnn.bo.sampler import SurrogateSampler
from bayesnn.bo.space import Configuration, Space
from bayesnn.bo.study import open_study, quiet_optuna


def optimize_command(
    command: str,
    space: Space,
    metric: str,
    *,
    storage: str | Path,
    logs: Path | None = None,
    num_workers: int = 1,
    direction: Direction = "minimize",
    surrogate: Surrogate = "nngp",
    num_trials: int = 30,
    seed: int = 0,
    timeout_per_trial: float | None = None,
    study_name: str = "bayesnn",
    progress: bool = False,
) -> Result:
    """Look for the configuration for which a command prints the best value.

    The value is the entry ``metric`` of the last line of JSON on the command's standard output, as in
    ``{"loss": 0.3, "accuracy": 0.9}``; its other numbers are kept with the trial as ``metric:accuracy``. A run without
    such a number, with an exit code other than 0 or beyond its time fails, which is kept with the reason, and counts as a
    trial; the others go on. Suggestions are made here, where the runs under way are known.

    Interrupted or killed, the same call goes on: it runs the trials that were cut off once more (each at most three times
    more) and what is missing. An interrupt kills the commands that are running; a parent that is killed can't, and they
    run to their end unheard.

    Args:
        command: the command line, with a place ``{name}`` for each parameter, see :class:`Command`.
        space: the search space.
        metric: the entry to optimise.
        storage: a path for one SQLite file, or a database URL.
        logs: folder in which each trial's output is kept; by default beside the SQLite file, ``study.logs``.
        num_workers: how many runs at once.
        direction: "minimize" or "maximize".
        surrogate, num_trials, seed, study_name, progress: as in :func:`minimize`.
        timeout_per_trial: seconds after which a run is killed, with all that it has started.

    Returns:
        The result.

    Raises:
        TypeError, ValueError: for arguments that make no sense, before anything is run.
        RuntimeError: if no run succeeded.
        KeyboardInterrupt: when interrupted, after the commands have been killed.
    """
    if direction not in ("minimize", "maximize"):
        raise ValueError(f"direction must be minimize or maximize, found {direction!r}")
    if not metric:
        raise ValueError("metric must name an entry of the JSON line, found nothing")
    for name, count in (("num_workers", num_workers), ("num_trials", num_trials)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, found {count}")
    if timeout_per_trial is not None and not 0 < timeout_per_trial < math.inf:
        raise ValueError(f"timeout_per_trial must be a positive number of seconds, found {timeout_per_trial}")
    if logs is None and "://" in str(storage):
        raise ValueError(f"logs must be given, since storage {str(storage)!r} is no file that it could lie beside")
    folder = Path(storage).with_suffix(".logs") if logs is None else logs
    runner = Runner(Command(command, space), metric, timeout_per_trial)
    goals = Goals.of(direction, {metric: direction})
    sampler = SurrogateSampler(surrogate, space=space, seed=seed, num_startup=startup_for(num_trials))
    with quiet_optuna():
        study = open_study(goals, space, sampler, storage, study_name)
        workers = _Commands(runner, num_workers, folder, study.study_name)
        run_trials(study, space, goals, workers, num_trials, progress=progress)
        return result_of(study, space, sampler, goals)


class _Commands:
    """Runs commands, several at once, each with a folder for its output."""

    def __init__(self, runner: Runner, num_workers: int, folder: Path, study_name: str) -> None:
        self.runner, self.num_workers, self.folder, self.study_name = runner, num_workers, folder, study_name
        self._threads = ThreadPoolExecutor(num_workers)

    def start(self) -> None:
        """Nothing to do."""

    def submit(self, x: Configuration, trial: Trial) -> Future[Attempt]:
        """Run the command for a configuration."""
        return self._threads.submit(
            self.runner.run, x, self.folder / f"{quote(self.study_name, safe=' ')}-{trial.number:04d}"
        )

    def died(self, error: BaseException) -> bool:
        """Never: a command that dies is a failed evaluation."""
        return False

    def shared_fate(self, error: BaseException) -> bool:
        """Never."""
        return False

    def stop(self) -> None:
        """Kill the commands that are running."""
        self.runner.stop()

    def close(self) -> None:
        """Wait for the threads."""
        self._threads.shutdown()
