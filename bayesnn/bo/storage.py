"""Where a study is kept: in memory, in one SQLite file, or in a database behind a URL."""

from __future__ import annotations

import re
import sqlite3
import time
import warnings
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from optuna.exceptions import ExperimentalWarning, OptunaError
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage
from optuna.study import Study
from optuna.trial import FrozenTrial
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError, SQLAlchemyError

from bayesnn.bo import recovery
from bayesnn.bo.file_systems import network_file_system
from bayesnn.bo.writing import engine_of
from bayesnn.data import BayesnnWarning

_SQLITE_HEADER = b"SQLite format 3\x00"


def open_storage(storage: str | Path | BaseStorage | None) -> BaseStorage:
    """Open what keeps a study.

    An SQLite file is written ahead (journal mode WAL), so that a trial doesn't wait for the disk some twenty times. Beside
    ``study.db`` there are ``study.db-wal`` and ``study.db-shm`` as long as it is open. On a file system that other machines
    see, where that mode isn't safe, the slow one is kept, with a warning.

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
    options = _sqlite_options(url) if url.startswith("sqlite") else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return _opened(url, options)
    except (SQLAlchemyError, OptunaError, ImportError, RuntimeError) as error:
        hint = '; its driver comes with pip install "bayesnn[postgresql]"' if _lacks_driver(url, error) else ""
        raise ValueError(f"storage {str(storage)!r} can't be used as a database of studies: {error}{hint}") from error


def _lacks_driver(url: str, error: Exception) -> bool:
    return url.startswith("postgresql") and isinstance(error, ImportError)


def _opened(url: str, options: dict[str, Any]) -> RDBStorage:
    """The storage; where another process is making the same tables at the same moment, once it has made them."""
    for _ in range(10):
        try:
            return _connected(url, options)
        except (IntegrityError, OperationalError, ProgrammingError) as error:
            if not re.search("already exists|UNIQUE constraint|duplicate key", str(error)):
                raise
            time.sleep(0.5)
    return _connected(url, options)


def _connected(url: str, options: dict[str, Any]) -> RDBStorage:
    return RDBStorage(
        url,
        engine_kwargs=options,
        heartbeat_interval=recovery.HEARTBEAT_SECONDS,
        grace_period=recovery.GRACE_SECONDS,
        heartbeat_stale_trial_callback=_requeue,
    )


def _requeue(study: Study, trial: FrozenTrial) -> None:
    recovery.requeue(study, trial)


class _WrittenAhead(sqlite3.Connection):
    """Doesn't wait for the disk at each write: a process that is killed loses nothing, and :func:`put_on_disk` waits."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Where another process is at the file in the old mode, that one stays.
        with suppress(sqlite3.OperationalError):
            (mode,) = self.execute("PRAGMA journal_mode=WAL").fetchone()
            if mode == "wal":
                self.execute("PRAGMA synchronous=NORMAL")


def _sqlite_options(url: str) -> dict[str, Any]:
    # Two processes on one file wait for each other instead of failing at once.
    options: dict[str, Any] = {"timeout": 60}
    place = make_url(url).database
    kind = network_file_system(Path(place).resolve()) if place else None
    if kind is None:
        options["factory"] = _WrittenAhead
    else:
        warnings.warn(
            f"storage {place!r} lies on a network file system ({kind}), where SQLite is slow and can't keep processes apart, "
            "so that a study that several share may be damaged: put the file on a local disk, or give the URL of a database "
            "server, postgresql+psycopg://…",
            BayesnnWarning,
            stacklevel=3,
        )
    return {"connect_args": options}


def put_on_disk(storage: BaseStorage) -> None:
    """Wait until all that was written to an SQLite file is in that file, and on the disk; other databases see to it."""
    engine = engine_of(storage)
    if engine is None or engine.dialect.name != "sqlite":
        return
    with suppress(SQLAlchemyError), engine.connect() as connection:  # where somebody is reading, the next one does it
        connection.execute(text("PRAGMA wal_checkpoint(PASSIVE)"))


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
