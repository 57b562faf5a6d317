"""Search spaces: round trips, the grid of discrete values, one-hot features and their gradient, bad definitions."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import optuna
import pytest
import torch
from hypothesis import given
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from bayesnn.bo import Space

MIXED = {
    "x": (-1.0, 3.0),
    "n": (1, 10),
    "rate": (1e-5, 1e-1, "log"),
    "width": (8, 512, "log"),
    "kind": ["a", "b", None],
}


@st.composite
def definitions(draw: st.DrawFn) -> dict:
    definition: dict = {}
    for index in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["float", "int", "log", "log int", "choices"]))
        low, width = draw(st.floats(-1e6, 1e6)), draw(st.floats(1e-3, 1e6))
        start, count = draw(st.integers(1, 1000)), draw(st.integers(1, 1000))
        definition[f"p{index}"] = {
            "float": (low, low + width),
            "int": (-start, count),
            "log": (abs(low) + 1e-8, abs(low) + 1e-8 + width, "log"),
            "log int": (start, start + count, "log"),
            "choices": [f"c{k}" for k in range(draw(st.integers(2, 5)))],
        }[kind]
    return definition


@given(definitions(), st.integers(0, 1000))
def test_configurations_codes_and_features_are_the_same_thing(definition: dict, skip: int) -> None:
    space = Space(definition)
    configurations = space.configurations(space.sobol(8, seed=1, skip=skip))
    codes = space.codes(configurations)
    assert codes.dtype == torch.float64 and (codes >= space.bounds[0]).all() and (codes <= space.bounds[1]).all()
    for back in (space.configurations(codes), space.configurations(space.decode(space.features(configurations)))):
        for before, after in zip(configurations, back, strict=True):
            for name, value in before.items():
                assert type(after[name]) is type(value)
                assert after[name] == (pytest.approx(value, rel=1e-9, abs=1e-9) if isinstance(value, float) else value)
    # Optuna knows the same space.
    again = Space.from_distributions(space.distributions())
    assert again == space
    for configuration in configurations:
        for name, distribution in space.distributions().items():
            assert distribution._contains(distribution.to_internal_repr(configuration[name]))


@given(definitions(), st.lists(st.floats(-0.5, 1.5), min_size=4, max_size=4))
def test_any_code_snaps_into_the_space(definition: dict, numbers: list[float]) -> None:
    space = Space(definition)
    d = len(definition)
    code = torch.tensor([numbers[:d]], dtype=torch.float64) * space.bounds[1].clamp_min(1)
    snapped = space.snap(code)
    assert torch.allclose(space.snap(snapped), snapped, atol=1e-12)
    space.codes(space.configurations(snapped))  # raises where a value is outside


def test_units() -> None:
    space = Space(MIXED)
    low = {"x": -1.0, "n": 1, "rate": 1e-5, "width": 8, "kind": "a"}
    middle = {"x": 1.0, "n": 4, "rate": 1e-3, "width": 64, "kind": "b"}
    expected = [[0, 0, 0, 0, 0], [0.5, 1 / 3, 0.5, 0.5, 1]]
    assert np.allclose(space.codes([low, middle]), expected, atol=1e-12)
    features = space.features([middle])
    assert np.allclose(features, [[0.5, 1 / 3, 0.5, 0.5, 0, 1, 0]], atol=1e-12)
    assert space.num_features == 7 and space.size == math.inf
    assert Space({"n": (1, 10), "kind": ["a", "b"]}).size == 20


def test_features_are_differentiable_in_the_numbers() -> None:
    space = Space({"x": (0.0, 2.0), "kind": ["a", "b", "c"], "n": (0, 4)})
    codes = torch.tensor([[0.3, 1.0, 0.5], [0.7, 2.0, 0.25]], dtype=torch.float64, requires_grad=True)
    weights = torch.arange(1.0, 6.0, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((space.encode(codes) * weights).sum(), codes)
    assert torch.equal(gradient, torch.tensor([[1.0, 0.0, 5.0], [1.0, 0.0, 5.0]], dtype=torch.float64))
    batched = codes.detach().expand(3, 2, 2, 3)
    assert torch.equal(space.encode(batched)[1, 1], space.encode(codes.detach()))


def test_grid_holds_each_configuration_once() -> None:
    space = Space({"n": (1, 3), "kind": ["a", "b"], "log": (1, 4, "log")})
    grid = space.configurations(space.grid())
    assert len({tuple(c.values()) for c in grid}) == len(grid) == space.size == 24
    assert [c["n"] for c in Space({"n": (1, 3)}).configurations(Space({"n": (1, 3)}).grid())] == [1, 2, 3]


def test_sobol_points_fill_each_parameter_evenly() -> None:
    space = Space({"n": (1, 4), "kind": ["a", "b"], "x": (0.0, 1.0), "rate": (1.0, 100.0, "log")})
    points = space.configurations(space.sobol(256, seed=3))
    assert [sum(c["n"] == n for c in points) for n in (1, 2, 3, 4)] == [64] * 4
    assert sum(c["kind"] == "a" for c in points) == 128
    assert sum(c["x"] < 0.5 for c in points) == 128 and sum(c["rate"] < 10 for c in points) == 128
    # On the log scale 1 takes from 0.5 to 1.5: half of the way to 4.5.
    logarithmic = Space({"n": (1, 4, "log")})
    assert [c["n"] for c in logarithmic.configurations(logarithmic.sobol(256, seed=3))].count(1) == 128
    assert torch.equal(space.sobol(5, seed=3, skip=7), space.sobol(12, seed=3)[7:])
    assert not torch.equal(space.sobol(5, seed=3), space.sobol(5, seed=4))


def test_steps_of_a_study() -> None:
    given_by_optuna = {
        "s": FloatDistribution(0.1, 0.9, step=0.2),
        "n": IntDistribution(0, 100, step=25),
        "c": CategoricalDistribution(("u", 2, None)),
    }
    space = Space.from_distributions(given_by_optuna)
    values = [
        c["s"] for c in Space.from_distributions({"s": given_by_optuna["s"]}).configurations(torch.eye(1).double())
    ]
    assert values == [pytest.approx(0.9)]
    assert space.size == 5 * 5 * 3
    for configuration in space.configurations(space.grid()):
        for name, distribution in given_by_optuna.items():
            assert distribution._contains(distribution.to_internal_repr(configuration[name]))
    assert space.distributions() == given_by_optuna


@pytest.mark.parametrize(
    "definition, error, message",
    [
        ({}, ValueError, "at least one parameter"),
        ([("x", (0.0, 1.0))], TypeError, "dict"),
        ({"x": (1.0, 0.0)}, ValueError, "x must have low < high"),
        ({"x": (1.0, 1.0)}, ValueError, "low < high"),
        ({"x": (0.0, 1.0, "log")}, ValueError, "x is on the log scale, so low must be positive"),
        ({"n": (-2, 5, "log")}, ValueError, "positive"),
        ({"x": (math.nan, 1.0)}, ValueError, "finite"),
        ({"x": (0.0, math.inf)}, ValueError, "finite"),
        ({"x": (-1e308, 1e308)}, ValueError, "too far apart"),
        ({"x": (0.0, 1.0, "lin")}, TypeError, 'x must be \\(low, high\\), \\(low, high, "log"\\) or a list'),
        ({"x": 3.0}, TypeError, "x must be"),
        ({"x": ("a", "b")}, TypeError, "list of choices"),
        ({"x": (False, True)}, TypeError, "x must be"),
        ({"x": []}, ValueError, "at least two choices"),
        ({"x": ["a"]}, ValueError, "at least two choices"),
        ({"x": ["a", "a"]}, ValueError, "must differ"),
        ({"x": [1, True]}, ValueError, "must differ"),
        ({"x": [0.0, math.nan]}, ValueError, "finite"),
        ({"x": [{}, "a"]}, TypeError, "strings, numbers, booleans or None"),
        ({1: (0.0, 1.0)}, TypeError, "name"),
    ],
)
def test_definitions_that_make_no_sense(definition: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Space(definition)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": 3.1}, "x of the configuration is outside the space: 3.1 isn't a number from -1 to 3"),
        ({"x": math.nan}, "x of"),
        ({"x": "1.0"}, "x of"),
        ({"n": 0}, "n of"),
        ({"n": 1.5}, "a whole number from 1 to 10"),
        ({"n": True}, "n of"),
        ({"kind": "c"}, "one of 'a', 'b', None"),
        ({"extra": 1}, "a configuration of this space has"),
    ],
)
def test_values_outside_the_space(change: dict, message: str) -> None:
    inside = {"x": 0.0, "n": 3, "rate": 1e-2, "width": 16, "kind": None}
    Space(MIXED).codes([inside])
    with pytest.raises(ValueError, match=message):
        Space(MIXED).codes([inside | change])


def test_unknown_distributions() -> None:
    class Other(optuna.distributions.BaseDistribution):
        def to_external_repr(self, internal: float) -> float:
            return internal

        def to_internal_repr(self, external: float) -> float:
            return external

        def single(self) -> bool:
            return False

        def _contains(self, internal: float) -> bool:
            return True

    with pytest.raises(TypeError, match="x has a distribution of an unknown kind"):
        Space.from_distributions({"x": Other()})


def test_wrong_number_of_features() -> None:
    with pytest.raises(ValueError, match="features of this space have 7 columns, found 3"):
        Space(MIXED).decode(torch.zeros(2, 3))
