"""Each acquisition function against its closed form, quadrature or enumeration; what is refused to whom."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from botorch.acquisition.max_value_entropy_search import qLowerBoundMaxValueEntropy
from botorch.models import ModelList, SingleTaskGP
from botorch.models.model import Model as BotorchModel
from torch import Tensor
from torch.distributions import Normal

from bayesnn.bo import Space, SpaceExhaustedError, suggest
from bayesnn.bo.acquisition import NAMES, Setting, acquisition, check_acquisition
from bayesnn.bo.on_codes import OnCodes
from bayesnn.bo.outcomes import Outcomes, outcomes_of
from bayesnn.bo.thompson import ThompsonAtPlaces, ThompsonDraw
from bayesnn.inference.amortized import PFN
from bayesnn.posteriors import FunctionDraws

pytestmark = [
    pytest.mark.filterwarnings("ignore:Data \\(outcome observations\\) is not standardized"),
    pytest.mark.filterwarnings("ignore:Very small noise values"),
]

LINE = Space({"x": (0.0, 1.0)})
X = torch.tensor([[0.05], [0.2], [0.45], [0.7], [0.95]], dtype=torch.float64)
GRID = torch.linspace(0, 1, 41, dtype=torch.float64).unsqueeze(-1)


def bump(x: Tensor) -> Tensor:
    return torch.sin(6 * x) + x


def gp(Y: Tensor, noise_var: float = 1e-4) -> SingleTaskGP:
    """Hyperparameters are set, not fitted."""
    model = SingleTaskGP(X, Y, train_Yvar=torch.full_like(Y, noise_var), outcome_transform=None)
    model.covar_module.lengthscale = 0.2
    return model.eval()


def setting(model: BotorchModel, outcomes: Outcomes, num_samples: int = 512, seed: int = 0) -> Setting:
    return Setting(OnCodes(model, LINE), LINE, X, X, outcomes, None, num_samples, 4.0, seed)


def built(name: str, model: BotorchModel, direction: Any = "maximize", **options: Any) -> Any:
    return acquisition(name, setting(model, outcomes_of(model.num_outputs, direction), **options), 1, 0)[1]


def moments(model: BotorchModel, points: Tensor = GRID) -> tuple[Tensor, Tensor]:
    posterior: Any = model.posterior(points.unsqueeze(-2))
    return posterior.mean.flatten().detach(), posterior.variance.flatten().sqrt().detach()


def units(model: BotorchModel) -> tuple[Tensor, Tensor]:
    mean = moments(model, X)[0]
    return mean.mean(), mean.std(correction=0)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_upper_confidence_bound(sign: float) -> None:
    model = gp(sign * bump(X))
    (mean, std), (loc, scale) = moments(model), units(model)
    exact = (sign * (mean - loc) + 2 * std) / scale
    found = built("ucb", model, "maximize" if sign > 0 else "minimize")(GRID.unsqueeze(-2))
    torch.testing.assert_close(found.detach(), exact, atol=0.02, rtol=0.01)


def test_log_expected_improvement_over_the_best_mean() -> None:
    model = gp(bump(X))
    (mean, std), (_, scale), best = moments(model), units(model), moments(model, X)[0].max()
    z = (mean - best) / std
    exact = std * (Normal(0.0, 1.0).log_prob(z).exp() + z * Normal(0.0, 1.0).cdf(z)) / scale
    found = built("logei", model)(GRID.unsqueeze(-2)).exp()
    large = exact > 1e-3
    torch.testing.assert_close(found[large].detach(), exact[large], atol=1e-3, rtol=0.05)


def test_knowledge_gradient_by_conditioning() -> None:
    """The mean of the best mean after an observation, model by model, for equally likely observations."""
    model = gp(bump(X), noise_var=0.05)
    kg = built("kg", model)
    found = kg(GRID[::5].unsqueeze(-2)).detach()
    _, scale = units(model)
    for point, value in zip(GRID[::5], found, strict=True):
        places = torch.cat([point[None], kg.places])
        posterior = model.posterior(point[None], observation_noise=torch.full((1, 1), 0.05).double())
        observations = posterior.mean + posterior.variance.sqrt() * kg.normals[:, None, None]
        after = model.condition_on_observations(
            point.expand(63, 1, 1), observations, noise=torch.full((63, 1, 1), 0.05).double()
        )
        means = after.posterior(places.expand(63, -1, -1)).mean[..., 0]
        exact = (means.amax(-1).mean() - model.posterior(places).mean.max()) / scale
        assert float(value) == pytest.approx(float(exact), abs=1e-4)
    assert float(found.max()) > 0.01


def test_pending_observations_leave_less_to_be_learned() -> None:
    model = gp(bump(X), noise_var=0.05)
    kg = built("kg", model)
    at = GRID[found : found + 1] if (found := int(kg(GRID.unsqueeze(-2)).argmax())) else GRID[:1]
    before = float(kg(at.unsqueeze(-2)).detach())
    kg.set_X_pending(at)
    once = float(kg((at + 1e-6).unsqueeze(-2)).detach())
    kg.set_X_pending(at.expand(40, -1))
    assert float(kg((at + 1e-6).unsqueeze(-2)).detach()) < 0.2 * before and once < before


def test_max_value_entropy_in_other_units() -> None:
    """The Gaussian view of a GP is that GP: the same values as BoTorch's, whatever the units and the direction."""
    values = []
    for loc, scale, direction in [(0.0, 1.0, "maximize"), (3e4, -1e6, "minimize")]:
        model = gp(bump(X), noise_var=0.01)
        torch.manual_seed(0)
        if direction == "maximize":
            values.append(built("mes", model, direction)(GRID.unsqueeze(-2)).detach())
        else:
            other = SingleTaskGP(X, loc + scale * bump(X), train_Yvar=torch.full((5, 1), 0.01 * scale**2).double())
            other.outcome_transform.eval()  # type: ignore[union-attr]
            other.outcome_transform.means.fill_(loc)  # type: ignore[union-attr]
            other.outcome_transform.stdvs.fill_(abs(scale))  # type: ignore[union-attr]
            other.outcome_transform._stdvs_sq.fill_(scale**2)  # type: ignore[union-attr]
            other.set_train_data(targets=-bump(X).flatten(), strict=False)
            other.likelihood.noise_covar.noise = torch.full((5,), 0.01).double()
            other.covar_module.lengthscale = 0.2
            values.append(built("mes", other.eval(), direction)(GRID.unsqueeze(-2)).detach())
    torch.testing.assert_close(values[0], values[1], atol=1e-4, rtol=1e-3)
    assert isinstance(built("mes", gp(bump(X))), qLowerBoundMaxValueEntropy) and float(values[0].max()) > 0.01


