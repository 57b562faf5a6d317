"""What a network was trained on is known and kept to: rows, columns, values, bounds."""

import math

import pytest
import torch

import bayesnn
from bayesnn import PFN, ConditionalNeuralProcess, NotFittedError
from bayesnn.bo import suggest
from bayesnn.histogram import prior_borders
from bayesnn.inference.amortized import DeepSetNetwork, GPTasks, GridGPTasks, MetaTraining, SetTransformer, TaskBatch
from bayesnn.inference.amortized.recipes import Recipe

BORDERS = prior_borders(torch.linspace(-3, 3, 100), 12).tolist()


def network(largest=(2.0, 3.0), max_features=3):
    return SetTransformer(
        max_features, BORDERS, (1.0, 1.0), width=16, num_layers=2, num_heads=2, largest=largest
    ).eval()


def data(n=12, d=2):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.rand(n, k, generator=generator, dtype=torch.float64) for k in (d, 1))


def test_bounds_are_where_the_prior_s_cube_is():
    """[low, high] is the interval of a uniform variable of variance 1, whatever the data."""
    X, y = data()
    model = PFN(network(), bounds=[(0.0, 1.0), (-1.0, 3.0)]).fit(X, y)
    corners = torch.tensor([[0.0, -1.0], [1.0, 3.0], [0.5, 1.0]], dtype=torch.float64)
    expected = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0]], dtype=torch.float64) * math.sqrt(3)
    torch.testing.assert_close(model._scaled(corners), expected)
    one_pair = PFN(network(), bounds=(0.0, 1.0)).fit(X, y)
    torch.testing.assert_close(one_pair._scaled(corners[:1]), torch.tensor([[-1.0, -3.0]]).double() * math.sqrt(3))


def test_without_bounds_columns_are_standardised():
    X, y = data()
    model = PFN(network()).fit(X, y)
    torch.testing.assert_close(model._scaled(X), (X - X.mean(0)) / X.std(0, correction=0), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    "make",
    [
        lambda **options: PFN(network(), **options),
        lambda **options: ConditionalNeuralProcess(DeepSetNetwork(3, width=16), **options),
    ],
)
def test_bounds_are_saved(make, tmp_path):
    model = make(bounds=(-1.0, 2.0)).fit(*data())
    model.save(tmp_path / "model.safetensors")
    again = type(model).load(tmp_path / "model.safetensors")
    assert again.bounds == [(-1.0, 2.0)]
    torch.testing.assert_close(again.predict(data()[0]).mean, model.predict(data()[0]).mean)
    again.fit(*data(n=5))


@pytest.mark.parametrize(
    ("bounds", "error", "message"),
    [
        ((1.0, 0.0), ValueError, "bounds must be two increasing numbers"),
        ((0.0, math.inf), ValueError, "bounds must be finite"),
        ([(0.0, 1.0), (0.0,)], TypeError, "bounds must be two numbers"),
    ],
)
def test_bad_bounds(bounds, error, message):
    with pytest.raises(error, match=message):
        PFN(network(), bounds=bounds)


def test_data_that_do_not_fit_the_bounds():
    X, y = data()
    with pytest.raises(ValueError, match="X must have 3 columns, one for each pair of bounds, found 2"):
        PFN(network(), bounds=[(0.0, 1.0)] * 3).fit(X, y)
    with pytest.raises(ValueError, match="X must be within the bounds, found"):
        PFN(network(), bounds=(0.0, 0.5)).fit(X, y)


def test_values_far_from_all_that_it_has_seen_are_refused():
    X, y = data(n=40)
    PFN(network()).fit(X, y)
    far = X.clone()
    far[0, 0] = 100.0
    with pytest.raises(
        ValueError, match=r"X must be within 4.0 standard deviations .* found 6.2: transform it, or drop such rows"
    ):
        PFN(network()).fit(far, y)
    high = y.clone()
    high[0] = 100.0
    with pytest.raises(ValueError, match=r"Y must be within 6.0 standard deviations .* found 6.2"):
        PFN(network()).fit(X, high)
    PFN(network(largest=None)).fit(far, high)


def test_rows_and_columns_beyond_training_are_refused_unless_localised():
    X, y = data(n=12)
    with pytest.raises(ValueError, match="X must have at most 8 rows, its max_context; found 12"):
        PFN(network(), max_context=8).fit(X, y)
    assert PFN(network(), max_context=8, bounds=(0.0, 1.0), neighbours=8).fit(X, y).predict(X).mean.shape == (12, 1)
    with pytest.raises(ValueError, match="X must have at most 3 columns"):
        PFN(network()).fit(*data(d=4))


def test_a_recipe_tells_its_network_how_far_its_prior_goes():
    prior = GridGPTasks(max_features=1)
    recipe = Recipe(
        "any", prior, MetaTraining(), settings={"width": 16, "num_layers": 1, "num_heads": 2}, num_buckets=20
    )
    largest = recipe.build_network().largest
    tasks = prior(2000, 16, torch.Generator().manual_seed(5))
    assert 2.5 < largest[0] < 8 and 3 < largest[1] < 8
    assert (
        float((tasks.X.abs() > 2 * largest[0]).double().mean())
        == float((tasks.y.abs() > 2 * largest[1]).double().mean())
        == 0
    )


def test_a_search_may_outgrow_the_network():
    """It sees all rows, up to twenty times as many as in training."""
    X, y = data(n=130)
    search = bayesnn.surrogate("pfn")
    found, expected = (
        model.fit(X, y).predict(X[:3]).mean for model in (search, PFN("bo", bounds=(0.0, 1.0), max_context=130))
    )
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="X must have at most 2000 rows"):
        bayesnn.surrogate("pfn").fit(*data(n=2001))
    joint = search.posterior(X[:6]).rsample(torch.Size([500]))[..., 0]
    assert joint.shape == (500, 6) and float((joint.T.corrcoef().diagonal() - 1).abs().max()) < 1e-6
    space = {"a": (0.0, 1.0), "b": (0.0, 1.0)}
    (found,) = suggest(search, space, seed=0)
    assert 0 <= found["a"] <= 1


