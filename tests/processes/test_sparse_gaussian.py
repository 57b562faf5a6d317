"""Regression with inducing points against the exact Gaussian process, and GPyTorch's own sparse one."""

import functools

import gpytorch
import pytest
import torch
from gpytorch.kernels import InducingPointKernel, RBFKernel, ScaleKernel
from torch.distributions import MultivariateNormal

from bayesnn import Model, likelihoods
from bayesnn.data import Data
from bayesnn.processes import CollapsedBound, SparseNNGP, sparse_gaussian
from bayesnn.processes.kernels import NNGPKernel
from bayesnn.processes.sparse_gaussian import CollapsedTarget
from bayesnn.processes.sparse_prior import SparsePrior

NOISE = likelihoods.Gaussian(noise_std=0.2)


def rbf(num_features, batch_shape):
    return ScaleKernel(RBFKernel(ard_num_dims=num_features, batch_shape=batch_shape), batch_shape=batch_shape)


def problem(n=40, m=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, 3, generator=generator).double()
    Y = torch.stack([(2 * X[:, 0]).sin(), X[:, 1] * X[:, 2]], 1)[:, :m]
    return X, Y + 0.2 * torch.randn(n, m, generator=generator).double()


@functools.cache
def fitted(num_inducing=40, optimise=False):
    return SparseNNGP(
        depth=2, likelihood=NOISE, optimise=optimise, method=CollapsedBound(num_inducing=num_inducing)
    ).fit(*problem())


def exact(model):
    """Covariances (m, n, n) of the observations, and the standardised data."""
    data = model._data
    noise = (2 * model._noise["log_noise_std"]).exp().reshape(-1, 1, 1)
    return model._prior.covariance(data.X) + noise * torch.eye(len(data)).double(), data


def collapsed(model):
    target = CollapsedTarget(model._data, model._prior, model.likelihood, model._noise)
    return target, model._prior.start()


def test_with_the_data_as_inducing_points_it_is_the_exact_process():
    model, new = fitted(), problem(7, seed=1)[0]
    assert len(model._values.points) == 40
    Sigma, data = exact(model)
    target, parameters = collapsed(model)
    bound = target.bound(parameters, model._values.points).detach()
    X = model._scaled(new)
    cross, prior = model._prior.covariance(X, data.X), model._prior.covariance(X)
    posterior = model._latent(X)
    for output in range(2):
        evidence = MultivariateNormal(torch.zeros(40).double(), Sigma[output]).log_prob(data.Y[:, output])
        assert float(bound[output]) == pytest.approx(float(evidence), abs=1e-6)
        mean = cross[output] @ torch.linalg.solve(Sigma[output], data.Y[:, output])
        covariance = prior[output] - cross[output] @ torch.linalg.solve(Sigma[output], cross[output].mT)
        torch.testing.assert_close(posterior.mean[:, output], mean, rtol=0, atol=1e-6)
        torch.testing.assert_close(posterior.output_covariance.to_dense()[output], covariance, rtol=0, atol=1e-6)
    var, noise = posterior.variance, (2 * model._noise["log_noise_std"]).exp()
    scale = problem()[1].var(0)
    torch.testing.assert_close(model.predict(new).variance, scale * (var + noise), rtol=1e-6, atol=0)


def test_bound_is_gpytorch_s_and_prediction_the_paper_s():
    X, Y = problem(60, 1)
    new, Z = problem(9, seed=3)[0], problem(12, seed=2)[0]
    prior = SparsePrior(NNGPKernel(depth=2), 1)
    prior.mean.data.fill_(0.3)
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    likelihood.noise = 0.1
    base = NNGPKernel(depth=2).double()

    class GPyTorchModel(gpytorch.models.ExactGP):
        def __init__(self):
            super().__init__(X, Y[:, 0], likelihood)
            self.mean_module = gpytorch.means.ConstantMean()
            self.covar_module = InducingPointKernel(base, inducing_points=Z.clone(), likelihood=likelihood)

        def forward(self, x):
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    gp = GPyTorchModel().double()
    gp.mean_module.constant.data.fill_(0.3)
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, gp)
    with gpytorch.settings.fast_computations(False, False, False):
        expected = mll(gp(X), Y[:, 0]) * len(X)
    noise = {"log_noise_std": torch.full((1, 1), 0.1).double().log() / 2}
    target = CollapsedTarget(Data(X, Y), prior, likelihoods.Gaussian(), noise)
    assert float(target.bound(prior.start(), Z).detach()) == pytest.approx(
        float(expected.detach()), abs=1e-3
    )  # GPyTorch's own jitter
    values = target.optimum(prior.start(), Z)
    base_new, own, left = prior.project(prior.inducing(Z), new)
    spread = values.root[0].mT @ base_new[0]
    # Titsias 2009, eq. 6
    Kzz, Kzx, Kzn = (base(first, second).to_dense().detach() for first, second in ((Z, Z), (Z, X), (Z, new)))
    middle = Kzz + Kzx @ Kzx.mT / 0.1
    mean = 0.3 + Kzn.mT @ torch.linalg.solve(middle, Kzx @ (Y[:, 0] - 0.3)) / 0.1
    variance = own[0] + (Kzn * (torch.linalg.solve(middle, Kzn) - torch.linalg.solve(Kzz, Kzn))).sum(0)
    torch.testing.assert_close(0.3 + base_new[0].mT @ values.mean[0], mean, rtol=0, atol=1e-7)
    torch.testing.assert_close(left[0] + spread.square().sum(0), variance, rtol=0, atol=1e-7)