class Lines(BotorchModel):
    """Three straight lines with weights: the posterior is known by enumeration."""

    num_outputs = 1
    batch_shape = torch.Size([])
    slopes = torch.tensor([1.0, -1.0, 0.2], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    train_inputs = (X,)

    def posterior(self, at: Tensor, *args: Any, **kwargs: Any) -> FunctionDraws:
        values = (self.slopes[:, None, None] * (at.unsqueeze(-3) - 0.5)).expand(*at.shape[:-2], 3, -1, 1)
        return FunctionDraws(values, self.weights.log().expand(*at.shape[:-2], 3))


class Waves(BotorchModel):
    """Draws of two outputs, by their formula; remembers where it was asked."""

    num_outputs = 2
    batch_shape = torch.Size([])
    train_inputs = (X,)

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[torch.Size] = []

    def posterior(self, at: Tensor, *args: Any, **kwargs: Any) -> FunctionDraws:
        self.asked.append(at.shape[:-1])
        phase = torch.arange(7, dtype=torch.float64)[:, None, None]
        values = torch.cat([torch.sin(6 * at.unsqueeze(-3) + phase), torch.cos(3 * at.unsqueeze(-3) - phase)], -1)
        return FunctionDraws(values)


def test_functions_are_asked_once_where_their_values_are_known() -> None:
    """The values and gradients are BoTorch's, which asks for all tried configurations beside each candidate."""
    limited = outcomes_of(2, "maximize", {1: ("<=", 0.3)})
    pending = torch.tensor([[0.33], [0.6]], dtype=torch.float64)
    for functions in (True, False):
        model = Waves()
        found = acquisition("lognei", setting(model, limited), 1, 0)[1]
        assert found.functions
        found.functions = functions
        answers = []
        for given in (None, pending, pending[:1]):
            found.set_X_pending(given)
            at = GRID.unsqueeze(-2).clone().requires_grad_()
            model.asked.clear()
            values = found(at)
            assert (torch.Size([41, 1]) in model.asked) == functions
            values = found(at)
            answers.append((values.detach(), torch.autograd.grad(values.sum(), at)[0]))
        if functions:
            expected = answers
            assert not torch.allclose(expected[0][0], expected[1][0])
    for own, other in zip(expected, answers, strict=True):
        torch.testing.assert_close(own, other)


def test_thompson_draws_members_by_their_weight() -> None:
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64).unsqueeze(-2)
    slopes = []
    for seed in range(300):
        draw = built("thompson", Lines(), seed=seed)
        assert isinstance(draw, ThompsonDraw)
        values = draw(ends)
        again = draw(torch.cat([ends, ends + 0.1, ends]))
        assert torch.equal(values, again[:2]) and torch.equal(values, again[-2:])  # one function
        slopes.append(float(values[1] - values[0]))
    scale = float(units(Lines())[1])
    shares = [sum(abs(slope * scale - wanted) < 1e-9 for slope in slopes) / 300 for wanted in (1.0, -1.0, 0.2)]
    for share, weight in zip(shares, (0.5, 0.3, 0.2), strict=True):
        assert abs(share - weight) / math.sqrt(weight * (1 - weight) / 300) < 3.5


