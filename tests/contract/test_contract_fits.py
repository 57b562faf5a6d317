"""What every registered model promises of fits, files, further observations, and bad or odd input."""

import copy
import warnings

import numpy as np
import pytest
import torch
from botorch.acquisition import (
    qKnowledgeGradient,
)
from botorch.sampling.get_sampler import get_sampler
from botorch.sampling.normal import SobolQMCNormalSampler
from contract.models import (
    OPTIONS,
    SPREAD,
    close,
    data,
    each_dtype,
    each_model,
    fitted,
    new_points,
    predictions,
    samples,
    unfitted,
)

import bayesnn
from bayesnn import BayesnnWarning, NotFittedError
from bayesnn.posteriors import function_draws

# Fits, dtypes, files ----------------------------------------------------------------------------------------------


@each_model
def test_same_seed_same_model_whatever_the_global_generators_do(name):
    torch.manual_seed(7)
    np.random.seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BayesnnWarning)
        same = unfitted(name).fit(*data(), seed=0)
    for found, expected in zip(predictions(same), predictions(fitted(name)), strict=True):
        assert torch.equal(found, expected)


@each_model
def test_answers_leave_the_global_generators_alone(name):
    model, new = fitted(name), unfitted(name)
    state = torch.random.get_rng_state()
    predictions(model)
    model.posterior(new_points(2), observation_noise=True)
    model.draw_functions(2)(new_points(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BayesnnWarning)
        new.fit(*data(num_rows=4))
    assert torch.equal(torch.random.get_rng_state(), state)


@each_model
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seed": 1.5}, TypeError, "seed must be a whole number, found 1.5"),
        ({"seed": True}, TypeError, "seed must be a whole number"),
        ({"time_budget": 0.0}, ValueError, "time_budget must be positive"),
        ({"time_budget": "1"}, TypeError, "time_budget must be"),
    ],
    ids=["fraction", "flag", "no time", "text"],
)
def test_settings_of_a_fit_are_checked_before_it(name, options, error, message):
    with pytest.raises(error, match=message):
        unfitted(name).fit(*data(), **options)


@each_model
@each_dtype
def test_dtype_in_dtype_out(name, dtype):
    model = fitted(name, dtype=dtype)
    for value in predictions(model, dtype):
        assert value.dtype == dtype and torch.isfinite(value).all()
    noisy = model.posterior(new_points(3, dtype=dtype), observation_noise=True)
    assert noisy.mean.dtype == dtype and model.draw_functions(3)(new_points(3, dtype=dtype)).dtype == dtype
    # Of another dtype at prediction: the model's counts.
    assert model.predict(new_points(3).float()).mean.dtype == dtype
    assert model.predict(new_points(3).numpy()).mean.dtype == dtype


@each_model
def test_single_and_double_precision_see_the_same_data(name):
    single, double = (
        fitted(name, dtype=torch.float32).predict(new_points(5).float()),
        fitted(name).predict(new_points(5)),
    )
    difference = (single.mean.double() - double.mean).abs() / double.stddev
    # A sampler's or an optimiser's path isn't the same in another precision; what it finds is.
    assert difference.max() < (1.5 if name in OPTIONS else 0.05)


@each_model
@pytest.mark.parametrize("num_outputs", [1, 2])
def test_saved_and_loaded(name, num_outputs, tmp_path):
    model = fitted(name, num_outputs)
    model.save(tmp_path / "model")
    for loaded in (bayesnn.Model.load(tmp_path / "model"), type(model).load(tmp_path / "model")):
        assert type(loaded) is type(model)
        for found, expected in zip(predictions(loaded), predictions(model), strict=True):
            assert torch.equal(found, expected)
    # The same file again: nothing got lost.
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "model").read_bytes()
    if num_outputs == 2:
        model.subset_output([1]).save(tmp_path / "part")
        close(
            bayesnn.Model.load(tmp_path / "part").posterior(new_points(3)).mean,
            model.posterior(new_points(3)).mean[..., [1]],
        )


@each_model
def test_copied(name):
    model = fitted(name)
    twin = copy.deepcopy(model)
    before = predictions(model)
    for found, expected in zip(predictions(twin), before, strict=True):
        assert torch.equal(found, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BayesnnWarning)
        twin.fit(new_points(5), new_points(5)[:, :1])
    for found, expected in zip(predictions(model), before, strict=True):
        assert torch.equal(found, expected)


