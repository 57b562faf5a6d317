"""Optimisation of what a command prints, with several runs of it at once, resumable."""

from __future__ import annotations

import math
import sys
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from urllib.parse import quote

import optuna
from optuna.study import Study
from optuna.trial import TrialState
from tqdm.auto import tqdm

from bayesnn.bo.chain import Surrogate
from bayesnn.bo.command import Command, Outcome, Runner
from bayesnn.bo.minimize import startup_for
from bayesnn.bo.outcomes import Direction
from bayesnn.bo.result import Result, is_evaluation, result_of
from bayesnn.bo.sampler import SurrogateSampler
from bayesnn.bo.space import Space
from bayesnn.bo.storage import HEARTBEAT_SECONDS, begin, release_own, requeue_orphans
from bayesnn.bo.study import configuration_of, num_begun, open_study, quiet_optuna


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
    sampler = SurrogateSampler(surrogate, space=space, seed=seed, num_startup=startup_for(num_trials))
    with quiet_optuna():
        study = open_study(direction, space, sampler, storage, study_name)
        if study.metric_names not in (None, [metric]):
            raise ValueError(
                f"the stored study {study_name!r} is about {study.metric_names[0]!r}, not {metric!r}: give another study_name"
            )
        study.set_metric_names([metric])
        wanted = int(min(num_trials, space.size))
        with tqdm(total=wanted, initial=_num_done(study), disable=not progress, unit="trial") as bar:
            _run_trials(study, runner, space, folder, wanted, num_workers, bar)
        return result_of(study, space, sampler)


def _run_trials(
    study: Study, runner: Runner, space: Space, folder: Path, wanted: int, num_workers: int, bar: tqdm
) -> None:
    """Run until the study has as many evaluations as wanted, those that other processes are at included."""
    release_own(study)
    running: dict[Future[Outcome], optuna.Trial] = {}
    with ThreadPoolExecutor(num_workers) as pool:
        try:
            while True:
                requeue_orphans(study)
                while len(running) < num_workers and num_begun(study) < wanted:
                    trial = begin(study)
                    place = folder / f"{quote(study.study_name, safe=' ')}-{trial.number:04d}"
                    running[pool.submit(runner.run, configuration_of(trial, space), place)] = trial
                if not running:
                    return
                finished, _ = wait(running, timeout=HEARTBEAT_SECONDS, return_when=FIRST_COMPLETED)
                for future in finished:
                    _tell(study, running.pop(future), future.result(), bar)
                for trial in running.values():
                    study._storage.record_heartbeat(trial._trial_id)  # type: ignore[attr-defined]
        except BaseException:
            runner.stop()
            release_own(study)
            raise


def _tell(study: Study, trial: optuna.Trial, outcome: Outcome, bar: tqdm) -> None:
    trial.set_user_attr("seconds", outcome.seconds)
    for name, number in outcome.others.items():
        if name.isprintable():  # what isn't, a database may refuse
            trial.set_user_attr(f"metric:{name[:200]}", number)
    if outcome.failure is None:
        study.tell(trial, outcome.value, skip_if_finished=True)
        bar.set_postfix(best=f"{study.best_value:.6g}")
    else:
        trial.set_user_attr("failure", outcome.failure)
        study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        if not bar.disable:
            bar.write(f"trial {trial.number} failed: {outcome.failure}", file=sys.stderr)
    bar.update()


def _num_done(study: Study) -> int:
    return sum(is_evaluation(trial) for trial in study.get_trials(deepcopy=False))
