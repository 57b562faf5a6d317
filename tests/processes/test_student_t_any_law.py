"""Regression with any mixing law: the inverse gamma gives the Student-t process, others what quadrature gives."""

import math

import pytest
import scipy.integrate
import scipy.stats
import torch
from botorch.acquisition import qLogExpectedImprovement
from gpytorch.kernels import RBFKernel

from bayesnn import Model, StudentTProcess
from bayesnn.posteriors import gaussian_view
from bayesnn.processes import ScaleMixtureProcess
from bayesnn.processes.scale_mixtures import BurrXII, HalfCauchy, InverseGamma
from bayesnn.processes.shared_scale import gaussian_marginals


def rbf(num_features, batch_shape):
    return RBFKernel(ard_num_dims=num_features, batch_shape=batch_shape)


def points(n, m=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, 2, generator=generator).double()
    return X, X.sin().sum(-1, keepdim=True) + 0.1 * torch.randn(n, m, generator=generator).double()


@pytest.mark.parametrize("num_outputs", [1, 2])
def test_inverse_gamma_gives_the_student_t_process(num_outputs):
    (X, Y), (new, y) = points(9, num_outputs), points(5, num_outputs, seed=1)
    # r is b/a there and 1 here.
    exact = StudentTProcess(kernel=rbf, optimise=False, shape=2.0, scale=2.0).fit(X, Y)
    sampled = ScaleMixtureProcess(kernel=rbf, optimise=False, mixing=InverseGamma(2.0, 2.0), num_draws=8000).fit(X, Y)
    own, other = exact.predict(new), sampled.predict(new)
    assert (own.mean - other.mean).abs().max() < 1e-10
    assert (own.variance / other.variance - 1).abs().max() < 0.02
    assert (own.epistemic / other.epistemic - 1).abs().max() < 0.02
    assert (own.log_prob(y) - other.log_prob(y)).abs().max() < 0.03
    assert (own.quantile(0.95) - other.quantile(0.95)).abs().max() < 0.01
    a, b = exact.posterior(new), sampled.posterior(new)
    assert (a.variance / b.variance - 1).abs().max() < 0.02
    normals = torch.randn(2000, 6, num_outputs, generator=torch.Generator().manual_seed(0)).double()
    first, second = (posterior.rsample_from_base_samples(torch.Size([2000]), normals) for posterior in (a, b))
    assert (first - second).abs().quantile(0.99) < 1e-3  # the draws of the scale end somewhere in the tails
    assert (gaussian_view(a).variance / gaussian_view(b).variance - 1).abs().max() < 0.02


@pytest.mark.parametrize("law", [HalfCauchy(), BurrXII(1.5, 1.2)], ids=repr)
def test_predictive_equals_quadrature(law):
    X, Y = points(6)
    model = ScaleMixtureProcess(kernel=rbf, optimise=False, mixing=law, num_draws=8000).fit(X, Y)
    new, known = points(1, seed=1)[0], model._known
    loc, var = gaussian_marginals(model._prior, known, model._scaled(new))
    total, distance = float(var + model._prior.noise_var), float(known.squared_distance)

    def integrand(t, y):
        s = math.exp(t)
        posterior = float(law.log_prob(torch.tensor(s).double())) - 3 * t - distance / (2 * s) + t
        return math.exp(posterior) * (1.0 if y is None else scipy.stats.norm.pdf(y, float(loc), math.sqrt(s * total)))

    mass, *densities = (
        scipy.integrate.quad(integrand, -10, 30, args=(y,), limit=300)[0] for y in (None, -1.0, 0.5, 3.0)
    )
    for y, density in zip((-1.0, 0.5, 3.0), densities, strict=True):
        found = model.predict(new).log_prob(Y.mean() + Y.std() * torch.tensor([[y]]).double())
        assert abs(float(found + Y.std().log()) - math.log(density / mass)) < 0.02


def test_fits_conditions_saves_and_acquires(tmp_path):
    X, Y = points(20, 2)
    model = ScaleMixtureProcess(kernel=rbf, mixing=BurrXII()).fit(X, Y)
    before = ScaleMixtureProcess(kernel=rbf, mixing=BurrXII(), optimise=False).fit(X, Y)
    assert (
        model._log_evidence(model._prior, model._known).sum() > before._log_evidence(before._prior, before._known).sum()
    )
    network = ScaleMixtureProcess(depth=1).fit(X.float(), Y.float())
    network.save(tmp_path / "model")
    loaded = Model.load(tmp_path / "model")
    assert torch.equal(loaded.predict(X.float()).quantile(0.9), network.predict(X.float()).quantile(0.9))
    assert loaded.posterior(X.float()).rsample().dtype == torch.float32
    one = ScaleMixtureProcess(kernel=rbf).fit(X, Y[:, :1])
    inputs = torch.zeros(3, 1, 2).double().requires_grad_()
    values = qLogExpectedImprovement(one, best_f=0.5)(inputs)
    (gradient,) = torch.autograd.grad(values.sum(), inputs)
    assert values.shape == (3,) and torch.isfinite(gradient).all() and gradient.abs().max() > 0
    fantasies = one.condition_on_observations(X[:5, None], torch.zeros(4, 5, 1, 1).double())
    assert fantasies.posterior(X[:3]).variance.shape == (4, 5, 3, 1)
    assert fantasies.predict(X[:3]).quantile(0.2).shape == (4, 5, 3, 1)


def test_no_variance_after_one_observation_under_a_half_cauchy():
    X, Y = points(1)
    model = ScaleMixtureProcess(kernel=rbf, optimise=False).fit(X, Y)
    assert torch.isinf(model.predict(X).variance).all() and torch.isinf(model.predict(X).epistemic).all()
    with pytest.raises(ValueError, match="no finite variance"):
        _ = model.posterior(X).variance


def test_one_draw():
    X, Y = points(8, 2)
    model = ScaleMixtureProcess(kernel=rbf, optimise=False, num_draws=1).fit(X, Y)
    scale = model._weighted(model._known).variances[:, 0]
    var = gaussian_marginals(model._prior, model._known, model._scaled(X[:3]))[1]
    torch.testing.assert_close(model.predict(X[:3]).epistemic, Y.var(0) * scale * var)
    torch.testing.assert_close(model.posterior(X[:3]).variance, Y.var(0) * scale * var)


def test_equal_fantasies_have_equal_variances():
    X, Y = points(8)
    model = ScaleMixtureProcess(kernel=rbf, optimise=False).fit(X, Y)
    fantasies = model.condition_on_observations(X[:1].expand(3, 1, 2) + 0.1, torch.full((4, 3, 1, 1), 0.3).double())
    for found in (fantasies.posterior(X[:2] + 0.5).variance, fantasies.predict(X[:2] + 0.5).variance):
        torch.testing.assert_close(found, found[:1, :1].expand_as(found), rtol=1e-9, atol=0)


def test_bad_arguments():
    for arguments in ({"num_draws": 2.5}, {"num_draws": True}, {"mixing": "x"}, {"mixing": HalfCauchy}):
        with pytest.raises(TypeError, match=next(iter(arguments))):
            ScaleMixtureProcess(**arguments)
    with pytest.raises(ValueError, match="num_draws"):
        ScaleMixtureProcess(num_draws=0)
