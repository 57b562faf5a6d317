"""The loop of every optimisation: suggest, evaluate somewhere, tell; as many at once as there are workers."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from typing import Any, Protocol

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from tqdm.auto import tqdm

from bayesnn.bo.attempt import Attempt
from bayesnn.bo.evaluations import failure_of, is_evaluation
from bayesnn.bo.goals import Goals
from bayesnn.bo.recovery import MAX_RETRIES, begin, heartbeats, release, requeue_orphans
from bayesnn.bo.space import Configuration, Space
from bayesnn.bo.storage import put_on_disk
from bayesnn.bo.study import configuration_of, num_begun
from bayesnn.bo.writing import write
from bayesnn.data import BayesnnWarning

Callback = Callable[[Study, FrozenTrial], None]

PATIENCE_SECONDS = 60.0  # after which the loop looks for orphans of other processes, while it waits
DISK_SECONDS = 1.0  # at most so often, results wait for the disk
MAX_DEATHS = 2 * (MAX_RETRIES + 1)  # for each worker, before any evaluation has come to an end


class Workers(Protocol):
    """Where evaluations happen."""

    num_workers: int

    def start(self) -> None:
        """Get ready, and raise an error if an evaluation couldn't even begin."""

    def submit(self, x: Configuration, trial: optuna.Trial) -> Future[Attempt]:
        """Evaluate a trial's configuration."""

    def died(self, error: BaseException) -> bool:
        """Whether a future's exception means that the worker died, so that the trial is to be tried again."""

    def shared_fate(self, error: BaseException) -> bool:
        """Whether such a death took all other evaluations with it, so that nobody knows whose fault it was."""

    def stop(self) -> None:
        """End what is running, if that can be done, and begin nothing else."""

    def close(self) -> None:
        """Let go of what was made for the evaluations, when all have ended."""


