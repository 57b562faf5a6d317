"""The sampler with a fidelity: what it models, what is pending where, and that promising trials get the resource."""

from __future__ import annotations

import math
import pickle
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import TrialState
from torch import Tensor

from bayesnn.bo import AutoSurrogate, Fidelity, Space, SurrogateSampler, When, ask
from bayesnn.bo.acquisition import FOR_SEVERAL, NAMES, Setting, acquisition as build
from bayesnn.bo.at_resource import AtResource, ModelAtResource
from bayesnn.bo.curves import observe_curves
from bayesnn.bo.on_codes import OnCodes
from bayesnn.bo.optimise import SpaceExhaustedError
from bayesnn.bo.outcomes import outcomes_of
from bayesnn.bo.suggest import propose
from bayesnn.processes import LearningCurveProcess

FIDELITY = Fidelity(27)
GRID = Space({"x": (1, 40), "kind": ["a", "b"]})
QUICK = {"num_restarts": 1, "raw_samples": 16, "num_samples": 32}


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def crossing(x: dict[str, Any], resource: int) -> float:
    """Curves of kind "a" begin lowest, those of "b" end lowest, at x = 28."""
    if x["kind"] == "a":
        return 0.5 + ((x["x"] - 10) / 40) ** 2 + 0.1 / resource
    return ((x["x"] - 28) / 40) ** 2 + 0.62 / resource**0.5


def run(
    sampler: SurrogateSampler,
    curve: Callable[[dict[str, Any], int], float] = crossing,
    space: Space = GRID,
    fidelity: Fidelity = FIDELITY,
    num_trials: int = 30,
    num_workers: int = 3,
    pruner: optuna.pruners.BasePruner | None = None,
) -> optuna.Study:
    """Workers side by side, each at a trial; whichever has spent least goes on next."""
    study = optuna.create_study(study_name="s", sampler=sampler, pruner=fidelity.pruner() if pruner is None else pruner)
    spent = dict.fromkeys(range(num_workers), 0)
    at: dict[int, optuna.Trial] = {}
    ended = 0
    while ended < num_trials:
        worker = min(spent, key=lambda key: (spent[key], key))
        if worker not in at:
            at[worker] = study.ask(space.distributions() if not space.conditions else {})
            for name in space.names:
                if space.exists(name, at[worker].params):
                    at[worker]._suggest(name, space.distributions()[name])
        trial = at[worker]
        last = max(study.trials[trial.number].intermediate_values, default=0)
        resource = fidelity.next_rung(last)
        spent[worker] += resource - last
        trial.report(curve(trial.params, resource), resource)
        state = None
        if resource == fidelity.max_resource:
            study.tell(trial, curve(trial.params, resource))
        elif trial.should_prune():
            state = TrialState.PRUNED
            study.tell(trial, state=state)
        if resource == fidelity.max_resource or state is not None:
            del at[worker]
            ended += 1
    return study


def sampler(surrogate: Any = "gp", **options: Any) -> SurrogateSampler:
    return SurrogateSampler(
        surrogate, **{"num_startup": 8, "seed": 0, "space": GRID, "fidelity": FIDELITY} | QUICK | options
    )


# What is done ----------------------------------------------------------------------------------------------------------


def test_promising_trials_get_the_resource_though_curves_cross() -> None:
    study = run(sampler(), num_trials=16)
    resources = {"a": 0, "b": 0}
    for trial in study.trials[8:]:
        resources[trial.params["kind"]] += max(trial.intermediate_values, default=0)
    assert resources["b"] > 3 * resources["a"] and resources["b"] > 40
    assert study.best_params["kind"] == "b" and abs(study.best_params["x"] - 28) <= 1
    assert sum(trial.state is TrialState.PRUNED for trial in study.trials) > 8
    records = [trial.user_attrs for trial in study.trials if trial.user_attrs["sampler"] == "surrogate"]
    assert len(records) >= 8 and not any("fallback" in record for record in records)
    assert all(record["num_rows"] > record["num_observed"] >= 8 and record["num_pending"] <= 2 for record in records)
    assert records[0]["resource"] < records[-1]["resource"] == 27
    # The model is of what trials end with, though few got there.
    worth = study.sampler.fit(study, GRID).posterior(GRID.features([{"x": 28, "kind": "b"}, {"x": 10, "kind": "a"}]))
    assert worth.mean[0, 0] < worth.mean[1, 0]


