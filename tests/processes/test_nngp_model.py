"""The NNGP model against the closed form, with the kernel written out."""

import math
import warnings

import pytest
import torch
from gpytorch.kernels import RBFKernel
from gpytorch.mlls import ExactMarginalLogLikelihood

from bayesnn import NNGP, likelihoods
from bayesnn.data import BayesnnWarning
from bayesnn.processes import SparseNNGP, StudentTProcess, exact
from bayesnn.processes.dual_activations import dual_activation
from bayesnn.processes.kernels import FourierKernel
from bayesnn.processes.maximum import minimise


def relu_kernel(A, B, depth, weight_var, bias_var):
    """The arc-cosine recursion (Cho and Saul 2009), in its textbook form."""
    cov = weight_var * A @ B.T / A.shape[1] + bias_var
    a, b = (weight_var * Z.square().sum(-1) / Z.shape[1] + bias_var for Z in (A, B))
    for _ in range(depth):
        norm = (a[:, None] * b).sqrt()
        theta = torch.arccos((cov / norm).clamp(-1, 1))
        kappa = norm * (theta.sin() + (math.pi - theta) * theta.cos()) / (2 * math.pi)
        cov, a, b = (weight_var * value + bias_var for value in (kappa, a / 2, b / 2))
    return cov


def test_posterior_equals_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(30, 3, generator=generator, dtype=torch.float64)
    Y = torch.sin(X[:, :1]) + 3 + 0.1 * torch.randn(30, 1, generator=generator, dtype=torch.float64)
    new = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    model = NNGP(depth=2, likelihood=likelihoods.Gaussian(noise_std=0.2), optimise=False).fit(X, Y)
    kernel, mean = model._gp.covar_module, model._gp.mean_module.constant
    hyper = (2, kernel.base_kernel.weight_var.item(), kernel.base_kernel.bias_var.item())
    A, B = ((Z - X.mean(0)) / X.std(0) / kernel.base_kernel.lengthscale for Z in (X, new))
    y = (Y - Y.mean()) / Y.std()
    K, cross, prior = (kernel.outputscale * relu_kernel(P, Q, *hyper) for P, Q in ((A, A), (A, B), (B, B)))
    solved = torch.linalg.solve(K + (0.2 / Y.std()) ** 2 * torch.eye(30, dtype=K.dtype), cross)
    exact_mean = Y.mean() + Y.std() * (mean + solved.T @ (y - mean))
    exact_cov = Y.var() * (prior - cross.T @ solved)
    posterior = model.posterior(new)
    assert (posterior.mean - exact_mean).abs().max() < 1e-10
    off = ~torch.eye(7, dtype=torch.bool)
    assert (posterior.distribution.covariance_matrix - exact_cov)[off].abs().max() < 1e-10
    assert (posterior.variance[:, 0] - exact_cov.diagonal()).abs().max() < 1e-10
    assert torch.allclose(model.predict(new).variance, posterior.variance + 0.04, atol=1e-12)


def rows(kind, dtype):
    """Data that make a marginal likelihood hard to maximise."""
    generator = torch.Generator().manual_seed(1)
    X = torch.rand(60, 3, generator=generator, dtype=torch.float64)
    Y = torch.sin(6 * X[:, :1])  # without noise, so that the likelihood grows as the noise shrinks
    if kind == "two rows":
        X, Y = X[:2], Y[:2]
    elif kind == "duplicates that disagree":
        X, Y = X[:10].repeat(6, 1), Y + torch.randn(60, 1, generator=generator, dtype=torch.float64)
    elif kind == "an outlier":
        Y[0] = 1e6
    elif kind == "noise alone":
        Y = torch.randn(60, 1, generator=generator, dtype=torch.float64)
    elif kind == "a step":
        Y = (X[:, :1] > 0.5).double()
    elif kind == "correlated inputs":
        X = X[:, :1] + 1e-6 * X
    return X.to(dtype), Y.to(dtype)