def test_bound_is_below_the_evidence_and_rises_with_inducing_points():
    model = fitted()
    Sigma, data = exact(model)
    target, parameters = collapsed(model)
    evidence = MultivariateNormal(torch.zeros(40).double(), Sigma).log_prob(data.Y.mT)
    before = torch.full((2,), -torch.inf).double()
    for count in (2, 5, 10, 20, 39):
        bound = target.bound(parameters, target.prior.landmarks(data.X, count))
        assert (bound > before).all() and (bound < evidence).all()
        before = bound


def test_gradient_equals_differences_and_does_not_depend_on_blocks(monkeypatch):
    data = fitted()._data
    target = CollapsedTarget(data, fitted()._prior_of(data), likelihoods.Gaussian(), {})
    Z, parameters = data.X[:8] + 0.1, target.start()
    objective = target.objective(Z)
    value, gradient = objective(parameters)
    for name, own in parameters.items():
        moved = []
        for sign in (1, -1):
            shifted = own.clone()
            shifted.view(-1)[-1] += sign * 1e-5
            moved.append(objective(parameters | {name: shifted})[0])
        difference = (moved[0] - moved[1]) / 2e-5
        assert float(gradient[name].reshape(-1)[-1]) == pytest.approx(float(difference), rel=1e-4, abs=1e-8), name
    monkeypatch.setattr(sparse_gaussian, "ROWS", 7)
    monkeypatch.setattr(sparse_gaussian, "KEPT", 0)
    blocks, gradient_of_blocks = objective(parameters)
    torch.testing.assert_close(blocks, value)
    for name, own in gradient.items():
        torch.testing.assert_close(gradient_of_blocks[name], own, rtol=1e-7, atol=1e-10)


def test_learns_noise_and_function_from_few_inducing_points():
    generator = torch.Generator().manual_seed(0)
    X = torch.rand(1500, 1, generator=generator).double() * 6 - 3
    Y = (2 * X).sin() + 0.2 * torch.randn(1500, 1, generator=generator).double()
    model = SparseNNGP(kernel=rbf, method=CollapsedBound(num_inducing=20, num_steps=80, num_first_rows=300)).fit(X, Y)
    target = CollapsedTarget(model._data, model._prior, model.likelihood, {})
    _, gradient = target.objective(model._values.points)(model._prior.start() | model._noise)
    assert max(float(value.abs().max()) for value in gradient.values()) < 1e-3  # the optimum for all rows
    p = model.predict(X)
    assert (p.mean - (2 * X).sin()).square().mean().sqrt() < 0.04
    assert 0.19 < p.aleatoric.mean().sqrt() < 0.21


def test_inducing_inputs_are_chosen_again_if_better():
    X, Y = problem(120, 1)
    bounds = []
    for count in (1, 2):
        model = SparseNNGP(
            depth=1, likelihood=NOISE, method=CollapsedBound(num_inducing=12, num_steps=40, num_selections=count)
        ).fit(X, Y)
        target = CollapsedTarget(model._data, model._prior, model.likelihood, model._noise)
        objective = target.objective(model._values.points)
        bounds.append(float(-objective(model._prior.start())[0]))
    assert bounds[1] >= bounds[0]


def test_further_observations_are_those_of_a_gaussian_process():
    model = fitted(10)
    new, X = problem(4, seed=5)[0], problem(6, seed=6)[0]
    Y = torch.randn(4, 2, generator=torch.Generator().manual_seed(1)).double()
    both = model.posterior(torch.cat([new, X]))
    noise = 0.04
    after = model.condition_on_observations(new, Y).posterior(X)
    steps = model.condition_on_observations(new[:1], Y[:1]).condition_on_observations(new[1:], Y[1:]).posterior(X)
    for output in range(2):
        K = both.output_covariance.to_dense()[output]
        gain = torch.linalg.solve(K[:4, :4] + noise * torch.eye(4).double(), K[:4, 4:]).mT
        mean = both.mean[4:, output] + gain @ (Y - both.mean[:4])[:, output]
        torch.testing.assert_close(after.mean[:, output], mean)
        torch.testing.assert_close(after.output_covariance.to_dense()[output], K[4:, 4:] - gain @ K[:4, 4:])
    torch.testing.assert_close(steps.mean, after.mean)
    torch.testing.assert_close(steps.variance, after.variance)
    narrow = model.condition_on_observations(new, Y).predict(X)
    torch.testing.assert_close(narrow.epistemic, after.variance)


def test_checkpoints_files_and_single_precision(tmp_path):
    X, Y = problem()
    options = {"depth": 1, "method": CollapsedBound(num_inducing=10, num_steps=12)}
    model = SparseNNGP(**options).fit(X, Y)

    def stop(index, state, info):
        if index == 5:
            raise KeyboardInterrupt

    resumed = SparseNNGP(**options)
    with pytest.raises(KeyboardInterrupt):
        resumed.fit(X, Y, checkpoint=tmp_path / "run", callbacks=[stop])
    resumed.fit(X, Y, checkpoint=tmp_path / "run")
    assert torch.equal(resumed.predict(X).mean, model.predict(X).mean)
    model.save(tmp_path / "model")
    loaded = Model.load(tmp_path / "model")
    assert torch.equal(loaded.predict(X).variance, model.predict(X).variance)
    single = SparseNNGP(**options).fit(X.float(), Y.float())
    assert single.predict(X).mean.dtype == torch.float32
    torch.testing.assert_close(single.predict(X).mean.double(), model.predict(X).mean, rtol=0, atol=5e-3)


def test_bad_arguments():
    with pytest.raises(TypeError, match="VariationalNNGP"):
        SparseNNGP(likelihood=likelihoods.Poisson())
    with pytest.raises(ValueError, match="depth"):
        SparseNNGP(depth=0)
    for name in ("num_inducing", "num_steps", "num_selections", "num_first_rows"):
        with pytest.raises(ValueError, match=name):
            CollapsedBound(**{name: 0})
