"""The sparse variational Student-t process: divergences, the bound and predictions against Monte Carlo and exact answers."""

import copy
import functools
import math

import pytest
import scipy.special
import scipy.stats
import torch
from gpytorch.kernels import RBFKernel
from torch.distributions import Categorical as CategoricalDistribution

from bayesnn import Model, likelihoods
from bayesnn.data import Data, minibatch
from bayesnn.inference.optimizer import adam_init
from bayesnn.inference.run import run
from bayesnn.processes import VariationalStudentTProcess
from bayesnn.processes.scale_mixtures import InverseGamma
from bayesnn.processes.variational_student_t import (
    SparseState,
    SparseStudentT,
    SparseTarget,
    _unpack,
    divergence,
    inverse_gamma_divergence,
)


def rbf(num_features, batch_shape):
    return RBFKernel(ard_num_dims=num_features, batch_shape=batch_shape)


def numbers(*values):
    return [torch.tensor(float(value)).double() for value in values]


def three_classes(n=90, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, 2, generator=generator).double()
    return X, (X[:, 0] > 0.4).long() + (X[:, 1] > 0).long()


QUICK = SparseStudentT(num_inducing=20, num_steps=150, learning_rate=0.05, batch_size=32, num_samples=4)


@functools.cache
def fitted():
    return VariationalStudentTProcess(likelihoods.Categorical(3), kernel=rbf, method=QUICK).fit(*three_classes())


def with_draws(model, count):
    """The same fitted model, with more draws in its predictions."""
    twin = copy.copy(model)
    twin.num_draws = count
    return twin


def test_divergence_equals_monte_carlo_over_values_that_are_not_whitened():
    generator = torch.Generator().manual_seed(0)
    C, M, count = 3, 4, 200_000
    mean = torch.randn(C, M, generator=generator).double()
    root = 0.3 * torch.randn(C, M, M, generator=generator).double().tril(-1) + torch.diag_embed(torch.rand(C, M) + 0.5)
    a, b, alpha, beta = numbers(3.3, 2.1, 2.0, 1.4)
    Z = torch.randn(M, 2, generator=generator).double()
    K = RBFKernel().double()(Z).to_dense().detach() + 0.1 * torch.eye(M)
    L = torch.linalg.cholesky(K)
    s = b / torch._standard_gamma(a.expand(count), generator=generator)
    total = InverseGamma(float(a), float(b)).log_prob(s) - InverseGamma(float(alpha), float(beta)).log_prob(s)
    for c in range(C):  # the same s for every class
        own = L @ root[c]
        u = L @ mean[c] + s.sqrt()[:, None] * (torch.randn(count, M, generator=generator).double() @ own.T)
        for sign, loc, factor in ((1, L @ mean[c], own), (-1, torch.zeros(M).double(), L)):
            standard = torch.linalg.solve_triangular(factor, (u - loc).T, upper=False).T / s.sqrt()[:, None]
            log_det = factor.diagonal().abs().log().sum() + 0.5 * M * s.log()
            total = total + sign * (-0.5 * standard.square().sum(-1) - log_det)
    exact = divergence(mean, root, a, b, alpha, beta)
    assert abs(float((total.mean() - exact) / (total.std() / math.sqrt(count)))) < 4
    assert float(total.std()) / math.sqrt(count) < 0.01 * float(exact)


def test_divergence_is_the_paper_s_formula():
    """With a diagonal S and a K that isn't the identity, and the same jitter in the determinant as in the inverse."""
    C, M = 2, 5
    generator = torch.Generator().manual_seed(1)
    m, diagonal = torch.randn(C, M, generator=generator).double(), torch.rand(C, M, generator=generator).double() + 0.1
    K = RBFKernel().double()(torch.randn(M, 2, generator=generator).double()).to_dense().detach() + 1e-2 * torch.eye(M)
    a, b, alpha, beta = 2.7, 0.8, 2.0, 1.9
    inverse = torch.linalg.inv(K)
    expected = 0.5 * sum(
        torch.logdet(K) - diagonal[c].log().sum() - M + (inverse.diagonal() * diagonal[c]).sum()
        + a / b * m[c] @ inverse @ m[c]
        for c in range(C)
    )  # fmt: skip
    expected = float(expected) + alpha * math.log(b / beta) - scipy.special.gammaln(a) + scipy.special.gammaln(alpha)
    expected += (a - alpha) * scipy.special.digamma(a) + (beta - b) * a / b
    L = torch.linalg.cholesky(K)
    whitened = torch.linalg.solve_triangular(L, torch.diag_embed(diagonal.sqrt()), upper=False)
    root = torch.linalg.cholesky(whitened @ whitened.mT)
    mean = torch.linalg.solve_triangular(L, m.T, upper=False).T
    assert float(divergence(mean, root, *numbers(a, b, alpha, beta))) == pytest.approx(expected, rel=1e-9)