def test_thompson_of_a_gaussian_follows_its_joint_law() -> None:
    model = gp(bump(X))
    places = torch.tensor([[0.25], [0.335]], dtype=torch.float64)  # about equally high
    posterior = model.posterior(places)
    covariance = posterior.distribution.covariance_matrix
    std = (covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]).sqrt()
    probability = float(Normal(0.0, 1.0).cdf((posterior.mean[0] - posterior.mean[1]) / std).detach())
    first = []
    for seed in range(400):
        draw = ThompsonAtPlaces(OnCodes(model, LINE), lambda values: values, places, seed)
        values = draw(places.unsqueeze(-2))
        first.append(float(values[0] > values[1]))
    z = (sum(first) / 400 - probability) / math.sqrt(probability * (1 - probability) / 400)
    assert 0.02 < probability < 0.98 and abs(z) < 3.5
    assert isinstance(built("thompson", model), ThompsonAtPlaces)


@pytest.mark.parametrize("name", ["logei", "lognei", "ucb", "thompson", "mes", "kg"])
def test_suggestions_by_name(name: Any) -> None:
    """On a mixed space, in batches: new, different, the same for the same seed."""
    space = Space({"x": (0.0, 1.0), "n": (1, 300), "kind": ["a", "b"]})
    tried = space.sobol(8, seed=0)
    features = space.encode(tried)
    model = SingleTaskGP(features, features.sum(-1, keepdim=True).sin()).eval()
    search: dict[str, Any] = {"acquisition": name, "num_restarts": 2, "raw_samples": 16, "num_samples": 32}
    found = suggest(model, space, 2, seed=3, **search)
    assert found == suggest(model, space, 2, seed=3, **search)
    codes = torch.cat([tried, space.codes(found)])
    assert len(codes.unique(dim=0)) == 10


@pytest.mark.parametrize("name", ["lognehvi", "lognparego"])
def test_several_objectives_under_a_constraint(name: Any) -> None:
    """Two objectives pull to both ends; a limit on the third output allows the middle alone."""
    targets = torch.cat([X, -X, (X - 0.5).abs()], -1)
    model = gp(targets, noise_var=1e-6)
    model.covar_module.lengthscale = 0.6  # so that it knows where the limit is
    options: dict[str, Any] = {"num_restarts": 2, "raw_samples": 32, "num_samples": 32, "acquisition": name}
    found = suggest(model, LINE, 2, direction="maximize", constraints={2: ("<=", 0.25)}, **options)
    assert all(0.2 < each["x"] < 0.8 for each in found) and found[0] != found[1]


@pytest.mark.parametrize(("limit", "low", "high"), [(("<=", 0.3), 0.0, 0.35), ((">=", 0.6), 0.55, 1.0)])
def test_one_objective_under_a_constraint(limit: Any, low: float, high: float) -> None:
    model = gp(torch.cat([-((X - 0.5) ** 2), X], -1), noise_var=1e-6)
    (found,) = suggest(model, LINE, direction="maximize", constraints={1: limit}, num_restarts=2, raw_samples=32)
    assert low <= found["x"] <= high


