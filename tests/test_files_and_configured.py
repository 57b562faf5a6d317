import inspect
import json
import os
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bayesnn
from bayesnn import BNN, likelihoods, networks, priors
from bayesnn.configured import Configured, build, describe
from bayesnn.files import fingerprint, flatten, read_tensors, unflatten, write_tensors
from bayesnn.inference import HMC, SGHMC, DeepEnsemble, MeanField, Structured
from bayesnn.model import Model

BUILT = [
    likelihoods.Gaussian(noise_std=[0.1, 2.0]),
    likelihoods.StudentT(df=3.0),
    likelihoods.Categorical(num_classes=4),
    priors.StudentT(df=3.0, scale=0.5),
    priors.PerLayer({"0.*": priors.Laplace(scale=2.0)}, default=priors.Horseshoe()),
    networks.mlp(3, 2, hidden=(4, 5), activation="relu"),
    HMC(num_chains=3),
    MeanField(batch_size=7),
    DeepEnsemble(held_out=0.1),
    Structured(SGHMC(num_chains=2), groups=(("*.weight",), ("*.bias", "likelihood.*"))),
]


@pytest.mark.parametrize("value", BUILT, ids=lambda value: type(value).__module__ + "." + type(value).__name__)
def test_what_is_described_can_be_built_again(value):
    text = json.dumps(describe(value))
    again = build(json.loads(text))
    assert type(again) is type(value)
    if isinstance(value, nn.Module):
        assert str(again) == str(value)
    else:
        assert json.dumps(describe(again)) == text
        assert again == value


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        0.1,
        float("inf"),
        "text",
        [1, [2.5, None]],
        (1, ("a*", [2])),
        (),
        {"a": {"b": (1,)}},
        torch.float32,
    ],
)
def test_plain_values_survive(value):
    assert build(json.loads(json.dumps(describe(value)))) == value


def test_numpy_s_numbers_become_plain_ones():
    found = describe([np.int64(3), np.float32(0.5), np.bool_(True)])
    assert json.dumps(found) == "[3, 0.5, true]"


def test_tensors_become_lists():
    assert build(describe(torch.tensor([[1.0, 2.0]]))) == [[1.0, 2.0]]


class Recorded(Configured):
    def __init__(self, a, b=2, *, c=3, **rest):
        self.a = a


def test_arguments_are_recorded_as_they_were_given():
    assert Recorded(1, c=5, d=7)._arguments == {"a": 1, "c": 5, "d": 7}
    assert Recorded(1, 4)._arguments == {"a": 1, "b": 4}
    assert build(describe(Recorded(1, c=[5], d=7)))._arguments == {"a": 1, "c": [5], "d": 7}
    with pytest.raises(TypeError, match="'a'"):
        Recorded()


@pytest.mark.parametrize("value", [lambda x: x, nn.Linear(2, 1), object(), {1: 2}, {"a": print}])
def test_code_is_never_written(value):
    with pytest.raises(TypeError, match="cannot save"):
        describe(value)


@pytest.mark.parametrize("name", ["os.system", "Popen", "NoSuchClass", None, "object"])
def test_unknown_classes_are_never_built(name):
    with pytest.raises(ValueError, match="is no class of this version"):
        build({"class": name, "arguments": {}})
    with pytest.raises(ValueError, match="is no torch dtype"):
        build({"dtype": "load"})


def test_every_class_has_a_name_of_its_own_in_files():
    for name, cls in Configured._classes.items():
        assert cls._saved_as == name
    assert build(describe(likelihoods.StudentT())) == likelihoods.StudentT()
    assert build(describe(priors.StudentT())) == priors.StudentT()
    with pytest.raises(TypeError, match=r"bayesnn.priors.Normal is saved as 'Normal' already.*saved_as="):
        type("Normal", (priors.Prior,), {})
    # A class defined again, as in a notebook, takes the place of the first.
    first, second = (dataclass(frozen=True)(type("Mine", (priors.Prior,), {"__qualname__": "Mine"})) for _ in range(2))
    assert build(describe(second())).__class__ is second and first is not second


# Files ---------------------------------------------------------------------------------------------------------------


