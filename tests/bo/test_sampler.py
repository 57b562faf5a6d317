"""The Optuna sampler: start-up, pending and failed trials, what is recorded, fallbacks, reproducibility."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from botorch.models import SingleTaskGP
from botorch.models.model import Model as BotorchModel
from optuna.trial import TrialState
from torch import Tensor

from bayesnn import BNN, BayesnnWarning
from bayesnn.bo import Space, SurrogateSampler, When
from bayesnn.bo.observations import observe
from bayesnn.inference import DeepEnsemble

DEFINITION = {"x": (0.0, 1.0), "n": (1, 5), "kind": ["a", "b"]}


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def model() -> BNN:
    return BNN(method=DeepEnsemble(num_members=5, num_steps=50))


def objective(trial: optuna.Trial) -> float:
    x = trial.suggest_float("x", 0.0, 1.0)
    n = trial.suggest_int("n", 1, 5)
    return (x - 0.3) ** 2 + 0.1 * abs(n - 3) + (trial.suggest_categorical("kind", ["a", "b"]) == "a")


def study_of(sampler: SurrogateSampler, direction: str = "minimize") -> optuna.Study:
    return optuna.create_study(sampler=sampler, direction=direction)


def test_startup_then_surrogate_with_a_record_of_both() -> None:
    study = study_of(SurrogateSampler(model(), num_startup=4, seed=0))
    study.optimize(objective, n_trials=7)
    records = [trial.user_attrs for trial in study.trials]
    # The first trial of a study without a given space shows what there is.
    assert records[0] == {"independent": ["x", "n", "kind"]}
    assert [record["sampler"] for record in records[1:]] == ["sobol"] * 3 + ["surrogate"] * 3
    assert [record["num_observed"] for record in records[1:]] == [1, 2, 3, 4, 5, 6]
    last = records[-1]
    assert last["surrogate"] == "BNN" and last["acquisition"] == "lognei"
    assert 0 < last["fit_seconds"] < last["suggest_seconds"] and np.isfinite(last["acquisition_value"])
    assert "fallback" not in last


def test_a_given_space_is_sobol_from_the_first_trial_on() -> None:
    space = Space(DEFINITION)
    study = study_of(SurrogateSampler(model(), num_startup=9, seed=3, space=DEFINITION))
    study.optimize(objective, n_trials=4)
    expected = space.configurations(space.sobol(4, seed=3))
    assert [trial.params for trial in study.trials] == expected


def test_same_seed_same_trace_whatever_else_draws_random_numbers() -> None:
    def trace(seed: int, interrupted: bool = False) -> list[dict]:
        storage = optuna.storages.InMemoryStorage()
        study = optuna.create_study(
            study_name="s", storage=storage, sampler=SurrogateSampler(model(), num_startup=3, seed=seed)
        )
        study.optimize(objective, n_trials=4)
        if interrupted:  # a new sampler in a new process goes on alike
            torch.rand(5)
            study = optuna.load_study(
                study_name="s", storage=storage, sampler=SurrogateSampler(model(), num_startup=3, seed=seed)
            )
        study.optimize(objective, n_trials=2)
        return [trial.params for trial in study.trials]

    assert trace(1) == trace(1) == trace(1, interrupted=True)
    assert trace(1) != trace(2)


def test_the_seed_reaches_the_surrogate() -> None:
    space = Space({"x": (0.0, 1.0), "y": (0.0, 1.0)})
    answers = []
    for seed in (1, 1, 2):
        study = study_of(SurrogateSampler(model(), num_startup=3, seed=seed, space=space))
        for configuration in space.configurations(space.sobol(3, seed=0)):
            value = configuration["x"] - configuration["y"] ** 2
            study.add_trial(optuna.create_trial(params=configuration, distributions=space.distributions(), value=value))
        answers.append(study.ask(space.distributions()).params)
    assert answers[0] == answers[1] != answers[2]


def test_startup_does_not_repeat_itself() -> None:
    for seed in range(5):
        study = study_of(SurrogateSampler(model(), num_startup=3, seed=seed, space={"n": (1, 3)}))
        study.optimize(lambda trial: trial.suggest_int("n", 1, 3), n_trials=3)
        assert sorted(trial.params["n"] for trial in study.trials) == [1, 2, 3]


def test_the_direction_counts() -> None:
    for direction, best in [("minimize", 0.0), ("maximize", 1.0)]:
        sampler = SurrogateSampler(
            lambda X, Y: SingleTaskGP(X, Y).eval(), num_startup=3, seed=0, space={"x": (0.0, 1.0)}
        )
        study = study_of(sampler, direction)
        study.optimize(lambda trial: 10 * trial.suggest_float("x", 0.0, 1.0) + 5, n_trials=6)
        assert study.best_params["x"] == pytest.approx(best, abs=1e-3)
        assert study.trials[-1].user_attrs["surrogate"] == "<lambda>"


def test_running_trials_are_pending() -> None:
    sampler = SurrogateSampler(model(), num_startup=3, seed=0, space=Space(DEFINITION))
    study = study_of(sampler)
    study.optimize(objective, n_trials=3)
    asked = [study.ask(Space(DEFINITION).distributions()) for _ in range(4)]
    assert [trial.user_attrs["num_pending"] for trial in study.trials[3:]] == [0, 1, 2, 3]
    codes = Space(DEFINITION).codes([trial.params for trial in asked])
    assert torch.cdist(codes, codes).add(torch.eye(4)).min() > 1e-3
    # Told out of order.
    for trial in reversed(asked):
        study.tell(trial, 1.0)
    study.ask(Space(DEFINITION).distributions())
    assert study.trials[-1].user_attrs["num_observed"] == 7


def test_failed_pruned_and_infinite_trials_are_not_fitted_and_not_repeated() -> None:
    space = Space({"n": (1, 6)})
    study = study_of(SurrogateSampler(model(), num_startup=2, seed=0, space=space))

    def fragile(trial: optuna.Trial) -> float:
        n = trial.suggest_int("n", 1, 6)
        if n == 2:
            raise ValueError
        if n == 3:
            return float("nan")
        if n == 4:
            return float("inf")
        if n == 5:
            raise optuna.TrialPruned
        return float(n)

    study.optimize(fragile, n_trials=6, catch=(ValueError,))
    assert sorted(trial.params["n"] for trial in study.trials) == [1, 2, 3, 4, 5, 6]
    observations = observe(study, space)
    assert sorted(observations.values.flatten().tolist()) == [1.0, 6.0]
    assert len(observations.failed) == 3 and len(observations.pending) == 1  # the pruned one
    assert "num_failed" in study.trials[-1].user_attrs


def test_a_surrogate_that_fails_is_replaced_visibly(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(X: Tensor, Y: Tensor) -> BotorchModel:
        raise np.linalg.LinAlgError("not positive definite")

    study = study_of(SurrogateSampler(broken, num_startup=2, seed=0, space=DEFINITION))
    with pytest.warns(
        BayesnnWarning, match="trial 2 is suggested by something simpler.*'broken'.*not positive definite"
    ):
        study.optimize(objective, n_trials=3)
    record = study.trials[-1].user_attrs
    assert record["sampler"] == "surrogate" and record["surrogate"] == "gp" and record["acquisition"] == "lognei"
    assert record["fallback"] == "broken: LinAlgError: not positive definite"
    # Neither does the Gaussian process answer.
    monkeypatch.setattr("bayesnn.bo.chain.FALLBACK", "nngp")
    monkeypatch.setattr("bayesnn.processes.NNGP.fit", broken)
    with pytest.warns(BayesnnWarning, match="'nngp'"):
        study.optimize(objective, n_trials=1)
    record = study.trials[-1].user_attrs
    assert record["sampler"] == "sobol" and record["fallback"].startswith(
        "broken: LinAlgError: not positive definite; nngp: "
    )
    assert study.trials[-1].params == Space(DEFINITION).configurations(Space(DEFINITION).sobol(4, seed=0))[3]


def test_an_exhausted_space_is_said_to_be() -> None:
    study = study_of(SurrogateSampler(model(), num_startup=2, seed=0))
    with pytest.warns(BayesnnWarning, match="SpaceExhaustedError: all of the space's 4 configurations"):
        study.optimize(lambda trial: float(trial.suggest_int("n", 1, 4)), n_trials=5)
    assert sorted(trial.params["n"] for trial in study.trials[:4]) == [1, 2, 3, 4]


def test_a_space_that_changes_along_the_way() -> None:
    def dynamic(trial: optuna.Trial) -> float:
        depth = trial.suggest_int("depth", 1, 3)
        widths = [trial.suggest_int(f"width{layer}", 1, 50) for layer in range(depth)]
        return float(sum(widths)) + trial.suggest_categorical("only", ["one"]).count("x")

    study = study_of(SurrogateSampler(model(), num_startup=3, seed=0), "maximize")
    with pytest.warns(BayesnnWarning, match="'width2' of trial .* is drawn uniformly") as caught:
        study.optimize(dynamic, n_trials=12)
    assert len([w for w in caught if "'width2'" in str(w.message)]) == 1
    before: list[set[str]] = []
    for trial in study.trials:
        common = set.intersection(*before) if before else set()
        assert set(trial.user_attrs.get("independent", [])) == set(trial.params) - common - {"only"}
        before.append(set(trial.params))


def test_ranges_that_differ_are_left_out() -> None:
    space = Space({"x": (0.0, 1.0)})
    study = study_of(SurrogateSampler(model(), seed=0))
    study.add_trial(
        optuna.create_trial(params={"x": 3.0}, distributions=Space({"x": (0.0, 5.0)}).distributions(), value=1.0)
    )
    study.add_trial(optuna.create_trial(params={"x": 0.5}, distributions=space.distributions(), value=2.0))
    study.add_trial(optuna.create_trial(params={}, distributions={}, state=TrialState.FAIL))
    observations = observe(study, space)
    assert observations.values.tolist() == [[2.0]] and len(observations.failed) == 0


def test_constant_objective() -> None:
    study = study_of(SurrogateSampler(model(), num_startup=2, seed=0, space=DEFINITION))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        study.optimize(lambda trial: 0 * objective(trial), n_trials=5)
    assert not [w for w in caught if "X: column" in str(w.message)]
    assert [trial.user_attrs["sampler"] for trial in study.trials] == ["sobol"] * 2 + ["surrogate"] * 3


def test_two_objectives() -> None:
    study = optuna.create_study(
        directions=["minimize", "maximize"],
        sampler=SurrogateSampler(model(), num_startup=4, seed=0, space=DEFINITION, num_samples=16),
    )

    def both(trial: optuna.Trial) -> tuple[float, float]:
        value = objective(trial)
        return value, trial.params["x"]

    study.optimize(both, n_trials=6)
    records = [trial.user_attrs for trial in study.trials[4:]]
    assert [record["acquisition"] for record in records] == ["lognehvi"] * 2
    assert observe(study, Space(DEFINITION)).values.shape == (6, 2)


def test_names_are_looked_up_at_once() -> None:
    assert SurrogateSampler("ensemble").surrogate_name == "ensemble"
    with pytest.raises(ValueError, match="no surrogate named 'nothing'; there are"):
        SurrogateSampler("nothing")


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"surrogate": 3}, TypeError, "surrogate must be a name, an unfitted bayesnn model or a function"),
        (
            {"surrogate": SingleTaskGP(torch.rand(3, 1).double(), torch.rand(3, 1).double())},
            TypeError,
            "found SingleTaskGP",
        ),
        ({"beta": -1.0}, ValueError, "beta must be"),
        ({"num_restarts": 0}, ValueError, "num_restarts must be at least 1"),
        ({"seconds": "a"}, TypeError, "seconds must be"),
        ({"acquisition": "best"}, ValueError, "acquisition must be one of"),
        ({"num_startup": 0}, ValueError, "num_startup must be at least 1, found 0"),
        ({"seed": -1}, ValueError, "seed must be at least 0, found -1"),
        ({"space": {"x": (1.0, 0.0)}}, ValueError, "low < high"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SurrogateSampler(**({"surrogate": "ensemble"} | options))


def test_the_given_model_stays_unfitted() -> None:
    given = model()
    sampler = SurrogateSampler(given, num_startup=1, seed=0, space=DEFINITION)
    study = study_of(sampler)
    with pytest.raises(ValueError, match="nothing to fit"):
        sampler.fit(study, Space(DEFINITION))
    study.optimize(objective, n_trials=3)
    assert given._data is None
    assert torch.allclose(
        sampler.fit(study, Space(DEFINITION)).train_targets.flatten(),
        torch.tensor([trial.value for trial in study.trials], dtype=torch.float64),
    )


def test_constraints_of_trials_are_kept() -> None:
    """The objective falls towards where the limit is broken; trials of something else don't count as failures."""
    sampler = SurrogateSampler("nngp", num_startup=5, seed=0, space={"x": (0.0, 1.0)}, num_restarts=2, raw_samples=32)
    study = study_of(sampler)

    def limited(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0.0, 1.0)
        trial.set_constraint("budget", x - 0.5)
        return -x

    study.optimize(limited, n_trials=10)
    observations = observe(study, Space({"x": (0.0, 1.0)}))
    assert observations.constraints == ("budget",) and observations.values.shape == (10, 2)
    kept = [trial.params["x"] for trial in study.trials[5:]]
    assert all(x < 0.6 for x in kept) and max(kept) > 0.4