def test_no_divergence_from_the_prior_itself():
    same = numbers(2.0, 1.4, 2.0, 1.4)
    root = torch.eye(4).double().expand(3, 4, 4)
    assert abs(float(divergence(torch.zeros(3, 4).double(), root, *same))) < 1e-12
    for a, b in ((0.5, 1.4), (2.0, 3.0), (40.0, 0.1)):
        assert inverse_gamma_divergence(*numbers(a, b, 2.0, 1.4)) > 0


def bound_and_evidence(labels, alpha=2.0):
    """A data set of two points, whose evidence is a small integral; inducing points there: q is only limited in form."""
    X = torch.tensor([[-0.7, 0.0], [0.9, 0.3]]).double()
    kernel = rbf(2, torch.Size([])).double()
    target = SparseTarget(Data(X, labels), kernel, likelihoods.Categorical(2), alpha)
    method = SparseStudentT(num_inducing=2, num_steps=500, learning_rate=0.04, num_samples=32)
    fit = run(method, target, seed=0)
    target.covariances.load_state_dict(fit.variational, strict=False)
    K = kernel(X).to_dense().detach()
    beta = float(fit.variational["log_prior_ratio"].exp()) * alpha
    generator = torch.Generator().manual_seed(3)
    count = 200_000
    s = beta / torch._standard_gamma(torch.full((count,), alpha).double(), generator=generator)
    normals = torch.randn(count, 2, 2, generator=generator).double() @ torch.linalg.cholesky(K).T  # (S, class, point)
    values = (s.sqrt()[:, None, None] * normals).mT
    likelihood = CategoricalDistribution(logits=values).log_prob(labels[:, 0]).sum(-1).exp()
    return float(fit.elbo[-200:].mean()), float(likelihood.mean().log())


def test_bound_is_below_the_evidence_and_close():
    bound, evidence = bound_and_evidence(torch.tensor([[0], [1]]))
    assert bound < evidence + 0.01 and bound > evidence - 0.1


def test_posterior_and_prediction_agree_and_share_the_scale():
    model, new = fitted(), three_classes(5, seed=1)[0]
    posterior, p = model.posterior(new), model.predict(new)
    assert posterior.shared and posterior.mean.shape == (5, 3)
    draws = posterior.rsample(torch.Size([20_000]), generator=torch.Generator().manual_seed(0))
    exact = draws.softmax(-1)
    many = with_draws(model, 20_000).predict(new)
    error = (exact.var(0) / 20_000).sqrt() * math.sqrt(2)
    assert ((many.probabilities - exact.mean(0)) / error).abs().max() < 4.5
    assert (p.probabilities - exact.mean(0)).abs().max() < 0.05
    # One chi-squared variable for classes: squares of different classes are correlated, beyond what normals give.
    z = (draws[:, 0] - posterior.mean[0]) / posterior.variance[0].sqrt()
    df = posterior.df
    products = z[:, 0].square() * z[:, 1].square()
    expected = (df - 2) / (df - 4)
    assert abs(float((products.mean() - expected) / (products.std() / math.sqrt(len(products))))) < 4


def heavy_tailed():
    """With 2.4 degrees of freedom, where it matters which values share a scale."""
    twin = copy.copy(fitted())
    twin._variational = fitted()._variational | {"log_shape": torch.tensor(1.2).double().log()}
    return twin


def test_marginals_of_predictions_are_the_posterior_s():
    model, new = heavy_tailed(), 2 * three_classes(6, seed=2)[0]
    posterior = model.posterior(new)
    logits = with_draws(model, 40_000).predict(new).components.logits.squeeze(-2)
    contrast = logits[..., 0] - logits[..., 1]  # shifts of all logits cancel
    loc = posterior.loc[:, 0] - posterior.loc[:, 1]
    scale = posterior.scale.diagonal(dim1=-2, dim2=-1)
    standard = (contrast - loc) / (scale[0] + scale[1]).sqrt()
    for point in range(6):
        assert scipy.stats.kstest(standard[:, point].numpy(), scipy.stats.t(posterior.df).cdf).pvalue > 1e-4


