import numpy as np
import pytest
import scipy.stats
import torch
from torch.distributions import Bernoulli, Categorical, Gamma, NegativeBinomial, Normal, Poisson, StudentT

from bayesnn.distributions import affine, cdf, outputs, sample
from bayesnn.histogram import Histogram

BORDERS = torch.linspace(-2, 2, 6).double()
LOGITS = torch.tensor([[0.1, 1.0, -0.5, 0.3, 0.0], [2.0, 0.0, 0.0, 0.0, 1.0]]).double()


def distributions(dtype=torch.float64):
    a = torch.tensor([0.3, 2.5], dtype=dtype)
    b = torch.tensor([1.5, 0.2], dtype=dtype)
    return {
        "normal": (Normal(a, b), scipy.stats.norm(a, b)),
        "student-t": (StudentT(torch.full_like(a, 5.0), a, b), scipy.stats.t(5, a, b)),
        "poisson": (Poisson(a), scipy.stats.poisson(a)),
        "negative binomial": (NegativeBinomial(b, logits=a), scipy.stats.nbinom(b, torch.sigmoid(-a))),
        "bernoulli": (Bernoulli(logits=a), scipy.stats.bernoulli(torch.sigmoid(a))),
    }


@pytest.mark.parametrize("name", distributions())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cdf_equals_scipy(name, dtype):
    ours, theirs = distributions(dtype)[name]
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for value in (-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.7, 4.0, 30.0):
        found = cdf(ours, torch.full((2,), value, dtype=dtype))
        assert found.dtype == dtype
        np.testing.assert_allclose(found, theirs.cdf(value), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [*distributions(), "histogram"])
def test_some_outputs(name):
    ours = Histogram(BORDERS, LOGITS) if name == "histogram" else distributions()[name][0]
    values = torch.tensor([0.0, 1.0]).double()
    for indices in ([1], [1, 0]):
        chosen = outputs(ours, indices)
        assert chosen.batch_shape == (len(indices),)
        assert torch.equal(cdf(chosen, values[indices]), cdf(ours, values)[indices])
        assert torch.equal(chosen.log_prob(values[indices]), ours.log_prob(values)[indices])


def test_classes_are_predicted_together():
    with pytest.raises(TypeError, match="a Categorical has no outputs of their own"):
        outputs(Categorical(logits=LOGITS), [0])


def test_cdf_broadcasts():
    values = torch.linspace(-1, 4, 7).double()[:, None]
    for ours, _ in distributions().values():
        assert cdf(ours, values).shape == (7, 2)


@pytest.mark.parametrize("name", [*distributions(), "histogram"])
def test_samples_have_the_right_law(name):
    ours = Histogram(BORDERS, LOGITS) if name == "histogram" else distributions()[name][0]
    count = 20_000
    draws = sample(ours, torch.Size([count]), torch.Generator().manual_seed(3)).double()
    assert draws.shape == (count, 2)
    z = (draws.mean(0) - ours.mean) / (ours.variance / count).sqrt()
    assert z.abs().max() < 4
    squares = (draws - ours.mean).square()
    z = (squares.mean(0) - ours.variance) / (squares.std(0) / count**0.5)
    assert z.abs().max() < 4
    # The whole law, not its moments alone.
    for level in (-0.5, 0.5, 1.0, 2.0, 3.0):
        p = cdf(ours, torch.full((2,), level).double())
        z = ((draws <= level).double().mean(0) - p) / (p * (1 - p) / count).sqrt().clamp_min(1e-9)
        assert z.abs().max() < 4, level


def test_categorical_samples():
    probabilities = torch.tensor([[0.2, 0.5, 0.3], [0.0, 1.0, 0.0]]).double()
    draws = sample(Categorical(probs=probabilities), torch.Size([20_000]), torch.Generator().manual_seed(0))
    found = torch.nn.functional.one_hot(draws, 3).double().mean(0)
    z = (found - probabilities) / (probabilities * (1 - probabilities) / 20_000).sqrt().clamp_min(1e-9)
    assert z.abs().max() < 4


@pytest.mark.parametrize("name", [*distributions(), "histogram", "categorical"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_come_from_the_generator_alone(name, dtype):
    if name == "histogram":
        ours = Histogram(BORDERS.to(dtype), LOGITS.to(dtype))
    elif name == "categorical":
        ours = Categorical(logits=LOGITS.to(dtype))
    else:
        ours = distributions(dtype)[name][0]
    torch.manual_seed(1)
    first = sample(ours, torch.Size([3, 4]), torch.Generator().manual_seed(5))
    torch.manual_seed(2)
    assert torch.equal(first, sample(ours, torch.Size([3, 4]), torch.Generator().manual_seed(5)))
    assert not torch.equal(first, sample(ours, torch.Size([3, 4]), torch.Generator().manual_seed(6)))
    assert first.shape == (3, 4, 2)
    assert first.dtype == (torch.int64 if name == "categorical" else dtype)


def test_samples_are_differentiable_where_they_can_be():
    loc = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for ours in (Normal(loc, 1.0), StudentT(torch.full((3,), 4.0).double(), loc, torch.ones(3).double())):
        (gradient,) = torch.autograd.grad(sample(ours, torch.Size([2]), torch.Generator()).sum(), loc)
        assert gradient.tolist() == [2, 2, 2]


def test_no_sampler():
    with pytest.raises(TypeError, match="Gamma"):
        sample(Gamma(1.0, 1.0), torch.Size(), torch.Generator())


def test_affine():
    loc, scale = torch.tensor(3.0).double(), torch.tensor(0.5).double()
    value = torch.linspace(-1, 5, 9).double()[:, None]
    for own in (Normal(torch.zeros(2).double(), torch.ones(2).double()), Histogram(BORDERS, LOGITS)):
        moved = affine(own, loc, scale)
        torch.testing.assert_close(moved.mean, loc + scale * own.mean)
        torch.testing.assert_close(moved.variance, scale**2 * own.variance)
        torch.testing.assert_close(cdf(moved, value), cdf(own, (value - loc) / scale))


@pytest.mark.parametrize("name", ["normal", "student-t", "bernoulli", "histogram", "categorical"])
def test_values_with_shared_random_numbers_do_not_depend_on_their_place(name):
    if name == "histogram":
        single, batched = Histogram(BORDERS, LOGITS), Histogram(BORDERS, LOGITS.expand(3, 2, 5))
    elif name == "categorical":
        single, batched = Categorical(logits=LOGITS), Categorical(logits=LOGITS.expand(3, 2, 5))
    else:
        single = distributions()[name][0]
        batched = single.expand((3, 2))
    one = sample(single, torch.Size([4]), torch.Generator().manual_seed(0))
    many = sample(batched, torch.Size([4]), torch.Generator().manual_seed(0), num_shared=1)
    assert many.shape == (4, 3, 2) and torch.equal(many, one.unsqueeze(1).expand(4, 3, 2))
