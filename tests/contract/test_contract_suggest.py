"""What every registered model promises as a surrogate: with every acquisition function that is right for it.

The problems: one objective, one with a limit on a second output, two, and two with a limit on a third.
"""

import functools
import warnings

import pytest
import torch
from contract.models import OPTIONS, unfitted

import bayesnn
from bayesnn import BayesnnWarning
from bayesnn.bo import AutoSurrogate, Ordinal, Space, suggest
from bayesnn.bo.acquisition import OF_ANY_DRAWS, Setting, acquisition, draws_are_functions
from bayesnn.bo.on_codes import OnCodes
from bayesnn.bo.outcomes import outcomes_of
from bayesnn.inference import HMC, MeanField
from bayesnn.inference.amortized import DeepSetNetwork, SetTransformer
from bayesnn.likelihoods import Gaussian

SQUARE = Space({"x": (0.0, 1.0), "y": (0.0, 1.0)})
GRID = Space({"n": (1, 5), "order": Ordinal(["low", "middle", "high"]), "kind": ["a", "b"]})  # searched completely
MIXED = Space({"x": (0.0, 1.0), "kind": ["a", "b"]})
SPACES = {"square": SQUARE, "grid": GRID, "mixed": MIXED}
# For each problem: its outputs, the limited ones, and the acquisition functions that are right for it.
PROBLEMS = {
    "one": (1, {}, ("auto", "logei", "lognei", "ucb", "thompson", "mes", "kg")),
    "limited": (2, {1: ("<=", 0.3)}, ("auto", "lognei")),
    "two": (2, {}, ("auto", "lognehvi", "lognparego")),
    "two-limited": (3, {2: ("<=", 0.3)}, ("lognehvi", "lognparego")),
}
# Networks that nobody has trained promise the same as others, and are quick; but they know nothing of known points.
BORDERS = torch.linspace(-3, 3, 9).tolist()
SMALL = OPTIONS | {
    "pfn": {"network": SetTransformer(5, BORDERS, (1.0, 1.0), width=8, num_layers=1, num_heads=1).double()},
    "cnp": {"network": DeepSetNetwork(5, width=8).double()},
    "hmc": OPTIONS["hmc"] | {"method": HMC(num_chains=2, num_warmup=20, num_draws=8, num_leapfrog=4)},
    "mean-field": OPTIONS["mean-field"] | {"method": MeanField(num_steps=100, num_draws=16)},
}
SMALL["dependent"] = SMALL["pfn"] | {"joint": "autoregressive"}  # draws that depend on all the points asked for
TRAINED = {"pfn": {"network": "gp-small"}, "cnp": {"network": "gp-small"}}
LOGARITHMS = ("logei", "lognei", "lognehvi", "lognparego", "auto")
INTERPOLATING = ("gp", "nngp", "student-t", "dkl")
QUICK = {"num_restarts": 1, "raw_samples": 8, "num_samples": 16}
NAMES_OF_SURROGATES = [*bayesnn.surrogates(), "auto"]


def cases(only=lambda problem, name: True):
    found = [
        pytest.param(surrogate, problem, name, id=f"<{surrogate}>-{problem}-{name}")
        for surrogate in NAMES_OF_SURROGATES
        for problem, (_, _, right) in PROBLEMS.items()
        for name in right
        if only(problem, name)
    ]
    return pytest.mark.parametrize(("surrogate", "problem", "name"), found)


each_surrogate = pytest.mark.parametrize("surrogate", NAMES_OF_SURROGATES, ids=lambda name: f"<{name}>")


@pytest.fixture(autouse=True)
def few_places(monkeypatch):
    """Among which draws, means and maxima are looked for: 256 would cost minutes, and promise the same."""
    monkeypatch.setattr("bayesnn.bo.acquisition.PLACES", 32)


def outputs(space, num_outputs):
    """Noiseless values at ten codes: waves, of which no two are alike."""
    codes = space.sobol(10, seed=0)
    total = codes / space.bounds[1]
    waves = [(3 * total.sum(-1) + 2 * k).sin() + total[:, 0] for k in range(num_outputs)]
    return codes, torch.stack(waves, -1)


@functools.cache
def surrogate_of(surrogate, space, num_outputs, trained=False):
    codes, Y = outputs(SPACES[space], num_outputs)
    X = SPACES[space].encode(codes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BayesnnWarning)
        if surrogate == "auto":
            return AutoSurrogate(["gp", "nngp"], num_folds=2)(X, Y, seed=0)
        if surrogate == "stack":
            return unfitted("stack").fit(X, Y, seed=0)
        name = "pfn" if surrogate == "dependent" else surrogate
        options = SMALL | TRAINED if trained else SMALL
        return bayesnn.surrogate(name, **options.get(surrogate, {})).fit(X, Y, seed=0)


