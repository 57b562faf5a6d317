"""Settings of the whole process that several threads may need at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType


class ProcessWide:
    """A context on a setting of the whole process: entered by the first of several threads, left by the last.

    Without it, the thread that leaves first would restore the setting under the others, or the last one restore what
    another had set.

    Args:
        context: makes a context manager that changes the setting and restores it.
    """

    def __init__(self, context: Callable[[], AbstractContextManager[None]]) -> None:
        self._context, self._lock, self._num_users = context, threading.Lock(), 0
        self._current: AbstractContextManager[None] | None = None

    def __enter__(self) -> None:
        with self._lock:
            if self._current is None:
                current = self._context()
                current.__enter__()
                self._current = current
            self._num_users += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            self._num_users -= 1
            if self._num_users == 0 and self._current is not None:
                current, self._current = self._current, None
                current.__exit__(None, None, None)
