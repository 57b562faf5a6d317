"""Closed forms against averages over the posterior's own draws and against BoTorch's for Gaussian marginals."""

import math

import pytest
import torch
from botorch.acquisition.analytic import LogExpectedImprovement
from botorch.exceptions.errors import UnsupportedError
from botorch.optim import optimize_acqf
from torch import nn

from bayesnn import NNGP, PFN, ConditionalNeuralProcess
from bayesnn.bo import ClosedForm, Space, log_expected_improvement, probability_of_improvement, quantile
from bayesnn.bo.acquisition import Setting, acquisition
from bayesnn.bo.improvement import MarginalImprovement, log_feasible_improvement
from bayesnn.bo.on_codes import OnCodes
from bayesnn.bo.outcomes import outcomes_of
from bayesnn.histogram import prior_borders
from bayesnn.inference.amortized import DeepSetNetwork, SetTransformer


def fitted(kind, num_outputs=1):
    generator = torch.Generator().manual_seed(1)
    X = torch.rand(8, 2, generator=generator, dtype=torch.float64)
    Y = 20 + 5 * torch.randn(8, num_outputs, generator=generator, dtype=torch.float64)
    borders = prior_borders(torch.linspace(-3, 3, 100), 30).tolist()
    network: nn.Module = SetTransformer(2, borders, (1.0, 1.0), width=16, num_layers=2, num_heads=2)
    if kind == "normal":
        network = DeepSetNetwork(2, width=16)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return (PFN if kind == "histogram" else ConditionalNeuralProcess)(network.eval()).fit(X, Y), Y


def candidates(count=5):
    return torch.rand(count, 1, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("kind", ["histogram", "normal"])
def test_values_are_averages_over_draws(kind, maximize):
    model, _ = fitted(kind)
    sign = 1.0 if maximize else -1.0
    draws = (
        sign * model.posterior(candidates()).rsample(torch.Size([40_000]), torch.Generator().manual_seed(3))[..., 0, 0]
    )
    level = ClosedForm(model, quantile(0.8), maximize)(candidates())
    for j in range(5):
        best = float(draws[:, j].mean())
        log_expected = ClosedForm(model, log_expected_improvement(best), maximize)(candidates())[j]
        probability = ClosedForm(model, probability_of_improvement(best), maximize)(candidates())[j]
        above = (draws[:, j] > best).double(), (draws[:, j] > level[j]).double()
        for values, found in (
            ((draws[:, j] - best).clamp_min(0), log_expected.exp()),
            (above[0], probability),
            (above[1], 0.2),
        ):
            assert abs(float((values.mean() - found) / values.std())) * 200 < 4.5


def test_normal_marginals_give_botorch_s_values():
    model, Y = fitted("normal")
    for maximize, best in ((True, float(Y.max())), (False, float(-Y.min()))):
        found = ClosedForm(model, log_expected_improvement(best), maximize)(candidates())
        expected = LogExpectedImprovement(model, best_f=best if maximize else -best, maximize=maximize)(candidates())
        torch.testing.assert_close(found, expected)


def test_it_is_optimised():
    """The optimiser ends where a fine grid has its maximum, with gradients in float64."""
    model, Y = fitted("histogram")
    acquisition = ClosedForm(model, log_expected_improvement(float(Y.max())))
    bounds = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    found, value = optimize_acqf(acquisition, bounds, q=1, num_restarts=4, raw_samples=64)
    steps = torch.linspace(0, 1, 60, dtype=torch.float64)
    grid = torch.cartesian_prod(steps, steps).unsqueeze(1)
    with torch.no_grad():
        assert float(value) >= float(acquisition(grid).max()) - 1e-3
    assert found.dtype == torch.float64


def test_what_it_refuses():
    model, _ = fitted("histogram", num_outputs=2)
    with pytest.raises(ValueError, match="model must have one outcome, found 2"):
        ClosedForm(model, quantile(0.5))
    assert ClosedForm(model.subset_output([1]), quantile(0.5))(candidates()).shape == (5,)
    gaussian = NNGP().fit(torch.rand(6, 2).double(), torch.rand(6, 1).double())
    with pytest.raises(TypeError, match="a posterior of histograms or normals"):
        ClosedForm(gaussian, quantile(0.5))(candidates())
    with pytest.raises(ValueError, match="level must lie in"):
        quantile(1.0)
    with pytest.raises(UnsupportedError, match="closed forms of one point know of no pending points"):
        ClosedForm(model.subset_output([1]), quantile(0.5)).set_X_pending(candidates()[:, 0])
    with pytest.raises(ValueError, match="best must be finite"):
        log_expected_improvement(float("nan"))


@pytest.mark.parametrize("kind", ["histogram", "normal"])
def test_under_limits_values_are_averages_over_draws(kind):
    """Of an improvement that counts where both limits are kept; without anything to improve on, of their being kept."""
    model, _ = fitted(kind, num_outputs=3)
    draws = model.posterior(candidates()).rsample(torch.Size([60_000]), torch.Generator().manual_seed(3))[..., 0, :]
    bounds = draws.mean((0, 1))
    limits = {0: ("<=", float(bounds[0])), 2: (">=", float(bounds[2]))}
    marginals = model.posterior(candidates()).marginals
    kept = (draws[..., 0] <= bounds[0]) & (draws[..., 2] >= bounds[2])
    for direction, sign in (("maximize", 1.0), ("minimize", -1.0)):
        best = sign * draws[..., 1].mean()
        improvement = (sign * draws[..., 1] - best).clamp_min(0)
        outcomes = outcomes_of(3, direction, limits)
        for found, values in (
            (log_feasible_improvement(marginals, outcomes, best), improvement * kept),
            (log_feasible_improvement(marginals, outcomes, None), kept.double()),
        ):
            z = (values.mean(0) - found.exp()) / values.std(0) * math.sqrt(len(draws))
            assert float(z.abs().max()) < 4.5


def test_far_from_a_limit_nearer_is_better():
    model, _ = fitted("histogram", num_outputs=2)
    function = MarginalImprovement(model, candidates().squeeze(1), outcomes_of(2, "maximize", {1: (">=", 1e6)}))
    at = candidates().requires_grad_()
    values = function(at)
    gradient = torch.autograd.grad(values.sum(), at)[0]
    assert len(values.unique()) == 5 and float(values.max()) < -700 and bool((gradient != 0).any(-1).all())


def test_auto_under_limits_is_the_closed_form():
    """It compares with the best mean among those that keep the limits; where none does, it looks for one that does."""
    model, _ = fitted("histogram", num_outputs=2)
    space = Space({"a": (0.0, 1.0), "b": (0.0, 1.0)})
    tried = candidates(8).squeeze(-2)
    means = model.posterior(tried.unsqueeze(-2)).mean.detach().squeeze(-2)
    middle = float(means[:, 1].median())
    for limit, expected in (
        ({1: ("<=", middle)}, float(-means[means[:, 1] <= middle, 0].min())),
        ({1: ("<=", float(means[:, 1].min()) - 100)}, None),
    ):
        on_codes = OnCodes(model, space)
        outcomes = outcomes_of(2, "minimize", limit)
        setting = Setting(on_codes, space, tried, tried, outcomes, None, 64, 4.0, 0)
        name, function = acquisition("auto", setting, 1, 0)
        assert name == "closed-form logei"
        assert function.best is None if expected is None else abs(float(function.best) - expected) < 1e-9
        wanted = log_feasible_improvement(on_codes.posterior(candidates()).marginals, outcomes, function.best)
        torch.testing.assert_close(function(candidates()), wanted, rtol=1e-12, atol=1e-12)