def test_same_seed_same_trace() -> None:
    traces = [
        [trial.params for trial in run(sampler("nngp", seed=seed, num_startup=5), num_trials=7).trials]
        for seed in (1, 1, 2)
    ]
    assert traces[0] == traces[1] != traces[2]


def test_with_one_rung_it_is_the_sampler_without_a_fidelity() -> None:
    once = Fidelity(27, min_resource=27)
    one = run(sampler(fidelity=once), fidelity=once, num_trials=11, num_workers=1)
    plain = run(sampler(fidelity=None), fidelity=once, num_trials=11, num_workers=1)
    assert [trial.params for trial in one.trials] == [trial.params for trial in plain.trials]
    assert "resource" not in one.trials[-1].user_attrs and one.trials[-1].user_attrs["num_observed"] == 10


@pytest.mark.parametrize("name", [name for name in NAMES if name not in FOR_SEVERAL])
def test_every_acquisition_function_for_one_objective(name: Any) -> None:
    study = run(sampler(acquisition=name), num_trials=10)
    assert study.trials[-1].user_attrs["acquisition"] == ("lognei" if name == "auto" else name)
    assert len({tuple(trial.params.values()) for trial in study.trials}) == len(study.trials)


@pytest.mark.parametrize("surrogate", ["nngp", "pfn", AutoSurrogate(["gp", "nngp"], num_folds=2)])
def test_any_surrogate_takes_the_resource_as_one_more_input(surrogate: Any) -> None:
    study = run(sampler(surrogate), num_trials=9)
    record = study.trials[-1].user_attrs
    assert record["sampler"] == "surrogate" and "fallback" not in record
    model = study.sampler.fit(study, GRID)
    assert isinstance(model, ModelAtResource) and model.joint.train_inputs[0].shape[-1] == GRID.num_features + 1
    assert model.posterior(GRID.features([{"x": 3, "kind": "a"}])).mean.shape == (1, 1)


def test_numbers_are_searched_for_at_the_resource_of_the_search() -> None:
    space = Space({"u": (0.0, 1.0), "n": (1, 3), "kind": ["a", "b"]})

    def curve(x: dict[str, Any], resource: int) -> float:
        return (x["u"] - 0.3) ** 2 + x["n"] + (x["kind"] == "a") + 1 / resource

    study = run(sampler(space=space), curve, space, num_trials=9)
    assert study.trials[-1].user_attrs["sampler"] == "surrogate" and "fallback" not in study.trials[-1].user_attrs
    assert study.trials[-1].params["n"] == 1


def test_conditions_and_constraints_and_failures() -> None:
    space = Space({"kind": ["a", "b"], "x": When((0.0, 1.0), kind="a"), "n": When((1, 9), kind="b")})

    def curve(x: dict[str, Any], resource: int) -> float:
        return x.get("x", 0) + x.get("n", 0) + 1 / resource

    study = run(sampler("nngp", space=space), curve, space, num_trials=8)
    assert all("independent" not in trial.user_attrs and "fallback" not in trial.user_attrs for trial in study.trials)

    for _ in range(4):  # what fails isn't tried again, and what is limited stays modelled
        trial = study.ask()
        failing = trial.suggest_categorical("kind", ["a", "b"])
        (trial.suggest_float("x", 0.0, 1.0) if failing == "a" else trial.suggest_int("n", 1, 9))
        study.tell(trial, state=TrialState.FAIL)
    trial = study.ask()
    trial.suggest_categorical("kind", ["a", "b"])
    assert study.trials[-1].user_attrs["num_failed"] == 4 and "fallback" not in study.trials[-1].user_attrs


def test_limits_are_kept() -> None:
    """The objective falls towards where the limit of 16 is broken."""
    space = Space({"x": (1, 40)})
    study = optuna.create_study(sampler=sampler("nngp", space=space, num_startup=6), pruner=FIDELITY.pruner())
    for _ in range(8):
        trial = study.ask()
        x = trial.suggest_int("x", 1, 40)
        trial.set_constraint("budget", x - 16.0)
        for resource in FIDELITY.rungs:
            trial.report(-x + 10 / resource, resource)
            if resource < 27 and trial.should_prune():
                study.tell(trial, state=TrialState.PRUNED)
                break
        else:
            study.tell(trial, -float(x))
    assert all(13 <= trial.params["x"] <= 17 for trial in study.trials[6:])


