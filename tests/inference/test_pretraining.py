"""Recipes: written, read, trained, interrupted, gone on from, and turned into weights with a card."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bayesnn.cli import app
from bayesnn.files import read_tensors
from bayesnn.inference.amortized import CausalTasks, GridGPTasks, MetaTraining, SetClassifier, SetTransformer
from bayesnn.inference.amortized.meta_training import MetaTarget
from bayesnn.inference.amortized.pretraining import export, from_checkpoint, launched_fabric, load_start, train
from bayesnn.inference.amortized.recipes import Recipe, read_recipe, write_recipe
from bayesnn.inference.amortized.weights import load_network

TRAINING = MetaTraining(num_steps=4, max_context=10, num_queries=8, rows_per_batch=128, num_warmup=2)
SMALL = {"width": 16, "num_layers": 2, "num_heads": 2}
RECIPES = {
    "regression": Recipe("tiny", GridGPTasks(max_features=1), TRAINING, settings=SMALL, num_buckets=20),
    "classes": Recipe("tiny", CausalTasks(4, 3), TRAINING, network="classifier", settings=SMALL),
    "deep set": Recipe("tiny", GridGPTasks(max_features=1), TRAINING, network="deep-set", settings={"width": 16}),
}


@pytest.mark.parametrize("name", RECIPES)
def test_trains_resumes_and_exports(name, tmp_path):
    recipe, lines = RECIPES[name], []
    trained = train(recipe, tmp_path / "state", log=lines.append, log_every=2)
    assert [line.split()[1] for line in lines] == ["2", "4"]
    assert all(("gap to the exact answer" in line) == (name != "classes") for line in lines)
    again, num_steps = from_checkpoint(recipe, tmp_path / "state")
    assert num_steps == 4
    card = export(recipe, again, num_steps, tmp_path, "a test", num_tasks=4)
    shipped, read = load_network(tmp_path / "tiny.safetensors")
    assert read == json.loads(json.dumps(card)) | {"sha256": read["sha256"]}
    for row in read["held_out"]["by_context_size"].values():
        assert ("nll" if name == "classes" else "gap_y") in row
    for one, two in zip(trained.state_dict().values(), shipped.state_dict().values(), strict=True):
        assert torch.equal(one, two)


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    recipe = RECIPES["regression"]
    train(recipe, tmp_path / "state", log=lambda line: None)
    others = (
        replace(recipe, prior=GridGPTasks(max_features=1, noise_stds=(0.2,))),
        replace(recipe, seed=1),
        replace(recipe, training=replace(TRAINING, lr=0.1)),
    )
    for other in others:
        with pytest.raises(ValueError, match="isn't of the recipe 'tiny': it has another"):
            from_checkpoint(other, tmp_path / "state")


def test_the_watch_changes_nothing():
    """Logs more or less often, the network comes out the same."""
    one, two = (train(RECIPES["regression"], log=lambda line: None, log_every=every).state_dict() for every in (1, 100))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_network_covers_its_prior():
    network = Recipe("any", GridGPTasks(), TRAINING, num_buckets=40).build_network()
    assert isinstance(network, SetTransformer) and network.num_buckets == 40 and network.max_features == 2
    assert network.borders[0] < -3 and network.borders[-1] > 3
    assert bool((network.borders.diff() > 0).all()) and bool((network.tail_scales > 0).all())
    classifier = RECIPES["classes"].build_network()
    assert isinstance(classifier, SetClassifier) and classifier.num_outputs == 3


def test_a_second_training(tmp_path):
    """It goes on from the first one's network, with finer histograms; from a file or from scratch: the same."""
    first = RECIPES["regression"]
    changes = {"before": first, "max_width": 0.3, "more_layers": 1, "num_processes": 2}
    second = replace(first, name="second", training=replace(TRAINING, num_steps=3), seed=1, **changes)
    export(first, train(first, log=lambda line: None), 4, tmp_path, "a test", num_tasks=2)
    start, hardware = load_start(second, tmp_path / "tiny.safetensors")
    assert hardware == "a test"
    at_once = train(second, tmp_path / "state", log=lambda line: None)
    from_file = train(second, log=lambda line: None, start=start)
    assert all(torch.equal(a, b) for a, b in zip(at_once.parameters(), from_file.parameters(), strict=True))
    assert from_file.borders[1:-1].diff().max() <= 0.3 + 1e-6 and from_file.num_buckets > start.num_buckets
    assert len(from_file.layers) == len(start.layers) + 1 and from_file.process_heads.num_processes == 2
    for begin in (start, None):
        again, num_steps = from_checkpoint(second, tmp_path / "state", begin)
        assert num_steps == 3
        assert all(torch.equal(a, b) for a, b in zip(at_once.parameters(), again.parameters(), strict=True))
    card = export(second, from_file, 3, tmp_path, "a test", num_tasks=2)
    assert card["steps_before"] == 4
    write_recipe(tmp_path / "second.json", second)
    assert read_recipe(tmp_path / "second.json") == second
    command = ["pretrain", str(tmp_path / "second.json"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*command, "--start", str(tmp_path / "tiny.safetensors")])
    assert result.exit_code == 0, result.output
    told, card = load_network(tmp_path / "out" / "second.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(told.parameters(), from_file.parameters(), strict=True))
    assert card["hardware"] == "a test; then 1 x cpu, 32-true"


def test_a_second_training_of_something_else(tmp_path):
    first = RECIPES["regression"]
    second = replace(first, before=first)
    export(first, train(first, log=lambda line: None), 2, tmp_path, "a test", num_tasks=2)
    with pytest.raises(ValueError, match="has 2 steps behind it, its recipe has 4"):
        load_start(second, tmp_path / "tiny.safetensors")
    with pytest.raises(ValueError, match="isn't of the recipe before 'tiny', by its card"):
        load_start(replace(second, before=replace(first, seed=3)), tmp_path / "tiny.safetensors")
    with pytest.raises(ValueError, match="begins with random weights, so there is no start"):
        load_start(first, tmp_path / "tiny.safetensors")
    for changed, error, message in [
        ({"before": "tiny"}, TypeError, "before must be a Recipe or None, found str"),
        ({"settings": {"width": 32}}, ValueError, "network and settings must be those of the recipe before"),
        (
            {"prior": GridGPTasks(max_features=2)},
            ValueError,
            "prior must have as many features as the one before, 1, found 2",
        ),
        ({"max_width": 0.0}, ValueError, "max_width must be"),
        (
            {"before": None, "max_width": 0.1},
            ValueError,
            "max_width refines the network of a recipe before, and there is none",
        ),
        (
            {"before": RECIPES["deep set"], "network": "deep-set", "settings": {"width": 16}, "max_width": 0.1},
            ValueError,
            "max_width is of histograms, which a network of kind 'deep-set' doesn't have",
        ),
        ({"more_layers": -1}, ValueError, "more_layers must be"),
        (
            {"before": None, "more_layers": 1},
            ValueError,
            "more_layers deepens the network of a recipe before, and there is none",
        ),
        (
            {"before": RECIPES["deep set"], "network": "deep-set", "settings": {"width": 16}, "more_layers": 1},
            ValueError,
            "more_layers is of transformers, a network of kind 'deep-set' has none",
        ),
        ({"num_processes": 1.5}, TypeError, "num_processes must be"),
        (
            {"before": None, "num_processes": 1},
            ValueError,
            "num_processes are added to the network of a recipe before, and there is none",
        ),
        (
            {"before": RECIPES["deep set"], "network": "deep-set", "settings": {"width": 16}, "num_processes": 1},
            ValueError,
            "num_processes is of transformers, a network of kind 'deep-set' has none",
        ),
    ]:
        with pytest.raises(error, match=message):
            replace(second, **changed)


@pytest.mark.parametrize("name", ["regression", "gp-small", "bo", "tabular-classification", "cnp-gp-small"])
def test_shipped_recipes(name):
    recipe = read_recipe(name)
    batch = recipe.prior(3, 20, torch.Generator().manual_seed(0))
    assert batch.X.shape == (3, 20, recipe.prior.max_features)


def test_a_recipe_comes_back_from_its_file(tmp_path):
    write_recipe(tmp_path / "recipe.json", RECIPES["classes"])
    assert read_recipe(tmp_path / "recipe.json") == RECIPES["classes"]


def test_what_is_no_recipe(tmp_path):
    with pytest.raises(FileNotFoundError, match="want a file, or one of bo, cnp-gp-small, gp-small"):
        read_recipe("nothing")
    for text in ("{", json.dumps({"class": "Recipe", "arguments": {}}), json.dumps([1])):
        (tmp_path / "recipe.json").write_text(text)
        with pytest.raises(ValueError, match="holds no recipe"):
            read_recipe(tmp_path / "recipe.json")
    with pytest.raises(ValueError, match="network must be one of transformer, classifier, deep-set"):
        Recipe("x", GridGPTasks(), TRAINING, network="tree")
    with pytest.raises(TypeError, match="prior must be a prior over tasks that has max_features"):
        Recipe("x", lambda *arguments: None, TRAINING)
    for changed, error, message in [
        ({"name": "../up"}, ValueError, "name must be a file's name"),
        ({"training": None}, TypeError, "training must be a MetaTraining"),
        ({"num_buckets": 2}, ValueError, "num_buckets must be at least 3"),
        ({"seed": "a"}, TypeError, "seed must be an integer"),
        ({"settings": [1]}, TypeError, "settings must be a dictionary"),
        ({"network": "classifier"}, ValueError, "network must be 'classifier' for a prior of classes, and no other"),
    ]:
        with pytest.raises(error, match=message):
            replace(RECIPES["regression"], **changed)


def test_command_line(tmp_path):
    write_recipe(tmp_path / "recipe.json", RECIPES["regression"])
    arguments = ["pretrain", str(tmp_path / "recipe.json"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--checkpoint", str(tmp_path / "state")])
    assert result.exit_code == 0, result.output
    trained, card = load_network(tmp_path / "out" / "tiny.safetensors")
    assert card["steps_done"] == 4 and card["hardware"] == "1 x cpu, 32-true"
    result = CliRunner().invoke(app, [*arguments, "--checkpoint", str(tmp_path / "state"), "--export"])
    assert result.exit_code == 0, result.output
    exported, _ = load_network(tmp_path / "out" / "tiny.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), exported.parameters(), strict=True))
    result = CliRunner().invoke(app, [*arguments, "--export"])
    assert result.exit_code == 2 and "--export needs --checkpoint" in result.output


def test_two_devices(tmp_path):
    """The command in two processes: it ends, one card is written, and both processes hold the same state."""
    pytest.importorskip("lightning_fabric")
    write_recipe(tmp_path / "recipe.json", RECIPES["regression"])
    command = [
        str(Path(sys.executable).parent / "bayesnn"),
        *("pretrain", str(tmp_path / "recipe.json"), "--out", str(tmp_path / "out")),
        *("--checkpoint", str(tmp_path / "state"), "--devices", "2"),
    ]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    network, card = load_network(tmp_path / "out" / "tiny.safetensors")
    assert card["hardware"] == "2 x cpu, 32-true" and card["steps_done"] == 4
    states = [read_tensors(tmp_path / "state" / place / "state.safetensors")[0] for place in (".", "process-1")]
    names = [name for name in states[0] if name.startswith("state.params")]
    assert len(names) > 10 and all(torch.equal(states[0][name], states[1][name]) for name in names)
    alone = train(RECIPES["regression"], log=lambda line: None)
    assert not all(torch.equal(a, b) for a, b in zip(network.parameters(), alone.parameters(), strict=True))


def test_half_precision():
    """Parameters stay in single precision; the loss and its gradient are nearly the same."""
    pytest.importorskip("lightning_fabric")
    recipe, fabric = RECIPES["regression"], launched_fabric("cpu", 1, "bf16-mixed")
    infos = []
    for own in (None, fabric):
        target = MetaTarget(recipe.build_network(), recipe.prior, own)
        state = recipe.training.init(target, torch.Generator())
        state, info = recipe.training.step(target, state, torch.Generator().manual_seed(1))
        assert all(value.dtype == torch.float32 for value in state.params.values())
        infos.append(info)
    full, half = infos
    assert 0 < abs(float(full.loss / half.loss - 1)) < 0.01
    assert 0 < abs(float(full.grad_norm / half.grad_norm - 1)) < 0.03
    assert all(
        bool(value.isfinite().all()) for value in train(recipe, fabric=fabric, log=lambda line: None).parameters()
    )


def test_settings_as_people_write_them(tmp_path):
    path = tmp_path / "recipe.json"
    write_recipe(path, RECIPES["regression"])
    description = json.loads(path.read_text())
    description["arguments"]["settings"] = {"width": 8, "num_layers": 1, "num_heads": 2}
    path.write_text(json.dumps(description))
    assert read_recipe(path).settings == {"width": 8, "num_layers": 1, "num_heads": 2}
    description["arguments"]["settings"] = {"num_layer": 1}
    path.write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"settings of the recipe 'tiny' don't fit its network: .*num_layer"):
        read_recipe(path).build_network()
