import math

import pytest
import torch
from botorch.acquisition import LinearMCObjective, ScalarizedPosteriorTransform, qLogExpectedImprovement
from botorch.models import SingleTaskGP
from botorch.posteriors import PosteriorList
from botorch.sampling import SobolQMCNormalSampler
from botorch.sampling.get_sampler import get_sampler
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from oracles import z_score
from torch.distributions import Normal

from bayesnn.distributions import cdf
from bayesnn.functions import function_draws_of
from bayesnn.histogram import Histogram
from bayesnn.posteriors import (
    Copula,
    FunctionDraws,
    FunctionSampler,
    Gaussian,
    StudentT,
    correlation_root,
    function_draws,
    gaussian_view,
)

GENERATOR = torch.Generator().manual_seed(0)
LOC, SCALE = torch.tensor([[3.0, -1.0]]).double(), torch.tensor([[2.0, 0.5]]).double()


def randn(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def covariances(*batch, m=2, q=3):
    root = randn(*batch, m, q, q)
    return root @ root.mT + 0.1 * torch.eye(q)


def correlations(*batch, m=2, q=3):
    covariance = covariances(*batch, m=m, q=q)
    std = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    return covariance / std.unsqueeze(-1) / std.unsqueeze(-2)


# Function draws ----------------------------------------------------------------------------------------------------


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


# Gaussian ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("batch", [(), (4,)])
def test_gaussian_arithmetic_equals_dense(m, batch):
    mean, covariance, noise = randn(*batch, 3, m), covariances(*batch, m=m), randn(*batch, 3, m).exp()
    own = Gaussian.from_moments(mean, covariance)
    loc, scale = LOC[:, :m], SCALE[:, :m]
    cases = {
        "plain": (own, mean, covariance),
        "noise": (own.with_noise(noise), mean, covariance + torch.diag_embed(noise.mT)),
        "noise of each output": (own.with_noise(noise[..., :1, :].expand(*batch, 3, m)), mean,
                                 covariance + noise[..., :1, :].mT.unsqueeze(-1) * torch.eye(3)),
        "affine": (own.affine(loc, scale), loc + scale * mean, scale.square().mT.unsqueeze(-1) * covariance),
        "outputs": (own.outputs([m - 1]), mean[..., [m - 1]], covariance[..., [m - 1], :, :]),
        "all": (
            own.with_noise(noise).affine(loc, scale).outputs(list(range(m))[::-1]),
            (loc + scale * mean).flip(-1),
            (scale.square().mT.unsqueeze(-1) * (covariance + torch.diag_embed(noise.mT))).flip(-3),
        ),
    }  # fmt: skip
    for posterior, expected_mean, expected in cases.values():
        torch.testing.assert_close(posterior.mean, expected_mean)
        torch.testing.assert_close(posterior.variance, expected.diagonal(dim1=-2, dim2=-1).mT)
        torch.testing.assert_close(posterior.output_covariance.to_dense(), expected)
        # Its samples have those moments.
        draws = posterior.rsample(torch.Size([4000]))
        assert draws.shape == (4000, *expected_mean.shape)
        assert z_score(draws, expected_mean).abs().max() < 4.5
        centred = draws - expected_mean
        products = centred.mT.unsqueeze(-1) * centred.mT.unsqueeze(-2)
        assert z_score(products, expected).abs().max() < 4.5


def test_output_covariance_of_botorch_s_own_posteriors():
    X, Y = torch.rand(8, 2, generator=GENERATOR).double(), randn(8, 2)
    model = SingleTaskGP(X, Y)
    posterior = model.posterior(torch.rand(3, 4, 2, generator=GENERATOR).double())
    own = gaussian_view(posterior)
    assert isinstance(posterior.distribution, MultitaskMultivariateNormal) and isinstance(own, Gaussian)
    for output in range(2):
        single = model.subset_output([output]).posterior(torch.zeros(1, 2).double())
        assert isinstance(single.distribution, MultivariateNormal)
    torch.testing.assert_close(own.mean, posterior.mean)
    torch.testing.assert_close(
        own.output_covariance.to_dense().diagonal(dim1=-2, dim2=-1).mT, posterior.variance
    )  # whichever way it interleaves


# Student-t ---------------------------------------------------------------------------------------------------------


def test_student_t_has_the_right_law():
    mean, scale, df = randn(3, 2), covariances(), 7.0
    own = StudentT(mean, scale, df)
    draws = own.rsample(torch.Size([40_000]), torch.Generator().manual_seed(1))
    assert z_score(draws, mean).abs().max() < 4
    centred = draws - mean
    products = centred.mT.unsqueeze(-1) * centred.mT.unsqueeze(-2)
    assert z_score(products, scale * df / (df - 2)).abs().max() < 4
    torch.testing.assert_close(own.variance, (scale * df / (df - 2)).diagonal(dim1=-2, dim2=-1).mT)
    marginal = torch.distributions.StudentT(df, mean, scale.diagonal(dim1=-2, dim2=-1).mT.sqrt())
    for level in (0.1, 0.5, 0.95):
        threshold = mean + marginal.scale * float(torch.tensor(1.5 * (level - 0.5)))
        p = cdf(marginal, threshold)
        shares = (draws <= threshold).double().mean(0)
        assert ((shares - p) / (p * (1 - p) / 40_000).sqrt()).abs().max() < 4


def test_student_t_has_one_chi_squared_for_each_function():
    """Of the squared, whitened values of two points, the ratio of variances gives nothing away but the sum does."""
    df = 9.0
    own = StudentT(torch.zeros(2, 1).double(), torch.eye(2).double()[None], df)
    draws = own.rsample(torch.Size([200_000]), torch.Generator().manual_seed(1)).squeeze(-1)
    # E[x^2 y^2] = (df/(df-2))^2 (df-2)/(df-4) if they share a chi-squared, (df/(df-2))^2 if not; E[x^4] is 3 times that.
    shared = (df / (df - 2)) ** 2 * (df - 2) / (df - 4)
    assert z_score(draws.square().prod(-1)[:, None], shared).abs() < 4
    kurtosis = draws.pow(4).mean(0) / shared
    torch.testing.assert_close(kurtosis, torch.full((2,), 3.0).double(), rtol=0.1, atol=0)


@pytest.mark.parametrize("df", [0.5, 1.0, 1.5, 2.0])
def test_student_t_without_moments(df):
    own = StudentT(torch.zeros(2, 1), torch.eye(2)[None], df)
    with pytest.raises(ValueError, match="no finite variance"):
        _ = own.variance
    if df <= 1:
        with pytest.raises(ValueError, match="no mean"):
            _ = own.mean
    assert torch.isfinite(own.rsample(torch.Size([10]))).all()


def test_student_t_needs_degrees_of_freedom():
    for df in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="df must be positive"):
            StudentT(torch.zeros(2, 1), torch.eye(2)[None], df)


