import math

import pytest
import torch
from botorch.acquisition import LinearMCObjective, ScalarizedPosteriorTransform, qLogExpectedImprovement
from botorch.posteriors import PosteriorList
from botorch.sampling import SobolQMCNormalSampler
from botorch.sampling.get_sampler import get_sampler
from oracles import z_score
from torch.distributions import Normal

from bayesnn.functions import function_draws_of
from bayesnn.posteriors import (
    Copula,
    FunctionDraws,
    FunctionSampler,
    Gaussian,
    StudentT,
    gaussian_view,
)

GENERATOR = torch.Generator().manual_seed(0)
LOC, SCALE = torch.tensor([[3.0, -1.0]]).double(), torch.tensor([[2.0, 0.5]]).double()


def randn(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def covariances(*batch, m=2, q=3):
    root = randn(*batch, m, q, q)
    return root @ root.mT + 0.1 * torch.eye(q)


@pytest.mark.parametrize("weighted", [False, True])
def test_moments_of_draws(weighted):
    values, log_weights = randn(4, 7, 3, 2), randn(4, 7) if weighted else None
    own = FunctionDraws(values, log_weights)
    w = torch.softmax(log_weights, -1) if weighted else torch.full((4, 7), 1 / 7).double()
    torch.testing.assert_close(own.mean, torch.einsum("bs,bsqm->bqm", w, values))
    second = torch.einsum("bs,bsqm->bqm", w, values.square())
    torch.testing.assert_close(own.variance, second - own.mean.square())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_draws", [3, 64, 257, 1000])
def test_with_as_many_samples_as_draws_each_is_used_exactly_once(num_draws, dtype):
    own = FunctionDraws(torch.arange(num_draws, dtype=dtype)[:, None, None])
    sampler = get_sampler(own, torch.Size([4096]), seed=3)
    samples = sampler(own).flatten()
    assert samples.dtype == dtype and torch.equal(samples.sort().values, own.values.flatten())
    # Even for the largest uniforms of each stratum, which single precision would round up.
    edge = (torch.arange(num_draws).double() + 1 - 2**-24) / num_draws
    picked = own.rsample_from_base_samples(torch.Size([num_draws]), edge).flatten()
    assert torch.equal(picked, own.values.flatten())


def test_weighted_samples_are_the_enumeration():
    values, log_weights = randn(3, 5, 2, 1), randn(3, 5)
    own = FunctionDraws(values, log_weights)
    count = 20_000  # stratified: each draw's share is right to within one sample
    samples = get_sampler(own, torch.Size([count]), seed=0)(own)
    same = (samples.unsqueeze(2) == values).all(-1).all(-1)  # (count, 3, 5)
    assert (same.sum(-1) == 1).all()
    shares = same.double().mean(0)
    assert ((shares - torch.softmax(log_weights, -1)).abs() < 2 / count).all()


def test_draws_of_weight_zero_are_never_picked():
    own = FunctionDraws(torch.arange(4.0)[:, None, None], torch.tensor([-torch.inf, 0.0, 0.0, -torch.inf]))
    samples = get_sampler(own, torch.Size([512]))(own)
    assert set(samples.flatten().tolist()) == {1.0, 2.0} and torch.isfinite(own.mean).all()


@pytest.mark.parametrize("weighted", [False, True])
def test_draws_do_not_depend_on_the_place_in_a_batch_or_on_the_batch(weighted):
    values, log_weights = randn(7, 1, 2), randn(7) if weighted else None
    own = FunctionDraws(values.expand(6, 7, 1, 2), log_weights)
    sampler = FunctionSampler(torch.Size([5]), seed=1)
    single = sampler(FunctionDraws(values, log_weights))
    samples = sampler(own)
    assert samples.shape == (5, 6, 1, 2)
    assert torch.equal(samples, single.unsqueeze(1).expand(5, 6, 1, 2))
    again = sampler(FunctionDraws(values.expand(2, 3, 7, 1, 2), log_weights))
    assert torch.equal(again[:, 0, 0], single)


def test_a_sampler_hands_its_base_samples_on():
    own = FunctionDraws(randn(9, 4, 1))
    first, second = FunctionSampler(torch.Size([9]), seed=0), FunctionSampler(torch.Size([9]), seed=5)
    baseline = first(own.outputs([0]))
    second._update_base_samples(own, first)
    assert torch.equal(second(own), baseline)


@pytest.mark.parametrize("weighted", [False, True])
def test_normal_base_samples_are_refused(weighted):
    """A normal sampler would pick draws with the wrong probabilities."""
    own = FunctionDraws(randn(9, 4, 1), randn(9) if weighted else None)
    with pytest.raises(ValueError, match=r"base samples .* get_sampler"):
        SobolQMCNormalSampler(torch.Size([16]), seed=0)(own)


def test_weights_with_a_batch_of_their_own_broadcast_over_functions():
    """A model with fantasies: F sets of weights, one set of function values."""
    values, log_weights = randn(5, 3, 2), randn(4, 5)
    own = FunctionDraws(values, log_weights)
    assert own.batch_shape == (4,) and own.mean.shape == own.variance.shape == (4, 3, 2)
    samples = get_sampler(own, torch.Size([8]))(own)
    assert samples.shape == (8, 4, 3, 2)
    for f in range(4):
        single = FunctionDraws(values, log_weights[f])
        torch.testing.assert_close(own.mean[f], single.mean)
        assert torch.equal(samples[:, f], get_sampler(single, torch.Size([8]))(single))
    nested = FunctionDraws(randn(6, 5, 3, 2), randn(4, 1, 5))
    assert nested.batch_shape == (4, 6) and nested.rsample(torch.Size([2])).shape == (2, 4, 6, 3, 2)


def test_random_samples_come_from_the_generator():
    own = FunctionDraws(randn(50, 2, 1))
    first, second = (own.rsample(torch.Size([6]), torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)
    assert own.rsample().shape == (1, 2, 1)
    samples = own.rsample(torch.Size([40_000]))
    assert z_score(samples, own.mean).abs().max() < 4


def test_draws_in_other_units_and_of_some_outputs():
    own = FunctionDraws(randn(2, 5, 3, 2), randn(2, 5))
    moved = own.affine(LOC, SCALE)
    torch.testing.assert_close(moved.mean, LOC + SCALE * own.mean)
    torch.testing.assert_close(moved.variance, SCALE.square() * own.variance)
    torch.testing.assert_close(own.outputs([1]).mean, own.mean[..., [1]])


def test_shapes_of_draws():
    with pytest.raises(ValueError, match="values must have shape"):
        FunctionDraws(randn(3, 1))
    with pytest.raises(ValueError, match="log_weights must end in S=4"):
        FunctionDraws(randn(4, 3, 1), randn(3))


class Draws:
    """The least a BoTorch acquisition function asks of a model with two outputs."""

    num_outputs, batch_shape = 2, torch.Size([])

    def __init__(self, values_at):
        self.values_at = values_at

    def posterior(self, X, posterior_transform=None, **kwargs):
        own = FunctionDraws(self.values_at(X))
        return own if posterior_transform is None else own.transformed(posterior_transform, X)


def test_a_scalarised_posterior_equals_a_linear_objective_and_the_enumeration():
    weights, slopes = torch.tensor([0.3, -0.8]).double(), randn(32, 2)
    offsets = randn(32, 2)
    model = Draws(lambda X: (X.unsqueeze(-3) * slopes[:, None] + offsets[:, None]).sin())  # (*batch, 32, q, 2), d=1
    X = randn(6, 3, 1)
    transform = ScalarizedPosteriorTransform(weights, offset=0.1)
    transformed = model.posterior(X, transform)
    assert transformed.values.shape == (6, 32, 3, 1)
    torch.testing.assert_close(transformed.mean[..., 0], model.posterior(X).mean @ weights + 0.1)
    sampler = FunctionSampler(torch.Size([32]))
    scalarised = qLogExpectedImprovement(model, best_f=0.2, sampler=sampler, posterior_transform=transform)
    linear = qLogExpectedImprovement(model, best_f=0.1, sampler=sampler, objective=LinearMCObjective(weights))
    torch.testing.assert_close(scalarised(X), linear(X))
    best = (model.values_at(X) @ weights + 0.1).amax(-1)
    torch.testing.assert_close(scalarised(X).exp(), (best - 0.2).clamp_min(0).mean(-1), rtol=1e-3, atol=2e-3)


def test_draws_beside_other_posteriors_get_as_many_samples_and_an_order_of_their_own():
    values = randn(64, 3, 1)
    gaussian = Gaussian.from_moments(randn(3, 1), covariances(m=1))
    # The same draws twice: paired one by one, their product would have a mean of one.
    standardised = (values - values.mean(0)) / values.std(0, correction=0)
    both = PosteriorList(FunctionDraws(standardised), FunctionDraws(standardised))
    samples = get_sampler(both, torch.Size([512]), seed=1)(both)
    assert samples.shape == (64, 3, 2)
    torch.testing.assert_close(samples.sort(0).values, standardised.expand(64, 3, 2).sort(0).values)  # exact
    assert (samples.prod(-1).mean(0).abs() < 4 / 8).all()
    for posterior, count in (
        (PosteriorList(FunctionDraws(values), gaussian), 448),
        (PosteriorList(FunctionDraws(values), FunctionDraws(values[:50])), 500),
        (PosteriorList(FunctionDraws(values), FunctionDraws(values, randn(64))), 448),
        (PosteriorList(gaussian, gaussian), 500),
    ):
        samples = get_sampler(posterior, torch.Size([500]), seed=1)(posterior)
        assert samples.shape == (count, 3, 2)
        assert (((samples.mean(0) - posterior.mean) / posterior.variance.sqrt()).abs() < 4 / math.sqrt(count)).all()


# Functions ---------------------------------------------------------------------------------------------------------


def rbf(X):
    return (-0.5 * (X.unsqueeze(-2) - X.unsqueeze(-3)).square().sum(-1)).exp() + 1e-10 * torch.eye(X.shape[-2])


PROCESSES = {
    "gaussian": lambda X: Gaussian.from_moments(X.sum(-1, keepdim=True), rbf(X).unsqueeze(-3)),
    "gaussian, two outputs": lambda X: Gaussian.from_moments(
        torch.cat([X, -X], -1), torch.stack([rbf(X), 2 * rbf(X)], -3)
    ),
    "student-t": lambda X: StudentT(torch.cat([X, X], -1), torch.stack([rbf(X), rbf(X)], -3), 4.0),
    "copula": lambda X: Copula(Normal(X, torch.ones_like(X)), torch.linalg.cholesky(rbf(X)).unsqueeze(-3)),
    "draws": lambda X: FunctionDraws((X.unsqueeze(-3) * torch.linspace(1, 2, 5).double()[:, None, None]).sin()),
}


@pytest.mark.parametrize("kind", PROCESSES)
def test_drawn_functions_stay_the_same_from_call_to_call(kind):
    functions = function_draws_of(PROCESSES[kind], 5, seed=1)
    first_X, second_X = torch.linspace(0, 1, 3).double()[:, None], torch.linspace(2, 3, 4).double().reshape(2, 2, 1)
    first, second = functions(first_X), functions(second_X)
    m = PROCESSES[kind](first_X).mean.shape[-1]
    assert first.shape == (5, 3, m) and second.shape == (5, 2, 2, m)
    both = torch.cat([first_X, second_X.reshape(4, 1)])
    torch.testing.assert_close(functions(both), torch.cat([first, second.flatten(1, 2)], 1), rtol=1e-3, atol=1e-3)
    same = function_draws_of(PROCESSES[kind], 5, seed=1)
    torch.testing.assert_close(same(first_X), first)


@pytest.mark.parametrize("kind", ["gaussian", "gaussian, two outputs", "student-t", "copula"])
def test_drawn_functions_have_the_joint_law_over_calls(kind):
    functions = function_draws_of(PROCESSES[kind], 8000, seed=1)
    X = torch.tensor([[0.0], [0.7], [1.5]]).double()
    draws = torch.cat([functions(X[:1]), functions(X[1:])], 1)
    exact = PROCESSES[kind](X)
    assert z_score(draws, exact.mean).abs().max() < 4
    centred = draws - exact.mean
    products = centred.mT.unsqueeze(-1) * centred.mT.unsqueeze(-2)
    assert z_score(products, gaussian_view(exact).output_covariance.to_dense()).abs().max() < 4
