"""Expected improvement beside pending configurations, against exact averages over what may be observed there."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from botorch.models.model import Model as BotorchModel
from torch import Tensor
from torch.distributions import Normal

from bayesnn import PFN, ConditionalNeuralProcess
from bayesnn.bo import ClosedForm, Space, log_expected_improvement, suggest
from bayesnn.bo.acquisition import Setting, acquisition
from bayesnn.bo.fantasies import fantasised
from bayesnn.bo.improvement import MarginalImprovement, best_mean
from bayesnn.bo.on_codes import OnCodes
from bayesnn.bo.outcomes import outcomes_of
from bayesnn.posteriors import Copula

LINE = Space({"x": (0.0, 1.0)})
X = torch.tensor([[0.05], [0.3], [0.45], [0.7], [0.95]], dtype=torch.float64)
GRID = torch.linspace(0.02, 0.98, 25, dtype=torch.float64).unsqueeze(-1)
NOISE_VAR = 0.05


def wave(x: Tensor) -> Tensor:
    return 30 + 10 * torch.cat([(7 * x).sin() + x, (5 * x).cos()], -1)


def kernel(a: Tensor, b: Tensor) -> Tensor:
    return 100 * (-0.5 * (a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1) / 0.2**2).exp()


class Process(BotorchModel):
    """Independent Gaussian processes about 30, of observations Y (*batch, n, m), exactly."""

    def __init__(self, X: Tensor, Y: Tensor) -> None:
        super().__init__()
        self.train_inputs, self.Y = (X,), Y

    @property
    def num_outputs(self) -> int:
        return self.Y.shape[-1]

    @property
    def batch_shape(self) -> torch.Size:
        return self.Y.shape[:-2]

    def posterior(self, X: Tensor, observation_noise: bool = False, **_: Any) -> Copula:
        (rows,) = self.train_inputs
        gain = torch.linalg.solve(kernel(rows, rows) + 100 * NOISE_VAR * torch.eye(len(rows)), kernel(rows, X)).mT
        mean = 30 + gain @ (self.Y - 30)
        variance = 100 - (gain * kernel(X, rows)).sum(-1, keepdim=True)
        std = (variance + 100 * NOISE_VAR * observation_noise).sqrt()
        return Copula(Normal(mean, std.expand_as(mean)), lambda: pytest.fail("draws aren't needed"))

    def condition_on_observations(self, X: Tensor, Y: Tensor, **_: Any) -> Process:
        rows = torch.cat([self.train_inputs[0], X])
        return Process(rows, torch.cat([self.Y.expand(*Y.shape[:-2], *self.Y.shape[-2:]), Y], -2))


def process(num_outputs: int = 1) -> Process:
    return Process(X, wave(X)[:, :num_outputs])


def joint(points: Tensor) -> tuple[Tensor, Tensor]:
    """The posterior's means (q, 2) and covariance (q, q) of f."""
    inverse = torch.linalg.inv(kernel(X, X) + 100 * NOISE_VAR * torch.eye(len(X)))
    gain = kernel(points, X) @ inverse
    return 30 + gain @ (wave(X) - 30), kernel(points, points) - gain @ kernel(X, points)