KINDS = [
    "no noise",
    "two rows",
    "duplicates that disagree",
    "an outlier",
    "noise alone",
    "a step",
    "correlated inputs",
]


@pytest.mark.parametrize("kernel", [None, FourierKernel()], ids=["perceptron", "fourier"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_never_fails(kind, kernel):
    X, Y = rows(kind, torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error", BayesnnWarning)
        p = NNGP(kernel=kernel).fit(X, Y).predict(X)
    assert bool(torch.isfinite(p.mean).all()) and bool((p.variance > 0).all())


@pytest.mark.parametrize("kind", ["no noise", "a step"])
def test_single_precision_is_fitted_in_double(kind):
    """What is found differs by the tolerance of the optimiser, since the data are rounded."""
    X, Y = rows(kind, torch.float32)
    single, double = (
        NNGP(kernel=FourierKernel()).fit(x, y).predict(x[:9]) for x, y in ((X, Y), (X.double(), Y.double()))
    )
    assert single.mean.dtype == torch.float32
    assert ((single.mean.double() - double.mean).abs() / double.stddev).max() < 0.01
    assert (single.stddev.double() / double.stddev - 1).abs().max() < 0.01


def test_fourier_features_make_a_stationary_kernel():
    """An activation's dual on top of a Gaussian kernel, written out."""
    X = 3 * torch.randn(20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kernel = FourierKernel(depth=1)(4, torch.Size()).double()
    kernel.lengthscale = torch.tensor([0.5, 1.0, 2.0, 4.0])
    scaled = X / kernel.lengthscale
    gaussian = torch.exp(-torch.cdist(scaled, scaled).square() / 4)
    gelu = dual_activation("gelu")
    weight_var = torch.full((1, 1), gelu.critical_weight_var, dtype=torch.float64)
    exact = gelu.kappa(weight_var, weight_var, weight_var * gaussian)
    found = kernel(X).to_dense()
    assert (found - exact).abs().max() < 1e-7  # cdist's rounding
    assert torch.allclose(found, kernel(X + 100).to_dense(), atol=1e-9)


def test_the_maximum_is_found():
    """Going on from there gains nothing."""
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(40, 2, generator=generator, dtype=torch.float64)
    model = NNGP().fit(X, torch.sin(2 * X[:, 0]))
    gp = model._gp.train().requires_grad_(True)
    mll = ExactMarginalLogLikelihood(gp.likelihood, gp)

    def loss():
        return -mll(gp(*gp.train_inputs), gp.train_targets)

    before = float(loss())
    minimise("NNGP", loss, gp, None)
    assert 40 * (before - float(loss())) < 0.02


def test_small_noise_is_found_in_few_steps(monkeypatch):
    """Two decades below where it starts, it takes 157 evaluations in its own units, and 55 in its logarithm's."""
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(100, 4, generator=generator, dtype=torch.float64)
    signal = torch.sin(2 * X[:, 0]) * X[:, 1] + X[:, 2]
    noise = torch.randn(100, generator=generator, dtype=torch.float64)
    calls = []

    def counted(name, loss, *arguments):
        minimise(name, lambda: (calls.append(1), loss())[1], *arguments)

    monkeypatch.setattr(exact, "minimise", counted)
    model = NNGP(restart=False).fit(X, signal + 0.03 * noise)
    assert 0.02 < model.predict(X[:1]).aleatoric.sqrt() < 0.04
    assert len(calls) < 90


@pytest.mark.parametrize("m", [1, 2])
def test_variances_in_small_units(m):
    """GPyTorch's own are never below 1e-10, in any units."""
    X, _ = rows("noise alone", torch.float64)
    model = NNGP(optimise=False).fit(X, 1e-5 * X[:, :m])
    found = model.posterior(X[:4] + 0.1)
    assert torch.allclose(found.variance, model.predict(X[:4] + 0.1).epistemic, rtol=1e-9, atol=0)
    assert torch.allclose(found.variance, found.distribution.covariance_matrix.diagonal().reshape(m, 4).mT, atol=0)
    assert found.variance.max() < 1e-11


@pytest.mark.parametrize("m", [1, 2])
def test_fantasies_under_fixed_noise(m):
    X, Y = rows("noise alone", torch.float64)
    model = NNGP(likelihood=likelihoods.Gaussian(noise_std=0.3), optimise=False).fit(X, torch.cat([Y, X], 1)[:, :m])
    imagined = torch.randn(4, 3, m, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fantasies = model.condition_on_observations(X[:3] + 0.1, imagined).posterior(X[5:8])
    for index in range(4):
        single = model.condition_on_observations(X[:3] + 0.1, imagined[index]).posterior(X[5:8])
        assert torch.allclose(fantasies.mean[index], single.mean, atol=1e-9)
        assert torch.allclose(fantasies.variance[index], single.variance, atol=1e-9)


def test_files_of_an_earlier_version_are_refused():
    X, Y = rows("noise alone", torch.float64)
    model = NNGP(optimise=False).fit(X, Y)
    state = model._state()
    old = {"covar_module.raw_outputscale": state.pop("covar_module.log_outputscale")} | state
    with pytest.raises(ValueError, match="as an earlier version had them: fit the model again"):
        model._set_state(old)


def test_predictions_in_blocks_of_rows(monkeypatch):
    X, Y = rows("noise alone", torch.float64)
    model = NNGP(optimise=False).fit(X, torch.cat([Y, X], 1)[:, :2])
    new = X.reshape(2, 30, 3) + 0.1
    whole = model.posterior(new)
    monkeypatch.setattr(exact, "ROWS", 7)
    p = model.predict(new)
    assert torch.allclose(p.mean, whole.mean, atol=1e-12)
    assert torch.allclose(p.epistemic, whole.variance, atol=1e-12)


def test_small_fixed_noise_is_as_asked():
    X, Y = rows("no noise", torch.float64)
    model = NNGP(likelihood=likelihoods.Gaussian(noise_std=1e-4)).fit(X, 5 * Y)
    expected = (1e-4 / (5 * Y).std()) ** 2
    assert torch.allclose(model._gp.likelihood.noise, expected.expand(60), rtol=1e-6)


def test_fantasies_at_the_same_inputs_warn_of_nothing():
    X, Y = rows("noise alone", torch.float64)
    model = NNGP(optimise=False).fit(X, Y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.condition_on_observations(X[:2] + 0.1, torch.randn(4, 2, 1).double()).batch_shape == (4,)


@pytest.mark.parametrize("model", [NNGP, StudentTProcess, SparseNNGP])
@pytest.mark.parametrize(
    ("kernel", "error", "message"),
    [
        ("rbf", TypeError, "kernel must be a function of the number of features and the batch shape"),
        (RBFKernel(), TypeError, "kernel must be a function of the number of features and the batch shape"),
        (lambda d, batch: 3, TypeError, "kernel must give a GPyTorch kernel, found int"),
        (lambda d, batch: RBFKernel(), ValueError, r"batch shape \(2,\), one for each output"),
    ],
    ids=["name", "kernel", "number", "no batch"],
)
def test_what_makes_no_kernel(model, kernel, error, message):
    X, Y = rows("noise alone", torch.float64)
    with pytest.raises(error, match=message):
        model(kernel=kernel).fit(X, Y.expand(60, 2) + X[:, :2])


@pytest.mark.parametrize("model", [NNGP, StudentTProcess, SparseNNGP])
def test_one_output_needs_no_batch(model):
    X, Y = rows("noise alone", torch.float64)
    p = model(kernel=lambda d, batch: RBFKernel(ard_num_dims=d)).fit(X, Y).predict(X[:3])
    assert bool(torch.isfinite(p.mean).all())
