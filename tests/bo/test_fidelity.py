"""Rungs and pruners."""

from __future__ import annotations

from typing import Any

import optuna
import pytest

from bayesnn.bo import Fidelity


@pytest.mark.parametrize(
    "fidelity, rungs",
    [
        (Fidelity(81), (1, 3, 9, 27, 81)),
        (Fidelity(50, min_resource=2, reduction_factor=4), (2, 8, 32, 50)),
        (Fidelity(9, min_resource=9), (9,)),
    ],
)
def test_rungs(fidelity: Fidelity, rungs: tuple[int, ...]) -> None:
    assert fidelity.rungs == rungs
    assert [fidelity.next_rung(resource) for resource in (0, *rungs)] == [*rungs, rungs[-1]]


def test_resources_on_the_log_scale() -> None:
    assert [Fidelity(81).code(rung) for rung in Fidelity(81).rungs] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    with pytest.raises(ValueError, match="one rung"):
        Fidelity(1).code(1)


@pytest.mark.parametrize("hyperband", [False, True])
def test_the_pruner_ends_the_worse_trials_at_rungs_only(hyperband: bool) -> None:
    fidelity = Fidelity(9, hyperband=hyperband)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(pruner=fidelity.pruner(), study_name="s")
    ended: list[int] = []
    for number in range(30):
        trial = study.ask()
        for resource in range(1, 10):
            trial.report(float(number), resource)  # each worse than all before
            if resource < 9 and trial.should_prune():
                break
        ended.append(resource)
        study.tell(trial, float(number))
    assert ended[0] == 9 and set(ended) == ({1, 3, 9} if hyperband else {1, 9})
    assert ended.count(1) >= 15


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"max_resource": 0}, ValueError, "max_resource must be at least 1"),
        ({"max_resource": 2.5}, TypeError, "max_resource"),
        ({"min_resource": 10}, ValueError, "min_resource must be at most max_resource 9, found 10"),
        ({"reduction_factor": 1}, ValueError, "reduction_factor must be at least 2"),
        ({"max_rows": 0}, ValueError, "max_rows"),
        ({"hyperband": 1}, TypeError, "hyperband"),
    ],
)
def test_numbers_that_make_no_sense(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Fidelity(**{"max_resource": 9} | options)
