"""Nyström approximations against dense linear algebra."""

from __future__ import annotations

import gpytorch
import pytest
import torch
from torch import Tensor

from bayesnn.processes.kernels.monte_carlo import FeatureKernel
from bayesnn.processes.kernels.nystrom import Nystrom, _systematic_sample, nystrom, ridge_leverage_scores


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 2, generator=seeded(seed), dtype=torch.float64)


def gaussian(x1: Tensor, x2: Tensor) -> Tensor:
    return (-0.5 * torch.cdist(x1, x2).square()).exp()


def rbf() -> gpytorch.kernels.Kernel:
    kernel = gpytorch.kernels.RBFKernel().double()
    kernel.lengthscale = 1.0
    return kernel.requires_grad_(False)


KERNELS = pytest.mark.parametrize("kernel", [gaussian, rbf()], ids=["function", "gpytorch"])


@KERNELS
@pytest.mark.parametrize("method", ["pivoted", "leverage", "uniform"])
def test_approximation_and_its_error(kernel, method) -> None:
    X, new = rows(120), rows(9, seed=1)
    K = gaussian(X, X)
    approximation = nystrom(kernel, X, 15, method, seeded(3))
    Z = approximation.landmarks
    assert Z.shape == (15, 2) and len(Z.unique(dim=0)) == 15
    assert (torch.cdist(Z, X).amin(-1) == 0).all()
    exact = gaussian(new, Z) @ torch.linalg.solve(gaussian(Z, Z), gaussian(Z, X))
    torch.testing.assert_close(approximation(new) @ approximation(X).T, exact, rtol=1e-6, atol=1e-7)
    left = K - approximation(X) @ approximation(X).T
    torch.testing.assert_close(approximation.residual_trace(X), left.trace(), rtol=1e-6, atol=1e-8)
    assert torch.linalg.eigvalsh(left).min() > -1e-8
    # The best of this rank leaves what the eigenvalues beyond leave.
    least = torch.linalg.eigvalsh(K)[:-15].sum()
    assert least < left.trace() < 60 * least
    everything = nystrom(kernel, X, 500, method, seeded(3))
    assert everything.residual_trace(X) < 1e-6 * K.trace()


def test_pivots_are_the_greedy_choice() -> None:
    X = rows(60)

    def kernel(x1: Tensor, x2: Tensor) -> Tensor:  # no ties on the diagonal
        return gaussian(x1, x2) * (2 + x1[..., :1]).abs() * (2 + x2[..., :1]).abs().mT

    left, expected = kernel(X, X), []
    for _ in range(8):
        index = int(left.diagonal().argmax())
        expected.append(index)
        left = left - left[:, [index]] @ left[[index]] / left[index, index]
    assert torch.equal(nystrom(kernel, X, 8).landmarks, X[expected])


def test_scores() -> None:
    X, ridge = rows(50), 0.3
    K = gaussian(X, X)
    exact = torch.linalg.solve(K + ridge * torch.eye(50).double(), K).diagonal()
    found = ridge_leverage_scores(gaussian, X, X, torch.ones(50).double())(ridge)
    torch.testing.assert_close(found, exact)
    # From a part of the rows: never less, as that explains less.
    part = ridge_leverage_scores(gaussian, X, X[:25], torch.ones(25).double())(ridge)
    assert (part >= exact - 1e-10).all() and (part > exact + 1e-3).any()


def test_systematic_samples_have_their_probabilities() -> None:
    probability = torch.tensor([1.0, 0.2, 0.7, 0.35, 0.75], dtype=torch.float64)
    counts, generator = torch.zeros(5, dtype=torch.float64), seeded(5)
    for _ in range(2000):
        index = _systematic_sample(probability, 3, generator)
        assert len(index) == 3
        counts[index] += 1
    z = (counts - 2000 * probability) / (2000 * probability * (1 - probability)).sqrt().clamp_min(1e-9)
    assert counts[0] == 2000 and z.abs().max() < 4


def test_leverage_finds_a_small_far_group() -> None:
    """Four outliers in 400 rows: uniform landmarks miss them nearly always."""
    X = torch.cat([0.3 * rows(396), 20 * rows(4, seed=2)])
    far = X.norm(dim=-1) > 5
    assert far.sum() >= 3
    found = {"leverage": 0.0, "uniform": 0.0}
    for method in found:
        for seed in range(10):
            landmarks = nystrom(gaussian, X, 20, method, seeded(seed)).landmarks  # type: ignore[arg-type]
            found[method] += float((landmarks.norm(dim=-1) > 5).sum() / far.sum() / 10)
    assert found["leverage"] > 0.9 and found["uniform"] < 0.2


def test_repeated_rows_and_low_rank() -> None:
    X = rows(3).repeat(20, 1)
    for method in ("pivoted", "leverage", "uniform"):
        approximation = nystrom(gaussian, X, 30, method, seeded(1))  # type: ignore[arg-type]
        assert approximation.rank <= 3 and torch.isfinite(approximation(X)).all()
        assert approximation.residual_trace(X) < 1e-8
    linear = nystrom(lambda x1, x2: x1 @ x2.mT, rows(40), 10)
    assert linear.rank == 2 and linear.residual_trace(rows(40)) < 1e-8
    one = nystrom(gaussian, rows(1), 4, "leverage", seeded())
    assert one.landmarks.shape == (1, 2)


def test_batches_gradients_and_single_precision() -> None:
    approximation = nystrom(rbf(), rows(40), 10)
    new = rows(12, seed=4)
    features = approximation(new.reshape(3, 4, 2))
    torch.testing.assert_close(features.reshape(12, -1), approximation(new))
    torch.testing.assert_close(
        approximation.residual_trace(new.reshape(3, 4, 2)).sum(), approximation.residual_trace(new)
    )
    new.requires_grad_()
    (gradient,) = torch.autograd.grad(approximation(new).sum(), new)
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0
    single = nystrom(gaussian, rows(40).float(), 10)
    assert single(rows(5).float()).dtype == torch.float32
    assert single.residual_trace(rows(40).float()) < 1.1 * approximation.residual_trace(rows(40)) + 1e-3


def test_as_a_kernel_of_features() -> None:
    X = rows(30)
    approximation = nystrom(rbf(), X, 12)
    kernel = FeatureKernel(approximation)
    torch.testing.assert_close(kernel(X).to_dense(), approximation(X) @ approximation(X).T)
    inducing = gpytorch.kernels.InducingPointKernel(
        rbf(), approximation.landmarks, gpytorch.likelihoods.GaussianLikelihood()
    )
    with gpytorch.settings.sgpr_diagonal_correction(False):
        theirs = inducing.eval()(X).to_dense()
    torch.testing.assert_close(kernel(X).to_dense(), theirs, rtol=1e-5, atol=1e-6)


def test_bad_input() -> None:
    X = rows(5)
    for arguments, message in (
        ((gaussian, X, 3, "random"), "method: found 'random'"),
        ((gaussian, X[0], 3), r"X: found shape \(2,\)"),
        ((gaussian, X[:0], 3), "at least one row"),
        ((gaussian, X, 0), "num_landmarks must be at least 1, found 0"),
        ((gaussian, X / 0, 3), "X must be finite"),
        ((gaussian, X, 3, "uniform"), "generator: found None"),
    ):
        with pytest.raises(ValueError, match=message):
            nystrom(*arguments)
    with pytest.raises(TypeError, match="num_landmarks must be an integer"):
        nystrom(gaussian, X, 2.5)
    with pytest.raises(ValueError, match="landmarks: found shape"):
        Nystrom(gaussian, X[:0])