def test_conditions_in_a_study() -> None:
    space = Space({"kind": ["a", "b"], "x": When((0.0, 1.0), kind="a"), "n": When((1, 9), kind="b")})
    study = study_of(SurrogateSampler("nngp", num_startup=6, seed=0, space=space, num_restarts=2, raw_samples=32))

    def branching(trial: optuna.Trial) -> float:
        if trial.suggest_categorical("kind", ["a", "b"]) == "a":
            return (trial.suggest_float("x", 0.0, 1.0) - 0.3) ** 2
        return 1.0 + trial.suggest_int("n", 1, 9)

    study.optimize(branching, n_trials=12)
    assert all("independent" not in trial.user_attrs and "fallback" not in trial.user_attrs for trial in study.trials)
    assert len(observe(study, space).codes) == 12
    assert sum(trial.params["kind"] == "a" for trial in study.trials[6:]) >= 4 and study.best_value < 0.05


def test_what_was_cut_off_is_no_failure() -> None:
    study = study_of(SurrogateSampler("nngp", seed=0, space=DEFINITION))
    space = Space(DEFINITION)
    for number, configuration in enumerate(space.configurations(space.sobol(2, seed=0))):
        study.add_trial(
            optuna.create_trial(
                state=[TrialState.FAIL, TrialState.RUNNING][number],
                params=configuration,
                distributions=space.distributions(),
                system_attrs={"retry_history": [0]} if number else {},
            )
        )
    observations = observe(study, space)
    assert len(observations.failed) == 0 and len(observations.pending) == 1
    # Nor while the trial that tries it again is being started.
    assert len(observe(study, space, exclude=1).failed) == 0


