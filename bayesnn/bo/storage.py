"""Where a study is kept: in memory, in one SQLite file, or in a database behind a URL."""

from __future__ import annotations

import os
import socket
import sqlite3
import time
import warnings
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, OptunaError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import IntegrityError, ProgrammingError, SQLAlchemyError

from bayesnn.bo.file_systems import network_file_system
from bayesnn.data import BayesnnWarning

HEARTBEAT_SECONDS, GRACE_SECONDS = 60, 180
MAX_RETRIES = 3
MAX_TRIES = 30  # to open a database that others may be making

_SQLITE_HEADER = b"SQLite format 3\x00"


def open_storage(storage: str | Path | BaseStorage | None) -> BaseStorage:
    """Open what keeps a study.

    Args:
        storage: None for memory; a path for one SQLite file, made if there is none; a database URL
            (``postgresql+psycopg://…``, with the extra ``postgresql``); or an Optuna storage.

    Several processes may open, and make, the same one at once. A file on a network file system is warned of.

    Raises:
        ValueError: if it can't be opened, or isn't a database of studies.
    """
    if storage is None:
        return InMemoryStorage()
    if isinstance(storage, BaseStorage):
        return storage
    if not isinstance(storage, (str, Path)) or not str(storage):
        raise TypeError(f"storage must be a path, a database URL or an Optuna storage, found {storage!r}")
    url = str(storage)
    if "://" not in url:
        path = Path(url).expanduser().resolve()
        _check_file(path)
        url = f"sqlite:///{path}"
    _warn_of_network(url)
    try:
        return _open_url(url)
    except (SQLAlchemyError, OptunaError, ImportError, RuntimeError) as error:
        hint = '; its driver comes with pip install "bayesnn[postgresql]"' if _lacks_driver(url, error) else ""
        raise ValueError(f"storage {str(storage)!r} can't be used as a database of studies: {error}{hint}") from error


def _warn_of_network(url: str) -> None:
    if not url.startswith("sqlite:///"):
        return
    path = Path(url.removeprefix("sqlite:///")).resolve()
    kind = network_file_system(path)
    if kind is not None:
        warnings.warn(
            f"storage {str(path)!r} lies on a network file system ({kind}), where SQLite can't keep processes apart and a "
            "study that several share may be damaged: put the file on a local disk, or give the URL of a database server, "
            "postgresql+psycopg://…",
            BayesnnWarning,
            stacklevel=3,
        )


def _open_url(url: str) -> RDBStorage:
    # Two processes on one file wait for each other instead of failing at once.
    options: dict[str, Any] = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    tries = 0
    while True:
        tries += 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                return RDBStorage(
                    url,
                    engine_kwargs=options,
                    heartbeat_interval=HEARTBEAT_SECONDS,
                    grace_period=GRACE_SECONDS,
                    heartbeat_stale_trial_callback=requeue,
                )
        except SQLAlchemyError as error:
            if tries == MAX_TRIES or not _may_be_in_the_making(error):
                raise
            time.sleep(0.1)


def _may_be_in_the_making(error: SQLAlchemyError) -> bool:
    """Whether another process may be making the same tables at this moment: Optuna doesn't expect that."""
    return isinstance(error, IntegrityError | ProgrammingError) or "already exists" in str(error)


def _lacks_driver(url: str, error: Exception) -> bool:
    return url.startswith("postgresql") and isinstance(error, ImportError)


def _check_file(path: Path) -> None:
    if not path.parent.is_dir():
        raise ValueError(f"storage {str(path)!r} can't be made: there is no folder {str(path.parent)!r}")
    if not path.exists():
        return
    if not path.is_file():
        raise ValueError(f"storage {str(path)!r} must be a file, found a folder or something else")
    with path.open("rb") as file:
        header = file.read(len(_SQLITE_HEADER))
    if header and header != _SQLITE_HEADER:
        raise ValueError(f"storage {str(path)!r} isn't an SQLite database; give the name of a new file")
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=60)) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.DatabaseError as error:
        raise ValueError(f"storage {str(path)!r} is a damaged database: {error}") from error
    if tables and "studies" not in tables:
        raise ValueError(f"storage {str(path)!r} is a database of something else, with the tables {sorted(tables)}")


# Trials that were cut off -----------------------------------------------------------------------------------------------


def sign(trial: optuna.Trial) -> None:
    """Write into a trial which process runs it."""
    trial.set_user_attr("process", _signature())


def _signature() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


def begin(study: Study) -> optuna.Trial:
    """Ask for the next trial, signed before it runs: a process killed while it suggests leaves an orphan that is found."""
    waiting = [TrialState.WAITING]
    if not study.get_trials(deepcopy=False, states=waiting):
        study.add_trial(optuna.create_trial(state=TrialState.WAITING))
    for queued in study.get_trials(deepcopy=False, states=waiting):
        study._storage.set_trial_user_attr(queued._trial_id, "process", _signature())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Heartbeat of storage")
        trial = study.ask()
    sign(trial)  # once more, in case another process signed it in between
    return trial


def release_own(study: Study) -> None:
    """Release every running trial that bears this process's signature.

    At the start of a process that is what a killed one with the same number has left behind, as containers have it.
    """
    for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        if trial.user_attrs.get("process") == _signature():
            release(study, trial.number)


def requeue_orphans(study: Study) -> None:
    """Fail the running trials whose process is gone, and queue their configurations again.

    A process on this machine is looked up; one on another machine counts as gone when its heartbeat has stopped.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)
    for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        if _is_orphan(trial):
            release(study, trial.number)


def release(study: Study, number: int) -> None:
    """Fail a trial that was cut off, and queue its configuration again."""
    trial = study.trials[number]
    if trial.state is TrialState.RUNNING:
        try:
            study._storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL)
        except UpdateFinishedTrialError:  # another process was faster
            return
    elif trial.state is not TrialState.FAIL:
        return
    requeue(study, trial)


def requeue(study: Study, trial: FrozenTrial) -> None:
    """Queue a trial's configuration again, unless it had failed by itself or that has been done often enough."""
    if "failure" in trial.user_attrs or num_retries(trial) >= MAX_RETRIES:
        return
    history = [*trial.system_attrs.get("retry_history", []), trial.number]
    study.add_trial(
        optuna.create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            # Not the process: until the new one signs, the trial would look like an orphan.
            user_attrs={name: value for name, value in trial.user_attrs.items() if name not in ("process", "seconds")},
            system_attrs=trial.system_attrs | {"failed_trial": history[0], "retry_history": history},
        )
    )


def num_retries(trial: FrozenTrial) -> int:
    """How often a trial's configuration had been cut off before."""
    return len(trial.system_attrs.get("retry_history", []))


def _is_orphan(trial: FrozenTrial) -> bool:
    process = trial.user_attrs.get("process")
    if process is None or process["host"] != socket.gethostname() or os.name != "posix":
        return False  # elsewhere, only the heartbeat tells
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # somebody else's process: it is there
        return False
    return False
