"""Our surrogates in Ax: the same posterior, every kind of problem, held-out folds, files and databases."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("ax")

from ax.adapter.cross_validation import cross_validate
from ax.adapter.registry import Generators
from ax.api.client import Client
from ax.api.configs import ChoiceParameterConfig, RangeParameterConfig, StorageConfig
from ax.core.search_space import SearchSpaceDigest
from ax.generators.torch.botorch_modular.surrogate import Surrogate, SurrogateSpec
from ax.storage.sqa_store.db import create_all_tables, get_engine, init_engine_and_session_factory
from botorch.acquisition.objective import ScalarizedPosteriorTransform
from botorch.sampling.normal import SobolQMCNormalSampler
from botorch.utils.datasets import SupervisedDataset

import bayesnn
from bayesnn import BNN, NNGP, PFN, BayesnnWarning
from bayesnn.bo.ax import SurrogateModel, generation_strategy, model_config
from bayesnn.inference import DeepEnsemble

BOUNDS = [(0.0, 10.0), (-1.0, 1.0)]
Outcomes = Mapping[str, float]


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("ax").setLevel(logging.ERROR)


def ensemble() -> BNN:
    return BNN(method=DeepEnsemble(num_members=5, num_steps=50))


def data(num_rows: int = 8, outcomes: tuple[str, ...] = ("loss",), **more: Any) -> SupervisedDataset:
    generator = torch.Generator().manual_seed(0)
    X = torch.rand(num_rows, 2, generator=generator).double() * torch.tensor([10.0, 2.0]) - torch.tensor([0.0, 1.0])
    Y = torch.stack([(k + 1) * torch.sin(X[:, 0] / 3) + X[:, 1] for k in range(len(outcomes))], -1)
    return SupervisedDataset(X, Y, feature_names=["u", "v"], outcome_names=list(outcomes), **more)


def digest() -> SearchSpaceDigest:
    return SearchSpaceDigest(feature_names=["u", "v"], bounds=BOUNDS)


def fitted(surrogate: Any, dataset: SupervisedDataset) -> Any:
    """The model that Ax builds for a data set."""
    own = Surrogate(SurrogateSpec(model_configs=[model_config(surrogate, seed=3)]))
    own.fit([dataset], digest())
    return own.model


def to_cube(X: torch.Tensor) -> torch.Tensor:
    low, high = torch.tensor(BOUNDS).double().T
    return (X - low) / (high - low)


# The model --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("surrogate", ["nngp", "student-t", "pfn", "gp", NNGP(depth=2), ensemble()], ids=str)
def test_ax_sees_the_posterior_of_the_surrogate_in_the_unit_cube(surrogate: Any) -> None:
    dataset = data(12)
    model = fitted(surrogate, dataset)
    unfitted = bayesnn.surrogate(surrogate) if isinstance(surrogate, str) else surrogate
    ours = unfitted.fit(to_cube(dataset.X), dataset.Y, seed=3)
    X = torch.tensor([[1.0, 0.2], [7.0, -0.9]]).double()
    theirs, expected = model.posterior(X), ours.posterior(to_cube(X))
    assert torch.allclose(theirs.mean, expected.mean) and torch.allclose(theirs.variance, expected.variance)
    noisy = model.posterior(X, observation_noise=True).variance
    assert torch.allclose(noisy, ours.posterior(to_cube(X), observation_noise=True).variance)
    # What Ax does for one objective.
    transform = ScalarizedPosteriorTransform(torch.tensor([-2.0]).double(), offset=1.0)
    scalar = model.posterior(X, posterior_transform=transform)
    draws = expected.rsample(torch.Size([64]))
    assert scalar.mean.shape == (2, 1) and draws.shape == (64, 2, 1)
    assert torch.allclose(scalar.mean, 1 - 2 * expected.mean, atol=0.05)
    assert torch.allclose(scalar.variance, 4 * expected.variance, rtol=0.2)
    assert torch.equal(model.train_inputs[0], dataset.X) and torch.allclose(model.train_targets, dataset.Y)


def test_auto_is_the_preferred_one_where_there_is_too_little_to_choose_by() -> None:
    model = fitted("auto", data(9))
    assert isinstance(model.surrogate, type(bayesnn.surrogate("gp")))


def test_fantasies_and_more_observations_are_in_axs_numbers() -> None:
    model, dataset = fitted("nngp", data(12)), data(12)
    X, Y = torch.tensor([[5.0, 0.5]]).double(), torch.tensor([[3.0]]).double()
    conditioned = model.condition_on_observations(X, Y)
    ours = bayesnn.surrogate("nngp").fit(to_cube(dataset.X), dataset.Y, seed=3)
    expected = ours.condition_on_observations(to_cube(X), Y).posterior(to_cube(X))
    assert torch.allclose(conditioned.posterior(X).mean, expected.mean)
    assert abs(conditioned.posterior(X).mean - model.posterior(X).mean).item() > 0.1
    assert model.subset_output([0]).num_outputs == 1
    fantasies = model.fantasize(X, SobolQMCNormalSampler(torch.Size([4]), seed=0))
    assert fantasies.posterior(X.expand(4, 1, 2)).mean.shape == (4, 1, 1)


def test_each_fold_is_held_out() -> None:
    """Ax loads the parameters of the model of all rows into that of a fold: nothing of a held-out row may come along."""
    client = client_of({"x": (0.0, 4.0)}, "-loss", random_seed=0)
    for x in (0.0, 1.0, 2.0, 3.0, 4.0):
        client.complete_trial(client.attach_trial({"x": x}), {"loss": x if x < 4 else 100.0})
    adapter = Generators.BOTORCH_MODULAR(
        experiment=client._experiment,
        surrogate_spec=SurrogateSpec(model_configs=[model_config("nngp")]),
        transforms=[],
    )
    results = cross_validate(adapter)
    X, Y = torch.arange(5.0).double().unsqueeze(-1) / 4, torch.tensor([[0.0], [1.0], [2.0], [3.0], [100.0]]).double()
    for result in results:
        row = round(result.observed.features.parameters["x"])
        kept = torch.arange(5) != row
        ours = bayesnn.surrogate("nngp").fit(X[kept], Y[kept], seed=0).posterior(X[[row]])
        assert result.predicted.means[0] == pytest.approx(ours.mean.item(), rel=1e-6)
    assert len(results) == 5


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"surrogate": "oracle"}, ValueError, "no surrogate named 'oracle'; there are"),
        ({"surrogate": 3}, TypeError, "surrogate must be a name or an unfitted bayesnn model, found int"),
        ({"surrogate": BNN(torch.nn.Linear(2, 1))}, TypeError, "cannot save"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"num_startup": 0}, ValueError, "num_startup must be at least 1"),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        generation_strategy(**arguments)


def test_what_the_surrogates_cannot_do_is_said() -> None:
    with pytest.raises(TypeError, match=r"PFN depend on the points asked for.*use bayesnn.bo.suggest"):
        fitted(PFN(joint="autoregressive"), data(12))
    with pytest.raises(TypeError, match="have no fidelity_features"):
        SurrogateModel.construct_inputs(data(), surrogate="nngp", fidelity_features=[1])
    with pytest.warns(BayesnnWarning, match="the standard errors told for loss are left aside"):
        fitted("nngp", data(Yvar=torch.full((8, 1), 0.1).double()))


# Problems ---------------------------------------------------------------------------------------------------------------


def client_of(
    parameters: Mapping[str, Any],
    objective: str,
    constraints: tuple[str, ...] = (),
    surrogate: Any = "nngp",
    num_startup: int = 4,
    storage: str | None = None,
    random_seed: int = 0,
) -> Client:
    config = None if storage is None else StorageConfig(url=storage)
    client = Client(storage_config=config, random_seed=random_seed)
    client.configure_experiment(
        name="experiment",
        parameters=[
            ChoiceParameterConfig(name=name, values=values, parameter_type="str", is_ordered=False)
            if isinstance(values, list)
            else RangeParameterConfig(
                name=name, bounds=values, parameter_type="int" if isinstance(values[0], int) else "float"
            )
            for name, values in parameters.items()
        ],
    )
    client.configure_optimization(objective=objective, outcome_constraints=list(constraints))
    client.set_generation_strategy(generation_strategy(surrogate, num_startup=num_startup))
    return client


def search(client: Client, f: Callable[..., Outcomes], num_trials: int, q: int = 1) -> list[dict[str, Any]]:
    """Run trials, q at once; all of them."""
    found = []
    for _ in range(num_trials // q):
        asked = client.get_next_trials(max_trials=q)
        assert len(asked) == q
        for index, x in asked.items():
            client.complete_trial(index, f(**x))
            found.append(x)
    return found


def by_surrogate(client: Client) -> list[int]:
    """The numbers of the trials that the surrogate suggested."""
    return [
        index
        for index, trial in client._experiment.trials.items()
        if any(run._generation_node_name == "MBM" for run in trial.generator_runs)
    ]


@pytest.mark.parametrize("surrogate", ["nngp", "ensemble"])
def test_one_objective(surrogate: str) -> None:
    client = client_of({"x": (0.0, 1.0)}, "-loss", surrogate=surrogate)
    tried = search(client, lambda x: {"loss": (x - 0.3) ** 2}, 7)
    assert by_surrogate(client) == [4, 5, 6] and len({x["x"] for x in tried}) == 7
    # The start is at 0.47 and beyond.
    assert min(abs(x["x"] - 0.3) for x in tried[:4]) > 0.15 > min(abs(x["x"] - 0.3) for x in tried[4:])


def test_a_constraint_is_kept() -> None:
    client = client_of({"x": (0.0, 1.0)}, "-loss", ("size <= 0.5",))
    tried = search(client, lambda x: {"loss": -x, "size": x + 0.2}, 7)
    # Where the constraint is kept, 0.3 is best; nothing of the start keeps it.
    assert min(x["x"] for x in tried[:4]) > 0.3
    assert all(x["x"] < 0.35 for x in tried[4:]) and any(0.25 < x["x"] <= 0.3 for x in tried[4:])


def test_a_mixed_space_in_batches() -> None:
    client = client_of({"x": (0.0, 1.0), "n": (1, 5), "kind": ["a", "b", "c"]}, "-loss", num_startup=3)
    tried = search(client, lambda x, n, kind: {"loss": (x - 0.3) ** 2 + abs(n - 2) + (kind != "b")}, 6, q=3)
    assert len({tuple(x.values()) for x in tried}) == 6 and by_surrogate(client) == [3, 4, 5]
    assert all(isinstance(x["n"], int) and x["kind"] in "abc" for x in tried)


@pytest.mark.parametrize("surrogate", ["nngp", ensemble()], ids=["gaussian", "draws"])
def test_two_objectives(surrogate: Any) -> None:
    client = client_of({"x": (0.0, 1.0)}, "-first, -second", surrogate=surrogate, num_startup=5)
    tried = search(client, lambda x: {"first": x**2, "second": (x - 0.5) ** 2}, 6 if surrogate != "nngp" else 7)
    assert by_surrogate(client) == list(range(5, len(tried))) and len({x["x"] for x in tried}) == len(tried)
    if surrogate == "nngp":  # between the two optima nothing is better in both
        assert all(0 <= x["x"] <= 0.55 for x in tried[5:])
    assert client.get_pareto_frontier()


# Kept -------------------------------------------------------------------------------------------------------------------

GO_ON = """
import sys
import bayesnn.bo.ax
from ax.api.client import Client
from ax.api.configs import StorageConfig

