"""Searches for hyperparameters: the lower of two minima for each output, within bounds, and nothing lost."""

import math
import time
import warnings

import pytest
import torch
from gpytorch.constraints import GreaterThan, Interval, LessThan
from gpytorch.kernels import Kernel, RBFKernel
from gpytorch.priors import UniformPrior
from linear_operator.utils.errors import NotPSDError
from linear_operator.utils.warnings import NumericalWarning
from torch import nn

from bayesnn import NNGP, StudentTProcess, likelihoods, surrogate
from bayesnn.data import BayesnnWarning
from bayesnn.processes import ScaleMixtureProcess, SparseNNGP, exact, student_t
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
    limits = _bounds(kernel)["raw_lengthscale"]
    low, high = (kernel.raw_lengthscale_constraint.transform(limit.double()) for limit in limits)
    assert torch.allclose(low, torch.tensor([1e-6, 1e-9]).double(), rtol=0.1)
    assert torch.allclose(high, torch.tensor([3e6, 1e6]).double(), rtol=1e-3)
    kernel = RBFKernel(lengthscale_constraint=Interval(0.1, 2.0))
    assert [float(limit) for limit in _bounds(kernel)["raw_lengthscale"]] == [-math.inf, math.inf]
    kernel = RBFKernel(lengthscale_constraint=GreaterThan(0.1))
    assert float(_bounds(kernel)["raw_lengthscale"][0]) == -math.inf
    kernel = RBFKernel(lengthscale_constraint=Interval(0.1, 2.0, transform=None, initial_value=1.0))
    assert [float(limit) for limit in _bounds(kernel)["raw_lengthscale"]] == pytest.approx([0.1, 2.0])
    kernel = NNGPKernel(architecture=serial(Dense(bias_var=0.0), Activation(), Dense(bias_var=0.0)))
    low, high = _bounds(kernel)["raw_bias_var"]
    assert (float(low), float(high)) == (0.0, 1e6)
    assert [float(limit) for limit in _bounds(Points(2.0))["x"]] == [-12.0, 16.0]


class Sloped(Kernel):
    """An RBF kernel of x_1 + rho x_2, with rho of any sign."""

    has_lengthscale = False

    def __init__(self, constraint, start, batch_shape):
        super().__init__(batch_shape=batch_shape)
        self.register_parameter("raw_rho", nn.Parameter(torch.zeros(*batch_shape, 1)))
        self.register_constraint("raw_rho", constraint)
        self.initialize(raw_rho=constraint.inverse_transform(torch.full((*batch_shape, 1), start)))

    def forward(self, x1, x2, diag=False, **params):
        rho = self.raw_rho_constraint.transform(self.raw_rho).unsqueeze(-1)
        a, b = (x[..., :1] + rho * x[..., 1:] for x in (x1, x2))
        square = (a - b).square().squeeze(-1) if diag else (a - b.mT).square()
        return torch.exp(-0.5 * square)


@pytest.mark.parametrize("model", [NNGP, StudentTProcess])
@pytest.mark.parametrize(
    ("constraint", "start"),
    [
        (Interval(-1.0, 1.0), 0.0),
        (Interval(-3.0, -0.1), -1.0),
        (LessThan(2.0), 0.5),
        (GreaterThan(-5.0), 0.2),
        (Interval(-1.0, 1.0, transform=None, initial_value=0.0), 0.0),
    ],
    ids=["both signs", "negative", "above", "below", "not transformed"],
)
def test_hyperparameters_of_any_sign(model, constraint, start):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(40, 2, generator=generator).double()
    Y = torch.sin(2 * (X[:, :1] - 0.6 * X[:, 1:])) + 0.05 * torch.randn(40, 1, generator=generator).double()
    made = []

    def kernel(d, batch):
        made.append(Sloped(constraint, start, batch))
        return made[-1]

    fitted = model(kernel=kernel).fit(X, Y)
    found = next(module for module in modules(fitted) if isinstance(module, Sloped))
    expected = -0.6 * float(X[:, 1].std() / X[:, 0].std())
    assert found.raw_rho_constraint.transform(found.raw_rho).item() == pytest.approx(expected, abs=0.1)


def modules(model):
    return (model._gp if isinstance(model, NNGP) else model._prior).modules()


@pytest.mark.parametrize("model", [NNGP, StudentTProcess, SparseNNGP])
def test_priors_of_bounded_support(model):
    """The search turns back where a prior ends."""
    X, Y = smooth(30)

    def kernel(d, batch):
        made = RBFKernel(ard_num_dims=d, batch_shape=batch, lengthscale_prior=UniformPrior(0.1, 0.8))
        made.lengthscale = 0.5
        return made

    fitted = model(kernel=kernel).fit(X, Y)
    found = next(module for module in modules(fitted) if isinstance(module, RBFKernel))
    assert bool(((found.lengthscale > 0.1) & (found.lengthscale < 0.8)).all())
    assert float(found.lengthscale.max()) > 0.6


def smooth(n):
    X = torch.linspace(-2, 2, 2 * n, dtype=torch.float64).reshape(n, 2)
    return X, X.sum(-1, keepdim=True).sin()


class Broken(Kernel):
    """Its gradient is NaN on the diagonal."""

    has_lengthscale = True

    def forward(self, x1, x2, diag=False, **params):
        square = ((x1.unsqueeze(-2) - x2.unsqueeze(-3)) / self.lengthscale.unsqueeze(-1)).square().sum(-1)
        found = torch.exp(-square.sqrt())
        return found.diagonal(dim1=-2, dim2=-1) if diag else found


