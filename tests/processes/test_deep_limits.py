"""The limits of deep networks against the kernels of finite depths, and votes against ones counted by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bayesnn.processes.deep_limits import MajorityVote, NearestNeighbour, SingularKernel, to_sphere, which_limit


class SphereDual:
    """A dual that depends on the correlation alone, from its normalised form and slope."""

    def __init__(self, value, slope) -> None:
        self.value, self.slope = value, slope

    def moments(self, var1: Tensor, var2: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
        return self.value(cov), self.slope(cov)


def relu() -> SphereDual:
    """Twice ReLU's; which_limit normalises."""
    return SphereDual(
        lambda c: 2 * ((1 - c * c).clamp_min(0).sqrt() + c * (math.pi - c.clamp(-1, 1).acos())) / math.pi,
        lambda c: 2 * (math.pi - c.clamp(-1, 1).acos()) / math.pi,
    )


def sine(square: float) -> SphereDual:
    """phi(x) = sin(a x), a^2 = ``square``."""
    return SphereDual(
        lambda c: math.exp(-square) * (square * c).sinh(), lambda c: math.exp(-square) * square * (square * c).cosh()
    )


def hermite() -> SphereDual:
    return SphereDual(lambda c: c**3, lambda c: 3 * c**2)


def two_classes(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Dirichlet(1, 2, 1) and Dirichlet(2, 1, 1) in the positive orthant, prior 0.4."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(n, generator=generator) < 0.4).long()
    gamma = -torch.rand(n, 3, generator=generator, dtype=torch.float64).log()
    extra = -torch.rand(n, generator=generator, dtype=torch.float64).log()
    gamma[torch.arange(n), torch.where(labels == 0, 1, 0)] += extra
    return gamma / gamma.sum(-1, keepdim=True), labels


def deep_classes(dual: SphereDual, depth: int, X: Tensor, labels: Tensor, X_new: Tensor) -> Tensor:
    """Interpolation with the normalised kernel K_L / slope(0)^L."""
    one = torch.ones((), dtype=X.dtype)
    top, slope = dual.value(one), dual.slope(0 * one) / dual.value(one)

    def kernel(A: Tensor, B: Tensor) -> Tensor:
        c = A @ B.T
        for _ in range(depth):
            c = (dual.value(c) / top).clamp_max(1)
        return c

    A, B = to_sphere(X), to_sphere(X_new)
    K, cross = kernel(A, A), kernel(B, A)
    K.diagonal().fill_(1.0)
    if 0 < slope < 1:
        K, cross = K / slope**depth, cross / slope**depth
    return (cross @ torch.linalg.solve(K, 2.0 * labels.double() - 1) > 0).long()


def test_deep_relu_is_the_majority_vote() -> None:
    X, labels = two_classes(60, 0)
    X_new, _ = two_classes(300, 1)
    limit = which_limit(relu())
    assert limit == MajorityVote()
    expected = limit.predict(X, labels, X_new)
    assert (expected == int(labels.double().mean() > 0.5)).all()
    agreement = [(deep_classes(relu(), depth, X, labels, X_new) == expected).double().mean() for depth in (1, 2000)]
    assert agreement[0] < 0.9 and agreement[1] > 0.97


def test_deep_hermite_is_the_nearest_neighbour() -> None:
    X, labels = two_classes(300, 0)
    X_new, _ = two_classes(1000, 1)
    limit = which_limit(hermite())
    assert limit == NearestNeighbour()
    expected = limit.predict(X, labels, X_new)
    assert torch.equal(expected, labels[torch.cdist(to_sphere(X_new), to_sphere(X)).argmin(-1)])
    A, B = to_sphere(X), to_sphere(X_new)
    agreement = []
    for depth in (2, 12):
        K = (A @ A.T).clamp_max(1) ** (3.0**depth)
        log_cross = 3.0**depth * (B @ A.T).clamp(1e-300, 1).log()
        cross = (log_cross - log_cross.amax(-1, keepdim=True)).exp()  # a factor for each row: most of them underflow
        found = (cross @ torch.linalg.solve(K.fill_diagonal_(1.0), 2.0 * labels.double() - 1) > 0).long()
        agreement.append((found == expected).double().mean())
    assert agreement[0] < 0.95 and agreement[1] > 0.995


def test_deep_sine_is_the_singular_kernel() -> None:
    X, labels = two_classes(1000, 0)
    X_new, truth = two_classes(1000, 1)
    limit = which_limit(sine(2.676))
    assert isinstance(limit, SingularKernel) and limit.exponent == pytest.approx(2, abs=1e-3)
    expected = limit.predict(X, labels, X_new)
    found = deep_classes(sine(2.676), 50, X, labels, X_new)
    assert abs((found == truth).double().mean() - (expected == truth).double().mean()) < 0.005
    assert (found == expected).double().mean() > 0.98


@pytest.mark.parametrize(("square", "exponent"), [(2.676, 2), (6.13539, 4), (13.8258, 8)])
def test_exponents_of_the_published_list(square: float, exponent: float) -> None:
    limit = which_limit(sine(square))
    assert isinstance(limit, SingularKernel)
    assert limit.exponent == pytest.approx(exponent, abs=1e-3)


def test_the_exponent_is_that_of_the_deep_kernel() -> None:
    """K_L / slope(0)^L near its singularity, where its logarithm is a line in log distance plus a periodic function."""
    square = 4.0
    dual, one = sine(square), torch.ones((), dtype=torch.float64)
    top = dual.value(one)
    period = (dual.slope(one) / top).sqrt()
    distance = 1e-4 * period ** torch.tensor([0.0, -5.0]).double()
    correlation = torch.zeros(2).double()
    gap = distance.square() / 2  # 1 - x . x', which near 1 says more
    for _ in range(40):
        small = 2 * math.exp(-square) * (square * (1 - gap / 2)).cosh() * (square * gap / 2).sinh() / top
        correlation = torch.where(gap < 0.5, 1 - small, dual.value(correlation) / top)
        gap = torch.where(gap < 0.5, small, 1.0)
    log_kernel = correlation.log()
    slope = (log_kernel[1] - log_kernel[0]) / (distance[0] / distance[1]).log()
    limit = which_limit(dual)
    assert isinstance(limit, SingularKernel) and limit.exponent == pytest.approx(slope.item(), rel=1e-3)


ALL = [MajorityVote(), NearestNeighbour(), SingularKernel(2.0)]


def test_votes_counted_by_hand() -> None:
    angle = torch.tensor([0.0, 0.4, 1.0, 1.2], dtype=torch.float64)
    X, labels = torch.stack([angle.cos(), angle.sin()], -1), torch.tensor([2, 0, 0, 1])
    at = torch.tensor([0.1, 0.8], dtype=torch.float64)
    X_new = 3 * torch.stack([at.cos(), at.sin()], -1)
    share = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).expand(2, 3)
    torch.testing.assert_close(MajorityVote().votes(X, labels, X_new), share)
    nearest = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    assert torch.equal(NearestNeighbour().votes(X, labels, X_new), nearest)
    weights = (2 * ((at[:, None] - angle).abs() / 2).sin()) ** -3.0
    one_hot = torch.nn.functional.one_hot(labels, 4).double()
    expected = weights @ one_hot / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(SingularKernel(3.0).votes(X, labels, X_new, num_classes=4), expected)


