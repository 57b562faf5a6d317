"""Evaluations in processes of their own, which can be killed: for time limits, and for several at once."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from joblib.externals.loky import ProcessPoolExecutor
from joblib.externals.loky.process_executor import ShutdownExecutorError
from optuna.trial import Trial

from bayesnn.bo.attempt import Attempt, Call, Returned, call_once
from bayesnn.bo.fidelity import Fidelity
from bayesnn.bo.follow import follow
from bayesnn.bo.space import Configuration

Curve = Generator[Any, None, None]


class Child:
    """One process, which does one call after the other; it is begun when it is needed, and again after it was killed.

    Nothing has to be importable there but what the function itself imports, not even this library: loky sends functions of
    scripts and notebooks by value. The process ends with its parent, however that ends.
    """

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._lock, self._stopped = threading.Lock(), False

    def start(self, call: Call) -> None:
        """Begin the process, and see whether the function gets there.

        Raises:
            TypeError: if it doesn't.
        """
        try:
            self._ready().submit(_ARRIVES, call.f, call.catch).result()
        except Exception as error:
            self.kill()
            raise unsendable(error) from error

    def __call__(
        self, call: Call, x: Configuration, seconds: float | None, follow: Callable[[Curve], Any] | None = None
    ) -> Attempt:
        """Call the function there; a call that takes longer than so many seconds is killed, and has failed.

        Args:
            call: the function.
            x: its argument.
            seconds: None: no limit.
            follow: what a function that yields has returned, from its values as they come.

        Raises:
            BrokenExecutor: if the process dies.
        """
        pool, start = self._ready(), time.perf_counter()
        try:
            # What it takes to begin a process isn't the function's time.
            pool.submit(_ARRIVES, call.f, call.catch).result()
            start = time.perf_counter()

            def ask(f: Any) -> Returned:
                left = None if seconds is None else max(0.0, start + seconds - time.perf_counter())
                try:
                    return Returned(*pool.submit(call_once, f, x, call.catch, False).result(left))
                except (TimeoutError, BrokenExecutor, ShutdownExecutorError):
                    raise
                except Exception as error:
                    reason = f"what the objective returned can't be sent between processes: {_reason(error)}"
                    return Returned(None, time.perf_counter() - start, reason, None)

            if follow is None:
                found = ask(call.f)
            else:
                found = _followed(ask, call, follow)._replace(seconds=time.perf_counter() - start)
        except TimeoutError:
            self.kill()
            return Attempt(None, time.perf_counter() - start, f"it took longer than {seconds:g} seconds")
        except (BrokenExecutor, ShutdownExecutorError) as error:
            self.kill()
            raise BrokenExecutor(str(error)) from error
        return call.understand(found)

    def stop(self) -> None:
        """Kill the process, and begin no other."""
        with self._lock:
            self._stopped = True
        self.kill()

    def kill(self) -> None:
        """Kill the process with all that it has started."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True, kill_workers=True)

    def _ready(self) -> ProcessPoolExecutor:
        with self._lock:
            if self._stopped:
                raise BrokenExecutor("it was stopped")
            if self._pool is None:
                self._pool = ProcessPoolExecutor(1, initializer=_END_WITH, initargs=(os.getpid(),))
            return self._pool


class _StepFailedError(Exception):
    """A function that yields has failed on the way, over there."""

    def __init__(self, returned: Returned) -> None:
        super().__init__(returned.failure)
        self.returned = returned


def _followed(ask: Callable[[Any], Returned], call: Call, follow: Callable[[Curve], Any]) -> Returned:
    """What a function has returned that may yield, one question for each value."""
    first = ask(_BEGIN(call.f))
    if first.failure is not None:
        return first
    yields, value = first.value
    if not yields:
        return first._replace(value=value)

    def curve() -> Curve:
        try:
            while (drawn := ask(_DRAW)).failure is None and drawn.value:
                yield drawn.value[0]
        except GeneratorExit:
            closed = ask(_CLOSE)
            if closed.failure is not None:
                raise _StepFailedError(closed) from None
            raise
        if drawn.failure is not None:
            ask(_CLOSE)  # it may not know, where its value couldn't be sent
            raise _StepFailedError(drawn)

    try:
        return first._replace(value=follow(curve()))
    except _StepFailedError as error:
        return error.returned
    except (TimeoutError, BrokenExecutor, ShutdownExecutorError):
        raise
    except Exception as error:  # as a function that raises
        ends = None if isinstance(error, call.catch) else error
        return first._replace(value=None, failure=f"{type(error).__name__}: {error}", error=ends)