@pytest.mark.parametrize("model", [NNGP, StudentTProcess])
def test_gradients_that_are_no_numbers_are_told(model):
    with pytest.warns(BayesnnWarning, match="couldn't be maximised, defaults are used"):
        model(kernel=lambda d, batch: Broken(batch_shape=batch)).fit(*smooth(10))


class Unused(RBFKernel):
    """With a parameter that doesn't count."""

    def __init__(self, **options):
        super().__init__(**options)
        self.register_parameter("spare", nn.Parameter(torch.zeros(1)))


@pytest.mark.parametrize("model", [NNGP, StudentTProcess])
def test_parameters_that_do_not_count(model):
    fitted = model(kernel=lambda d, batch: Unused(ard_num_dims=d, batch_shape=batch)).fit(*smooth(20))
    assert float(next(module for module in modules(fitted) if isinstance(module, Unused)).spare) == 0


def test_shared_parameters_of_as_many_entries_as_outputs():
    """Their mixture is worse than either: it isn't taken."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.both = nn.Parameter(torch.full((2,), -2.0, dtype=torch.float64))

        def loss(self):
            difference = 100 * (self.both[0] - self.both[1]).square()
            well = (self.both.square() - 1).square() + difference
            return well - torch.tensor([0.5, -0.3], dtype=torch.float64) * self.both

    pair = Pair()
    minimise("some model", pair.loss, pair, None, [{"both": 2.0}])
    assert bool((pair.both > 0.9).all())


def test_a_start_where_nothing_can_be_computed_at_all():
    points = Points(12.0)

    def loss():
        if points.x.item() > 10:
            raise NotPSDError
        return points.two_minima([0.3])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        minimise("some model", loss, points, None, [{"x": 2.0}])
    assert points.x.item() == pytest.approx(1, abs=0.1)


def test_no_warnings_of_matrices_on_the_way():
    points = Points(-2.0)

    def loss():
        warnings.warn("added jitter", NumericalWarning, stacklevel=1)
        return points.two_minima([0.3])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        minimise("some model", loss, points, None, [{"x": 2.0}])


@pytest.mark.parametrize("model", [NNGP, StudentTProcess, SparseNNGP])
def test_a_factory_may_give_the_same_kernel_again(model):
    X, Y = smooth(20)
    kernel = RBFKernel(ard_num_dims=2)
    other = torch.cos(4 * X[:, :1])
    again = model(kernel=lambda d, batch: kernel).fit(X, Y).fit(X, other)
    fresh = model(kernel=lambda d, batch: RBFKernel(ard_num_dims=2)).fit(X, other)
    assert torch.allclose(again.predict(X).mean, fresh.predict(X).mean, atol=1e-5)
    assert kernel.raw_lengthscale.requires_grad and float(kernel.raw_lengthscale.abs().max()) == 0


@pytest.mark.parametrize(
    ("make", "searches"),
    [
        (NNGP, 2),
        (StudentTProcess, 2),
        (lambda: NNGP(restart=False), 1),
        (lambda: StudentTProcess(restart=False), 1),
        (ScaleMixtureProcess, 2),
        (lambda: ScaleMixtureProcess(restart=False), 1),
        (lambda: surrogate("nngp"), 1),
        (lambda: NNGP(likelihood=likelihoods.Gaussian(noise_std=0.1)), 1),
        (lambda: StudentTProcess(likelihood=likelihoods.Gaussian(noise_std=0.1)), 1),
        (lambda: surrogate("student-t"), 1),
        (lambda: surrogate("nngp", restart=True, depth=1), 2),
    ],
)
def test_who_searches_twice(make, searches, monkeypatch):
    found = []

    def counted(name, loss, module, time_budget, other_starts=(), max_steps=None):
        found.append(1 + len(other_starts))

    for module in (exact, student_t):
        monkeypatch.setattr(module, "minimise", counted)
    X = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    make().fit(X, X[:, :1].sin())
    assert found == [searches]


@pytest.mark.parametrize("model", [NNGP, StudentTProcess])
@pytest.mark.parametrize(("n", "frequency", "seed", "better"), [(14, 10, 2, "first"), (8, 25, 2, "second")])
def test_the_better_of_two_maxima(model, n, frequency, seed, better, monkeypatch):
    """Whichever of the starts leads to it: each alone, and both."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.rand(n, 1, generator=generator).double()
    Y = torch.sin(frequency * X) + 0.4 * torch.randn(n, 1, generator=generator).double()
    densities = {}
    minimised = minimise

    def from_start(which):
        def search(name, loss, module, time_budget, other_starts=(), max_steps=15_000):
            if which == "second":
                parameters = dict(module.named_parameters())
                for key, value in other_starts[0].items():
                    parameters[key].data.fill_(value)
            minimised(name, loss, module, time_budget, other_starts if which == "both" else (), max_steps)
            densities[which] = -loss().sum().item()

        return search

    for which in ("first", "second", "both"):
        for place in (exact, student_t):
            monkeypatch.setattr(place, "minimise", from_start(which))
        model(kernel=lambda d, batch: RBFKernel(ard_num_dims=d, batch_shape=batch)).fit(X, Y)
    assert max(("first", "second"), key=densities.__getitem__) == better
    assert abs(densities["first"] - densities["second"]) > 0.01
    assert densities["both"] == pytest.approx(densities[better], abs=1e-6)