@pytest.mark.parametrize("num_outputs", [1, 2])
def test_fantasies_have_the_observations_joint_law(num_outputs: int) -> None:
    pending = torch.tensor([[0.5], [0.56], [0.2]], dtype=torch.float64)
    Y = fantasised(process(num_outputs), pending, 1024, seed=3).Y[:, len(X) :]  # type: ignore[attr-defined]
    mean, covariance = joint(pending)
    covariance = covariance + 100 * NOISE_VAR * torch.eye(3)
    torch.testing.assert_close(Y.mean(0), mean[:, :num_outputs], atol=0.05, rtol=0)
    for outcome in Y.unbind(-1):
        torch.testing.assert_close(outcome.T.cov(), covariance, atol=0.02 * float(covariance.max()), rtol=0)
    if num_outputs == 2:
        across = (Y[..., 0] - mean[:, 0]).mT @ (Y[..., 1] - mean[:, 1]) / 1024
        assert float(across.abs().max()) < 0.03 * float(covariance.max())
    torch.testing.assert_close(
        fantasised(process(), pending[:1], 1, 0).Y[0, -1],
        mean[0, :1],  # type: ignore[attr-defined]
    )


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("limited", [False, True])
def test_it_is_the_average_over_what_may_be_observed(sign: int, limited: bool) -> None:
    """Of one pending observation, or of an objective's and a limited outcome's at one place, by the midpoint rule."""
    limit = 29.0
    outcomes = outcomes_of(1 + limited, "maximize" if sign > 0 else "minimize", {1: ("<=", limit)} if limited else {})
    function = MarginalImprovement(process(1 + limited), X, outcomes, 4096, seed=1)
    without = function(GRID.unsqueeze(-2)).exp()
    pending = GRID[without.argmax()][None] + 0.01
    function.set_X_pending(pending)

    places = torch.cat([X, pending, GRID])
    mean, covariance = joint(places)
    at = len(X)  # the pending one's
    levels = (torch.arange(500, dtype=torch.float64) + 0.5) / 500
    surprise = torch.special.ndtri(levels) * (covariance[at, at] + 100 * NOISE_VAR).sqrt()
    gain = covariance[:, at] / (covariance[at, at] + 100 * NOISE_VAR)
    means = mean + gain[:, None] * surprise[:, None, None]  # (nodes, places, 2)
    std = (covariance.diagonal() - gain * covariance[at]).sqrt()[at + 1 :]
    known, new = means.split([at + 1, len(GRID)], 1)
    merits = (sign * known[..., 0]).expand(500, 500, -1)  # nodes of the limited outcome, of the objective, places
    if limited:
        kept = (known[..., 1] <= limit)[:, None].expand_as(merits)
        worst = merits.amin(-1)
        best = torch.where(kept.any(-1), merits.masked_fill(~kept, -math.inf).amax(-1), worst)
        weight = Normal(0.0, 1.0).cdf((limit - new[..., 1]) / std)[:, None]
    else:
        best, weight = merits.amax(-1)[:1], torch.ones(1, 1, len(GRID))
    z = (sign * new[..., 0] - best[..., None]) / std
    improvement = std * (Normal(0.0, 1.0).log_prob(z).exp() + z * Normal(0.0, 1.0).cdf(z))
    exact = (improvement * weight).mean((0, 1))
    found = function(GRID.unsqueeze(-2)).exp()
    torch.testing.assert_close(found, exact, rtol=0.03 if limited else 2e-3, atol=1e-3 * float(exact.max()))
    believer = MarginalImprovement(process(1 + limited), X, outcomes, num_fantasies=1)
    believer.set_X_pending(pending)
    for other in (without, believer(GRID.unsqueeze(-2)).exp()):  # which is far from it
        assert float((other - exact).abs().max()) > 0.05 * float(exact.max())


def test_few_fantasies_are_near_the_average() -> None:
    """Of three pending configurations, as many as a batch of four has: the default against 4096."""
    pending = torch.tensor([[0.15], [0.55], [0.85]], dtype=torch.float64)
    values = []
    for num_fantasies in (None, 4096):
        function = MarginalImprovement(process(), X, outcomes_of(1, "maximize"), num_fantasies, seed=0)
        function.set_X_pending(pending)
        values.append(function(GRID.unsqueeze(-2)).exp())
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=0.1 * float(values[1].max()))


def fitted(kind: str, num_outputs: int = 1, **options: Any) -> Any:
    model = PFN("bo", bounds=(0.0, 1.0), **options) if kind == "histogram" else ConditionalNeuralProcess()
    return model.fit(X, wave(X)[:, :num_outputs])