def test_the_bound_is_of_classes_that_share_a_scale():
    """The step's estimate against draws of the posterior, whose sharing is tested above."""
    model, (X, labels) = heavy_tailed(), three_classes(12, seed=7)
    count = 20_000
    data = Data(model._scaled(X), labels.unsqueeze(-1))
    target = SparseTarget(data, model._covariances.kernel, likelihoods.Categorical(3), 2.0)
    state = SparseState(model._variational, adam_init(model._variational))
    found, estimates = [], []
    for batch_size in (None, 5):
        method = SparseStudentT(num_samples=count, batch_size=batch_size)
        rows = minibatch(data, batch_size, torch.Generator().manual_seed(0))
        found.append(method.step(target, state, torch.Generator().manual_seed(0))[1].elbo)
        posterior = model._latent(rows.X.unsqueeze(1))
        draws = posterior.rsample(torch.Size([count]), generator=torch.Generator().manual_seed(1)).squeeze(-2)
        fits = 12 / len(rows) * CategoricalDistribution(logits=draws).log_prob(rows.Y.squeeze(-1)).sum(-1)
        estimates.append((fits.mean(), fits.std() / math.sqrt(count)))
    prior = model._variational["log_prior_ratio"].exp() * 2.0
    q = _unpack(model._variational, 2.0)
    penalty = divergence(q.mean, q.root, q.shape, q.scale, torch.tensor(2.0).double(), prior)
    for elbo, (fit, error) in zip(found, estimates, strict=True):
        assert abs(float((elbo + penalty - fit) / (math.sqrt(2) * error))) < 4
        assert error < 0.02 * abs(fit)


def test_classifies_and_doubts_far_away():
    model = fitted()
    X, labels = three_classes(300, seed=3)
    p = model.predict(X)
    assert (p.labels == labels).double().mean() > 0.85
    assert p.log_prob(labels).mean() > -0.45
    far = model.predict(torch.full((1, 2), 40.0).double())
    assert far.entropy.min() > 0.9 * math.log(3)


def test_minibatches_checkpoints_and_files(tmp_path):
    X, labels = three_classes()
    model = fitted()
    resumed = VariationalStudentTProcess(likelihoods.Categorical(3), kernel=rbf, method=QUICK)

    def stop(index, state, info):
        if index == 70:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        resumed.fit(X, labels, checkpoint=tmp_path / "run", callbacks=[stop])
    resumed.fit(X, labels, checkpoint=tmp_path / "run")
    for name, value in model._variational.items():
        close = torch.equal(value, resumed._variational[name])
        assert close, name
    network = VariationalStudentTProcess(
        likelihoods.Bernoulli(), depth=2, method=SparseStudentT(num_inducing=10, num_steps=5)
    ).fit(X.float(), (labels > 0).float())
    network.save(tmp_path / "model")
    loaded = Model.load(tmp_path / "model")
    assert torch.equal(loaded.predict(X.float()).probabilities, network.predict(X.float()).probabilities)
    assert loaded.predict(X.float()).probabilities.dtype == torch.float32
    batches = model.predict(X.reshape(9, 10, 2)).probabilities
    assert batches.shape == (9, 10, 3)
    assert model.posterior(X.reshape(9, 10, 2)).rsample(torch.Size([2])).shape == (2, 9, 10, 3)


def test_equal_rows_have_one_probability_near_the_exact_one():
    model, new = heavy_tailed(), 2 * three_classes(6, seed=2)[0]
    found = model.predict(new.repeat_interleave(50, 0)).probabilities.reshape(6, 50, 3)
    assert (found - found[:, :1]).abs().max() < 1e-12
    posterior = model.posterior(new)
    draws = posterior.rsample(torch.Size([200_000]), generator=torch.Generator().manual_seed(0)).softmax(-1).mean(0)
    assert (found[:, 0] - draws).abs().max() < 0.005


def test_bad_arguments():
    with pytest.raises(TypeError, match="StudentTProcess"):
        VariationalStudentTProcess(likelihoods.Gaussian())
    with pytest.raises(TypeError, match="free parameters"):
        VariationalStudentTProcess(likelihoods.NegativeBinomial())
    for arguments in ({"shape": 0.0}, {"num_draws": 0}, {"depth": 0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            VariationalStudentTProcess(likelihoods.Categorical(2), **arguments)
    for name in ("num_inducing", "num_steps", "batch_size", "learning_rate", "num_samples"):
        with pytest.raises(ValueError, match=name):
            SparseStudentT(**{name: 0})
    for name in ("num_inducing", "num_steps", "batch_size", "num_samples"):
        for value in (2.5, True):
            with pytest.raises(TypeError, match=name):
                SparseStudentT(**{name: value})
    for value in (math.inf, math.nan):
        with pytest.raises(ValueError, match="learning_rate"):
            SparseStudentT(learning_rate=value)
    for arguments in ({"shape": "a"}, {"num_draws": 2.5}):
        with pytest.raises(TypeError, match=next(iter(arguments))):
            VariationalStudentTProcess(likelihoods.Categorical(2), **arguments)
