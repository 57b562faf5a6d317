"""Evaluations in this thread, or on executors: those of ``concurrent.futures``, Dask's, Ray's."""

from __future__ import annotations

from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from typing import Any

from optuna.trial import Trial

from bayesnn.bo.attempt import Attempt, Call
from bayesnn.bo.children import call_in_child, start_child, unsendable
from bayesnn.bo.fidelity import Fidelity
from bayesnn.bo.follow import followed
from bayesnn.bo.space import Configuration

# What Dask and Ray call it when a task's worker is gone (they may have tried several).
_DEATHS = {"KilledWorker", "WorkerCrashedError", "NodeDiedError", "OutOfMemoryError", "ActorDiedError"}


class Here:
    """Evaluates in this thread, one after the other.

    Args:
        call: the objective function.
        fidelity: of a function that yields.
    """

    num_workers = 1

    def __init__(self, call: Call, fidelity: Fidelity | None = None) -> None:
        self.call, self.fidelity = call, fidelity

    def start(self) -> None:
        """Nothing to do."""

    def submit(self, x: Configuration, trial: Trial) -> Future[Attempt]:
        """Evaluate a configuration before this returns."""
        call = self.call if self.fidelity is None else followed(self.call, trial, self.fidelity)
        future: Future[Attempt] = Future()
        future.set_result(call(x))
        return future

    def died(self, error: BaseException) -> bool:
        """Never: that would be this process."""
        return False

    def shared_fate(self, error: BaseException) -> bool:
        """Never."""
        return False

    def stop(self) -> None:
        """Nothing is running."""

    def close(self) -> None:
        """Nothing to do."""


class OnExecutor:
    """Evaluates on an executor, which stays open; one of processes that broke is replaced by another like it.

    Args:
        call: the objective function.
        executor: of ``concurrent.futures``, or a Dask client.
        num_workers: how many evaluations at once; None: as many as it has workers.
        timeout: seconds after which an evaluation is killed, in a process that its worker begins.

    Raises:
        TypeError: if it is no executor.
        ValueError: if ``num_workers`` is needed, because the executor doesn't say how many it has.
    """

    def __init__(self, call: Call, executor: Any, num_workers: int | None, timeout: float | None = None) -> None:
        self.call, self.timeout = call, timeout
        self.executor = executor_of(executor)
        self.num_workers = size_of(executor) if num_workers is None else num_workers
        self._given, self._running = self.executor, set[Future[Attempt]]()

    def start(self) -> None:
        """See whether the function gets there.

        Raises:
            TypeError: if it doesn't.
            RuntimeError: if the workers can't begin processes that could be killed.
        """
        begin = _arrives if self.timeout is None else start_child
        try:
            self._submit(begin, self.call).result()
        except AssertionError as error:  # of a daemonic process, as Dask's are by default
            raise RuntimeError(
                f"evaluation_timeout needs workers that may begin processes: {error}; for Dask, "
                'dask.config.set({"distributed.worker.daemon": False}) before the cluster is made'
            ) from error
        except Exception as error:
            raise unsendable(error) from error

    def submit(self, x: Configuration, trial: Trial) -> Future[Attempt]:
        """Evaluate a configuration."""
        if self.timeout is None:
            future = self._submit(self.call.elsewhere, x)
        else:
            future = self._submit(call_in_child, self.call, x, self.timeout)
        self._running.add(future)
        future.add_done_callback(self._running.discard)
        return future

    def _submit(self, *task: Any) -> Future[Any]:
        try:
            return self.executor.submit(*task)
        except BrokenExecutor:
            self.executor = _another_like(self.executor)
            return self.executor.submit(*task)

    def died(self, error: BaseException) -> bool:
        """Whether the worker died."""
        return isinstance(error, BrokenExecutor) or any(kind.__name__ in _DEATHS for kind in type(error).__mro__)

    def shared_fate(self, error: BaseException) -> bool:
        """In a pool of processes, one that dies takes the others with it."""
        return isinstance(error, BrokenExecutor) and self.num_workers > 1

    def stop(self) -> None:
        """Cancel what hasn't begun; what has runs to its end, unheard."""
        for future in list(self._running):
            future.cancel()

    def close(self) -> None:
        """End an executor that took the place of the given one."""
        if self.executor is not self._given:
            self.executor.shutdown(wait=False, cancel_futures=True)


def _arrives(call: Call) -> None:
    """Does nothing where the call has come to."""


def executor_of(executor: Any) -> Executor:
    """An executor as ``concurrent.futures`` has them.

    Raises:
        TypeError: if it can't be one.
    """
    if isinstance(executor, Executor):
        return executor
    if callable(getattr(executor, "get_executor", None)):  # a Dask client
        found: Executor = executor.get_executor(pure=False)
        return found
    raise TypeError(
        f"executor must be one of concurrent.futures, a Dask client or a RayExecutor, found {type(executor).__name__}"
    )


def size_of(executor: Any) -> int:
    """How many evaluations an executor or a Dask client runs at once.

    Raises:
        ValueError: if it doesn't say.
    """
    found = getattr(executor, "_max_workers", None)  # of concurrent.futures, which publish it nowhere
    if callable(getattr(executor, "nthreads", None)):
        found = sum(executor.nthreads().values())
    if not isinstance(found, int) or found < 1:
        raise ValueError(f"num_workers must be given: the {type(executor).__name__} doesn't say how many it has")
    return found


def _another_like(executor: Executor) -> Executor:
    """A pool of processes like one that broke.

    Raises:
        BrokenExecutor: for other executors.
    """
    if type(executor) is not ProcessPoolExecutor:
        raise BrokenExecutor(f"the {type(executor).__name__} broke; give a new one, and the same call goes on")
    was: Any = executor
    return ProcessPoolExecutor(
        was._max_workers, was._mp_context, was._initializer, was._initargs, max_tasks_per_child=was._max_tasks_per_child
    )


class RayExecutor(Executor):
    """Ray's workers as an executor of ``concurrent.futures``.

    Args:
        options: of each task, as ``ray.remote`` takes them: ``num_cpus=2``, ``num_gpus=1``, ``runtime_env={…}``.

    Raises:
        ImportError: without Ray, the extra "ray".

    Example:
        >>> minimize(f, space, executor=RayExecutor(num_gpus=1))
    """

    def __init__(self, **options: Any) -> None:
        try:
            import ray
        except ImportError:
            raise ImportError('Ray isn\'t installed: pip install "bayesnn[ray]"') from None
        if not ray.is_initialized():
            ray.init(log_to_driver=False)
        # Who died and is tried again is for the study to decide.
        options = {"num_cpus": 1, "max_retries": 0} | options
        self._task = ray.remote(**options)(_apply)
        has, wanted = ray.cluster_resources(), {"CPU": options["num_cpus"], "GPU": options.get("num_gpus", 0)}
        shares = [has.get(kind, 0.0) / amount for kind, amount in wanted.items() if amount]
        self._max_workers = max(1, int(min(shares, default=1)))

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run a function on a worker."""
        future: Future[Any] = self._task.remote(fn, args, kwargs).future()
        return future


def _apply(function: Any, args: Any, kwargs: Any) -> Any:
    return function(*args, **kwargs)