def run_trials(
    study: Study,
    space: Space,
    goals: Goals,
    workers: Workers,
    num_trials: int,
    *,
    progress: bool = False,
    timeout: float | None = None,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Evaluate until the study has ``num_trials`` evaluations, those that other processes are at included.

    What a process that is gone has left behind is run again first.

    Raises:
        KeyboardInterrupt: after what was running has been released: it will be run again.
        RuntimeError: if workers die again and again, or can't do their work.
    """
    wanted = int(min(num_trials, space.size))
    if wanted < num_trials:
        message = f"the space has only {wanted} configurations: there will be no {num_trials} trials"
        warnings.warn(message, BayesnnWarning, stacklevel=4)
    requeue_orphans(study)
    done = sum(is_evaluation(trial) for trial in study.get_trials(deepcopy=False))
    with tqdm(total=wanted, initial=done, disable=not progress, unit="trial") as bar:
        loop = _Loop(study, space, goals, workers, wanted, bar, callbacks)
        try:
            loop.run(None if timeout is None else time.monotonic() + timeout)
        finally:
            put_on_disk(study._storage)


class _Loop:
    """What is under way, and what becomes of it."""

    def __init__(
        self,
        study: Study,
        space: Space,
        goals: Goals,
        workers: Workers,
        wanted: int,
        bar: tqdm,
        callbacks: Sequence[Callback],
    ) -> None:
        self.study, self.space, self.goals, self.workers = study, space, goals, workers
        self.wanted, self.bar, self.callbacks = wanted, bar, callbacks
        self.begun: dict[int, optuna.Trial] = {}  # by id, also while they are being suggested
        self.running: dict[Future[Attempt], optuna.Trial] = {}
        self.suspects = 0  # trials to be tried again, each alone, because one of them kills its worker
        self.alone: set[int] = set()  # ids of those that are
        self.deaths, self.proven = 0, False  # of workers; whether any evaluation has come to an end
        self.on_disk = time.monotonic()

    def run(self, deadline: float | None) -> None:
        """Until there is nothing left to do, or no time."""
        self._accept_stop(True)
        try:
            with heartbeats(self.study._storage, self.begun):
                if num_begun(self.study.get_trials(deepcopy=False)) < self.wanted:
                    self.workers.start()
                while self._fill(deadline) or self.running or requeue_orphans(self.study):
                    finished, _ = wait(self.running, timeout=PATIENCE_SECONDS, return_when=FIRST_COMPLETED)
                    if self.running and not finished:
                        requeue_orphans(self.study)
                    for future in finished:
                        self._take(self.running.pop(future), future)
        except BaseException:
            self._keep_what_is_done()
            self.workers.stop()
            for trial_id in list(self.begun):
                release(self.study, trial_id)
            raise
        finally:
            self._accept_stop(False)
            self.workers.close()

    def _keep_what_is_done(self) -> None:
        """Tell what had ended when the loop was interrupted, whatever callbacks or other trials do."""
        for future, trial in self.running.items():
            if future.done() and not future.cancelled() and future.exception() is None:
                with suppress(Exception):
                    self._tell(trial, future.result())

    def _fill(self, deadline: float | None) -> bool:
        """Begin evaluations while there are workers for them; says whether any was begun."""
        room = 1 if self.suspects else self.workers.num_workers
        begun = False
        # What has finished is told first, so that the next suggestion knows of it.
        while len(self.running) < room and not any(map(Future.done, self.running)) and self._on_time(deadline):
            trials = self.study.get_trials(deepcopy=False)
            if num_begun(trials) >= self.wanted:
                break
            trial = begin(self.study, trials)
            self.begun[trial._trial_id] = trial
            if self.suspects:
                self.alone.add(trial._trial_id)
            x = configuration_of(trial, self.space)
            self.running[self.workers.submit(x, trial)] = trial
            begun = True
        return begun

    def _on_time(self, deadline: float | None) -> bool:
        """Whether evaluations may still begin."""
        return not self.study._stop_flag and (deadline is None or time.monotonic() < deadline)

    def _take(self, trial: optuna.Trial, future: Future[Attempt]) -> None:
        """What became of an evaluation."""
        if future.cancelled():
            raise RuntimeError(f"the executor has cancelled the evaluation of trial {trial.number}")
        error = future.exception()
        if error is None:
            self.proven = True
            self.suspects -= trial._trial_id in self.alone
            self._tell(trial, future.result())
        elif self.workers.died(error):
            self._mourn(trial, error)
        elif isinstance(error, KeyboardInterrupt):  # a terminal's Ctrl-C reaches workers too
            raise error
        else:
            raise RuntimeError(f"an evaluation couldn't be run: {type(error).__name__}: {error}") from error

    def _tell(self, trial: optuna.Trial, attempt: Attempt) -> None:
        limited = {name: attempt.numbers[name] for name in self.goals.limits} if attempt.numbers else {}
        record: dict[str, Any] = {"seconds": attempt.seconds} | {
            f"metric:{name[:200]}": number
            for name, number in (limited | (attempt.others or {})).items()
            if name.isprintable()  # what isn't, a database may refuse
        }
        if attempt.failure is not None:
            record["failure"] = attempt.failure
        with suppress(UpdateFinishedTrialError):  # somebody took this process for dead, and queued the trial again
            write(self.study._storage, trial._trial_id, record)
            for name, excess in self.goals.excesses(attempt.numbers).items() if attempt.numbers else ():
                trial.set_constraint(name, excess)
        if attempt.numbers is None:
            told = self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        else:
            ended = (
                {"state": TrialState.PRUNED} if attempt.ended_early else {"values": self.goals.values(attempt.numbers)}
            )
            told = self.study.tell(trial, **ended, skip_if_finished=True)
        del self.begun[trial._trial_id]
        if time.monotonic() - self.on_disk > DISK_SECONDS:
            put_on_disk(self.study._storage)
            self.on_disk = time.monotonic()
        self._announce(told, attempt.failure)
        if attempt.error is not None:
            raise attempt.error

    def _mourn(self, trial: optuna.Trial, error: BaseException) -> None:
        """A worker died: its trial is tried again, alone where others died with it, so that the next death tells."""
        again = release(self.study, trial._trial_id)
        del self.begun[trial._trial_id]
        self.deaths += 1
        if trial._trial_id in self.alone:
            self.suspects -= not again
        elif self.workers.shared_fate(error):
            self.suspects += again
        if not self.proven and self.deaths >= MAX_DEATHS * self.workers.num_workers:
            raise RuntimeError(
                f"{self.deaths} workers died, one after the other, and no evaluation has come to an end; the last one: "
                f"{type(error).__name__}: {error}"
            ) from error
        told = self.study._storage.get_trial(trial._trial_id)
        if failure_of(told) is not None:  # it won't be tried again
            self._announce(told, failure_of(told))

    def _announce(self, trial: FrozenTrial, failure: str | None) -> None:
        """An evaluation has come to an end: to the progress bar and the callbacks."""
        self.bar.update()
        if not self.bar.disable:
            self._show(trial, failure)
        for callback in self.callbacks:
            callback(self.study, trial)

    def _show(self, trial: FrozenTrial, failure: str | None) -> None:
        if failure is not None:
            self.bar.write(f"trial {trial.number} failed: {failure}", file=sys.stderr)
        best = self.study.best_trials
        if len(self.study.directions) > 1:
            self.bar.set_postfix(front=len(best))
        elif best:
            self.bar.set_postfix(best=f"{best[0].value:.6g}")

    def _accept_stop(self, accept: bool) -> None:
        """Whether callbacks may call ``study.stop()``, as in Optuna's own loop."""
        self.study._thread_local.in_optimize_loop = accept
        self.study._stop_flag = False