def test_constraints_that_not_all_trials_have_are_told_of() -> None:
    study = study_of(
        SurrogateSampler("nngp", num_startup=3, seed=0, space={"x": (0.0, 1.0)}, num_restarts=1, raw_samples=8)
    )

    def limited(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0.0, 1.0)
        if trial.number != 1:
            trial.set_constraint("c", x - 0.5)
        return -x

    with pytest.warns(
        BayesnnWarning, match="not all finished trials have the constraint.s. c: no suggestion looks at them"
    ):
        study.optimize(limited, n_trials=4)
    assert study.trials[-1].user_attrs["constraints_ignored"] == ["c"]


def test_trials_outside_the_space_are_told_of() -> None:
    space = Space({"kind": ["a", "b"], "x": When((0.0, 1.0), kind="a")})
    study = study_of(SurrogateSampler("nngp", num_startup=9, seed=0, space=space))
    # A parameter that doesn't exist under the condition doesn't put a trial outside.
    for params in ({"kind": "a", "x": 0.2}, {"kind": "b", "x": 0.2}, {"kind": "a"}):
        distributions = {name: space.distributions()[name] for name in params}
        study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=1.0))
    assert len(observe(study, space).codes) == 2 and observe(study, space).num_outside == 1
    with pytest.warns(BayesnnWarning, match="finished trials outside the space, which are left out: 1"):
        study.ask().suggest_categorical("kind", ["a", "b"])
    assert study.trials[-1].user_attrs["num_outside"] == 1


