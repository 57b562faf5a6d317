"""The Student-t process against ratios of joint densities, quadrature over the mixing variable, and the Gaussian process."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from gpytorch.kernels import RBFKernel
from torch.distributions import MultivariateNormal

from bayesnn import StudentTProcess, likelihoods
from bayesnn.posteriors import StudentT
from bayesnn.processes.shared_scale import (
    MixturePrior,
    condition,
    gaussian,
    inflation,
    log_evidence,
    no_observations,
    predict_marginals,
    student_t,
)


def rbf(num_features, batch_shape):
    return RBFKernel(ard_num_dims=num_features, batch_shape=batch_shape)


def prior(a=1.7, b=0.9, noise_var=0.05, num_outputs=1):
    kernel = rbf(2, torch.Size([num_outputs]))
    built = MixturePrior(kernel, num_outputs, a, b, torch.full((num_outputs,), noise_var))
    return built.requires_grad_(False)


def points(n, m=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, generator=generator).double(), torch.randn(n, m, generator=generator).double()


def seen(model, X, Y):
    return condition(model, no_observations(model, 2), X, Y)


def predict(model, known, X):
    return student_t(model, known, *gaussian(model, known, X))


def scale_matrix(model, X, noisy):
    """(b/a) (K + eps I), with noise for the first ``noisy`` points only."""
    noise = torch.diag(torch.cat([model.noise_var.expand(noisy), torch.zeros(len(X) - noisy)]))
    return (model.covariance(X, X)[0] + noise).numpy()


def log_t(y, scale, df):
    return scipy.stats.multivariate_t(np.zeros(len(y)), scale, df).logpdf(y)


@pytest.mark.parametrize(("n", "q"), [(0, 2), (1, 1), (1, 3), (6, 1), (9, 4)])
def test_predictive_is_the_ratio_of_joint_densities(n, q):
    model, (X, Y), (new, f) = prior(), points(n), points(q, seed=1)
    known = seen(model, X, Y) if n else no_observations(model, 2)
    posterior = predict(model, known, new)
    assert posterior.df == pytest.approx(2 * 1.7 + n)
    found = scipy.stats.multivariate_t(posterior.loc[:, 0], posterior.scale[0], posterior.df).logpdf(f[:, 0])
    joint = log_t(torch.cat([Y, f])[:, 0].numpy(), scale_matrix(model, torch.cat([X, new]), n), 2 * 1.7)
    alone = log_t(Y[:, 0].numpy(), scale_matrix(model, X, n), 2 * 1.7) if n else 0.0
    assert abs(float(found) - (joint - alone)) < 1e-10
    assert abs(float(log_evidence(model, known)) - alone) < 1e-10
    loc, var = predict_marginals(model, known, new)
    assert (loc - posterior.loc).abs().max() < 1e-12
    assert (var[:, 0] - posterior.scale[0].diagonal()).abs().max() < 1e-12


def test_predictions_of_observations_are_ratios_of_densities():
    X, Y = points(12)
    Y = 3 + 5 * Y
    model = StudentTProcess(kernel=rbf, shape=0.8, scale=1.1, optimise=False).fit(X, Y)
    new, y = points(3, seed=1)
    standardised = [(values - Y.mean()) / Y.std() for values in (Y, 3 + 5 * y)]
    inputs = (torch.cat([X, new]) - X.mean(0)) / X.std(0)
    own = model._prior
    for row in range(3):
        rows = [*range(12), 12 + row]
        both = torch.cat([standardised[0], standardised[1][row : row + 1]])[:, 0].numpy()
        ratio = log_t(both, scale_matrix(own, inputs[rows], 13), 1.6) - log_t(
            both[:12], scale_matrix(own, inputs[:12], 12), 1.6
        )
        found = model.predict(new[row : row + 1]).log_prob(3 + 5 * y[row : row + 1])
        assert abs(float(found) - (ratio - math.log(Y.std()))) < 1e-10
    # Jointly too: function and noise share one chi-squared variable.
    noisy = model.posterior(new, observation_noise=True)
    joint = torch.cat(standardised)[:, 0].numpy()
    ratio = log_t(joint, scale_matrix(own, inputs, 15), 1.6) - log_t(
        joint[:12], scale_matrix(own, inputs[:12], 12), 1.6
    )
    found = scipy.stats.multivariate_t(noisy.loc[:, 0], noisy.scale[0], noisy.df).logpdf((3 + 5 * y)[:, 0])
    assert abs(float(found) - (ratio - 3 * math.log(Y.std()))) < 1e-10


def test_predictive_is_the_mixture_over_the_scale():
    """By quadrature over s | y: nothing Student-t is put in by hand."""
    model, (X, Y), (new, _) = prior(), points(5), points(1, seed=1)
    known = seen(model, X, Y)
    posterior = predict(model, known, new)
    unit = known.squared_distance * 0.9 / 1.7  # of K + eps I, not of its multiple by b/a
    law = scipy.stats.invgamma(1.7 + 2.5, scale=0.9 + float(unit) / 2)
    levels = (np.arange(200_000) + 0.5) / 200_000
    scales = law.ppf(levels)
    gaussian_var = float(posterior.scale / inflation(model, known)) * 1.7 / 0.9
    for y in (-1.0, 0.3, 4.0):
        mixed = scipy.stats.norm.pdf(y, float(posterior.loc), np.sqrt(scales * gaussian_var)).mean()
        exact = scipy.stats.t.pdf(y, posterior.df, float(posterior.loc), math.sqrt(float(posterior.scale)))
        assert mixed == pytest.approx(exact, rel=1e-4)


def gaussian_process(model, X, Y, new):
    K, cross, own = (model.covariance(A, B)[0] for A, B in ((X, X), (X, new), (new, new)))
    solved = torch.linalg.solve(K + model.noise_var * torch.eye(len(X)), cross)
    return solved.T @ Y, own - cross.T @ solved


def test_mean_is_the_gaussian_process_s_and_so_is_everything_in_the_limit():
    (X, Y), (new, _) = points(8), points(3, seed=1)
    errors = []
    for a in (1.0, 1e2, 1e4, 1e6):
        model = prior(a, 0.7 * a)
        posterior = predict(model, seen(model, X, Y), new)
        mean, covariance = gaussian_process(model, X, Y, new)
        assert (posterior.loc - mean).abs().max() < 1e-12
        errors.append(float((posterior.scale[0] - covariance).abs().max()))
    assert errors[0] > 0.01 and errors[-1] < 1e-6
    assert all(later < 0.03 * earlier for earlier, later in itertools.pairwise(errors[1:]))
    K = model.covariance(X, X)[0] + model.noise_var * torch.eye(8)
    gaussian = MultivariateNormal(torch.zeros(8).double(), K).log_prob(Y[:, 0])
    assert abs(float(log_evidence(model, seen(model, X, Y)) - gaussian)) < 1e-4


def test_conditioning_equals_seeing_all_at_once():
    X, Y = points(10)
    model = StudentTProcess(kernel=rbf, likelihood=likelihoods.Gaussian(noise_std=0.3), optimise=False)
    first = model.fit(X[:6], Y[:6])
    new, _ = points(4, seed=1)
    later = first.condition_on_observations(X[6:8], Y[6:8]).condition_on_observations(X[8:], Y[8:])
    whole = condition(first._prior, first._known, *first._observed(X[6:], Y[6:]))
    expected = predict(first._prior, whole, first._scaled(new)).affine(first._outcomes.loc, first._outcomes.scale)
    posterior = later.posterior(new)
    assert posterior.df == 14.0 and (posterior.loc - expected.loc).abs().max() < 1e-12
    assert (posterior.scale - expected.scale).abs().max() < 1e-12
    assert first.posterior(new).df == 10.0
    # Fantasies in a batch are each what they are alone; points in batches share nothing.
    outcomes = torch.randn(3, 5, 2, 1, generator=torch.Generator().manual_seed(2)).double()
    inputs = torch.randn(5, 2, 2, generator=torch.Generator().manual_seed(3)).double()
    batch = first.condition_on_observations(inputs, outcomes)
    assert batch.batch_shape == (3, 5)
    together, apart = batch.posterior(new), first.condition_on_observations(inputs[4], outcomes[1, 4]).posterior(new)
    assert (together.loc[1, 4] - apart.loc).abs().max() < 1e-12
    assert (together.scale[1, 4] - apart.scale).abs().max() < 1e-12


def test_surprising_data_widen_and_expected_data_narrow():
    X, _ = points(12)
    model = prior(a=1.0, b=1.0)
    scale = torch.from_numpy(scale_matrix(model, X, 12))
    typical = torch.linalg.cholesky(scale) @ torch.ones(12, 1).double()  # d^2 = n exactly
    for factor in (0.3, 1.0, 5.0):
        widening = float(inflation(model, seen(model, X, factor * typical)))
        assert widening == pytest.approx((2 + 12 * factor**2) / 14, rel=1e-9)


@pytest.mark.parametrize("unit", [1e-40, 1e-31, 1.0, 1e31])
def test_quantiles_know_no_units(unit):
    X, Y = points(30)
    p = StudentTProcess(optimise=False).fit(X, unit * Y).predict(X[:3])
    assert torch.allclose(p.cdf(p.quantile(0.9)), torch.tensor(0.9).double())


def test_variance_where_there_is_none():
    X, Y = points(1)
    model = StudentTProcess(kernel=rbf, shape=0.4, scale=1.0, optimise=False).fit(X, Y)  # 1.8 degrees of freedom
    posterior, p = model.posterior(X), model.predict(X)
    assert torch.isfinite(posterior.mean).all()
    with pytest.raises(ValueError, match=r"df=1.8 has no finite variance"):
        _ = posterior.variance
    for value in (p.variance, p.aleatoric, p.epistemic, p.stddev):
        assert torch.isinf(value).all()
    low, high = p.interval(0.9)
    assert torch.isfinite(low).all() and float(p.cdf(high)) == pytest.approx(0.95, abs=1e-6)
    assert torch.isfinite(p.log_prob(Y)).all()
    with pytest.raises(ValueError, match="has no mean"):
        _ = predict(prior(0.4), no_observations(prior(0.4), 2), X).mean


def test_draws_share_one_chi_squared_variable():
    """E[f1^2 f2^2] of uncorrelated coordinates: (nu - 2) / (nu - 4) with one, 1 with one for each (unit variances)."""
    df, count = 12.0, 400_000
    unit = torch.eye(2).double()[None] * (df - 2) / df
    posterior = StudentT(torch.zeros(2, 1).double(), unit, df)
    values = posterior.rsample(torch.Size([count]), generator=torch.Generator().manual_seed(0)).squeeze(-1)
    products = values.square().prod(-1)
    z = float((products.mean() - (df - 2) / (df - 4)) / (products.std() / math.sqrt(count)))
    assert abs(z) < 4
    assert float((products.mean() - 1) / (products.std() / math.sqrt(count))) > 20
    # Outputs: each its own by default, one for all where they share it.
    for shared, expected in ((False, 1.0), (True, (df - 2) / (df - 4))):
        outputs = StudentT(torch.zeros(1, 2).double(), unit[:, :1, :1].expand(2, 1, 1), df, shared)
        values = outputs.rsample(torch.Size([count]), generator=torch.Generator().manual_seed(1)).squeeze(-2)
        products = values.square().prod(-1)
        assert abs(float((products.mean() - expected) / (products.std() / math.sqrt(count)))) < 4


def test_outputs_have_degrees_of_freedom_of_their_own():
    X, Y = points(15, 2)
    both = StudentTProcess(kernel=rbf).fit(X, Y)
    df = both.posterior(X).df
    assert df.shape == (2,) and df[0] != df[1]
    for index in (0, 1):
        part = both.posterior(X, output_indices=[index])
        assert part.df == df[index]
        assert torch.equal(part.variance, both.posterior(X).variance[:, [index]])
    with pytest.raises(ValueError, match="share"):
        StudentT(torch.zeros(1, 2), torch.ones(2, 1, 1), torch.tensor([3.0, 4.0]), shared=True)


def test_fitted_hyperparameters_are_at_a_maximum():
    X, _ = points(40)
    Y = torch.sin(2 * X[:, :1]) + X[:, 1:].cos() + 0.1 * points(40, seed=4)[1]
    model = StudentTProcess(kernel=rbf).fit(X, Y)
    own = model._prior.requires_grad_(True)
    known = seen(own, model._data.X, model._data.Y)
    objective = (log_evidence(own, known).sum() + own.log_prior()) / 40
    for gradient in torch.autograd.grad(objective, list(own.parameters())):
        assert gradient.abs().max() < 1e-3
    p = model.predict(X)
    assert float(p.aleatoric.mean().sqrt()) == pytest.approx(0.1, rel=0.3)
    given = StudentTProcess(likelihood=likelihoods.Gaussian(noise_std=0.25), kernel=rbf).fit(X, Y)
    assert (given._likelihood_parameters()["log_noise_std"].exp() * Y.std()).item() == pytest.approx(0.25)


def test_a_kernel_of_one_s_own_has_to_be_given_when_loading(tmp_path):
    X, Y = points(10)
    model = StudentTProcess(kernel=rbf).fit(X, Y)
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="kernel=…"):
        StudentTProcess.load(tmp_path / "model")
    loaded = StudentTProcess.load(tmp_path / "model", kernel=rbf)
    assert torch.equal(loaded.predict(X).mean, model.predict(X).mean)
    assert torch.equal(loaded.predict(X).quantile(0.9), model.predict(X).quantile(0.9))


def test_calibrated_where_scales_vary_and_a_gaussian_process_is_not():
    """Data sets from the prior, whose scales are heavy-tailed: ranks of a new function value are uniform."""
    model, gaussian = prior(a=1.0, b=1.0, noise_var=0.01), prior(a=1e6, b=1e6, noise_var=0.01)
    generator = torch.Generator().manual_seed(5)
    X, _ = points(6, seed=6)
    root = torch.linalg.cholesky(torch.from_numpy(scale_matrix(model, X, 5)) + 1e-9 * torch.eye(6))
    count = 3000
    scales = 1 / torch._standard_gamma(torch.ones(count).double(), generator=generator)
    values = scales.sqrt()[:, None] * torch.randn(count, 6, generator=generator).double() @ root.T
    Y, f = values[:, :5].unsqueeze(-1), values[:, 5]
    coverage = []
    for own in (model, gaussian):
        known = condition(own, no_observations(own, 2), X[:5].expand(count, 5, 2), Y)
        posterior = predict(own, known, X[5:].expand(count, 1, 2))
        z = (f - posterior.loc[:, 0, 0]) / posterior.scale[:, 0, 0, 0].sqrt()
        ranks = scipy.stats.t.cdf(z.numpy(), posterior.df)
        coverage.append(float(((ranks > 0.05) & (ranks < 0.95)).mean()))
        if own is model:
            assert scipy.stats.kstest(ranks, "uniform").pvalue > 1e-3
    error = math.sqrt(0.9 * 0.1 / count)
    assert abs(coverage[0] - 0.9) < 4 * error and abs(coverage[1] - 0.9) > 10 * error


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"likelihood must be likelihoods\.Gaussian"):
        StudentTProcess(likelihood=likelihoods.StudentT())
    for arguments, message in (({"shape": 0.0}, "shape"), ({"scale": math.inf}, "scale"), ({"depth": 0}, "depth")):
        with pytest.raises(ValueError, match=message):
            StudentTProcess(**arguments)
