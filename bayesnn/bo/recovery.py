"""Trials that were cut off: whose process runs which, which are orphans, and how they are queued again."""

from __future__ import annotations

import os
import socket
import uuid
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Event, Thread
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, OptunaError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

HEARTBEAT_SECONDS, GRACE_SECONDS = 60, 180
MAX_RETRIES = 3

_PROCESS = uuid.uuid4().hex  # a later process may have this one's number, as in containers


def signature() -> dict[str, Any]:
    """Which process this is."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "id": _PROCESS}


def begin(study: Study, trials: Sequence[FrozenTrial] | None = None) -> optuna.Trial:
    """The next trial, running and signed: a process killed while it suggests leaves an orphan that is found.

    What is queued comes first. Parameters are suggested when they are asked for.

    Args:
        study: the study.
        trials: its trials, if somebody has just read them.
    """
    trial_id = _begun(study, study.get_trials(deepcopy=False) if trials is None else trials)
    if _has_heartbeats(study._storage):
        study._storage.record_heartbeat(trial_id)  # type: ignore[attr-defined]
    return optuna.Trial(study, trial_id)


def _begun(study: Study, trials: Sequence[FrozenTrial]) -> int:
    storage = study._storage
    for queued in (trial for trial in trials if trial.state is TrialState.WAITING):
        storage.set_trial_user_attr(queued._trial_id, "process", signature())
        with suppress(UpdateFinishedTrialError):
            if storage.set_trial_state_values(queued._trial_id, state=TrialState.RUNNING):  # nobody was faster
                storage.set_trial_user_attr(
                    queued._trial_id, "process", signature()
                )  # in case somebody signed in between
                return queued._trial_id
    template = optuna.create_trial(state=TrialState.RUNNING, user_attrs={"process": signature()})
    return storage.create_new_trial(study._study_id, template)


@contextmanager
def heartbeats(storage: BaseStorage, trial_ids: Collection[int]) -> Iterator[None]:
    """While this lasts, tell the storage again and again that these trials are being run; they may change meanwhile."""
    if not _has_heartbeats(storage):
        yield
        return
    ended = Event()

    def beat() -> None:
        while not ended.wait(HEARTBEAT_SECONDS):
            for trial_id in list(trial_ids):
                with suppress(OptunaError, SQLAlchemyError, KeyError):  # a database that is away may come back
                    storage.record_heartbeat(trial_id)  # type: ignore[attr-defined]

    thread = Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _has_heartbeats(storage: BaseStorage) -> bool:
    return getattr(storage, "get_heartbeat_interval", lambda: None)() is not None


def requeue_orphans(study: Study) -> int:
    """Fail the running trials whose process is gone, and queue their configurations again; says how many there were.

    A process on this machine is looked up; one on another machine counts as gone when its heartbeat has stopped.
    """
    before = _running(study)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)
    for trial in before:
        if _is_orphan(trial):
            release(study, trial._trial_id)
    still = {trial.number for trial in _running(study)}
    return sum(trial.number not in still for trial in before)


def _running(study: Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=[TrialState.RUNNING])


def release(study: Study, trial_id: int) -> bool:
    """Fail a trial that was cut off, and queue its configuration again; says whether that was done."""
    trial = study._storage.get_trial(trial_id)
    if trial.state is not TrialState.RUNNING:
        return False
    try:
        study._storage.set_trial_state_values(trial_id, state=TrialState.FAIL)
    except UpdateFinishedTrialError:  # another process was faster
        return False
    return requeue(study, trial)


def requeue(study: Study, trial: FrozenTrial) -> bool:
    """Queue a trial's configuration again, unless it had failed by itself or that has been done often enough."""
    if "failure" in trial.user_attrs or num_retries(trial) >= MAX_RETRIES:
        return False
    history = [*trial.system_attrs.get("retry_history", []), trial.number]
    # It is judged again at each rung; Hyperband may even have other rungs for it.
    kept = {name: value for name, value in trial.system_attrs.items() if not name.startswith("completed_rung")}
    study.add_trial(
        optuna.create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            # Not the process: until the new one signs, the trial would look like an orphan.
            user_attrs={name: value for name, value in trial.user_attrs.items() if name not in ("process", "seconds")},
            system_attrs=kept | {"failed_trial": history[0], "retry_history": history},
        )
    )
    return True


def num_retries(trial: FrozenTrial) -> int:
    """How often a trial's configuration had been cut off before."""
    return len(trial.system_attrs.get("retry_history", []))


def _is_orphan(trial: FrozenTrial) -> bool:
    process = trial.user_attrs.get("process")
    if process is None or process["host"] != socket.gethostname() or os.name != "posix":
        return False  # elsewhere, only the heartbeat tells
    if process["pid"] == os.getpid():
        return process.get("id") != _PROCESS
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # somebody else's process: it is there
        return False
    return False
