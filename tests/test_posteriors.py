import math

import pytest
import torch
from botorch.acquisition import ScalarizedPosteriorTransform
from botorch.models import SingleTaskGP
from botorch.sampling import SobolQMCNormalSampler
from botorch.sampling.get_sampler import get_sampler
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from oracles import z_score
from torch.distributions import Normal

from bayesnn.distributions import cdf
from bayesnn.histogram import Histogram
from bayesnn.posteriors import (
    Copula,
    FunctionDraws,
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


def test_a_copulas_root_is_found_when_a_draw_needs_it():
    calls, known = [], torch.linalg.cholesky(correlations())

    def root():
        calls.append(1)
        return known

    law = Normal(torch.zeros(3, 2).double(), torch.ones(3, 2).double())
    lazy, eager = Copula(law, root), Copula(law, known)
    moved = lazy.affine(torch.ones(1, 2).double(), 2 * torch.ones(1, 2).double()).outputs([1])
    assert lazy.mean.shape == (3, 2) and moved.variance.shape == (3, 1) and not calls
    normals = torch.randn(5, 3, 2, dtype=torch.float64)
    expected = eager.rsample_from_base_samples(torch.Size([5]), normals)
    torch.testing.assert_close(lazy.rsample_from_base_samples(torch.Size([5]), normals), expected)
    lazy.rsample_from_base_samples(torch.Size([5]), normals)
    assert len(calls) == 1