def setting(model: BotorchModel, outcomes: Any) -> Setting:
    return Setting(OnCodes(model, LINE), LINE, X, X, outcomes, None, 32, 4.0, 0)


@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("kind", ["histogram", "normal"])
def test_without_pending_ones_it_is_over_the_best_mean(kind: str, maximize: bool) -> None:
    model, outcomes = fitted(kind), outcomes_of(1, "maximize" if maximize else "minimize")
    means = model.posterior(X).mean.detach()
    best = float(means.max()) if maximize else float(-means.min())
    expected = ClosedForm(model, log_expected_improvement(best), maximize)(GRID.unsqueeze(-2))
    name, function = acquisition("auto", setting(model, outcomes), 1, 0)
    assert name == "closed-form logei"
    torch.testing.assert_close(function(GRID.unsqueeze(-2)), expected, rtol=1e-12, atol=1e-12)
    function.set_X_pending(GRID[:2])
    assert not torch.allclose(function(GRID.unsqueeze(-2)), expected, atol=0.1)
    function.set_X_pending(None)
    torch.testing.assert_close(function(GRID.unsqueeze(-2)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["histogram", "normal"])
def test_contexts_at_once_answer_like_each_alone(kind: str) -> None:
    """Under limits, with two pending configurations: fantasy by fantasy, in the model's own units."""
    model, pending = fitted(kind, 2), torch.tensor([[0.5], [0.8]], dtype=torch.float64)
    outcomes = outcomes_of(2, "minimize", {1: (">=", 28.0)})
    function = MarginalImprovement(OnCodes(model, LINE), X, outcomes, 4, seed=2)
    function.set_X_pending(pending)
    context = fantasised(model, pending, 4, seed=2)._context  # type: ignore[union-attr]
    fantasies = model._outcomes.loc + model._outcomes.scale * context.Y[..., len(X) :, 0].mT
    products = []
    for fantasy in fantasies:
        given = model.condition_on_observations(pending, fantasy)
        means = given.posterior(torch.cat([X, pending])).mean.detach()
        best = -means[means[:, 1] >= 28, 0].min()
        improvement = ClosedForm(given.subset_output([0]), log_expected_improvement(float(best)), maximize=False)
        law = given.subset_output([1]).posterior(GRID.unsqueeze(-2)).marginals
        kept = 1 - law.cdf(torch.full_like(law.mean, 28.0))
        products.append(improvement(GRID.unsqueeze(-2)).exp() * kept[..., 0, 0])
    torch.testing.assert_close(function(GRID.unsqueeze(-2)).exp(), torch.stack(products).mean(0), rtol=1e-6, atol=1e-9)


def test_fantasies_at_codes_are_those_at_features() -> None:
    space = Space({"x": (0.0, 1.0), "kind": ["a", "b", "c"]})
    tried, pending, new = space.sobol(12, seed=0).split([6, 2, 4])
    model = PFN("bo", bounds=(0.0, 1.0)).fit(space.encode(tried), wave(tried[:, :1])[:, :1])
    outcomes = outcomes_of(1, "minimize")
    name, function = acquisition(
        "auto", Setting(OnCodes(model, space), space, tried, tried, outcomes, None, 8, 4.0, 0), 2, 1
    )
    expected = MarginalImprovement(model, space.encode(tried), outcomes)
    function.set_X_pending(pending)
    expected.set_X_pending(space.encode(pending))
    assert name == "closed-form logei"
    torch.testing.assert_close(function(new.unsqueeze(-2)), expected(space.encode(new).unsqueeze(-2)))


def test_candidates_know_nothing_of_each_other() -> None:
    function = MarginalImprovement(fitted("histogram"), X, outcomes_of(1, "minimize"), 4)
    function.set_X_pending(GRID[3:5])
    together = function(GRID.unsqueeze(-2))
    order = torch.randperm(len(GRID), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(function(GRID[order].unsqueeze(-2)), together[order], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(function(GRID[7:8].unsqueeze(-2)), together[7:8], rtol=1e-9, atol=1e-9)


def test_the_best_mean_that_keeps_the_limits() -> None:
    outcomes = outcomes_of(2, "maximize", {1: ("<=", 0.0)})
    kept = torch.tensor([[3.0, 1.0], [1.0, -1.0], [2.0, -1.0]])
    broken = torch.tensor([[3.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
    assert best_mean(kept, outcomes) == 2
    assert best_mean(broken, outcomes) is None
    assert best_mean(torch.stack([kept, broken]), outcomes).tolist() == [2, 1]  # type: ignore[union-attr]


def test_units_of_the_objective_change_nothing() -> None:
    values = []
    for scale in (1.0, 1000.0):
        model = PFN("bo", bounds=(0.0, 1.0)).fit(X, 5 + scale * wave(X))
        outcomes = outcomes_of(2, "minimize", {1: ("<=", 5 + scale * 30)})
        function = MarginalImprovement(model, X, outcomes)
        function.set_X_pending(GRID[3:5])
        values.append(function(GRID.unsqueeze(-2)) - math.log(scale))
    torch.testing.assert_close(*values, atol=1e-4, rtol=0)


@pytest.mark.parametrize("constraints", [None, {1: ("<=", 32.0)}])
def test_suggestions_keep_apart(constraints: Any) -> None:
    """In a batch and beside pending configurations, of the seed alone."""
    model = fitted("histogram", 1 if constraints is None else 2)
    options: Any = {"constraints": constraints, "num_restarts": 2, "raw_samples": 32}
    first = suggest(model, LINE, seed=1, **options)[0]
    beside = suggest(model, LINE, seed=1, pending=[first], **options)[0]
    assert abs(first["x"] - beside["x"]) > 0.02
    batch = suggest(model, LINE, 3, seed=1, **options)
    places = torch.tensor([each["x"] for each in batch])
    assert batch[0] == first and float(places.sort().values.diff().min()) > 0.01
    assert suggest(model, LINE, 3, seed=1, **options) == batch


def test_a_context_that_is_full_is_asked_for_joint_draws() -> None:
    outcomes = outcomes_of(1, "minimize")
    closed, draws = "closed-form logei", "lognei"
    for max_context, expected in ((5, [closed, draws, draws, draws]), (6, [closed, closed, closed, draws])):
        model = fitted("histogram", max_context=max_context)
        found = [acquisition("auto", setting(model, outcomes), q, k)[0] for q, k in ((1, 0), (2, 0), (1, 1), (2, 1))]
        assert found == expected
    assert acquisition("auto", setting(fitted("histogram", 2).subset_output([0]), outcomes), 2, 0)[0] == draws
    options: Any = {"num_restarts": 1, "raw_samples": 8, "num_samples": 8, "pending": LINE.configurations(GRID[:2])}
    assert 0 <= suggest(fitted("histogram", max_context=6), LINE, **options)[0]["x"] <= 1


def test_where_each_query_has_a_context_of_its_own_one_fantasy_must_do() -> None:
    outcomes = outcomes_of(1, "minimize")
    for neighbours, expected in ((5, 1), (6, 4)):
        model = fitted("histogram", neighbours=neighbours)
        name, function = acquisition("auto", setting(model, outcomes), 1, 1)
        assert name == "closed-form logei"
        before = function(GRID.unsqueeze(-2))
        function.set_X_pending(GRID[12:13])
        assert function.given.batch_shape == (expected,)
        after = function(GRID.unsqueeze(-2))
        assert bool(after.isfinite().all())
        # Of four fantasies a low one may by chance make more of the place; in each, less is left to be known of it.
        assert expected > 1 or float(after[12]) < float(before[12])
        known, unknown = (each.posterior(GRID[12:13]).variance.sqrt() for each in (function.given, model))
        assert bool((known < 0.5 * unknown).all())
