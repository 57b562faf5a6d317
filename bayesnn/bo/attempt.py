"""One call of the objective function, wherever it happens, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from bayesnn.bo.goals import Goals
from bayesnn.bo.space import Configuration

Objective = Callable[[Configuration], Any]


class Attempt(NamedTuple):
    """What came of one evaluation.

    Fields:
        numbers: the objectives and what is limited, by name; None if it failed.
        seconds: how long it took.
        failure: why it failed; None if it didn't.
        others: further numbers that are kept with the trial.
        error: what ends the optimisation, because it isn't among the exceptions to catch.
        ended_early: whether its trial was pruned.
    """

    numbers: dict[str, float] | None
    seconds: float
    failure: str | None = None
    others: dict[str, float] | None = None
    error: BaseException | None = None
    ended_early: bool = False


class EndedEarly(NamedTuple):
    """What stands for the value of a function that yields and was asked no more: what it yielded last."""

    value: Any


class Returned(NamedTuple):
    """What the objective function gave, before it is understood.

    Fields:
        value: what it returned.
        seconds: how long it took.
        failure: what it raised, in words; None if it didn't.
        error: what it raised, if that isn't among the exceptions to catch.
    """

    value: Any
    seconds: float
    failure: str | None
    error: BaseException | None


def _made() -> Callable[..., tuple[Any, ...]]:
    """The function below, nested so that it travels by value: a process that runs it needn't import this library."""

    def call_once(
        f: Objective, x: Configuration, catch: tuple[type[Exception], ...], here: bool = True
    ) -> tuple[Any, ...]:
        import time
        import traceback

        start = time.perf_counter()
        try:
            value = f(dict(x))
        except (Exception, SystemExit) as error:  # programs made into functions exit
            failure = "".join(traceback.format_exception_only(error)).strip()[:2000]
            # An exception of somebody's own might not travel.
            ends = None if isinstance(error, (*catch, SystemExit)) else error if here else RuntimeError(failure)
            return None, time.perf_counter() - start, failure, ends
        return value, time.perf_counter() - start, None, None

    return call_once


call_once = _made()


class Call(NamedTuple):
    """How the objective function is called.

    Fields:
        f: the function.
        goals: what it is to return.
        catch: exceptions that are failed evaluations.
    """

    f: Objective
    goals: Goals
    catch: tuple[type[Exception], ...] = (Exception,)

    def __call__(self, x: Configuration) -> Attempt:
        """Call f once and understand what it returned. Nothing but interrupts comes out of here as an exception."""
        return self.understand(Returned(*call_once(self.f, x, self.catch)))

    def understand(self, returned: Returned) -> Attempt:
        """What came of a call."""
        if returned.failure is not None:
            return Attempt(None, returned.seconds, returned.failure, error=returned.error)
        ended_early = isinstance(returned.value, EndedEarly)
        value = returned.value.value if ended_early else returned.value
        try:
            numbers = self.goals.read(value)
        except ValueError as error:
            return Attempt(None, returned.seconds, str(error))
        except Exception as error:  # what came back may not even be willing to be shown
            return Attempt(None, returned.seconds, f"{type(error).__name__}: {error}"[:2000])
        others: dict[str, float] = {}
        with suppress(Exception):
            others = self.goals.others(value)
        return Attempt(numbers, returned.seconds, others=others, ended_early=ended_early)

    def elsewhere(self, x: Configuration) -> Attempt:
        """The same, with nothing in it that might not travel between processes."""
        return self.understand(Returned(*call_once(self.f, x, self.catch, False)))