@pytest.mark.parametrize("limit", ALL)
def test_coincident_points_decide(limit) -> None:
    X = torch.tensor([[1.0, 0.0], [0.1, 0.3], [0.1, 0.3], [0.0, 1.0], [0.3, 0.9], [1.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([1, 2, 0, 1, 2, 1])
    votes = limit.votes(X, labels, X)
    assert torch.isfinite(votes).all()
    torch.testing.assert_close(votes[1], torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64) / 3)
    torch.testing.assert_close(votes[1], votes[4])  # the same direction: the same point on the sphere
    assert votes[4].sum() == pytest.approx(1) and votes[0, 1] == 1 and votes[3, 1] == 1


def test_coincidence_counts_all_directions_alike() -> None:
    X, labels = two_classes(50, 3)
    for limit in ALL:
        torch.testing.assert_close(
            limit.votes(X, labels, 7.3 * X), torch.nn.functional.one_hot(labels, 2).double(), rtol=0, atol=0
        )


@pytest.mark.parametrize("limit", ALL)
def test_ties_go_to_the_smallest_class(limit) -> None:
    X = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    middle = torch.tensor([[2.0, 2.0]], dtype=torch.float64)
    for labels in ([1, 2], [2, 1]):
        votes = limit.votes(X, torch.tensor(labels), middle)
        torch.testing.assert_close(votes, torch.tensor([[0.0, 0.5, 0.5]], dtype=torch.float64))
        assert limit.predict(X, torch.tensor(labels), middle).tolist() == [1]


@pytest.mark.parametrize("limit", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_and_dtypes(limit, dtype) -> None:
    X, labels = two_classes(30, 0)
    X, X_new = X.to(dtype), two_classes(12, 1)[0].to(dtype).reshape(3, 4, 3)
    votes = limit.votes(X, labels, X_new)
    assert votes.shape == (3, 4, 2) and votes.dtype == dtype
    torch.testing.assert_close(votes[1], limit.votes(X, labels, X_new[1]))
    sets = torch.stack([X, X.flip(0), X.roll(1, -1)])
    several = limit.votes(sets, torch.stack([labels, labels.flip(0), labels]), X_new)
    torch.testing.assert_close(several[1], votes[1], rtol=1e-5, atol=1e-6)
    assert limit.predict(X, labels, X_new).shape == (3, 4)


def test_extreme_lengths_and_exponents() -> None:
    X, labels = two_classes(20, 0)
    X_new, _ = two_classes(5, 1)
    for limit in ALL:
        for factor in (1e-200, 1e200):
            torch.testing.assert_close(limit.votes(factor * X, labels, X_new), limit.votes(X, labels, X_new))
    sharp = SingularKernel(5000.0).votes(X, labels, X_new)
    torch.testing.assert_close(sharp, NearestNeighbour().votes(X, labels, X_new), rtol=0, atol=1e-6)


def test_bad_input() -> None:
    X, labels = two_classes(5, 0)
    vote = MajorityVote()
    for arguments, error, message in (
        ((X[:0], labels[:0], X), ValueError, "at least one row"),
        ((X, labels, X[:, :2]), ValueError, "X_new: found shape"),
        ((X, labels.double(), X), TypeError, "labels: found torch.float64"),
        ((X, labels[:3], X), ValueError, "one for each row"),
        ((X, labels - 1, X), ValueError, "labels: found -1"),
        ((X, labels, X, 1), ValueError, "want 0 to 0"),
        ((0 * X, labels, X), ValueError, "no place on the sphere"),
        ((X, labels, X / 0), ValueError, "no place on the sphere"),
        ((X.numpy(), labels, X), TypeError, "X: found ndarray"),
        ((X, labels.tolist(), X), TypeError, "labels: found list"),
        ((X, labels, X.float()), TypeError, "X_new: found torch.float32, want torch.float64"),
        ((X, labels, X, 3.5), TypeError, "num_classes must be an integer"),
    ):
        with pytest.raises(error, match=message):
            vote.votes(*arguments)
    for value, error in ((0, ValueError), (math.inf, ValueError), ("a", TypeError)):
        with pytest.raises(error, match="exponent must be"):
            SingularKernel(value)
    for value, slope, message in (
        (lambda c: c, lambda c: 1 + 0 * c, "linear"),
        (lambda c: 0 * c, lambda c: 0 * c, "is zero"),
        (lambda c: c.asin(), lambda c: 1 / (1 - c * c).sqrt(), "slope at 1 is inf"),
        (lambda c: c.asin(), lambda c: 0 * c, "isn't the derivative"),
    ):
        with pytest.raises(ValueError, match=message):
            which_limit(SphereDual(value, slope))
