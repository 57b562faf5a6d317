"""Suggestions against exact expected improvement, pending points, discrete spaces, units, seeds and bad arguments."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from botorch.models import SingleTaskGP
from botorch.models.model import Model as BotorchModel
from botorch.posteriors import Posterior
from torch import Tensor
from torch.distributions import Normal

from bayesnn import BNN, NotFittedError
from bayesnn.bo import Space, SpaceExhaustedError, suggest
from bayesnn.bo.acquisition import Setting, acquisition as build
from bayesnn.bo.on_codes import OnCodes
from bayesnn.bo.outcomes import outcomes_of
from bayesnn.bo.suggest import propose
from bayesnn.inference import DeepEnsemble

pytestmark = [
    pytest.mark.filterwarnings("ignore:Data \\(outcome observations\\) is not standardized"),
    pytest.mark.filterwarnings("ignore:Very small noise values"),
    pytest.mark.filterwarnings("ignore:A not p.d."),
    pytest.mark.filterwarnings("ignore:X. column"),
]

LINE = Space({"x": (0.0, 1.0)})
STEPS = Space({"n": (0, 200)})
MIXED = Space(
    {"x": (-1.0, 3.0), "n": (1, 6), "rate": (1e-5, 1e-1, "log"), "many": (1, 100_000), "kind": ["a", "b", "c"]}
)


def bump(X: Tensor) -> Tensor:
    return torch.sin(6 * X).sum(-1, keepdim=True) + X[..., :1]


def ensemble(space: Space, num_points: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> BNN:
    X = space.encode(space.sobol(num_points, seed=0)).to(dtype)
    model = BNN(method=DeepEnsemble(num_members=5, num_steps=100))
    return model.fit(X, 3 + scale * bump(X), seed=0)


def gp(space: Space, X: Tensor, Y: Tensor) -> SingleTaskGP:
    """A GP whose hyperparameters are set, not fitted, and that knows its values exactly."""
    model = SingleTaskGP(X, Y, train_Yvar=torch.full_like(Y, 1e-8), outcome_transform=None)
    model.covar_module.lengthscale = 0.25
    return model.eval()


def exact_improvement(model: BNN, space: Space, codes: Tensor) -> Tensor:
    """E[max(0, f(x) - max_i f(x_i))] of an equally weighted ensemble, member by member; maximisation."""
    with torch.no_grad():
        values = model.posterior(space.encode(codes)).values[..., 0]
        known = model.posterior(model.train_inputs[0]).values[..., 0]
    return (values - known.amax(-1, keepdim=True)).clamp_min(0).mean(0)


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_an_ensembles_suggestion_maximises_its_exact_expected_improvement(direction: str) -> None:
    model = ensemble(STEPS, 6, scale=1.0 if direction == "maximize" else -1.0)
    mirrored = ensemble(STEPS, 6)  # the same, seen from the side of maximisation
    with torch.no_grad():
        features = STEPS.encode(STEPS.grid())
        sign = 1.0 if direction == "maximize" else -1.0
        values = sign * model.posterior(features).values[..., 0]
        known = sign * model.posterior(model.train_inputs[0]).values[..., 0]
    exact = (values - known.amax(-1, keepdim=True)).clamp_min(0).mean(0)
    assert exact.max() > 0
    (found,) = suggest(model, STEPS, direction=direction)
    assert exact[found["n"]] == pytest.approx(float(exact.max()), rel=1e-3)
    if direction == "maximize":
        assert torch.allclose(exact, exact_improvement(mirrored, STEPS, STEPS.grid()))


def test_a_gps_suggestion_maximises_the_closed_form_of_expected_improvement() -> None:
    X = torch.tensor([[0.05], [0.2], [0.45], [0.7], [0.95]], dtype=torch.float64)
    Y = bump(X)
    model = gp(LINE, X, Y)
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64).unsqueeze(-1)
    with torch.no_grad():
        posterior = model.posterior(grid.unsqueeze(-2))
        mean, std = posterior.mean.flatten(), posterior.variance.flatten().sqrt()
    z = (mean - Y.max()) / std
    exact = std * (Normal(0.0, 1.0).log_prob(z).exp() + z * Normal(0.0, 1.0).cdf(z))
    (found,) = suggest(model, LINE, direction="maximize", num_samples=1024)
    assert exact[round(found["x"] * 2000)] > 0.99 * exact.max()


@pytest.mark.parametrize("kind", ["ensemble", "gp"])
def test_known_and_pending_points_gain_nothing(kind: str) -> None:
    if kind == "ensemble":
        model: BotorchModel = ensemble(LINE, 6)
    else:
        X = LINE.sobol(6, seed=0)
        model = gp(LINE, X, bump(X))
    tried, pending = LINE.sobol(6, seed=0), torch.tensor([[0.123], [0.456]], dtype=torch.float64)
    setting = Setting(OnCodes(model, LINE), LINE, tried, tried, outcomes_of(1, "maximize"), None, 64, 4.0, 0)
    _, acquisition = build("lognei", setting, 1, 0)
    acquisition.set_X_pending(pending)
    known = acquisition(torch.cat([tried, pending]).unsqueeze(-2)).exp()
    elsewhere = acquisition(torch.linspace(0, 1, 200, dtype=torch.float64)[:, None, None]).exp()
    # A GP's joint draws carry jitter: a standard deviation of 1e-4 at a known point.
    assert known.max() < (1e-6 if kind == "ensemble" else 5e-4)
    assert elsewhere.max() > 0.02


def test_a_batch_is_one_suggestion_after_the_other() -> None:
    model = ensemble(STEPS, 6)
    first = suggest(model, STEPS, direction="maximize")
    second = suggest(model, STEPS, direction="maximize", pending=first)
    assert suggest(model, STEPS, 2, direction="maximize") == first + second != first + first
    batch = propose(model, STEPS, 2, pending=STEPS.codes([]), outcomes=outcomes_of(1, "maximize"))
    # What the second improves on top of the first, member by member, in units of the predicted means' spread.
    with torch.no_grad():
        at_known = model.posterior(model.train_inputs[0])
        known = at_known.values[..., 0].amax(-1)
        values = model.posterior(STEPS.features(first + second)).values[..., 0]
    exact = (values[:, 1] - torch.maximum(known, values[:, 0])).clamp_min(0).mean() / at_known.mean.std(correction=0)
    assert np.exp(batch.values[1]) == pytest.approx(float(exact), rel=1e-2)


@pytest.mark.parametrize("space", [LINE, STEPS, MIXED, Space({"many": (1, 10**6), "k": (1, 300)})], ids=repr)
def test_suggestions_lie_in_the_space_differ_and_follow_the_seed(space: Space) -> None:
    model = ensemble(space, 8)
    tried = space.decode(model.train_inputs[0])
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = suggest(model, space, 3, seed=1)
    assert torch.equal(torch_state, torch.get_rng_state()) and python_state == random.getstate()
    assert np.array_equal(numpy_state, np.random.get_state()[1])
    torch.rand(3)
    random.random()
    assert suggest(model, space, 3, seed=1) == first
    codes = space.codes(first)  # raises outside the space
    assert len(torch.cat([tried, codes]).unique(dim=0)) == len(tried) + 3


def test_many_choices_follow_the_seed() -> None:
    space = Space({name: [f"{name}{k}" for k in range(60)] for name in "abc"} | {"x": (0.0, 1.0)})
    model = ensemble(space, 30)
    answers = []
    for state in range(6):  # BoTorch draws some of many choices from Python's own generator
        random.seed(state)
        answers.append(suggest(model, space, seed=1, raw_samples=2, num_restarts=1))
    assert answers == [answers[0]] * 6


def test_float32_models_are_searched_in_float64() -> None:
    single, double = ensemble(LINE, 6, torch.float32), ensemble(LINE, 6, torch.float64)
    assert single.train_inputs[0].dtype == torch.float32
    codes = propose(single, LINE, 1, pending=LINE.codes([]), outcomes=outcomes_of(1, "maximize")).codes
    assert codes.dtype == torch.float64
    grid = torch.linspace(0, 1, 1001, dtype=torch.float64).unsqueeze(-1)
    best = exact_improvement(single, LINE, grid).max()
    assert exact_improvement(single, LINE, codes)[0] > 0.98 * best
    assert suggest(double, LINE, direction="maximize")


def test_units_of_the_objective_do_not_matter() -> None:
    X = LINE.sobol(6, seed=0)
    answers = []
    for loc, scale in [(0.0, 1.0), (-5e-6, 1e-6), (3e4, 1e6)]:
        model = SingleTaskGP(X, loc + scale * bump(X))  # standardises its outcomes
        model.covar_module.lengthscale = 0.25
        answers.append(suggest(model.eval(), LINE, direction="maximize", seed=2)[0]["x"])
    assert answers == [pytest.approx(answers[0], abs=1e-3)] * 3


def test_a_finite_space_is_exhausted_but_never_repeated() -> None:
    space = Space({"n": (1, 3), "kind": ["a", "b"]})
    X = space.encode(space.grid()[:3])
    model = BNN(method=DeepEnsemble(num_members=3, num_steps=20)).fit(X, X.sum(-1), seed=0)
    tried = space.configurations(space.grid()[:3])
    rest = suggest(model, space, 3)
    assert sorted(map(str, tried + rest)) == sorted(map(str, space.configurations(space.grid())))
    assert suggest(model, space, pending=rest[:2]) == rest[2:]
    with pytest.raises(SpaceExhaustedError, match="all of the space's 6 configurations"):
        suggest(model, space, 4)
    with pytest.raises(SpaceExhaustedError):
        suggest(model, space, pending=rest)


def test_constant_objective() -> None:
    X = MIXED.encode(MIXED.sobol(5, seed=0))
    with pytest.warns(UserWarning, match="constant"):
        model = BNN(method=DeepEnsemble(num_members=3, num_steps=20)).fit(X, torch.full((5, 1), 7.0), seed=0)
    MIXED.codes(suggest(model, MIXED, 2))


class Copies(SingleTaskGP):
    """Several copies of a GP in a batch dimension of their own, as BoTorch's fully Bayesian models have them."""

    _is_ensemble = True

    def posterior(self, X: Tensor, *args: Any, **kwargs: Any) -> Posterior:
        return super().posterior(X.unsqueeze(-3), *args, **kwargs)