def test_settings_that_fit_no_study_of_this_kind() -> None:
    one = study_of(SurrogateSampler("nngp", space=DEFINITION, acquisition="lognehvi"))
    with pytest.raises(ValueError, match="acquisition must be one of logei"):
        one.ask().suggest_float("x", 0.0, 1.0)
    pair = study_of(SurrogateSampler("nngp", space=DEFINITION, reference_point=[1.0, 2.0]))
    with pytest.raises(ValueError, match="reference_point must be None for one objective"):
        pair.ask().suggest_float("x", 0.0, 1.0)


def test_a_function_may_have_a_models_name() -> None:
    calls = []

    def gp(X: Tensor, Y: Tensor) -> BotorchModel:
        calls.append(len(X))
        return SingleTaskGP(X, Y)

    study = study_of(
        SurrogateSampler(gp, num_startup=2, seed=0, space={"x": (0.0, 1.0)}, num_restarts=1, raw_samples=8)
    )
    study.optimize(lambda trial: trial.suggest_float("x", 0.0, 1.0), n_trials=4)
    assert calls == [2, 3]


def test_a_diverged_run_does_not_hide_what_the_others_say() -> None:
    """A value of 1e6 among values below 1 is drawn in: the suggestion stays near the minimum, by the surrogate itself."""
    study = study_of(SurrogateSampler("pfn", num_startup=5, seed=0, space={"x": (0.0, 1.0)}))
    for place in torch.linspace(0.05, 0.95, 14).tolist():
        value = 1e6 if place > 0.9 else (place - 0.3) ** 2
        distributions = Space({"x": (0.0, 1.0)}).distributions()
        study.add_trial(optuna.create_trial(params={"x": place}, distributions=distributions, value=value))
    trial = study.ask()
    x = trial.suggest_float("x", 0.0, 1.0)
    record = study.trials[-1].user_attrs
    assert "fallback" not in record and record["num_drawn_in"] == 1
    assert abs(x - 0.3) < 0.1
    model = study.sampler.fit(study, Space({"x": (0.0, 1.0)}))
    assert float(model.posterior(torch.tensor([[0.95]], dtype=torch.float64)).mean) < 10