def unsendable(error: Exception) -> TypeError:
    """That the objective function doesn't get to where it is to be called."""
    return TypeError(f"f, or what it uses, can't be sent to another process: {_reason(error)}")


def _reason(error: Exception) -> str:
    """What went wrong over there: the last line of the traceback that was sent along, if there is one."""
    lines = [line for line in str(error.__cause__ or error).splitlines() if line.strip('" ')]
    return lines[-1][:2000] if lines else type(error).__name__


def _sent() -> tuple[Callable[..., None], Callable[[int], None]]:
    """Two functions, nested so that they travel by value."""

    def arrives(*values: Any) -> None:
        """Does nothing where the values have come to."""

    def end_with(parent: int) -> None:
        """End this process when its parent is gone, even if that couldn't say so."""
        import os
        import threading
        import time

        def watch() -> None:
            while os.getppid() == parent:
                time.sleep(1)
            os._exit(1)

        if os.name == "posix":
            threading.Thread(target=watch, daemon=True).start()

    return arrives, end_with


_ARRIVES, _END_WITH = _sent()


def _steps() -> tuple[Callable[[Any], Any], Callable[[Any], Any], Callable[[Any], Any]]:
    """Three functions for one that yields, which stays where it is between calls; nested so that they travel by value."""

    def kept() -> Any:
        import sys
        import types

        return sys.modules.setdefault("_bayesnn_curve", types.ModuleType("_bayesnn_curve"))

    def begin(f: Any) -> Any:
        def call(x: Any) -> tuple[bool, Any]:
            from collections.abc import Generator

            value = f(x)
            if not isinstance(value, Generator):
                return False, value
            kept().curve = value
            return True, None

        return call

    def draw(x: Any) -> tuple[Any, ...]:
        """One value, or nothing when there are no more."""
        for value in kept().curve:
            return (value,)
        return ()

    def close(x: Any) -> None:
        kept().curve.close()

    return begin, draw, close


_BEGIN, _DRAW, _CLOSE = _steps()


class Children:
    """Evaluates in processes of this machine, one for each worker.

    Args:
        call: the objective function.
        num_workers: how many at once.
        timeout: seconds after which an evaluation is killed.
        fidelity: of a function that yields.
    """

    def __init__(
        self, call: Call, num_workers: int, timeout: float | None = None, fidelity: Fidelity | None = None
    ) -> None:
        self.call, self.num_workers, self.timeout, self.fidelity = call, num_workers, timeout, fidelity
        self._children = [Child() for _ in range(num_workers)]
        self._idle: SimpleQueue[Child] = SimpleQueue()
        for child in self._children:
            self._idle.put(child)
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="evaluation")

    def start(self) -> None:
        """Begin the first process."""
        self._children[0].start(self.call)

    def submit(self, x: Configuration, trial: Trial) -> Future[Attempt]:
        """Evaluate a configuration."""
        return self._threads.submit(self._run, x, trial)

    def _run(self, x: Configuration, trial: Trial) -> Attempt:
        child, fidelity = self._idle.get(), self.fidelity
        following = None if fidelity is None else lambda curve: follow(curve, trial, fidelity, self.call.goals)
        try:
            return child(self.call, x, self.timeout, following)
        finally:
            self._idle.put(child)

    def died(self, error: BaseException) -> bool:
        """Whether the process died."""
        return isinstance(error, BrokenExecutor)

    def shared_fate(self, error: BaseException) -> bool:
        """Never: each process does one evaluation."""
        return False

    def stop(self) -> None:
        """Kill all processes."""
        for child in self._children:
            child.stop()

    def close(self) -> None:
        """End the processes."""
        for child in self._children:
            with suppress(Exception):
                child.stop()
        self._threads.shutdown()


_OWN = threading.local()


def call_in_child(call: Call, x: Configuration, seconds: float) -> Attempt:
    """Call the function in a child of this thread, for workers that can't kill an evaluation themselves."""
    return _own_child()(call, x, seconds)


def start_child(call: Call) -> None:
    """Begin this thread's child, and see whether the function gets there."""
    _own_child().start(call)


def _own_child() -> Child:
    if not hasattr(_OWN, "child"):
        _OWN.child = Child()
    child: Child = _OWN.child
    return child
