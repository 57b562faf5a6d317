"""Duals by quadrature, against closed forms and double quadrature."""

from __future__ import annotations

import warnings

import pytest
import torch
from dual_oracles import quadrature, scalars

from bayesnn import BayesnnWarning
from bayesnn.configured import describe
from bayesnn.processes.dual_activations import Erf, Numerical, ReLU, dual_activation

TANH = [((1.3, 0.7, 0.4), 0.15091976), ((2.0, 1.5, -1.1), -0.29133257), ((0.5, 0.5, 0.45), 0.24443405)]


@pytest.mark.parametrize("covariance, expected", TANH)
def test_tanh_equals_the_published_values(covariance: tuple[float, float, float], expected: float) -> None:
    assert Numerical("tanh").kappa(*scalars(*covariance)).item() == pytest.approx(expected, abs=5.1e-9)


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "silu", "mish", "softplus", "atan", "log_cosh"])
@pytest.mark.parametrize("covariance", [(1.3, 0.7, 0.4), (0.5, 0.5, -0.5), (1e-10, 1.0, 3e-6), (1e-10, 1e-10, 1e-10)])
def test_smooth_functions_equal_double_quadrature(name: str, covariance: tuple[float, float, float]) -> None:
    dual = Numerical(name, num_points=200)
    expected = quadrature(dual, *covariance)
    assert dual.moments(*scalars(*covariance)) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_the_error_falls_fast_without_kinks_and_slowly_with_them() -> None:
    covariance = scalars(1.3, 0.7, 0.4)
    smooth = [abs(Numerical(torch.erf, k).kappa(*covariance) - Erf().kappa(*covariance)).item() for k in (10, 20, 40)]
    assert smooth[1] < 1e-2 * smooth[0] and smooth[2] < 1e-8
    rough = [abs(Numerical(torch.relu, k).kappa(*covariance) - ReLU().kappa(*covariance)).item() for k in (32, 200)]
    assert 1e-8 < rough[1] < rough[0] < 1e-2


def test_coincident_points_equal_the_diagonal_and_kernels_are_positive() -> None:
    """Whatever the error of the quadrature."""
    dual = Numerical(torch.relu, num_points=20)
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    var = x.square().sum(-1)
    for matrix, diagonal in zip(dual.moments(var[:, None], var, x @ x.mT), dual.diagonal(var), strict=True):
        torch.testing.assert_close(matrix.diagonal(), diagonal, rtol=1e-12, atol=0)
        assert torch.linalg.eigvalsh(matrix).min() > -1e-12


def test_steps_are_flat() -> None:
    dual = Numerical(lambda x: (x > 0).to(x.dtype), num_points=50)
    kappa, kappa_dot = dual.moments(*scalars(1.0, 1.0, 0.5))
    assert kappa.item() == pytest.approx(1 / 3, abs=2e-2)
    assert kappa_dot.item() == 0


def test_names_without_a_closed_form_warn() -> None:
    with pytest.warns(BayesnnWarning, match=r"'tanh'; its kernel comes from quadrature with 100 points"):
        dual = dual_activation("tanh")
    assert dual == Numerical("tanh")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dual_activation(dual) is dual
        Numerical("tanh")


@pytest.mark.parametrize("num_points", [1, 257, True, 10.0])
def test_num_points_out_of_range(num_points: int) -> None:
    with pytest.raises(ValueError, match=r"num_points: found .*, want an integer from 2 to 256"):
        Numerical("tanh", num_points)


def test_functions_that_will_not_do() -> None:
    with pytest.raises(ValueError, match=r"elementwise: found 'swosh', want a function or one of 'tanh'"):
        Numerical("swosh")
    with pytest.raises(ValueError, match="does not act on every element"):
        Numerical(lambda x: x.softmax(-1))
    with pytest.raises(ValueError, match="log is not finite everywhere"):
        Numerical(torch.log)
    with pytest.raises(TypeError, match="cannot save"):
        describe(Numerical(torch.tanh))