path = sys.argv[1]
if path.endswith(".json"):
    client = Client.load_from_json_file(path)
else:
    client = Client.load_from_database("experiment", StorageConfig(url="sqlite:///" + path))
client._random_seed = 0
print(repr(client.get_next_trials(max_trials=1)))
"""


@pytest.mark.parametrize("kept", ["experiment.json", "experiment.db"])
def test_another_process_goes_on_as_this_one_would(tmp_path: Path, kept: str) -> None:
    path = tmp_path / kept
    storage = None if kept.endswith("json") else f"sqlite:///{path}"
    if storage is not None:
        init_engine_and_session_factory(url=storage)
        create_all_tables(get_engine())
    client = client_of({"x": (0.0, 1.0)}, "-loss", surrogate=NNGP(depth=2), storage=storage)
    search(client, lambda x: {"loss": (x - 0.3) ** 2}, 5)
    if storage is None:
        client.save_to_json_file(str(path))
    found = subprocess.run(
        [sys.executable, "-c", GO_ON, str(path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert found.returncode == 0, found.stderr[-3000:]
    ours, theirs = client.get_next_trials(max_trials=1), eval(found.stdout.splitlines()[-1])
    assert list(theirs) == [5] and theirs[5]["x"] == pytest.approx(ours[5]["x"], abs=1e-6)
