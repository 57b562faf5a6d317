"""Training by gradient flow against numerical integration of its differential equation, and the model against refits."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from bayesnn import Model, likelihoods
from bayesnn.processes.architectures import mlp
from bayesnn.processes.gradient_flow import NTKEnsemble, gradient_flow
from bayesnn.processes.kernels import NTKKernel


class ReLUNetwork(torch.nn.Module):
    """K and Theta of two hidden ReLU layers in their textbook form, without lengthscales."""

    def __init__(self, weight_var: float = 2.0, bias_var: float = 0.1) -> None:
        super().__init__()
        self.weight_var = torch.nn.Parameter(torch.tensor(weight_var, dtype=torch.float64))
        self.bias_var = bias_var

    def nngp_and_ntk(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        weight_var, bias_var, d = self.weight_var, self.bias_var, x1.shape[-1]
        cov = theta = weight_var * x1 @ x2.mT / d + bias_var
        a = weight_var * x1.square().sum(-1).unsqueeze(-1) / d + bias_var
        b = weight_var * x2.square().sum(-1).unsqueeze(-2) / d + bias_var
        for _ in range(2):
            norm = (a * b).sqrt()
            sin = (1 - (cov / norm).square()).clamp_min(1e-30).sqrt()
            dot = (math.pi - torch.atan2(sin, cov / norm)) / (2 * math.pi)
            cov, dot = weight_var * (norm * sin / (2 * math.pi) + dot * cov) + bias_var, weight_var * dot
            theta = cov + dot * theta
            a, b = (weight_var * value / 2 + bias_var for value in (a, b))
        return cov, theta


def problem(n: int = 8, q: int = 4, m: int = 2, batch: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    Y = torch.sin(2 * X[:, :m]) + 0.1 * torch.randn(n, m, generator=generator, dtype=torch.float64)
    return X, Y, torch.randn(*batch, q, 3, generator=generator, dtype=torch.float64)


def integrated(
    kernel: ReLUNetwork, X: Tensor, Y: Tensor, X_new: Tensor, time: float, ridge: float
) -> tuple[Tensor, Tensor]:
    """The mean and covariance of f_t at the new points: f_t is affine in f_0, so unit starts give its matrix."""
    points, n = torch.cat([X, X_new]), len(X)
    with torch.no_grad():
        K, theta = kernel.nngp_and_ntk(points, points)

    def path(start: Tensor, targets: Tensor) -> Tensor:
        def rate(_, flat):
            f = torch.as_tensor(flat).reshape(start.shape)
            return (-theta[:, :n] @ (f[:n] - targets) - ridge * (f - start)).reshape(-1).numpy()

        solution = solve_ivp(rate, (0, time), start.reshape(-1).numpy(), method="LSODA", rtol=1e-10, atol=1e-12)
        return torch.as_tensor(solution.y[:, -1]).reshape(start.shape)

    mean = path(torch.zeros(len(points), Y.shape[1]).double(), Y)
    matrix = path(torch.eye(len(points)).double(), torch.zeros(n, len(points)).double())
    return mean[n:], (matrix @ K @ matrix.T)[n:, n:]


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("time", [0.0, 0.01, 0.3, 5.0, 200.0])
def test_equals_the_integrated_flow(time: float, ridge: float) -> None:
    kernel = ReLUNetwork()
    X, Y, X_new = problem()
    law = gradient_flow(kernel, X, Y, X_new, time, ridge)
    mean, covariance = (
        integrated(kernel, X, Y, X_new, time, ridge)
        if time > 0
        else (torch.zeros(4, 2).double(), kernel.nngp_and_ntk(X_new, X_new)[0])
    )
    torch.testing.assert_close(law.mean, mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(law.covariance, covariance, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_end_of_training(ridge: float) -> None:
    """Kernel ridge regression of the targets, and of every start; long times tend to it."""
    kernel = ReLUNetwork()
    X, Y, X_new = problem()
    K, theta = kernel.nngp_and_ntk(X, X)
    cross, theta_cross = kernel.nngp_and_ntk(X_new, X)
    weights = torch.linalg.solve(theta + ridge * torch.eye(8).double(), theta_cross.mT).mT
    prior = kernel.nngp_and_ntk(X_new, X_new)[0]
    covariance = prior + weights @ K @ weights.mT - weights @ cross.mT - cross @ weights.mT
    for time in (math.inf, 1e6):
        law = gradient_flow(kernel, X, Y, X_new, time, ridge)
        torch.testing.assert_close(law.mean, weights @ Y, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(law.covariance, covariance, rtol=1e-8, atol=1e-8)
    if ridge == 0:
        at_data = gradient_flow(kernel, X, Y, X)
        torch.testing.assert_close(at_data.mean, Y, rtol=0, atol=1e-10)
        assert at_data.covariance.abs().max() < 1e-10


def test_trained_readout_is_the_posterior_of_the_gaussian_process() -> None:
    kernel = ReLUNetwork()
    X, Y, X_new = problem()
    K, cross = kernel.nngp_and_ntk(X, X)[0], kernel.nngp_and_ntk(X_new, X)[0]
    prior = kernel.nngp_and_ntk(X_new, X_new)[0]
    law = gradient_flow(kernel, X, Y, X_new, readout_only=True)
    torch.testing.assert_close(law.mean, cross @ torch.linalg.solve(K, Y), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(law.covariance, prior - cross @ torch.linalg.solve(K, cross.mT), rtol=1e-7, atol=1e-8)
    # Training all layers leaves more of the starts: the ensemble's isn't the posterior.
    assert (gradient_flow(kernel, X, Y, X_new).covariance - law.covariance).abs().max() > 0.01


def test_batches_and_repeated_rows() -> None:
    kernel = ReLUNetwork()
    X, Y, X_new = problem(batch=(2, 3))
    law = gradient_flow(kernel, X, Y, X_new, 2.0)
    assert law.mean.shape == (2, 3, 4, 2) and law.covariance.shape == (2, 3, 4, 4)
    one = gradient_flow(kernel, X, Y, X_new[1, 2], 2.0)
    torch.testing.assert_close(law.mean[1, 2], one.mean)
    torch.testing.assert_close(law.covariance[1, 2], one.covariance)
    # The same inputs with other outcomes: training ends at their mean.
    twice = gradient_flow(kernel, torch.cat([X, X]), torch.cat([Y, Y + 1]), X)
    torch.testing.assert_close(twice.mean, Y + 0.5, rtol=0, atol=1e-7)
    assert twice.covariance.abs().max() < 1e-7
    # Twice the observations at half the speed.
    same = gradient_flow(kernel, torch.cat([X, X]), torch.cat([Y, Y]), X_new[0, 0], 1.0)
    torch.testing.assert_close(same.mean, gradient_flow(kernel, X, Y, X_new[0, 0], 2.0).mean, rtol=0, atol=1e-7)


def test_model_is_the_flow_in_the_users_units() -> None:
    X, Y, X_new = problem(n=20)
    model = NTKEnsemble(ReLUNetwork(), time=3.0, ridge=0.2).fit(X, 5 + 2 * Y)
    A, B = ((Z - X.mean(0)) / X.std(0) for Z in (X, X_new))
    law = gradient_flow(ReLUNetwork(), A, (Y - Y.mean(0)) / Y.std(0), B, 3.0, 0.2)
    posterior = model.posterior(X_new)
    torch.testing.assert_close(posterior.mean, 5 + 2 * (Y.mean(0) + Y.std(0) * law.mean), rtol=1e-8, atol=1e-8)
    expected = 4 * Y.var(0) * model._scale * law.covariance.diagonal().unsqueeze(-1)
    torch.testing.assert_close(posterior.variance, expected, rtol=1e-8, atol=1e-8)
    noise = 4 * Y.var(0) * model._noise_var
    torch.testing.assert_close(model.predict(X_new).variance, expected + noise, rtol=1e-8, atol=1e-8)


def left_out(model: NTKEnsemble, ridges: list[float]) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        K, theta = ReLUNetwork().nngp_and_ntk(model._data.X, model._data.X)
        return model._left_out(model._data, K, theta, torch.tensor(ridges).double())


def test_cross_validation_equals_refits() -> None:
    X, Y, _ = problem(n=9)  # nine folds of one
    model = NTKEnsemble(ReLUNetwork(), time=4.0).fit(X, Y)
    data, ridges = model._data, [0.01, 0.5]
    residuals, variances = left_out(model, ridges)
    for i in range(9):
        kept = torch.arange(9) != i
        for row, ridge in enumerate(ridges):
            law = gradient_flow(ReLUNetwork(), data.X[kept], data.Y[kept], data.X[[i]], 4.0, ridge)
            torch.testing.assert_close(residuals[row, i], data.Y[i] - law.mean[0], rtol=1e-8, atol=1e-9)
            torch.testing.assert_close(variances[row, i, 0], law.covariance[0, 0], rtol=1e-7, atol=1e-9)


def test_chosen_values_are_the_best() -> None:
    X, Y, _ = problem(n=60)
    Y = Y + 0.5 * torch.randn(60, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    model = NTKEnsemble(ReLUNetwork()).fit(X, Y)
    size = ReLUNetwork().nngp_and_ntk(model._data.X, model._data.X)[0].diagonal().mean()

    def objective(scale: Tensor, noise_var: Tensor, ridge: Tensor, output: int) -> Tensor:
        residuals, variances = (value[0] for value in left_out(model, [ridge.item()]))
        spread = scale * variances[:, 0] + noise_var
        fit = torch.distributions.Normal(0.0, spread.sqrt()).log_prob(residuals[:, output]).sum()
        scale_prior = torch.distributions.Normal(0.0, (size * scale).sqrt()).log_prob(torch.tensor(1.0))
        ratio = noise_var / (scale * size)
        return fit + scale_prior - (ratio.log() + 4).square() / 8

    for output in range(2):
        scale, noise_var, ridge = (value[output] for value in (model._scale, model._noise_var, model._ridge))
        best = objective(scale, noise_var, ridge, output)
        for factor in (0.9, 1.1):
            assert objective(scale * factor, noise_var * factor, ridge, output) < best
        for factor in (10**0.25, 10**-0.25):
            profile = torch.linspace(-1, 1, 41).exp()  # the best scale for another ratio of noise and scale
            others = [objective(scale * c, noise_var * c * factor, ridge, output) for c in profile]
            assert max(others) <= best + 1e-9
        for factor in (10**0.5, 10**-0.5):
            assert objective(scale, noise_var, ridge * factor, output) <= best + 1e-9


def test_noise_is_found_and_taken() -> None:
    generator = torch.Generator().manual_seed(3)
    X = torch.rand(150, 2, generator=generator, dtype=torch.float64) * 4 - 2
    Y = torch.sin(2 * X[:, :1]) + 0.2 * torch.randn(150, 1, generator=generator, dtype=torch.float64)
    model = NTKEnsemble(ReLUNetwork()).fit(X, Y)
    new = torch.rand(50, 2, generator=generator, dtype=torch.float64) * 4 - 2
    predictive = model.predict(new)
    assert 0.17 < predictive.aleatoric.sqrt().mean() < 0.24
    assert (predictive.mean - torch.sin(2 * new[:, :1])).square().mean().sqrt() < 0.2
    fixed = NTKEnsemble(ReLUNetwork(), likelihood=likelihoods.Gaussian(noise_std=0.3)).fit(X, Y)
    torch.testing.assert_close(fixed.predict(new).aleatoric, torch.full((50, 1), 0.09).double())


def test_more_observations_are_trained_on_from_the_start() -> None:
    X, Y, X_new = problem(n=12)
    model = NTKEnsemble(ReLUNetwork(), time=5.0, ridge=0.1).fit(X[:9], Y[:9])
    conditioned = model.condition_on_observations(X[9:], Y[9:])
    A, B = ((Z - X[:9].mean(0)) / X[:9].std(0) for Z in (X, X_new))
    loc, scale = Y[:9].mean(0), Y[:9].std(0)
    law = gradient_flow(ReLUNetwork(), A, (Y - loc) / scale, B, 5.0, 0.1)
    torch.testing.assert_close(conditioned.posterior(X_new).mean, loc + scale * law.mean, rtol=1e-8, atol=1e-8)


def test_saved_with_the_kernel_given_again(tmp_path) -> None:
    X, Y, X_new = problem(n=12)
    kernel = ReLUNetwork(weight_var=1.5)
    model = NTKEnsemble(kernel, time=math.inf).fit(X, Y)
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="kernel of NTKEnsemble couldn't be saved"):
        Model.load(tmp_path / "model")
    loaded = NTKEnsemble.load(tmp_path / "model", kernel=ReLUNetwork())  # its parameters come from the file
    assert torch.equal(loaded.posterior(X_new).mean, model.posterior(X_new).mean)
    assert torch.equal(loaded.posterior(X_new).variance, model.posterior(X_new).variance)
    assert kernel.weight_var.requires_grad


def test_default_kernel_is_saved_by_its_arguments(tmp_path) -> None:
    X, Y, X_new = problem(n=12)
    model = NTKEnsemble(depth=2, activation="erf").fit(X, Y)
    given = NTKEnsemble(NTKKernel(2, "erf")).fit(X, Y)
    assert torch.equal(model.predict(X_new).mean, given.predict(X_new).mean)
    model.save(tmp_path / "model")
    assert torch.equal(Model.load(tmp_path / "model").predict(X_new).mean, model.predict(X_new).mean)
    layers = NTKEnsemble(architecture=mlp(2, "erf")).fit(X, Y)
    assert torch.equal(layers.predict(X_new).mean, model.predict(X_new).mean)
    layers.save(tmp_path / "layers")
    assert torch.equal(Model.load(tmp_path / "layers").predict(X_new).mean, model.predict(X_new).mean)
    with pytest.raises(ValueError, match="depth"):
        NTKEnsemble(depth=0)


def test_single_precision_equals_double() -> None:
    X, Y, X_new = (value.float() for value in problem(n=40))
    X = torch.cat([X, X[:5] + 1e-3])
    Y = torch.cat([Y, Y[:5]])
    for options in ({}, {"ridge": 1e-4}):
        single, double = (NTKEnsemble(depth=4, **options).fit(X.to(d), Y.to(d)) for d in (torch.float32, torch.float64))
        assert single._K.dtype == single._scale.dtype == torch.float64
        p, expected = single.predict(X_new), double.predict(X_new.double())
        posterior = single.posterior(X_new)
        assert p.mean.dtype == p.variance.dtype == posterior.mean.dtype == posterior.variance.dtype == torch.float32
        torch.testing.assert_close(p.mean.double(), expected.mean, rtol=0, atol=1e-3)
        torch.testing.assert_close(p.variance.double(), expected.variance, rtol=1e-3, atol=0)
    further = single.condition_on_observations(X_new, Y[:4])
    assert further.predict(X_new).mean.dtype == torch.float32 and further._K.dtype == torch.float64


def test_predictions_are_made_in_blocks_of_rows(monkeypatch) -> None:
    X, Y, X_new = problem(n=12, q=7, batch=(2,))
    model = NTKEnsemble(ReLUNetwork()).fit(X, Y)
    whole, posterior = model.predict(X_new), model.posterior(X_new)
    torch.testing.assert_close(whole.epistemic, posterior.variance, rtol=1e-9, atol=1e-12)
    monkeypatch.setattr("bayesnn.processes.gradient_flow.ROWS", 3)
    sizes = []
    kernels = NTKEnsemble._kernels
    monkeypatch.setattr(NTKEnsemble, "_kernels", lambda self, a, b: (sizes.append(a.shape[-2]), kernels(self, a, b))[1])
    blocks = model.predict(X_new)
    assert max(sizes) == 3
    torch.testing.assert_close(blocks.mean, whole.mean)
    torch.testing.assert_close(blocks.variance, whole.variance)


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="time: found -1"):
        NTKEnsemble(ReLUNetwork(), time=-1)
    with pytest.raises(ValueError, match="time: found nan"):
        gradient_flow(ReLUNetwork(), *problem(), time=math.nan)
    with pytest.raises(ValueError, match="ridge: found inf"):
        NTKEnsemble(ReLUNetwork(), ridge=math.inf)
    with pytest.raises(TypeError, match="kernel: found str"):
        NTKEnsemble("relu")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"must be likelihoods.Gaussian"):
        NTKEnsemble(ReLUNetwork(), likelihood=likelihoods.StudentT())  # type: ignore[arg-type]
    X, Y, X_new = problem()
    for arguments, message in (
        ((X, Y[:, 0], X_new), r"Y must have shape \(8, m\), found \(8,\)"),
        ((X, Y[:5], X_new), "Y must have shape"),
        ((X / 0, Y, X_new), "X must be finite"),
        ((X, Y * math.nan, X_new), "Y must be finite"),
        ((X, Y, X_new * math.nan), "X_new must be finite"),
        ((X, Y, X_new[:, :2]), "X_new must have 3 columns"),
    ):
        with pytest.raises(ValueError, match=message):
            gradient_flow(ReLUNetwork(), *arguments)
