"""Joint batches of trials: what is in the study, what others see of it, the same as a batch of suggestions."""

from __future__ import annotations

from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from bayesnn.bo import Space, SurrogateSampler, ask
from bayesnn.bo.observations import observe

SPACE = Space({"x": (0.0, 1.0), "n": (1, 300), "kind": ["a", "b"]})


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def f(x: dict[str, Any]) -> float:
    return (x["x"] - 0.3) ** 2 + 1e-4 * (x["n"] - 100) ** 2 + (x["kind"] == "a")


def study_with(num_told: int, **options: Any) -> optuna.Study:
    settings: dict[str, Any] = {"num_startup": 4, "seed": 1, "space": SPACE, "num_restarts": 2, "raw_samples": 32}
    study = optuna.create_study(sampler=SurrogateSampler("nngp", **settings | options))
    while num_told > 0:
        for trial in ask(study, min(3, num_told)):
            study.tell(trial, f(trial.params))
        num_told -= 3
    return study


def test_a_batch_of_the_sobol_sequence_is_its_next_points() -> None:
    study = study_with(0)
    batches = [ask(study, 2), ask(study, 2)]
    found = [trial.params for batch in batches for trial in batch]
    assert found == SPACE.configurations(SPACE.sobol(4, seed=1))


def test_a_batch_is_in_the_study_and_pending_for_everybody() -> None:
    study = study_with(6)
    batch = ask(study, 3)
    assert [trial.number for trial in batch] == [6, 7, 8]
    stored = study.get_trials()[6:]
    assert all(trial.state is TrialState.RUNNING and set(trial.params) == set(SPACE.names) for trial in stored)
    assert len({str(trial.params) for trial in stored}) == 3
    assert len(observe(study, SPACE).pending) == 3
    records = [trial.user_attrs for trial in stored]
    assert all(record["sampler"] == "surrogate" and record["num_pending"] == 0 for record in records)
    assert len({record["acquisition_value"] for record in records}) == 3
    # Optuna's own suggestions give what has been decided, and out of order is as good.
    assert batch[1].suggest_float("x", 0.0, 1.0) == stored[1].params["x"]
    for trial in reversed(batch):
        study.tell(trial, f(trial.params))
    assert len(observe(study, SPACE).codes) == 9 and study.best_value <= min(f(each.params) for each in stored)


def test_the_first_of_a_batch_is_what_one_would_have_been() -> None:
    one, several = (ask(study_with(6), n) for n in (1, 3))
    assert one[0].params == several[0].params
    again = ask(study_with(6), 3)
    assert [trial.params for trial in again] == [trial.params for trial in several]


def test_a_space_that_only_trials_show() -> None:
    study = optuna.create_study(sampler=SurrogateSampler("nngp", num_startup=2, seed=0))
    with pytest.raises(ValueError, match="study must have finished trials that show the space"):
        ask(study, 2)
    study.optimize(lambda trial: trial.suggest_float("x", 0.0, 1.0), n_trials=3)
    assert all(0 <= trial.params["x"] <= 1 for trial in ask(study, 2))


@pytest.mark.parametrize("n, error", [(0, ValueError), (1.5, TypeError), ("3", TypeError)])
def test_numbers_that_make_no_sense(n: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="n must be"):
        ask(study_with(0), n)
    with pytest.raises(TypeError, match="study must have a SurrogateSampler, found TPESampler"):
        ask(optuna.create_study(), 1)
    with pytest.raises(TypeError, match="study must be an Optuna study, found NoneType"):
        ask(None, 1)  # type: ignore[arg-type]


def test_what_is_queued_comes_first() -> None:
    study = study_with(6)
    study.enqueue_trial({"x": 0.5, "n": 7, "kind": "b"})
    first, second = ask(study, 2)
    assert first.params == {"x": 0.5, "n": 7, "kind": "b"} and second.user_attrs["num_pending"] == 1
    assert len(ask(study_with(0), 1)) == 1


def test_what_was_asked_for_is_not_chosen_again() -> None:
    study = study_with(6)
    (trial,) = ask(study, 1)
    before = dict(trial.user_attrs)
    assert 0 <= trial.suggest_float("extra", 0.0, 1.0) <= 1
    after = study.trials[-1].user_attrs
    assert {name: after[name] for name in before} == before and after["independent"] == ["extra"]