def test_further_training_forgets_the_fit_and_the_limits():
    model = PFN(network(), neighbours=10).fit(*data())
    model.meta_fit(GridGPTasks(max_features=2), MetaTraining(num_steps=1, max_context=4, num_queries=4))
    assert model.neighbours == 4 and model.network.largest is None
    with pytest.raises(NotFittedError):
        model.predict(data()[0])


def test_a_prior_with_too_many_features_is_refused():
    with pytest.raises(ValueError, match="prior must give X of at most 3 columns, as many as the network has, found 5"):
        PFN(network()).meta_fit(GPTasks(max_features=5), MetaTraining(num_steps=1))


def test_a_loss_that_is_no_number_ends_the_training():
    def broken(batch_size, num_points, generator):
        X = torch.randn(batch_size, num_points, 1, generator=generator)
        return TaskBatch(X, X / 0 * 0, X)

    with pytest.raises(FloatingPointError, match="the loss is nan at step 0"):
        PFN(network()).meta_fit(broken, MetaTraining(num_steps=3))


def test_names_give_models_for_tables_and_for_searches():
    assert bayesnn.named_model("nngp").restart and not bayesnn.surrogate("nngp").restart
    with pytest.raises(ValueError, match="no surrogate named 'pnf'; there are cnp, "):
        bayesnn.named_model("pnf")


def test_queries_far_away_are_warned_of():
    X, y = data()
    model = PFN(network(largest=(2.0, 30.0))).fit(X, y)
    far = X.mean(0, keepdim=True) + 5 * X.std(0, keepdim=True)
    with pytest.warns(bayesnn.BayesnnWarning, match="X is over 4.0 standard deviations from its mean"):
        model.predict(far)
    model.predict(X.mean(0, keepdim=True) + 3 * X.std(0, keepdim=True))


@pytest.mark.filterwarnings("ignore:X is over")
def test_conditioning_refuses_what_fitting_refuses():
    X, y = data()
    model = PFN(network()).fit(X, y)
    with pytest.raises(ValueError, match=r"X must be within 4.0 standard deviations of its mean"):
        model.condition_on_observations(100 + X, y)
    with pytest.raises(ValueError, match=r"Y must be within 6.0 standard deviations of its mean"):
        model.condition_on_observations(X, 100 + y)


def test_autoregressive_draws_are_no_functions():
    model = PFN(network(), joint="autoregressive").fit(*data())
    with pytest.raises(TypeError, match="autoregressive draws are no functions"):
        model.draw_functions(3)
    assert PFN(network()).fit(*data()).draw_functions(3)(data()[0]).shape == (3, 12, 1)


@pytest.mark.parametrize("far", [1e3, -1e6, 1e12])
def test_one_row_far_from_all_others_is_refused_or_warned_of(far):
    X, y = data(n=30)
    high, wide = y.sin(), X.clone()
    high[7], wide[5, 1] = far, far
    with pytest.raises(ValueError, match=r"Y can't be used: row 7 of column 0 is .* look alike"):
        PFN(network(largest=(9.0, 9.0))).fit(X, high)
    with pytest.warns(bayesnn.BayesnnWarning, match=r"X: row 5 of column 1 is .* look alike"):
        PFN(network(largest=(9.0, 9.0))).fit(wide, y)
    PFN(network(largest=None)).fit(wide, high)


def test_rare_categories_and_few_rows_are_let_through():
    X, y = data(n=30)
    X[:, 1] = 0
    X[7, 1] = 1
    PFN(network(largest=(6.0, 6.0))).fit(X, y)
    X, y = data(n=9)
    y[3] = 1e3
    PFN(network(largest=(6.0, 6.0))).fit(X, y)


def test_with_bounds_observations_outside_are_refused_and_queries_warned_of():
    X, y = data()
    model = PFN(network(), bounds=(0.0, 1.0)).fit(X, y)
    with pytest.raises(ValueError, match="X must be within the bounds, found 1"):
        model.condition_on_observations(X + 1, y)
    with pytest.warns(bayesnn.BayesnnWarning, match="X is outside the bounds"):
        model.predict(X + 1)


@pytest.mark.parametrize("bounds", [5, [], "ab", (0.0,), (float("nan"), 1.0), [(0.0, 1.0), 3]])
def test_bounds_that_are_none(bounds):
    with pytest.raises((TypeError, ValueError), match="bounds must be"):
        PFN(network(), bounds=bounds)


def test_bounds_as_tensors():
    assert PFN(network(), bounds=torch.tensor([[0.0, 1.0], [2.0, 3.0]])).bounds == [(0.0, 1.0), (2.0, 3.0)]
    assert PFN(network(), bounds=torch.tensor([0.0, 1.0])).bounds == [(0.0, 1.0)]


def test_the_old_range_isnt_saved_with_a_network_of_another_prior(tmp_path):
    training = MetaTraining(num_steps=2, max_context=20, num_queries=4, rows_per_batch=64, num_warmup=0)
    model = PFN(network()).meta_fit(GPTasks(max_features=2), training).fit(*data())
    model.save(tmp_path / "model.safetensors")
    assert model.network.largest is None and PFN.load(tmp_path / "model.safetensors").network.largest is None


def test_one_row_says_nothing_of_the_scale():
    X, y = data(n=1)
    with pytest.warns(bayesnn.BayesnnWarning, match="Y has one row"):
        PFN(network()).fit(X, y)
