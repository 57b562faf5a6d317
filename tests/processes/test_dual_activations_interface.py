"""Dual activations as objects: by name, saved and built again, what they refuse, the edge of chaos."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import pytest
import torch
from dual_oracles import ALL
from torch.nn import functional

from bayesnn.configured import build, describe
from bayesnn.processes.dual_activations import (
    RBF,
    Cos,
    DualActivation,
    Gaussian,
    LeakyReLU,
    Monomial,
    Numerical,
    Polynomial,
    RectifiedMonomial,
    Sin,
    dual_activation,
)

NAMES = ["identity", "relu", "leaky_relu", "abs", "sign", "erf", "gelu", "sin", "cos", "exp", "gaussian", "rbf"]
CASES: dict[str, DualActivation] = {**ALL, "tanh": Numerical("tanh", 60), "softplus": Numerical("softplus", 60)}
CRITICAL = {"relu": 2.0, "abs": 1.0, "leaky": 2 / 1.09, "erf": 1.5521, "x2": 0.625, "rbf": 1 / 1.2, "identity": 1.0}


@pytest.mark.parametrize("name", CASES)
def test_weight_variance_is_critical(name: str) -> None:
    """chi = weight_var E[phi'^2] = 1 where the variance stays as it is, or in the limit that it grows to."""
    dual = CASES[name]
    weight_var = dual.critical_weight_var
    assert weight_var == pytest.approx(CRITICAL.get(name, weight_var), rel=1e-4)
    var = torch.logspace(-3, 6, 200_001, dtype=torch.float64)
    kappa, kappa_dot = dual.diagonal(var)
    gain = weight_var * kappa + 0.1 - var
    if name == "sign":
        assert weight_var == 1 and not kappa_dot.any()
    elif name == "softplus" or (gain > 0.09).all():  # no fixed point: linear growth
        assert weight_var * dual.diagonal(torch.tensor(1e6, dtype=torch.float64)).kappa_dot.item() == pytest.approx(
            1, abs=2e-3
        )
    else:
        nearest = (gain / var).abs() + (weight_var * kappa_dot - 1).abs()
        assert nearest.min() < 1e-3


@pytest.mark.parametrize("name", CASES)
def test_saved_and_built_again(name: str) -> None:
    dual = CASES[name]
    again = build(json.loads(json.dumps(describe(dual))))
    assert type(again) is type(dual) and again.name == dual.name
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    assert torch.equal(again.function(x), dual.function(x))
    assert describe(again) == describe(dual)
    with pytest.raises(dataclasses.FrozenInstanceError):
        dual.name = "other"


@pytest.mark.parametrize("name", NAMES)
def test_by_name(name: str) -> None:
    dual = dual_activation(name)
    assert dual.name == name
    assert dual_activation(dual) is dual


@pytest.mark.parametrize(
    "name, function",
    [
        ("relu", torch.relu),
        ("leaky_relu", functional.leaky_relu),
        ("abs", torch.abs),
        ("sign", torch.sign),
        ("erf", torch.erf),
        ("gelu", functional.gelu),
        ("sin", torch.sin),
        ("cos", torch.cos),
        ("exp", torch.exp),
    ],
)
def test_functions_are_pytorchs(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.linspace(-3, 3, 13)
    torch.testing.assert_close(dual_activation(name).function(x), function(x))


def test_unknown_activation_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"activation: found 'swosh'.*'relu'.*'erf'.*quadrature does 'tanh'"):
        dual_activation("swosh")
    with pytest.raises(TypeError, match=r"activation: found builtin_function_or_method.*Numerical\(function\)"):
        dual_activation(torch.tanh)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: LeakyReLU(float("nan")), "slope: found nan, want a finite number"),
        (lambda: Sin(frequency=float("inf")), "frequency: found inf"),
        (lambda: Cos(amplitude="1"), "amplitude: found '1'"),
        (lambda: Gaussian(0.5), "exponent: found 0.5, want a negative number"),
        (lambda: RBF(0.0), "gamma: found 0.0, want a positive number"),
        (lambda: Monomial(0), "degree: found 0, want an integer of at least 1"),
        (lambda: RectifiedMonomial(1), "degree: found 1, want an integer of at least 2"),
        (lambda: Polynomial([1.0, 0.0]), r"coefficients: found \[1.0, 0.0\]"),
        (lambda: Polynomial([1.0, float("nan")]), r"coefficients\[1\]: found nan"),
    ],
)
def test_wrong_arguments(wrong: Callable[[], DualActivation], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()