def test_models_whose_posterior_has_a_dimension_of_members() -> None:
    X = LINE.sobol(6, seed=0)
    Y = bump(X)
    one = gp(LINE, X, Y)
    many = Copies(X.expand(3, 6, 1), Y.expand(3, 6, 1), torch.full((3, 6, 1), 1e-8).double(), outcome_transform=None)
    many.covar_module.lengthscale = 0.25
    expected = suggest(one, LINE, direction="maximize")[0]["x"]
    assert suggest(many.eval(), LINE, direction="maximize")[0]["x"] == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"q": 0}, "q must be at least 1"),
        ({"seed": 1.5}, "seed must be an integer, found 1.5"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"direction": None}, 'direction must be "minimize" or "maximize", or a list of them, found None'),
        ({"constraints": {True: ("<=", 1.0)}}, "constraints must name outputs 0 … 0, found True"),
        ({"reference_point": 5}, "reference_point must be a list of values"),
        ({"reference_point": [float("nan"), 1.0]}, "reference_point must be finite"),
        ({"pending": {"n": 3}}, "configurations must be a list of them, found a single one"),
        ({"num_samples": 1.5}, "num_samples must be an integer, found 1.5"),
        ({"beta": -1.0}, "beta must be"),
        ({"seconds": 0.0}, "seconds must be"),
        ({"acquisition": "ei"}, "acquisition must be one of auto, logei"),
        ({"constraints": {0: ("<=", 1.0)}}, "constraints must leave an objective"),
        ({"constraints": {3: ("<=", 1.0)}}, "constraints must name outputs 0 … 0, found 3"),
        ({"constraints": {0: 1.0}}, 'must be ."<=", bound. or .">=", bound., found 1.0'),
        ({"direction": "up"}, 'direction must be "minimize" or "maximize"'),
        ({"direction": ["minimize", "maximize"]}, "for each of the 1 output"),
        ({"reference_point": [0.0]}, "reference_point must be None for one objective, found .0.0."),
        ({"pending": [{"n": 300}]}, "n of the configuration is outside the space"),
        ({"space": {"n": (0, 200), "x": (0.0, 1.0)}}, "features of this space have 2 columns, found 1"),
        ({"space": {"n": (2, 1)}}, "low < high"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        suggest(**({"model": ensemble(STEPS, 3), "space": STEPS} | arguments))


def test_models_that_cannot_be_asked() -> None:
    with pytest.raises(NotFittedError, match="fit"):
        suggest(BNN(), STEPS)
    with pytest.raises(TypeError, match="model must be a fitted BoTorch model, found str"):
        suggest("nngp", STEPS)  # type: ignore[arg-type]

    class Nameless(BotorchModel):
        num_outputs = 1

        def posterior(self, X: Tensor, *args: Any, **kwargs: Any) -> Posterior:
            raise AssertionError

    with pytest.raises(TypeError, match="Nameless doesn't say what it was fitted to"):
        suggest(Nameless(), STEPS)