# Copula ------------------------------------------------------------------------------------------------------------


def histograms(*shape):
    return Histogram(torch.linspace(-2, 2, 9).double(), randn(*shape, 8))


@pytest.mark.parametrize("kind", ["normal", "histogram"])
def test_copula_keeps_marginals_and_correlation(kind):
    marginals = Normal(randn(3, 2), randn(3, 2).exp()) if kind == "normal" else histograms(3, 2)
    correlation = correlations()
    own = Copula(marginals, torch.linalg.cholesky(correlation))
    draws = own.rsample(torch.Size([20_000]), torch.Generator().manual_seed(1))
    assert draws.shape == (20_000, 3, 2)
    assert z_score(draws, own.mean).abs().max() < 4
    assert z_score((draws - own.mean).square(), own.variance).abs().max() < 4
    uniforms = cdf(marginals, draws)
    # Through the marginals' own cdf the draws are Gaussian with the copula's correlation, and outputs independent.
    normals = torch.special.ndtri(uniforms.clamp(1e-12, 1 - 1e-12))
    products = normals.mT.unsqueeze(-1) * normals.mT.unsqueeze(-2)
    assert z_score(products, correlation).abs().max() < 4
    assert z_score((normals[..., 0] * normals[..., 1]), 0.0).abs().max() < 4


