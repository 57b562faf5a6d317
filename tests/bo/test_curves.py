"""What trials' reports become: rows at rungs, what is pending where, what failed, and how many rows there may be."""

from __future__ import annotations

from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import TrialState

from bayesnn.bo import Fidelity, Space
from bayesnn.bo.curves import Curves, observe_curves

SPACE = Space({"x": (0.0, 1.0)})
FIDELITY = Fidelity(9)
COMPLETE, PRUNED, RUNNING, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING, TrialState.FAIL


def study_of(*trials: tuple[float, TrialState, dict[int, float]], **options: Any) -> optuna.Study:
    """Trials by x, state and reports; a finished one's value is its last report."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(**options)
    for x, state, reported in trials:
        study.add_trial(
            optuna.create_trial(
                state=state,
                params={"x": x},
                distributions=SPACE.distributions(),
                intermediate_values=reported,
                value=reported[max(reported)] if state is COMPLETE else None,
            )
        )
    return study


def rows(curves: Curves) -> list[tuple[float, float, float]]:
    """(x, resource, value) of each row, in order."""
    codes, values = curves.observations.codes, curves.observations.values[:, 0]
    resources = (9 ** codes[:, 1]).round()
    return [tuple(row) for row in torch.stack([codes[:, 0], resources, values], -1).tolist()]


def places(codes: torch.Tensor) -> list[tuple[float, float]]:
    return [(x, round(9**code)) for x, code in codes.tolist()]


def every(*resources: int) -> dict[int, float]:
    return {resource: -float(resource) for resource in resources}


def test_rows_at_the_rungs_of_running_pruned_and_finished_trials() -> None:
    study = study_of(
        (0.1, COMPLETE, every(*range(1, 10))),
        (0.2, PRUNED, every(1, 2, 3)),
        (0.3, RUNNING, every(1, 2)),
        (0.4, RUNNING, {}),
    )
    curves = observe_curves(study, SPACE, FIDELITY)
    assert rows(curves) == [(0.1, 1, -1), (0.1, 3, -3), (0.1, 9, -9), (0.2, 1, -1), (0.2, 3, -3), (0.3, 1, -1)]
    assert curves.num_trials == 3 and len(curves.observations.failed) == 0


def test_running_trials_are_pending_at_their_next_rung() -> None:
    study = study_of(
        (0.1, RUNNING, {}), (0.2, RUNNING, every(1)), (0.3, RUNNING, every(1, 2, 3, 4)), (0.4, PRUNED, every(1))
    )
    assert places(observe_curves(study, SPACE, FIDELITY).observations.pending) == [(0.1, 1), (0.2, 3), (0.3, 9)]
    # Nor is the trial that is being started pending.
    assert places(observe_curves(study, SPACE, FIDELITY, exclude=0).observations.pending) == [(0.2, 3), (0.3, 9)]


def test_reports_between_the_rungs_count_where_they_were_made() -> None:
    study = study_of((0.1, RUNNING, every(0, 2, 4, 6)), (0.2, COMPLETE, every(5)), (0.3, PRUNED, every(12)))
    curves = observe_curves(study, SPACE, FIDELITY)
    # What a trial ended with is what the whole resource gives, and more than that there isn't.
    assert rows(curves) == [(0.1, 2, -2), (0.1, 4, -4), (0.2, 5, -5), (0.2, 9, -5), (0.3, 9, -12)]


def test_what_a_finished_trial_returned_is_its_value_at_the_whole_resource() -> None:
    study = study_of((0.1, RUNNING, every(1, 3, 9)))
    study.tell(0, 7.0)
    assert rows(observe_curves(study, SPACE, FIDELITY))[-1] == (0.1, 9, 7)


def test_failures_give_no_rows() -> None:
    nan = float("nan")
    study = study_of(
        (0.1, FAIL, every(1, 3)), (0.2, PRUNED, {1: 1.0, 2: nan}), (0.3, RUNNING, {1: 1.0, 3: nan}), (0.4, PRUNED, {})
    )
    curves = observe_curves(study, SPACE, FIDELITY)
    assert rows(curves) == [(0.3, 1, 1)]
    assert [x for x, _ in places(curves.observations.failed)] == [0.1, 0.2]
    # Where a trial was pruned before it said anything, there is nothing to be gained, nor anything to learn from.
    assert places(curves.observations.pending) == [(0.3, 9), (0.4, 1)]


def test_what_was_reported_before_a_trial_was_cut_off_holds() -> None:
    study = study_of((0.1, FAIL, every(1, 2, 3)))
    study.add_trial(
        optuna.create_trial(
            state=RUNNING,
            params={"x": 0.1},
            distributions=SPACE.distributions(),
            intermediate_values={1: 5.0},
            system_attrs={"retry_history": [0]},
        )
    )
    curves = observe_curves(study, SPACE, FIDELITY)
    assert rows(curves) == [(0.1, 1, 5), (0.1, 3, -3)]
    assert places(curves.observations.pending) == [(0.1, 9)] and len(curves.observations.failed) == 0


@pytest.mark.parametrize(
    "reached, resource", [([], 1), ([9, 9], 1), ([9, 1, 1], 1), ([9, 3, 3, 1], 3), ([9, 9, 9], 9), ([9, 3, 9, 1], 3)]
)
def test_the_resource_of_the_search_is_the_highest_rung_with_three_values(reached: list[int], resource: int) -> None:
    trials = [(0.1 * n, PRUNED, every(*(r for r in (1, 3, 9) if r <= last))) for n, last in enumerate(reached)]
    assert observe_curves(study_of(*trials), SPACE, FIDELITY).resource == resource


def test_of_too_many_rows_those_of_the_trials_that_got_furthest_are_kept() -> None:
    trials = [(n / 100, PRUNED, every(1)) for n in range(40)]
    trials += [(0.5, PRUNED, every(1, 3)), (0.6, COMPLETE, every(1, 3, 9))]
    study, fidelity = study_of(*trials), Fidelity(9, max_rows=15)
    curves = observe_curves(study, SPACE, fidelity, seed=1)
    kept = rows(curves)
    assert len(kept) == 15 and curves.num_trials == 12 and len(curves.left_out) == 30
    assert kept[-5:] == [(0.5, 1, -1), (0.5, 3, -3), (0.6, 1, -1), (0.6, 3, -3), (0.6, 9, -9)]
    assert np.ptp([x for x, resource, _ in kept[:-5]]) > 0.15  # of the others, any
    assert rows(observe_curves(study, SPACE, fidelity, seed=1)) == kept
    assert rows(observe_curves(study, SPACE, fidelity, seed=2)) != kept


def test_constraints_hold_at_all_rungs_and_running_trials_wait_for_theirs() -> None:
    study = study_of((0.1, RUNNING, every(1, 3)), (0.2, RUNNING, every(1)), (0.3, RUNNING, every(1)))
    for trial, limit in zip([optuna.Trial(study, number) for number in (0, 1)], (0.5, -0.5), strict=True):
        trial.set_constraint("c", limit)
    study.tell(0, state=PRUNED)
    curves = observe_curves(study, SPACE, FIDELITY)
    assert curves.observations.constraints == ("c",)
    assert curves.observations.values.tolist() == [[-1, 0.5], [-3, 0.5], [-1, -0.5]]
    assert places(curves.observations.pending) == [(0.2, 3), (0.3, 3)]


def test_trials_outside_the_space_are_counted() -> None:
    study = study_of((0.1, PRUNED, every(1)), (0.9, PRUNED, every(1)))
    curves = observe_curves(study, Space({"x": (0.0, 0.5)}), FIDELITY)
    assert rows(curves) == [(0.2, 1, -1)] and curves.observations.num_outside == 1
