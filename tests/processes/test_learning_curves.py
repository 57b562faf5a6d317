"""Exponential decays and Gaussian processes of learning curves: formulas, the integral they come from, exact conditioning."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from gpytorch.kernels import Kernel
from scipy import integrate, stats

from bayesnn import load
from bayesnn.likelihoods import Gaussian
from bayesnn.processes import LearningCurveProcess
from bayesnn.processes.kernels.exponential_decay import ExponentialDecay

RATIO = 81.0


def decay(rate_shape: float, rate: float) -> ExponentialDecay:
    kernel = ExponentialDecay(RATIO)
    kernel.initialize(raw_rate_shape=torch.tensor(rate_shape).log(), raw_rate=torch.tensor(rate).log())
    return kernel.double()


def codes(resources: list[float]) -> torch.Tensor:
    """Of resources in units of the whole."""
    return 1 + torch.tensor(resources, dtype=torch.float64).log()[:, None] / math.log(RATIO)


def test_the_kernel_is_the_integral_over_rates() -> None:
    first, second = [1 / 81, 0.1, 1.0], [0.03, 0.7]
    found = decay(1.7, 0.3)(codes(first), codes(second)).to_dense()
    law = stats.gamma(1.7, scale=1 / 0.3)

    def covariance(r: float, s: float) -> float:
        return integrate.quad(lambda rate: math.exp(-rate * (r + s)) * law.pdf(rate), 0, np.inf)[0]

    expected = torch.tensor([[covariance(r, s) for s in second] for r in first]).double()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rate_shape, rate", [(0.2, 1e-3), (1.0, 0.1), (5.0, 3.0)])
def test_the_kernel_is_positive_definite_with_its_own_diagonal(rate_shape: float, rate: float) -> None:
    kernel, t = decay(rate_shape, rate), torch.linspace(0, 1, 40).double()[:, None]
    matrix = kernel(t).to_dense()
    assert torch.linalg.eigvalsh(matrix).min() > -1e-12 * 40
    torch.testing.assert_close(kernel(t, diag=True), matrix.diagonal())


def by_hand(kernel: Kernel, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The covariance of the docstring, from the kernel's hyperparameters."""
    limits, (shared, changing), curve = (
        kernel.kernels[0],
        kernel.kernels[1].kernels[0].kernels,
        kernel.kernels[1].kernels[1],
    )

    def squared_exponential(scaled: Kernel) -> np.ndarray:
        lengths = scaled.base_kernel.lengthscale.detach().numpy()
        gaps = (first[:, None, :-1] - second[None, :, :-1]) / lengths
        return scaled.outputscale.item() * np.exp(-0.5 * (gaps**2).sum(-1))

    r, s = RATIO ** (first[:, None, -1] - 1), RATIO ** (second[None, :, -1] - 1)
    decayed = (curve.rate.item() / (r + s + curve.rate.item())) ** curve.rate_shape.item()
    return squared_exponential(limits) + (shared.constant.item() + squared_exponential(changing)) * decayed


def curves(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Configurations in the unit square at one to four rungs each, whose curves fall at different rates."""
    generator = np.random.default_rng(seed)
    rows, values = [], []
    for x in generator.random((12, 2)):
        for rung in range(generator.integers(1, 5)):
            t = rung / 4
            rows.append([*x, t])
            values.append([np.sin(4 * x[0]) + (0.5 + x[1]) / (1 + 5 * RATIO ** (t - 1))])
    return torch.tensor(np.array(rows)), torch.tensor(np.array(values))


def test_the_posterior_is_exact_conditioning() -> None:
    X, Y = curves()
    model = LearningCurveProcess(RATIO, bounds=(0.0, 1.0)).fit(X, Y)
    queries = torch.cat([X[:2], torch.rand(5, 3, generator=torch.Generator().manual_seed(0)).double()])
    kernel, mean = model._gp.covar_module, model._gp.mean_module.constant.item()
    noise_var = model._gp.likelihood.noise.item()
    loc, scale = Y.mean().item(), Y.std().item()
    outcomes, inputs, points = (Y.numpy() - loc) / scale, X.numpy(), queries.numpy()
    gram = by_hand(kernel, inputs, inputs) + noise_var * np.eye(len(X))
    cross = by_hand(kernel, points, inputs)
    expected_mean = loc + scale * (mean + cross @ np.linalg.solve(gram, outcomes - mean))
    expected_cov = scale**2 * (by_hand(kernel, points, points) - cross @ np.linalg.solve(gram, cross.T))
    posterior = model.posterior(queries)
    np.testing.assert_allclose(posterior.mean, expected_mean, rtol=1e-6, atol=1e-8)
    covariance = posterior.distribution.covariance_matrix
    np.testing.assert_allclose(covariance, expected_cov, rtol=1e-5, atol=1e-8)


def test_what_has_been_learned_is_that_curves_fall() -> None:
    """Where a configuration's curve ends is predicted from its beginning, better than without it."""
    X, Y = curves()
    model = LearningCurveProcess(RATIO, bounds=(0.0, 1.0)).fit(X, Y)
    new = torch.tensor([[0.05, 0.95, 0.0], [0.05, 0.95, 1.0]]).double()
    before = model.posterior(new)
    truth = [math.sin(0.2) + 1.45 / (1 + 5 / RATIO), math.sin(0.2) + 1.45 / 6]
    assert before.mean[0] > before.mean[1]
    after = model.condition_on_observations(new[:1], torch.tensor([[truth[0]]]).double()).posterior(new[1:])
    assert after.variance.item() < before.variance[1].item()
    assert abs(after.mean.item() - truth[1]) < 3 * after.variance.item() ** 0.5 + 0.05


def test_outputs_have_their_own_decays_and_files_keep_them(tmp_path: Path) -> None:
    X, Y = curves()
    both = torch.cat([Y, -3 * Y + X[:, :1]], -1)
    model = LearningCurveProcess(RATIO, Gaussian(0.05), bounds=(0.0, 1.0)).fit(X, both)
    alone = LearningCurveProcess(RATIO, Gaussian(0.05), bounds=(0.0, 1.0)).fit(X, Y)
    torch.testing.assert_close(model.posterior(X).mean[:, :1], alone.posterior(X).mean, rtol=1e-2, atol=1e-2)
    model.save(tmp_path / "model.safetensors")
    torch.testing.assert_close(load(tmp_path / "model.safetensors").posterior(X).mean, model.posterior(X).mean)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="ratio must be above 1, found 1"):
        LearningCurveProcess(1.0)
    with pytest.raises(ValueError, match="found a single column"):
        LearningCurveProcess(3.0).fit(torch.rand(3, 1).double(), torch.rand(3, 1).double())
