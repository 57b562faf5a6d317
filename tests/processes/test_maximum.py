"""Searches for hyperparameters: the lower of two minima for each output, within bounds, and nothing lost."""

import math
import time
import warnings

import pytest
import torch
from gpytorch.constraints import GreaterThan, Interval
from gpytorch.kernels import RBFKernel
from gpytorch.priors import GammaPrior
from linear_operator.utils.errors import NotPSDError
from torch import nn

from bayesnn import NNGP, StudentTProcess, likelihoods, surrogate
from bayesnn.data import BayesnnWarning
from bayesnn.processes import gaussian, student_t
from bayesnn.processes.architectures import Activation, Dense, serial
from bayesnn.processes.kernels import NNGPKernel
from bayesnn.processes.maximum import _bounds, minimise


class Points(nn.Module):
    """x of m outputs, and what they share."""

    def __init__(self, *x, shared=False):
        super().__init__()
        self.x = nn.Parameter(torch.tensor(x, dtype=torch.float64))
        if shared:
            self.shared = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def two_minima(self, tilt):
        """Near -1 and 1; the lower is on the side of the tilt's sign."""
        shared = self.shared.square().sum() if hasattr(self, "shared") else 0.0
        return (self.x.square() - 1).square() - torch.tensor(tilt, dtype=torch.float64) * self.x + shared


@pytest.mark.parametrize("first", [-2.0, 2.0])
def test_each_output_is_at_the_lower_of_two_minima(first):
    points = Points(first, first)
    minimise("some model", lambda: points.two_minima([0.3, -0.3]), points, None, [{"x": -first}])
    assert torch.equal(points.x.sign(), torch.tensor([1.0, -1.0]).double())
    slope = 4 * points.x * (points.x.square() - 1) - torch.tensor([0.3, -0.3])
    assert slope.abs().max() < 1e-5
    minimise("some model", lambda: points.two_minima([0.3, -0.3]), points, None, [{"x": 2.0}, {"x": -2.0}])
    assert torch.equal(points.x.sign(), torch.tensor([1.0, -1.0]).double())


def test_outputs_that_share_parameters_are_at_the_lower_sum():
    points = Points(-2.0, -2.0, shared=True)
    minimise("some model", lambda: points.two_minima([0.3, -0.1]), points, None, [{"x": 2.0}])
    assert bool((points.x > 0).all())


def test_one_output():
    points = Points(-2.0)
    minimise("some model", lambda: points.two_minima([0.3]).squeeze(0), points, None, [{"x": 2.0}])
    assert points.x.item() > 0


def test_no_other_search_after_the_time_is_up():
    points = Points(-2.0)

    calls = []

    def slow():
        calls.append(1)
        time.sleep(0.06)
        return points.two_minima([0.3])

    minimise("some model", slow, points, 0.05, [{"x": 2.0}] * 50)
    assert len(calls) < 20


def test_what_finds_nothing_better_is_left_with_a_warning():
    points = Points(0.0)
    calls = []

    def loss():
        calls.append(1)
        if len(calls) > 1:
            raise NotPSDError
        return points.x.sum()

    with pytest.warns(BayesnnWarning, match="some model: log p\\(y\\) couldn't be maximised"):
        minimise("some model", loss, points, None, [{"x": 2.0}])
    assert points.x.item() == 0


def test_a_start_where_nothing_can_be_computed_is_passed_over():
    points = Points(0.5)

    def loss():
        if points.x.item() > 5:
            raise NotPSDError
        return points.two_minima([0.3])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        minimise("some model", loss, points, None, [{"x": 10.0}])
    assert points.x.item() == pytest.approx(1, abs=0.1)


def test_faults_of_the_loss_itself_are_not_hidden():
    points = Points(0.0)
    calls = []

    def loss():
        calls.append(1)
        if len(calls) > 1:
            raise ValueError("a fault")
        return points.x.sum()

    with pytest.raises(ValueError, match="a fault"):
        minimise("some model", loss, points, None)


def test_bounds():
    kernel = RBFKernel(ard_num_dims=2)
    kernel.lengthscale = torch.tensor([3.0, 1e-3])
    low, high = (
        kernel.raw_lengthscale_constraint.transform(limit.double()) for limit in _bounds(kernel)["raw_lengthscale"]
    )
    assert torch.allclose(low, torch.tensor([1e-6, 1e-9]).double(), rtol=0.1)
    assert torch.allclose(high, torch.tensor([3e6, 1e6]).double(), rtol=1e-3)
    kernel = RBFKernel(lengthscale_constraint=Interval(0.1, 2.0))
    assert [float(limit) for limit in _bounds(kernel)["raw_lengthscale"]] == [-math.inf, math.inf]
    kernel = RBFKernel(lengthscale_constraint=GreaterThan(0.1))
    assert float(_bounds(kernel)["raw_lengthscale"][0]) == -math.inf
    kernel = NNGPKernel(architecture=serial(Dense(bias_var=0.0), Activation(), Dense(bias_var=0.0)))
    low, high = _bounds(kernel)["raw_bias_var"]
    assert (float(low), float(high)) == (0.0, 1e6)
    assert [float(limit) for limit in _bounds(Points(2.0))["x"]] == [-12.0, 16.0]


@pytest.mark.parametrize("model", [NNGP, StudentTProcess])
def test_variances_that_would_underflow(model):
    """Outcomes without a trace of the inputs, under a prior whose support ends at 0: no search fails."""
    generator = torch.Generator().manual_seed(0)
    X, Y = (torch.randn(30, width, generator=generator).double() for width in (2, 1))

    def kernel(d, batch):
        return RBFKernel(ard_num_dims=d, batch_shape=batch, lengthscale_prior=GammaPrior(1.0, 1.0))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p = model(kernel=kernel).fit(X, Y).predict(X)
    assert bool(torch.isfinite(p.mean).all())


@pytest.mark.parametrize(
    ("make", "searches"),
    [
        (NNGP, 2),
        (StudentTProcess, 2),
        (lambda: NNGP(restart=False), 1),
        (lambda: StudentTProcess(restart=False), 1),
        (lambda: surrogate("nngp"), 1),
        (lambda: NNGP(likelihood=likelihoods.Gaussian(noise_std=0.1)), 1),
        (lambda: StudentTProcess(likelihood=likelihoods.Gaussian(noise_std=0.1)), 1),
        (lambda: surrogate("student-t"), 1),
        (lambda: surrogate("nngp", restart=True, depth=1), 2),
    ],
)
def test_who_searches_twice(make, searches, monkeypatch):
    found = []

    def counted(name, loss, module, time_budget, other_starts=()):
        found.append(1 + len(other_starts))

    for module in (gaussian, student_t):
        monkeypatch.setattr(module, "minimise", counted)
    X = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    make().fit(X, X[:, :1].sin())
    assert found == [searches]


def test_twice_is_never_worse():
    generator = torch.Generator().manual_seed(3)
    X = torch.rand(40, 3, generator=generator).double()
    Y = torch.cat([torch.sin(9 * X[:, :1]), torch.randn(40, 1, generator=generator).double()], 1)
    once, twice = (StudentTProcess(restart=restart).fit(X, Y) for restart in (False, True))

    def density(model):
        return model._log_evidence(model._prior, model._known) + model._prior.log_prior()

    assert bool((density(twice) >= density(once) - 1e-6).all())