@pytest.mark.parametrize("kind", ["normal", "histogram"])
def test_copula_in_other_units_and_of_some_outputs(kind):
    marginals = Normal(randn(3, 2), randn(3, 2).exp()) if kind == "normal" else histograms(3, 2)
    own = Copula(marginals, torch.linalg.cholesky(correlations()))
    normals = randn(5, 3, 2)
    plain = own.rsample_from_base_samples(torch.Size([5]), normals)
    moved = own.affine(LOC, SCALE)
    torch.testing.assert_close(moved.rsample_from_base_samples(torch.Size([5]), normals), LOC + SCALE * plain)
    torch.testing.assert_close(moved.variance, SCALE.square() * own.variance)
    for posterior, factor in ((own.outputs([1]), 1.0), (moved.outputs([1]), SCALE[0, 1])):
        found = posterior.rsample_from_base_samples(torch.Size([5]), normals[..., [1]])
        torch.testing.assert_close(found, (LOC + SCALE * plain if factor != 1 else plain)[..., [1]])


def test_copula_draws_are_differentiable():
    logits, q = randn(3, 2, 8).requires_grad_(), 3
    own = Copula(Histogram(torch.linspace(-2, 2, 9).double(), logits), torch.linalg.cholesky(correlations(q=q)))
    normals = randn(4, 3, 2)
    (gradient,) = torch.autograd.grad(own.rsample_from_base_samples(torch.Size([4]), normals).sum(), logits)
    step = torch.zeros_like(logits)
    step[1, 0, 3] = 1e-6

    def total(values):
        moved = Copula(Histogram(torch.linspace(-2, 2, 9).double(), values), own.root)
        return moved.rsample_from_base_samples(torch.Size([4]), normals).sum()

    difference = (total(logits.detach() + step) - total(logits.detach() - step)) / 2e-6
    torch.testing.assert_close(gradient[1, 0, 3], difference, rtol=1e-4, atol=1e-6)


def test_correlation_root_is_cholesky_where_it_can_be_and_unit_where_it_cannot():
    correlation = correlations(4, q=5)
    torch.testing.assert_close(correlation_root(correlation), torch.linalg.cholesky(correlation), rtol=1e-4, atol=1e-4)
    same = torch.ones(2, 3, 3).double()  # one point three times
    torch.testing.assert_close(correlation_root(same), torch.tensor([[1.0, 0, 0]] * 3).double().expand(2, 3, 3))
    odd = torch.tensor([[1.0, 0.9, -0.9], [0.9, 1.0, 0.9], [-0.9, 0.9, 1.0]]).double()  # no correlation matrix
    root = correlation_root(odd)
    torch.testing.assert_close(root.square().sum(-1), torch.ones(3).double())
    for k in (1, 2):  # points that follow never change those before
        torch.testing.assert_close(correlation_root(odd[:k, :k]), root[:k, :k])


# All of them -------------------------------------------------------------------------------------------------------


def kinds(*batch, q=3):
    torch.manual_seed(0)
    return {
        "gaussian": Gaussian.from_moments(randn(*batch, q, 2), covariances(*batch, q=q)),
        "gaussian, one output": Gaussian.from_moments(randn(*batch, q, 1), covariances(*batch, m=1, q=q)),
        "student-t": StudentT(randn(*batch, q, 2), covariances(*batch, q=q), 5.0),
        "copula": Copula(histograms(*batch, q, 2), torch.linalg.cholesky(correlations(*batch, q=q))),
    }


def part(posterior, q):
    """The posterior at its first q points."""
    if isinstance(posterior, Gaussian):
        return Gaussian.from_moments(posterior.mean[..., :q, :], posterior.output_covariance.to_dense()[..., :q, :q])
    if isinstance(posterior, StudentT):
        return StudentT(posterior.loc[..., :q, :], posterior.scale[..., :q, :q], posterior.df)
    marginals = Histogram(posterior.marginals.borders, posterior.marginals.logits[..., :q, :, :])
    return Copula(marginals, posterior.root[..., :q, :q])