def test_hyperbands_brackets_share_one_model() -> None:
    fidelity = Fidelity(9, hyperband=True)
    study = run(sampler(fidelity=fidelity), fidelity=fidelity, num_trials=10)
    last = study.trials[-1].user_attrs
    assert last["num_observed"] >= 8 and last["sampler"] == "surrogate"


def test_a_batch_is_asked_for_at_once() -> None:
    study = run(sampler(), num_trials=10, num_workers=1)
    batch = ask(study, 3)
    assert len({tuple(trial.params.values()) for trial in batch}) == 3
    curves = observe_curves(study, GRID, FIDELITY)
    assert [round(27 ** code[-1].item()) for code in curves.observations.pending] == [1, 1, 1]


def test_a_cap_on_rows_is_kept_and_told_of() -> None:
    small = Fidelity(27, max_rows=12)
    study = run(sampler(fidelity=small), fidelity=small, num_trials=14)
    record = study.trials[-1].user_attrs
    assert record["num_rows"] <= 12 and record["num_left_out"] > 0
    assert len({tuple(trial.params.values()) for trial in study.trials}) == len(study.trials)


def test_a_sampler_with_a_fidelity_can_be_pickled() -> None:
    own = sampler()
    study = run(own, num_trials=8)
    answers = [
        each.chain.answers(study, GRID, 50, 1)[0].configuration for each in (own, pickle.loads(pickle.dumps(own)))
    ]
    assert answers[0] == answers[1]


def test_several_objectives_and_other_things_are_refused() -> None:
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler())
    with pytest.raises(ValueError, match="fidelity must be None for several objectives, found 2"):
        study.ask(GRID.distributions())
    with pytest.raises(TypeError, match="fidelity must be a Fidelity, found int"):
        SurrogateSampler("nngp", fidelity=81)  # type: ignore[arg-type]


def test_what_is_left_out_of_the_fit_is_not_suggested_again() -> None:
    """Of four configurations, at any resources, the model knows one, one is pending, one failed, and one was left out."""
    space = AtResource(Space({"n": (1, 5)}), 2 / 3, 0.0)
    X = torch.tensor([[0.0, t] for t in (0.0, 1 / 3, 2 / 3)]).double()
    model = LearningCurveProcess(27.0, bounds=(0.0, 1.0), optimise=False).fit(X, -X[:, 1:])
    pending, failed, others = (
        torch.tensor([[code, t]]).double() for code, t in ((0.25, 1.0), (0.5, 1.0), (1.0, 1 / 3))
    )
    options = {"outcomes": outcomes_of(1, "minimize"), "pending": pending, "failed": failed, **QUICK}
    proposal = propose(model, space, 1, others=others, **options)
    assert proposal.codes.tolist() == [[0.75, pytest.approx(2 / 3)]]
    with pytest.raises(SpaceExhaustedError):
        propose(model, space, 2, others=others, **options)


# What is pending, and where --------------------------------------------------------------------------------------------

LINE = Space({"x": (0.0, 1.0)})


def fitted() -> LearningCurveProcess:
    generator = np.random.default_rng(0)
    x, t = generator.random(20), generator.choice([0, 1 / 3, 2 / 3, 1], 20)
    y = np.sin(5 * x) + (1 + x) / (1 + 8 * 27 ** (t - 1))
    X = torch.tensor(np.stack([x, t], -1))
    return LearningCurveProcess(27.0, bounds=(0.0, 1.0)).fit(X, torch.tensor(y)[:, None])


