"""Rows that all batches share, computed once: the same posterior as of all rows together, for fewer covariances."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bayesnn.bo import Space
from bayesnn.bo.acquisition import Setting, acquisition
from bayesnn.bo.on_codes import OnCodes
from bayesnn.bo.optimise import local_randomness
from bayesnn.bo.outcomes import outcomes_of
from bayesnn.likelihoods import Gaussian
from bayesnn.model import Model
from bayesnn.processes import NNGP, DeepKernel, GaussianProcess, ScaleMixtureProcess, StudentTProcess
from bayesnn.processes.kernels import NNGPKernel

SQUARE = Space({"x": (0.0, 1.0), "y": (0.0, 1.0)})
X = SQUARE.sobol(12, seed=0)
OUTCOMES = torch.stack([(3 * X[:, 0]).sin() + X[:, 1], 40 * X.square().sum(-1), 1e-3 * (X[:, 0] - X[:, 1])], -1)
SHARED = torch.cat([X[:4], SQUARE.sobol(2, seed=7)])  # some of them observed
FAMILIES = [NNGP, GaussianProcess, DeepKernel, StudentTProcess, ScaleMixtureProcess]


def fitted(family: Any = NNGP, num_outputs: int = 1, noise_std: float | None = None) -> Model:
    return family(likelihood=Gaussian(noise_std), optimise=False).fit(X, OUTCOMES[:, :num_outputs])


def together(model: Any, own: Tensor, shared: Tensor = SHARED) -> Any:
    return model.posterior(torch.cat([shared.expand(*own.shape[:-2], *shared.shape), own], -2))


def moments(posterior: Any) -> tuple[Tensor, Tensor]:
    if hasattr(posterior, "output_covariance"):
        return posterior.mean, posterior.output_covariance.to_dense()
    return posterior.loc, posterior.scale


def gradient(values: tuple[Tensor, ...], at: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    total = sum((torch.randn(v.shape, generator=generator, dtype=v.dtype) * v / v.abs().max()).sum() for v in values)
    return torch.autograd.grad(total, at)[0]


def assert_same(found: Any, expected: Any, own: Tensor) -> None:
    for first, second in zip(moments(found), moments(expected), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-8, atol=1e-8 * float(second.detach().abs().max()))
    torch.testing.assert_close(gradient(moments(found), own), gradient(moments(expected), own), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("batch", [(), (8,), (2, 3)])
@pytest.mark.parametrize("q", [1, 2])
@pytest.mark.parametrize("num_outputs", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_posterior_of_all_rows(family: Any, num_outputs: int, q: int, batch: tuple[int, ...]) -> None:
    model = fitted(family, num_outputs)
    own = torch.rand(*batch, q, 2, dtype=X.dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()
    beside = model.posterior_beside(SHARED)
    for _ in range(2):
        assert_same(beside(own), together(model, own), own)


@pytest.mark.parametrize("num_outputs", [1, 3])
def test_fixed_noise(num_outputs: int) -> None:
    model, own = fitted(NNGP, num_outputs, noise_std=0.1), SQUARE.sobol(5, seed=3).unsqueeze(-2).requires_grad_()
    assert_same(model.posterior_beside(SHARED)(own), together(model, own), own)


@pytest.mark.parametrize("family", [NNGP, StudentTProcess])
def test_of_some_outputs_after_fantasies_and_in_single_precision(family: Any) -> None:
    own = SQUARE.sobol(5, seed=3).unsqueeze(-2).requires_grad_()
    some = fitted(family, 3).subset_output([2, 0])
    assert_same(some.posterior_beside(SHARED)(own), together(some, own), own)
    fantasies = fitted(family).condition_on_observations(SHARED[-2:], torch.randn(3, 2, 1, dtype=X.dtype))
    one = own[:, None]
    assert_same(fantasies.posterior_beside(SHARED)(one), together(fantasies, one), own)
    single = family(optimise=False).fit(X.float(), OUTCOMES.float())
    found, expected = (
        single.posterior_beside(SHARED.float())(own.float()),
        together(single, own.float(), SHARED.float()),
    )
    for first, second in zip(moments(found), moments(expected), strict=True):
        assert first.dtype == torch.float32
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5 * float(second.abs().max()))


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of covariances of each evaluation of a network's kernel."""
    counts: list[int] = []
    forward = NNGPKernel.forward

    def counted(self: Any, x1: Tensor, x2: Tensor, diag: bool = False, **options: Any) -> Tensor:
        values = forward(self, x1, x2, diag, **options)
        counts.append(values.numel())
        return values

    monkeypatch.setattr(NNGPKernel, "forward", counted)
    return counts


@pytest.mark.parametrize("family", [NNGP, StudentTProcess])
def test_shared_rows_cost_nothing_in_a_second_call(family: Any, entries: list[int]) -> None:
    beside = fitted(family).posterior_beside(SHARED)
    entries.clear()
    beside(torch.rand(8, 1, 2, dtype=X.dtype))
    assert sum(entries) == 8 * (len(X) + len(SHARED)) + 8  # and the variances


def built(name: str, model: Model, limits: Any, share: bool) -> Any:
    on_codes = OnCodes(model, SQUARE)
    if not share:
        on_codes.share = lambda codes: None  # type: ignore[method-assign]
    number = 2 if name != "lognei" else 1
    outcomes = outcomes_of(model.num_outputs, ["minimize"] * number, limits)
    with local_randomness(0):  # pruning draws at random
        return acquisition(name, Setting(on_codes, SQUARE, X, X, outcomes, None, 32, 4.0, 0), 1, 0)[1]


@pytest.mark.parametrize("limits", [None, {2: ("<=", 2e-4)}])
@pytest.mark.parametrize("family", [NNGP, StudentTProcess])
@pytest.mark.parametrize("name", ["lognei", "lognehvi", "lognparego"])
def test_acquisition_values_are_the_same(name: str, family: Any, limits: Any, entries: list[int]) -> None:
    if name == "lognei":
        Y, limits = (OUTCOMES[:, 0], None) if limits is None else (OUTCOMES[:, [0, 2]], {1: limits[2]})
    else:
        Y = OUTCOMES[:, :2] if limits is None else OUTCOMES
    model = family(likelihood=Gaussian((0.3 * Y.reshape(len(X), -1).std(0)).tolist()), optimise=False).fit(X, Y)
    functions = [built(name, model, limits, share) for share in (True, False)]
    own = SQUARE.sobol(6, seed=3).unsqueeze(-2).requires_grad_()
    for pending in (None, SQUARE.sobol(2, seed=5)):
        values, gradients, costs = [], [], []
        for function in functions:
            function.set_X_pending(pending)
            function(own[:1])  # what is shared
            entries.clear()
            values.append(function(own))
            costs.append(sum(entries))
            gradients.append(torch.autograd.grad(values[-1].sum(), own)[0])
        torch.testing.assert_close(values[0], values[1], rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-7)
        assert costs[0] < 0.7 * costs[1]


def test_other_rows_are_not_taken_for_the_shared_ones() -> None:
    model, own = OnCodes(fitted(), SQUARE), SQUARE.sobol(6, seed=3).reshape(2, 3, 2).requires_grad_()
    expected = model.posterior(own)
    model.share(X[:2])
    assert_same(model.posterior(own), expected, own)
    assert model.posterior(X[:2]).mean.shape == (2, 1)
