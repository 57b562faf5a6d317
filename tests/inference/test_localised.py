"""Amortised models restricted to the rows nearest to a query."""

import pytest
import torch

from bayesnn import likelihoods, load
from bayesnn.inference.amortized import PFN, PFNClassifier, SetClassifier, SetTransformer


def network(seed=0):
    borders = torch.linspace(-3, 3, 13).tolist()
    made = SetTransformer(3, borders, (1.0, 1.0), width=16, num_layers=2, num_heads=2, seed=seed)
    with torch.no_grad():  # else every block is the identity
        for value in made.parameters():
            value += 0.2 * torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
    return made


def data(n=12, m=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, generator=generator).double(), torch.randn(n, m, generator=generator).double()


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_each_query_sees_its_nearest_rows(m, batch):
    X, Y = data(m=m)
    new = torch.randn(*batch, 4, 2, generator=torch.Generator().manual_seed(1)).double()
    model = PFN(network(), max_context=12, neighbours=5).fit(X, Y)
    p = model.predict(new)
    scaled, context = model._scaled(new).reshape(-1, 2), model._context
    for index, query in enumerate(scaled):
        nearest = (context.X - query).square().sum(-1).argsort(stable=True)[:5].sort().values
        for output in range(m):
            cache = model._own.encode(context.X[nearest], context.Y[output, nearest])
            _, y = model._own.distributions(model._own.query(cache, query[None]))
            found = p.mean.reshape(-1, m)[index, output]
            loc, scale = model._outcomes.loc[0, output], model._outcomes.scale[0, output]
            assert torch.allclose(found, loc + scale * y.mean, atol=1e-9)


def test_classes_of_the_nearest_rows():
    generator = torch.Generator().manual_seed(0)
    X, labels = data()[0], torch.randint(3, (12,), generator=generator)
    labels[:3] = torch.arange(3)
    classifier = SetClassifier(3, 4, width=16, num_layers=2, num_heads=2)
    with torch.no_grad():
        for value in classifier.parameters():
            value += 0.2 * torch.randn(value.shape, generator=generator)
    model = PFNClassifier(likelihoods.Categorical(3), classifier, neighbours=5).fit(X, labels)
    new = data(4, seed=1)[0]
    found, scaled = model.predict(new).probabilities, model._scaled(new)
    for index, query in enumerate(scaled):
        nearest = (model._context.X - query).square().sum(-1).argsort(stable=True)[:5].sort().values
        cache = model._own.encode(model._context.X[nearest], labels[nearest, None].double())
        (classes,) = model._own.distributions(model._own.query(cache, query[None]))
        torch.testing.assert_close(found[index].flatten(), classes.logits[0, :3].softmax(-1))


def test_all_rows_make_the_model_itself():
    X, Y = data()
    plain = PFN(network(), max_context=12)
    new = data(7, seed=3)[0]
    expected = plain.fit(X, Y)
    for k in (12, 11):
        found = PFN(network(), max_context=12, neighbours=k).fit(X, Y)
        same = torch.allclose(found.predict(new).mean, expected.predict(new).mean, atol=1e-10)
        assert same == (k == 12)


def test_the_order_of_rows_does_not_matter():
    X, Y = data()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    one, two = (PFN(network(), neighbours=4).fit(X[rows], Y[rows]) for rows in (torch.arange(12), order))
    new = data(5, seed=4)[0]
    assert torch.allclose(one.predict(new).variance, two.predict(new).variance, atol=1e-9)


def test_more_rows_than_the_network_was_trained_on():
    X, Y = data(400)
    with pytest.raises(ValueError, match="at most 100 rows"):
        PFN(network(), max_context=100).fit(X, Y)
    model = PFN(network(), max_context=100, neighbours=20).fit(X, Y)
    assert model.predict(data(300, seed=1)[0]).mean.shape == (300, 1)


def test_joint_draws_fantasies_and_files(tmp_path):
    X, Y = data(m=2)
    model = PFN(network(), neighbours=4).fit(X, Y)
    new = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(5)).double()
    assert model.posterior(new).rsample(torch.Size([6])).shape == (6, 3, 2, 2)
    imagined = model.condition_on_observations(new[0], torch.randn(5, 2, 2).double())
    assert imagined.posterior(new[1]).mean.shape == (5, 2, 2)
    again = load_saved(model, tmp_path)
    assert torch.equal(again.predict(new).mean, model.predict(new).mean)


def load_saved(model, folder):
    model.save(folder / "model.safetensors")
    return load(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PFN(network(), neighbours=0), ValueError, "neighbours must be at least 1"),
        (lambda: PFN(network(), neighbours=2.0), TypeError, "neighbours must be an integer"),
        (lambda: PFN(network(), max_context=10, neighbours=11), ValueError, "neighbours must be at most 10"),
        (
            lambda: PFN(network(), joint="autoregressive", neighbours=3),
            ValueError,
            "must be None for autoregressive draws",
        ),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()
