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

from bayesnn.bo import Ordinal, Space, When

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
        ({"x": (0.0, 1.0, "lin")}, TypeError, 'x must be \\(low, high\\), \\(low, high, "log"\\), a list'),
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


NESTED = {
    "optimizer": ["adam", "sgd", "none"],
    "momentum": When((0.0, 0.9), optimizer=["sgd"]),
    "rate": When((1e-4, 1e-1, "log"), optimizer=["adam", "sgd"]),
    "schedule": When(["flat", "steps"], optimizer=["adam", "sgd"]),
    "steps": When((1, 4), schedule="steps"),
    "size": Ordinal(["small", "medium", "large"]),
}


def test_conditions() -> None:
    space = Space(NESTED)
    for configuration in space.configurations(space.sobol(64, seed=0)):
        names = {"optimizer", "size"}
        names |= {"rate", "schedule"} if configuration["optimizer"] != "none" else set()
        names |= {"momentum"} if configuration["optimizer"] == "sgd" else set()
        names |= {"steps"} if configuration.get("schedule") == "steps" else set()
        assert set(configuration) == names
        assert space.configurations(space.codes([configuration])) == [pytest.approx(configuration)]
        assert space.configurations(space.decode(space.features([configuration]))) == [pytest.approx(configuration)]
    # What doesn't exist makes no difference: to the features, nor to the code that a code snaps to.
    codes = space.sobol(200, seed=1)
    without = codes[:, 0] == 2
    other = codes.clone()
    other[without, 1:5] = space.sobol(200, seed=2)[without, 1:5]
    assert without.any() and torch.equal(space.encode(codes), space.encode(other))
    assert torch.equal(space.snap(codes), space.snap(other))
    assert "steps: a whole number from 1 to 4 when schedule is 'steps'" in repr(space)


def test_a_finite_space_with_conditions_counts_what_differs() -> None:
    space = Space({"kind": ["a", "b"], "n": When((1, 3), kind="a"), "m": When((1, 2), n=[2, 3])})
    # a: n = 1, or n = 2 or 3 with two m each; b.
    assert space.size == 6 and len(space.grid()) == 6
    configurations = space.configurations(space.grid())
    assert len({str(sorted(each.items())) for each in configurations}) == 6
    assert Space({"kind": ["a", "b"], "n": When((1, 3), kind="b")}) != Space(
        {"kind": ["a", "b"], "n": When((1, 3), kind="a")}
    )


def test_sizes_of_spaces_with_conditions_are_counted_not_enumerated() -> None:
    many = {f"p{k}": When((0, 9), kind="a") for k in range(12)}
    assert Space({"kind": ["a", "b", "c"]} | many).size == 10**12 + 2
    assert Space({"n": (1, 10**9), "m": When((1, 4), n=[1, 2])}).size == 10**9 + 6
    assert Space({"kind": ["a", "b"], "x": When((0.0, 1.0), kind="a")}).size == math.inf
    assert Space(NESTED).size == math.inf


def test_ordinals_are_numbers_with_few_values() -> None:
    space = Space({"size": Ordinal(["s", "m", "l"])})
    assert space.codes([{"size": value} for value in "sml"]).flatten().tolist() == [0.0, 0.5, 1.0]
    assert space.step_codes == {0: [0.0, 0.5, 1.0]} and not space.category_codes and space.num_features == 1
    assert space.configurations(torch.tensor([[0.2], [0.3], [0.9]])) == [{"size": "s"}, {"size": "m"}, {"size": "l"}]
    assert space.distributions() == {"size": CategoricalDistribution(("s", "m", "l"))}
    shares = torch.tensor([code for (code,) in space.sobol(300, seed=0).tolist()])
    assert all(abs(float((shares == code).float().mean()) - 1 / 3) < 0.02 for code in (0.0, 0.5, 1.0))


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: Ordinal("abc"), TypeError, "choices of an Ordinal must be a list, found 'abc'"),
        (lambda: Ordinal(["a"]), ValueError, "an Ordinal needs at least two choices"),
        (lambda: When((0, 1)), ValueError, "When needs the values of one other parameter, found 0"),
        (lambda: When((0, 1), a=1, b=2), ValueError, "found 2"),
        (lambda: When((0, 1), a=[]), ValueError, "When needs at least one value of a"),
        (
            lambda: Space({"n": When((0, 1), k="a"), "k": ["a", "b"]}),
            ValueError,
            "n depends on 'k', which must be a parameter",
        ),
        (
            lambda: Space({"k": ["a", "b"], "n": When((0, 1), k="c")}),
            ValueError,
            "in a way that can't be: 'c' isn't one of",
        ),
        (
            lambda: Space({"x": (0.0, 1.0), "n": When((0, 1), x=0.5)}),
            ValueError,
            "n must depend on a parameter with separate",
        ),
        (lambda: Space({"k": ["a", "b"], "n": When((1, 0), k="a")}), ValueError, "n must have low < high"),
        (
            lambda: Space(NESTED).codes([{"optimizer": "none", "size": "small", "rate": 0.01}]),
            ValueError,
            "of this space with these values has .'optimizer', 'size'., found",
        ),
    ],
)
def test_conditions_and_orders_that_make_no_sense(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