def test_who_gets_which() -> None:
    one, several, limited = (
        outcomes_of(1, "minimize"),
        outcomes_of(2, "minimize"),
        outcomes_of(2, "minimize", {1: ("<=", 0)}),
    )
    model = gp(bump(X))
    for name in NAMES:
        for outcomes, fitting in (
            (one, {"auto", "logei", "lognei", "ucb", "thompson", "mes", "kg"}),
            (several, {"auto", "lognehvi", "lognparego"}),
            (limited, {"auto", "lognei"}),
        ):
            if name in fitting:
                check_acquisition(name, outcomes, model)
            else:
                with pytest.raises(ValueError, match="acquisition must be one of"):
                    check_acquisition(name, outcomes, model)
    with pytest.raises(ValueError, match="acquisition must be one of auto, logei"):
        check_acquisition("best", one, model)


def test_draws_that_depend_on_the_points() -> None:
    model = PFN("bo", bounds=(0.0, 1.0), joint="autoregressive").fit(X, bump(X))
    for name in ("thompson", "mes", "kg"):
        with pytest.raises(ValueError, match="for a model whose draws depend on the points asked for"):
            suggest(model, LINE, acquisition=name)  # type: ignore[arg-type]
    options: dict[str, Any] = {"num_restarts": 1, "raw_samples": 8, "num_samples": 8}
    assert 0 <= suggest(model, LINE, acquisition="lognei", **options)[0]["x"] <= 1
    chosen, _ = acquisition("auto", setting(model, outcomes_of(1, "minimize"), 8), 1, 0)
    assert chosen == "closed-form logei"


@pytest.mark.parametrize("name", ["mes", "ucb"])
def test_a_batch_keeps_away_from_failures(name: Any) -> None:
    """Also where pending points make the acquisition function negative."""
    tried = LINE.sobol(24, seed=0)
    tried, failed = tried[tried[:, 0] < 0.5], tried[tried[:, 0] > 0.55]
    model = SingleTaskGP(tried, bump(tried))
    model.covar_module.lengthscale = 0.2
    options: dict[str, Any] = {"acquisition": name, "num_restarts": 2, "raw_samples": 32, "num_samples": 64}
    pending = [{"x": 0.31}, {"x": 0.44}]
    found = suggest(model.eval(), LINE, 2, pending=pending, failed=LINE.configurations(failed), **options)
    assert all(each["x"] < 0.6 for each in found)


def test_thompson_finds_what_is_left_of_a_finite_space() -> None:
    space = Space({"n": (1, 20), "m": (1, 25)})
    grid = space.grid()
    left = [{"n": 3, "m": 7}, {"n": 18, "m": 20}]
    tried = grid[[space.configurations(code[None])[0] not in left for code in grid]]
    model = SingleTaskGP(tried[::20], tried[::20].sum(-1, keepdim=True)).eval()
    taken = space.configurations(torch.cat([tried[k::20] for k in range(1, 20)]))
    found = suggest(model, space, 2, acquisition="thompson", pending=taken)
    assert sorted(map(str, found)) == sorted(map(str, left))
    with pytest.raises(SpaceExhaustedError, match="all of the space's 500 configurations"):
        suggest(model, space, 3, acquisition="thompson", pending=taken)


def test_models_made_of_others_tell_whose_draws_are_no_functions() -> None:
    drawn = PFN("bo", bounds=(0.0, 1.0), joint="autoregressive").fit(X, bump(X))
    several = ModelList(drawn, gp(bump(X)))
    with pytest.raises(ValueError, match="for a model whose draws depend on the points asked for"):
        check_acquisition("lognehvi", outcomes_of(2, "minimize"), several)
    check_acquisition("lognehvi", outcomes_of(2, "minimize"), ModelList(gp(bump(X)), gp(bump(X))))


@pytest.mark.parametrize("num_outputs", [2, 3])
def test_values_under_limits_are_no_estimates(num_outputs: int) -> None:
    """Where no tried configuration keeps the limits, a lower bound stands for the best: the same at each call."""
    targets = torch.cat([X, -X, (X - 0.5).abs()], -1)[:, -num_outputs:]
    model = gp(targets, noise_var=1e-2)
    outcomes = outcomes_of(num_outputs, "maximize", {num_outputs - 1: ("<=", 0.0)})
    name = "lognei" if num_outputs == 2 else "lognparego"
    function = acquisition(name, setting(model, outcomes), 1, 0)[1]
    once = function(GRID.unsqueeze(-2))
    assert function.lower_bound is not None
    assert torch.equal(function(GRID.unsqueeze(-2)), once)
    assert float(function.lower_bound) < float(function.baseline_obj.min())  # type: ignore[arg-type]
