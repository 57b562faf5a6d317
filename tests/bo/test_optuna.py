"""The sampler in studies as Optuna's users have them: threads, queues, copies, pickles, other samplers' trials, plots."""

from __future__ import annotations

import pickle
import random
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from botorch.models import SingleTaskGP
from botorch.models.model import Model as BotorchModel
from optuna.trial import TrialState
from torch import Tensor

from bayesnn import NNGP
from bayesnn.bo import AutoSurrogate, Fidelity, Space, SurrogateSampler, When
from bayesnn.bo.optimise import local_randomness
from bayesnn.bo.study import configuration_of

DEFINITION = {"x": (0.0, 1.0), "n": (1, 5), "kind": ["a", "b"]}
FAST: dict[str, Any] = {"num_startup": 4, "num_restarts": 1, "raw_samples": 16, "num_samples": 32}


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def sampler(**more: Any) -> SurrogateSampler:
    return SurrogateSampler(**({"surrogate": "nngp", "seed": 0} | FAST | more))


def objective(trial: optuna.Trial) -> float:
    """Define-by-run: Optuna learns the space from the calls."""
    x = trial.suggest_float("x", 0.0, 1.0)
    n = trial.suggest_int("n", 1, 5)
    return (x - 0.3) ** 2 + 0.1 * abs(n - 3) + (trial.suggest_categorical("kind", ["a", "b"]) == "a")


def gp(X: Tensor, Y: Tensor) -> BotorchModel:
    return SingleTaskGP(X, Y).eval()


def test_threads_share_a_sampler() -> None:
    study = optuna.create_study(sampler=sampler(space=DEFINITION))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing falls back
        study.optimize(objective, n_trials=8, n_jobs=2)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 8
    assert len({tuple(trial.params.values()) for trial in study.trials}) == 8
    records = [trial.user_attrs for trial in study.trials]
    assert {record["sampler"] for record in records[:4]} == {"sobol"}
    assert records[-1]["sampler"] == "surrogate" and "fallback" not in records[-1]
    # Each saw what the other was at.
    assert all(record["num_observed"] + record["num_pending"] >= index - 1 for index, record in enumerate(records))


def test_threads_do_not_share_random_numbers() -> None:
    def draws(seed: int) -> list[float]:
        with local_randomness(seed):
            first = torch.rand(1).item() + random.random()
            time.sleep(0.05)  # for another thread to come in
            return [first, torch.rand(1).item() + random.random()]

    alone = [draws(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(draws, range(4))) == alone


@pytest.mark.filterwarnings("ignore:'(n|kind)' of trial 5 is drawn uniformly")
@pytest.mark.parametrize("space", [None, DEFINITION])
def test_what_is_queued_is_tried_as_it_is(space: dict[str, Any] | None) -> None:
    study = optuna.create_study(sampler=sampler(space=space))
    study.optimize(objective, n_trials=4)
    study.enqueue_trial({"x": 0.25, "n": 3, "kind": "b"})
    study.enqueue_trial({"x": 0.75})  # the rest is the sampler's
    study.optimize(objective, n_trials=3)
    assert study.trials[4].params == {"x": 0.25, "n": 3, "kind": "b"}
    assert study.trials[5].params["x"] == 0.75 and set(study.trials[5].params) == {"x", "n", "kind"}
    assert study.trials[6].user_attrs["num_observed"] == 6


def test_a_copied_study_goes_on_alike() -> None:
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=storage, study_name="one", sampler=sampler(space=DEFINITION))
    study.optimize(objective, n_trials=5)
    other = optuna.storages.InMemoryStorage()
    optuna.copy_study(from_study_name="one", from_storage=storage, to_storage=other, to_study_name="two")
    copied = optuna.load_study(study_name="two", storage=other, sampler=sampler(space=DEFINITION))
    assert [trial.user_attrs for trial in copied.trials] == [trial.user_attrs for trial in study.trials]
    for each in (study, copied):
        each.optimize(objective, n_trials=1)
    assert study.trials[-1].params == copied.trials[-1].params
    assert copied.trials[-1].user_attrs["sampler"] == "surrogate"


@pytest.mark.parametrize(
    "surrogate",
    ["nngp", "auto", NNGP(depth=2), AutoSurrogate(["gp"]), gp],
    ids=["name", "auto", "model", "of", "function"],
)
def test_a_pickled_sampler_goes_on_alike(surrogate: Any) -> None:
    """As Optuna's manual has it for studies that are resumed."""
    space = Space({"x": (0.0, 1.0), "kind": ["a", "b"], "n": When((1, 5), kind="b")})
    asked = []
    for pickled in (False, True):
        own = sampler(surrogate=surrogate, space=space)
        study = optuna.create_study(sampler=own)
        for x in space.configurations(space.sobol(4, seed=1)):
            study.add_trial(
                optuna.create_trial(
                    params=x,
                    distributions={name: space.distributions()[name] for name in x},
                    value=x["x"] + x.get("n", 0),
                )
            )
        study.sampler = pickle.loads(pickle.dumps(own)) if pickled else own
        asked.append(configuration_of(study.ask(), space))
        record = study.trials[-1].user_attrs
        assert record["sampler"] == "surrogate" and "fallback" not in record and "independent" not in record
    assert asked[0] == asked[1]


def test_a_sampler_of_curves_can_be_pickled() -> None:
    own = sampler(surrogate="gp", space={"x": (0.0, 1.0)}, fidelity=Fidelity(max_resource=9))
    assert pickle.loads(pickle.dumps(own)).surrogate_name == "gp"


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_trials_of_other_samplers_count() -> None:
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(objective, n_trials=4)
    study.sampler = sampler()
    study.optimize(objective, n_trials=1)
    record = study.trials[-1].user_attrs
    assert record["sampler"] == "surrogate" and record["num_observed"] == 4 and "independent" not in record
    study.sampler = optuna.samplers.PartialFixedSampler({"n": 2}, sampler())
    study.optimize(objective, n_trials=1)
    assert study.trials[-1].params["n"] == 2 and set(study.trials[-1].params) == {"x", "n", "kind"}


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_optunas_plots_take_our_studies() -> None:
    one = optuna.create_study(sampler=sampler(space=DEFINITION))
    two = optuna.create_study(directions=["minimize", "maximize"], sampler=sampler(space=DEFINITION))

    def limited(trial: optuna.Trial) -> float:
        trial.set_constraint("limit", trial.suggest_float("x", 0.0, 1.0) - 0.5)
        if trial.number == 1:
            raise ValueError
        return objective(trial)

    one.optimize(limited, n_trials=5, catch=(ValueError,))
    two.optimize(lambda trial: (objective(trial), trial.params["x"]), n_trials=4)
    plots = optuna.visualization.matplotlib
    for plot in (
        plots.plot_optimization_history,
        plots.plot_slice,
        plots.plot_parallel_coordinate,
        plots.plot_timeline,
    ):
        assert np.size(plot(one)) > 0
    assert np.size(plots.plot_contour(one, params=["x", "n"])) > 0
    front = plots.plot_pareto_front(two)
    drawn = sum(len(collection.get_offsets()) for collection in front.collections)
    assert drawn == 4