@pytest.mark.parametrize("name", ["lognei", "logei", "ucb", "mes", "kg"])
def test_pending_points_are_where_the_acquisition_function_wants_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values are compared at the resource of the search; what will be learned is learned at the next rungs."""
    seen: list[Tensor] = []

    def spying(*arguments: Any) -> Any:
        name, function = build(*arguments)
        monkeypatch.setattr(
            function, "set_X_pending", lambda X: (seen.append(X), type(function).set_X_pending(function, X))
        )
        return name, function

    monkeypatch.setattr(sys.modules["bayesnn.bo.suggest"], "build_acquisition", spying)
    pending = torch.tensor([[0.2, 0.0], [0.8, 1.0]]).double()
    options = {"num_restarts": 1, "raw_samples": 8, "num_samples": 8}
    propose(
        fitted(),
        AtResource(LINE, 2 / 3, 0.0),
        2,
        acquisition=name,
        outcomes=outcomes_of(1, "minimize"),
        pending=pending,
        **options,
    )
    resources = [[0.0, 1.0], [0.0, 1.0, 0.0]] if name in ("mes", "kg") else [[2 / 3] * 2, [2 / 3] * 3]
    assert [X[:, 1].tolist() for X in seen] == resources
    assert sorted(seen[0][:, 0].tolist()) == pytest.approx([0.2, 0.8])


def setting(model: Any, space: AtResource, tried: Tensor) -> Setting:
    return Setting(OnCodes(model, space), space, tried, tried, outcomes_of(1, "minimize"), None, 64, 4.0, 0)


def test_the_knowledge_gradient_counts_what_the_next_rung_tells() -> None:
    """It is that of the model conditioned on the pending value, whatever it turns out to be."""
    model, space = fitted(), AtResource(LINE, 1.0, 0.0)
    tried = space.compared(space.decode(model.train_inputs[0]))
    pending = torch.tensor([[0.3, 1 / 3]]).double()
    _, gradient = build("kg", setting(model, space, tried), 1, 1)
    gradient.set_X_pending(pending)
    predicted = model.posterior(pending).mean.detach()
    _, conditioned = build("kg", setting(model.condition_on_observations(pending, predicted), space, tried), 1, 0)
    # Both are in units of the spread of predicted means, which a value as predicted leaves as it is.
    points = torch.tensor([[[0.32, 1.0]], [[0.7, 1.0]]]).double()
    found, expected = gradient(points), conditioned(points)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-9)
    gradient.set_X_pending(space.compared(pending))
    assert not torch.allclose(gradient(points), expected, rtol=1e-3)


def test_improvements_averaged_over_the_next_rungs_values_are_those_over_the_pending_trial_itself() -> None:
    """Fantasies at the next rung, and then the improvement over all configurations, the pending one included, is what the
    acquisition function computes from joint draws, but for a constant: by the law of total expectation, exactly."""
    model = fitted()
    pending, candidates, best = [0.3, 1 / 3], [0.35, 0.55, 0.95], 0.6  # best: the lowest at the resource of the search
    points = torch.tensor([[x, 1.0] for x in (*candidates, pending[0])] + [pending]).double()
    posterior = model.posterior(points)
    mean, covariance = posterior.mean[:, 0].numpy(), posterior.distribution.covariance_matrix.numpy()
    generator, nodes = np.random.default_rng(0), np.polynomial.hermite_e.hermegauss(15)
    fantasised, joint = np.zeros(3), np.zeros(3)
    draws = generator.standard_normal((40_000, 4))
    draws = np.concatenate([draws, -draws])
    gain = covariance[:4, 4] / covariance[4, 4]
    root = np.linalg.cholesky(covariance[:4, :4] - np.outer(gain, covariance[4, :4]) + 1e-10 * np.eye(4))
    for node, weight in zip(*nodes, strict=True):
        values = mean[:4] + gain * node * math.sqrt(covariance[4, 4]) + draws @ root.T
        incumbent = np.minimum(best, values[:, 3])
        fantasised += weight / nodes[1].sum() * np.maximum(incumbent[:, None] - values[:, :3], 0).mean(0)
    values = mean[:4] + draws @ np.linalg.cholesky(covariance[:4, :4] + 1e-10 * np.eye(4)).T
    alone = np.maximum(best - values[:, 3], 0).mean()
    joint = np.maximum(best - np.minimum(values[:, :3], values[:, 3:]), 0).mean(0) - alone
    np.testing.assert_allclose(fantasised, joint, rtol=0.05, atol=2e-3)
    assert fantasised.max() > 0.02
