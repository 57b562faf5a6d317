"""Classes in one forward pass."""

import pytest
import torch

from bayesnn import likelihoods, load
from bayesnn.inference.amortized import CausalTasks, MetaTraining, PFNClassifier, SetClassifier
from bayesnn.inference.amortized.meta_training import MetaTarget, meta_loss
from bayesnn.inference.run import run


def network(seed=0):
    made = SetClassifier(4, 3, width=16, num_layers=2, num_heads=2, seed=seed)
    with torch.no_grad():  # else every block is the identity
        for value in made.parameters():
            value += 0.2 * torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
    return made


def data(n=20, classes=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 2, generator=generator).double(), torch.randint(classes, (n,), generator=generator)


def test_probabilities_are_the_network_s():
    X, y = data()
    model = PFNClassifier(likelihoods.Categorical(3), network()).fit(X, y)
    new = torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(1)).double()
    p = model.predict(new)
    assert p.probabilities.shape == (2, 5, 3)
    (classes,) = model._own(model._data.X, y[:, None].double(), model._scaled(new[0]))
    assert torch.allclose(p.probabilities[0], classes.probs)
    assert torch.allclose(model.posterior(new).mean.softmax(-1), p.probabilities)
    assert float(p.epistemic.abs().max()) < 1e-12


def test_classes_that_do_not_exist_have_no_probability():
    X, y = data(classes=2)
    p = PFNClassifier(likelihoods.Categorical(2), network()).fit(X, y).predict(X)
    assert p.probabilities.shape == (20, 2) and torch.allclose(p.probabilities.sum(-1), torch.ones(20).double())


def test_order_of_rows_and_files(tmp_path):
    X, y = data()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    one, two = (PFNClassifier(likelihoods.Categorical(3), network()).fit(X[o], y[o]) for o in (torch.arange(20), order))
    assert torch.allclose(one.predict(X).probabilities, two.predict(X).probabilities, atol=1e-10)
    one.save(tmp_path / "model.safetensors")
    assert torch.equal(load(tmp_path / "model.safetensors").predict(X).probabilities, one.predict(X).probabilities)


def test_training_learns():
    """Two hundred steps on tables of one column bring the loss below that of knowing nothing."""
    prior = CausalTasks(max_features=2, max_classes=2)
    net = SetClassifier(2, 2, width=24, num_layers=2, num_heads=2)
    training = MetaTraining(num_steps=200, max_context=30, num_queries=16, rows_per_batch=512, num_warmup=10, lr=3e-3)
    run(training, MetaTarget(net, prior))
    batch = prior(200, 46, torch.Generator().manual_seed(9))
    batch = batch._replace(X=batch.X.float())
    assert float(meta_loss(net, dict(net.named_parameters()), batch, 30)) < 0.62


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PFNClassifier(likelihoods.Gaussian(), network()), TypeError, "must be likelihoods.Categorical"),
        (lambda: PFNClassifier(likelihoods.Categorical(4), network()), ValueError, "at most 3 classes"),
        (
            lambda: PFNClassifier(likelihoods.Categorical(3), network(), max_context=10).fit(*data()),
            ValueError,
            "at most 10 rows",
        ),
        (
            lambda: PFNClassifier(likelihoods.Categorical(3), network()).fit(torch.randn(20, 5), data()[1]),
            ValueError,
            "at most 4 columns",
        ),
        (
            lambda: (
                PFNClassifier(likelihoods.Categorical(3), network())
                .fit(*data())
                .condition_on_observations(data()[0], data()[1])
            ),
            NotImplementedError,
            "fit the model to all rows",
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