@pytest.mark.parametrize("kind", kinds())
def test_points_that_follow_never_change_the_draws_before_them(kind):
    """What qLogNEHVI does: the baseline's base samples are copied into those of baseline and candidates."""
    whole = kinds()[kind]
    baseline_sampler = SobolQMCNormalSampler(torch.Size([8]), seed=1)
    baseline = baseline_sampler(part(whole, 2))
    sampler = SobolQMCNormalSampler(torch.Size([8]), seed=2)
    sampler._update_base_samples(whole, baseline_sampler)
    torch.testing.assert_close(sampler(whole)[:, :2], baseline, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", kinds())
def test_draws_are_the_same_function_in_every_element_of_a_batch(kind):
    single = kinds()[kind]
    if isinstance(single, Gaussian):
        m = single.mean.shape[-1]
        batched = Gaussian.from_moments(
            single.mean.expand(4, 3, m), single.output_covariance.to_dense().expand(4, m, 3, 3)
        )
    elif isinstance(single, StudentT):
        batched = StudentT(single.loc.expand(4, 3, 2), single.scale.expand(4, 2, 3, 3), single.df)
    else:
        own = Histogram(single.marginals.borders, single.marginals.logits.expand(4, 3, 2, 8))
        batched = Copula(own, single.root.expand(4, 2, 3, 3))
    for samples in (
        get_sampler(batched, torch.Size([6]), seed=1)(batched),
        function_draws(batched, 6).values.movedim(-3, 0),
    ):
        assert samples.shape[:2] == (6, 4)
        torch.testing.assert_close(samples, samples[:, :1].expand_as(samples))
    sampler = get_sampler(single, torch.Size([6]), seed=1)
    torch.testing.assert_close(sampler(single), get_sampler(batched, torch.Size([6]), seed=1)(batched)[:, 0])


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_quasi_random_draws_have_the_moments(kind, batch):
    posterior = kinds(*batch)[kind]
    draws = function_draws(posterior, 4096)
    assert draws.values.shape == (*batch, 4096, *posterior.mean.shape[-2:])
    torch.testing.assert_close(draws.mean, posterior.mean, rtol=0, atol=0.02)
    tolerance = 0.3 if kind == "student-t" else 0.03  # a variance of fourth moments without a variance
    torch.testing.assert_close(draws.variance, posterior.variance, rtol=tolerance, atol=0)
    assert function_draws(draws, 3) is draws


@pytest.mark.parametrize("kind", kinds())
def test_a_posterior_transform_of_anything(kind):
    posterior = kinds(4)[kind]
    m = posterior.mean.shape[-1]
    weights = torch.tensor([0.3, -0.8]).double()[:m]
    transformed = posterior.transformed(ScalarizedPosteriorTransform(weights), torch.zeros(4, 3, 1).double())
    assert transformed.mean.shape == (4, 3, 1)
    torch.testing.assert_close(transformed.mean[..., 0], posterior.mean @ weights, rtol=0, atol=0.1)
    variance = posterior.variance @ weights.square()
    torch.testing.assert_close(transformed.variance[..., 0], variance, rtol=0.5, atol=0)


def test_gaussian_view_matches_moments():
    draws = FunctionDraws(randn(4, 9, 3, 2), randn(4, 9))
    view = gaussian_view(draws)
    torch.testing.assert_close(view.mean, draws.mean)
    centred = draws.values - draws.mean.unsqueeze(-3)
    expected = torch.einsum("bs,bsqm,bsrm->bmqr", torch.softmax(draws.log_weights, -1), centred, centred)
    torch.testing.assert_close(view.output_covariance.to_dense(), expected)
    for posterior in kinds(4).values():
        view = gaussian_view(posterior)
        torch.testing.assert_close(view.mean, posterior.mean)
        torch.testing.assert_close(view.variance, posterior.variance)
    student = kinds(4)["student-t"]
    torch.testing.assert_close(gaussian_view(student).output_covariance.to_dense(), student.scale * 5 / 3)
    copula = kinds(4)["copula"]
    std = copula.variance.sqrt().mT
    correlation = copula.root @ copula.root.mT
    expected = std.unsqueeze(-1) * correlation * std.unsqueeze(-2)
    torch.testing.assert_close(gaussian_view(copula).output_covariance.to_dense(), expected)
    with pytest.raises(TypeError, match="no Gaussian view"):
        gaussian_view(object())


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


def test_draws_beside_other_posteriors_get_as_many_samples_and_an_order_of_their_own():
    values = randn(64, 3, 1)
    gaussian = kinds()["gaussian, one output"]
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