@each_model
def test_fitted_again(name):
    """A second fit forgets the first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BayesnnWarning)
        model = unfitted(name).fit(new_points(5), new_points(5)[:, :1])
        model.fit(*data(), seed=0)
    for found, expected in zip(predictions(model), predictions(fitted(name)), strict=True):
        assert torch.equal(found, expected)


# Look-ahead ---------------------------------------------------------------------------------------------------------


@each_model
def test_conditioning_moves_towards_what_was_seen(name):
    model, X = fitted(name), new_points(1, seed=9)
    before = model.posterior(X)
    shift = before.variance.sqrt().clamp_min(0.05 * SPREAD)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BayesnnWarning)
        up, down = (model.condition_on_observations(X, before.mean + sign * shift) for sign in (1, -1))
    assert up.posterior(X).mean > down.posterior(X).mean
    close(model.posterior(X).mean, before.mean)  # the model itself stays as it is
    assert up.posterior(new_points(4, 3)).mean.shape == (4, 3, 1)
    assert torch.isfinite(up.predict(new_points(4)).quantile(0.5)).all()
    with pytest.raises(ValueError, match="Y must be finite"):
        model.condition_on_observations(X, torch.full((1, 1), torch.nan))
    for wrong in (torch.zeros(1, 2), torch.zeros(2, 1), torch.zeros(1)):
        with pytest.raises(ValueError, match="Y must have shape"):
            model.condition_on_observations(X, wrong)


@each_model
@pytest.mark.filterwarnings("ignore::bayesnn.BayesnnWarning")
def test_fantasies(name, tmp_path):
    model, X = fitted(name), new_points(3, 1, seed=9)
    posterior = model.posterior(X, observation_noise=True)
    for sampler in (get_sampler(posterior, torch.Size([4]), seed=1), SobolQMCNormalSampler(torch.Size([4]), seed=1)):
        fantasy = model.fantasize(X, sampler)
        assert fantasy.batch_shape == (4, 3) and fantasy.num_outputs == 1
        for points in (new_points(5), new_points(3, 5), new_points(4, 3, 5)):
            after = fantasy.posterior(points)
            assert after.mean.shape == after.variance.shape == (4, 3, 5, 1)
            assert torch.isfinite(after.mean).all()
            assert function_draws(after, 8).values.shape[-2:] == (5, 1)
            p = fantasy.predict(points)
            assert p.mean.shape == p.quantile(0.5).shape == (4, 3, 5, 1)
    with pytest.raises(ValueError, match="conditioned model can't be saved"):
        fantasy.save(tmp_path / "fantasy")
    with_noise = model.fantasize(X, sampler, observation_noise=torch.full((1, 1), 0.5).double())
    assert with_noise.posterior(new_points(2)).mean.shape == (4, 3, 2, 1)


@each_model
@pytest.mark.filterwarnings("ignore::bayesnn.BayesnnWarning")
def test_knowledge_gradient(name):
    model = fitted(name)
    acquisition = qKnowledgeGradient(model, num_fantasies=3)
    X = new_points(2, 4).requires_grad_()  # one candidate and three fantasy points
    values = acquisition(X)
    (gradient,) = torch.autograd.grad(values.sum(), X)
    assert values.shape == (2,) and torch.isfinite(values).all() and torch.isfinite(gradient).all()
    assert gradient[:, 0].abs().max() > 0


# Bad and odd input -------------------------------------------------------------------------------------------------


@each_model
def test_errors_before_fitting(name):
    model = unfitted(name)
    for ask in (
        lambda: model.predict(new_points(2)),
        lambda: model.posterior(new_points(2)),
        lambda: model.draw_functions(3),
        lambda: model.condition_on_observations(new_points(1), torch.zeros(1, 1)),
        lambda: model.train_inputs,
        lambda: model.num_outputs,
        lambda: model.save("nowhere"),
    ):
        with pytest.raises(NotFittedError, match=r"isn't fitted yet: call fit\(X, Y\) first"):
            ask()


@each_model
def test_bad_data(name):
    X, Y = data()
    bad = X.clone()
    bad[2, 1] = torch.nan
    model = unfitted(name)
    for wrong_X, wrong_Y, error, message in (
        (bad, Y, ValueError, "X must be finite"),
        (X, Y / 0.0, ValueError, "Y must be finite"),
        (X[:0], Y[:0], ValueError, "at least one row"),
        (X[:, :0], Y, ValueError, "at least one row and one column"),
        (X[:5], Y, ValueError, "X has 5, Y has 14"),
        (X[:, 0], Y, ValueError, r"must have shape \(n, d\)"),
        (X[None], Y[None], ValueError, r"must have shape \(n, d\)"),
        (X, Y[:, :0], ValueError, "Y must have shape"),
        (X.to(torch.complex128), Y, TypeError, "X must be real"),
        ([["a", "b"]], [1.0], TypeError, "X must hold numbers"),
        (X, ["a"] * 14, TypeError, "Y must hold numbers"),
    ):
        with pytest.raises(error, match=message):
            model.fit(wrong_X, wrong_Y)
    with pytest.raises(NotFittedError):
        model.predict(X)
    model = fitted(name)
    for wrong, message in (
        (bad, "X must be finite"),
        (X[:, :1], "X must have 2 columns as at fit, found 1"),
        (X[0], "shape"),
    ):
        for ask in (model.predict, model.posterior):
            with pytest.raises(ValueError, match=message):
                ask(wrong)


def answers(name, X, Y):
    model = unfitted(name).fit(X, Y)
    p, posterior = model.predict(new_points(4)), model.posterior(new_points(4))
    for value in (p.mean, p.variance, p.quantile(0.9), p.log_prob(p.mean), posterior.mean, posterior.variance):
        assert torch.isfinite(value).all()
    assert (p.variance > 0).all() and torch.isfinite(samples(model, new_points(2, 3))).all()
    return p


@each_model
@pytest.mark.filterwarnings("ignore::bayesnn.BayesnnWarning")
def test_few_rows(name):
    X, Y = data()
    p = answers(name, X[:1], Y[:1])
    assert (p.mean - Y[0]).abs().max() < 10
    answers(name, X[:2], Y[:2])


@each_model
@pytest.mark.filterwarnings("ignore::botorch.exceptions.warnings.InputDataWarning")
def test_constant_outcomes(name):
    X, _ = data()
    with pytest.warns(BayesnnWarning, match=r"Y: column\(s\) \[0\] are constant"):
        p = answers(name, X, torch.full((14, 1), 7.0).double())
    assert (p.mean - 7).abs().max() < 1.5


@each_model
def test_constant_inputs(name):
    X, Y = data()
    X = X.clone()
    X[:, 1] = 3.0
    with pytest.warns(BayesnnWarning, match=r"X: column\(s\) \[1\] are constant"):
        answers(name, X, Y)


@each_model
@pytest.mark.filterwarnings("ignore::bayesnn.BayesnnWarning")
def test_repeated_rows(name):
    X, Y = data()
    answers(name, torch.cat([X, X, X]), torch.cat([Y, Y, Y]))
    answers(name, X[:1].repeat(8, 1), Y[:8])


@each_model
@pytest.mark.filterwarnings("ignore::bayesnn.BayesnnWarning")
def test_any_units(name):
    """A change of units of X and Y changes nothing but units."""
    X, Y = data()
    moved = unfitted(name).fit(1000 * X - 7, -3 + 1e-3 * Y, seed=0).predict(1000 * new_points(5) - 7)
    p = fitted(name).predict(new_points(5))
    difference = ((moved.mean + 3) * 1e3 - p.mean).abs() / p.stddev
    # Rounding makes a sampler's path another one, though the same model.
    assert difference.max() < (1.5 if name in OPTIONS else 1e-2)


@each_model
@pytest.mark.filterwarnings("ignore::bayesnn.BayesnnWarning")
def test_inputs_that_require_gradients(name):
    X, Y = data()
    model = unfitted(name).fit(X.clone().requires_grad_(), Y.clone().requires_grad_(), seed=0)
    for found, expected in zip(predictions(copy.deepcopy(model)), predictions(fitted(name)), strict=True):
        assert torch.equal(found, expected) and not found.requires_grad