def test_tensors_and_description_come_back(tmp_path):
    tensors = {
        "a": torch.randn(3, 2).mT,  # not contiguous
        "b": torch.arange(4, dtype=torch.int64),
        "c": torch.tensor(1.5, dtype=torch.float64),
        "d": torch.zeros(0, 3),
        "e": torch.tensor([True, False]),
        "f": torch.ones(2, requires_grad=True),
    }
    tensors["g"] = tensors["a"]  # shared memory
    path = tmp_path / "folder" / "file"
    write_tensors(path, tensors, {"x": [1, {"y": None}]})
    found, description = read_tensors(path)
    assert description == {"x": [1, {"y": None}]} and found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value)
    assert os.listdir(path.parent) == ["file"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_tensors(path, {"a": torch.ones(2)}, {})
    with pytest.raises(TypeError):
        write_tensors(path, {"a": torch.zeros(2)}, {"x": object()})
    assert read_tensors(path)[0]["a"].tolist() == [1, 1]


def test_what_is_no_file_of_ours(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        read_tensors(tmp_path / "nothing")
    path = tmp_path / "file"
    write_tensors(path, {"a": torch.ones(200)}, {})
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:-1], whole[:40], b"\x80\x04\x95" + whole):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a complete bayesnn file"):
            read_tensors(path)
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="not a complete bayesnn file"):
        read_tensors(path)


class Inner(NamedTuple):
    x: Tensor
    group: dict[str, Tensor]


class Outer(NamedTuple):
    inner: Inner
    count: Tensor


def test_nested_states_flatten_and_come_back():
    state = Outer(Inner(torch.ones(2), {"a.b": torch.zeros(1), "c": torch.ones(1)}), torch.tensor(3))
    flat = flatten(state, "state")
    assert set(flat) == {"state.inner.x", "state.inner.group.a.b", "state.inner.group.c", "state.count"}
    again = unflatten(flat, state, "state")
    assert isinstance(again, Outer) and isinstance(again.inner, Inner)
    assert all(torch.equal(value, flat[name]) for name, value in flatten(again, "state").items())
    with pytest.raises(TypeError, match="a state is made of tensors"):
        flatten({"a": [torch.ones(1)]})


def test_fingerprints():
    a = torch.arange(6.0)
    assert fingerprint(a) == fingerprint(a.clone()) == fingerprint(a.reshape(6))
    others = [
        fingerprint(a + 1e-6),
        fingerprint(a.reshape(2, 3)),
        fingerprint(a.double()),
        fingerprint(a, a),
        fingerprint(a, "x"),
    ]
    assert len({fingerprint(a), *others}) == 6


# Models --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    X = torch.linspace(-1, 1, 10).double()[:, None]
    model = BNN(method=MeanField(num_steps=5, num_draws=4), prior=priors.StudentT(), likelihood=likelihoods.StudentT())
    model.fit(X, X.sin())
    model.save(tmp_path / "model")
    return model, tmp_path / "model", X


def test_a_model_file_holds_data_and_no_code(saved):
    model, path, X = saved
    tensors, description = read_tensors(path)
    assert torch.equal(tensors["data.X"], (X - X.mean()) / X.std())
    assert description["class"] == "BNN" and description["arguments"]["prior"]["class"] == "StudentTPrior"
    loaded = Model.load(path)
    assert loaded.prior == model.prior and loaded.likelihood == model.likelihood and loaded.method == model.method
    assert torch.equal(loaded.predict(X).mean, model.predict(X).mean)


def test_arguments_can_be_replaced_at_loading(saved):
    _, path, _X = saved
    assert BNN.load(path, max_draws=2).max_draws == 2


def test_wrong_files_for_a_model(saved, tmp_path):
    _, path, _ = saved
    with pytest.raises(ValueError, match="holds a 'BNN', not a NNGP"):
        bayesnn.NNGP.load(path)
    tensors, description = read_tensors(path)
    for changes in ({"format": 2}, {"class": "MLP"}, {"class": "Unheard"}):
        write_tensors(tmp_path / "other", tensors, description | changes)
        with pytest.raises(ValueError, match="not a Model of this version"):
            Model.load(tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        Model.load(tmp_path / "nothing")


# Names ---------------------------------------------------------------------------------------------------------------


def test_surrogates_by_name():
    names = bayesnn.surrogates()
    assert names == sorted(names) and {"hmc", "mean-field", "ensemble", "nngp", "cnp", "pfn"} <= set(names)
    assert bayesnn.surrogate("hmc", max_draws=7).max_draws == 7
    assert isinstance(bayesnn.surrogate("ensemble").method, DeepEnsemble)
    assert bayesnn.surrogate("hmc") is not bayesnn.surrogate("hmc")
    with pytest.raises(ValueError, match=r"no surrogate named 'kriging'; there are cnp, "):
        bayesnn.surrogate("kriging")


def test_public_names_are_there_and_documented():
    for name in bayesnn.__all__:
        value = getattr(bayesnn, name)
        assert inspect.getdoc(value), name