def built(model, space, problem, name, num_pending=0):
    """The acquisition function that ``suggest`` would maximise."""
    num_outputs, limits, _ = PROBLEMS[problem]
    codes, _ = outputs(SPACES[space], num_outputs)
    outcomes = outcomes_of(num_outputs, "maximize", limits)
    setting = Setting(OnCodes(model, SPACES[space]), SPACES[space], codes, codes, outcomes, None, 16, 4.0, 0)
    return acquisition(name, setting, 1, num_pending)[1]


def check_suggestions(surrogate, problem, name, space):
    num_outputs, limits, _ = PROBLEMS[problem]
    model, pending = surrogate_of(surrogate, space, num_outputs), SPACES[space].sobol(12, seed=0)[10:]
    options = QUICK | {"pending": SPACES[space].configurations(pending), "constraints": limits, "acquisition": name}
    found = suggest(model, SPACES[space], 2, seed=3, **options)
    codes = SPACES[space].codes(found)  # it refuses what is outside
    assert torch.isfinite(codes).all()
    known = torch.cat([outputs(SPACES[space], 1)[0], pending])
    assert len(torch.cat([known, codes]).unique(dim=0)) == len(known.unique(dim=0)) + 2
    torch.rand(3)
    assert suggest(model, SPACES[space], 2, seed=3, **options) == found


@cases()
def test_suggestions_are_new_points_of_the_space_and_the_seeds_alone(surrogate, problem, name):
    check_suggestions(surrogate, problem, name, "grid")


@each_surrogate
@pytest.mark.parametrize("space", ["square", "mixed"])
def test_suggestions_by_gradients(surrogate, space):
    check_suggestions(surrogate, "one", "auto", space)


@cases()
def test_values_are_the_points_own(surrogate, problem, name):
    """Whatever else is in the batch, wherever in it, and with pending points; gradients are finite."""
    model = surrogate_of(surrogate, "square", PROBLEMS[problem][0])
    for pending in (None, SQUARE.sobol(2, seed=5)):
        function = built(model, "square", problem, name, 0 if pending is None else 2)
        if pending is not None:
            function.set_X_pending(pending)
        X = SQUARE.sobol(5, seed=1).unsqueeze(1).requires_grad_()
        together = function(X)
        assert together.shape == (5,) and torch.isfinite(together).all()
        if together.requires_grad:
            (gradient,) = torch.autograd.grad(together.sum(), X)
            assert torch.isfinite(gradient).all()
        with torch.no_grad():
            for values, expected in (
                (function(X.flip(0)).flip(0), together),
                (function(X[3:4]), together[3:4]),
                (function(X.repeat(2, 1, 1))[5:], together),
            ):
                pair = (values.exp(), expected.exp()) if name in LOGARITHMS else (values, expected)
                torch.testing.assert_close(*pair, rtol=1e-6, atol=1e-6)


@cases(only=lambda problem, name: name in ("lognei", "lognehvi"))
def test_nothing_is_gained_where_the_value_is_known_or_awaited(surrogate, problem, name):
    model = surrogate_of(surrogate, "square", PROBLEMS[problem][0], trained=True)
    function, pending = built(model, "square", problem, name), SQUARE.sobol(2, seed=5)
    function.set_X_pending(pending)
    known = torch.cat([outputs(SQUARE, 1)[0], pending])
    with torch.no_grad():
        assert function(known.unsqueeze(1)).exp().max() < 5e-3


@pytest.mark.parametrize("surrogate", INTERPOLATING, ids=lambda name: f"<{name}>")
def test_no_improvement_is_expected_where_a_noiseless_value_is_known(surrogate):
    """Over the best mean, which is then the best value."""
    codes, Y = outputs(SQUARE, 1)
    model = bayesnn.surrogate(surrogate, likelihood=Gaussian(noise_std=1e-3)).fit(codes, Y)
    function = built(model, "square", "one", "logei")
    with torch.no_grad():
        known, elsewhere = (function(X.unsqueeze(1)).exp() for X in (codes, SQUARE.sobol(32, seed=1)))
    assert known.max() < 5e-3 and elsewhere.max() > 10 * known.max()


def test_draws_that_depend_on_the_points_get_what_compares_one_calls_values():
    assert all(draws_are_functions(surrogate_of(surrogate, "grid", 1)) for surrogate in NAMES_OF_SURROGATES)
    for problem, (num_outputs, limits, right) in PROBLEMS.items():
        model = surrogate_of("dependent", "grid", num_outputs)
        for name in right:
            options = QUICK | {"constraints": limits, "acquisition": name}
            if name in ("auto", *OF_ANY_DRAWS):
                assert GRID.codes(suggest(model, GRID, **options)).isfinite().all(), problem
            else:
                with pytest.raises(ValueError, match="for a model whose draws depend on the points asked for, found"):
                    suggest(model, GRID, **options)
