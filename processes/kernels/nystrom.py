r"""Nyström approximations: a kernel matrix from its columns at a few landmarks.

.. math:: K \approx \hat K = K_{XZ} K_{ZZ}^+ K_{ZX}

(Williams & Seeger 2001). :math:`K - \hat K` is positive semi-definite, so that its trace bounds its error in every norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from gpytorch.kernels import Kernel
from linear_operator import to_dense
from linear_operator.operators import KernelLinearOperator
from torch import Tensor, nn

from bayesnn.checks import count
from bayesnn.data import as_float

KernelFunction = Callable[[Tensor, Tensor], Any]
Landmarks = Literal["pivoted", "leverage", "uniform"]


class Nystrom(nn.Module):
    r"""Features of a kernel from landmarks: :math:`\phi(x) = K_{ZZ}^{-1/2} k(Z, x)`, so that :math:`\phi(x) \cdot \phi(x')`
    is the approximation.

    ``FeatureKernel(approximation)`` is the GPyTorch kernel of it. For inference with inducing points, whose variances are
    corrected, give ``landmarks`` to GPyTorch's ``InducingPointKernel`` or variational strategies instead.

    Args:
        kernel: a GPyTorch kernel, or a function of x1 (*batch, n, d) and x2 (*batch, m, d) that gives (*batch, n, m).
        landmarks: (r, d).

    Attributes:
        landmarks: (r, d).
        rank: how many features there are: fewer than landmarks where some of them are repeated, up to rounding.

    Raises:
        ValueError: if there are no landmarks.
    """

    landmarks: Tensor
    _whitening: Tensor

    def __init__(self, kernel: KernelFunction, landmarks: Tensor) -> None:
        super().__init__()
        if landmarks.dim() != 2 or len(landmarks) == 0:
            raise ValueError(f"landmarks: found shape {tuple(landmarks.shape)}, want (r, d) with at least one row.")
        self.kernel = kernel
        self.register_buffer("landmarks", landmarks.detach())
        with torch.no_grad():
            values, vectors = torch.linalg.eigh(to_dense(kernel(self.landmarks, self.landmarks)))
        kept = values > values.max() * len(values) * torch.finfo(values.dtype).eps
        self.register_buffer("_whitening", vectors[:, kept] / values[kept].sqrt())

    @property
    def rank(self) -> int:
        """The number of features."""
        return self._whitening.shape[-1]

    def forward(self, X: Tensor) -> Tensor:
        """Features (*batch, n, rank) of X (*batch, n, d)."""
        Z = self.landmarks.expand(*X.shape[:-2], *self.landmarks.shape)
        return to_dense(self.kernel(X, Z)) @ self._whitening

    def residual_trace(self, X: Tensor) -> Tensor:
        """The trace of K - K_hat at X (*batch, n, d), (*batch): the sum of what the features leave of every variance.

        Over the trace of K, it is the relative error in the nuclear norm. Costs O(n r^2).
        """
        variances = _matrix(self.kernel, X).diagonal(dim1=-2, dim2=-1)
        return (variances - self(X).square().sum(-1)).clamp_min(0).sum(-1)


def nystrom(
    kernel: KernelFunction,
    X: Tensor,
    num_landmarks: int,
    method: Landmarks = "pivoted",
    generator: torch.Generator | None = None,
) -> Nystrom:
    """A Nyström approximation with landmarks among the rows of X.

    Args:
        kernel: a GPyTorch kernel, or a function of x1 (*batch, n, d) and x2 (*batch, m, d) that gives (*batch, n, m).
        X: (n, d).
        num_landmarks: at most; fewer are taken where those explain all variance up to rounding, or X has fewer rows.
        method: "pivoted", greedily that with the largest variance left (linear_operator's pivoted Cholesky factor;
            deterministic); "leverage", at random by approximate ridge leverage scores (recursive sampling: Musco & Musco
            2017), which resists outliers; "uniform", at random.
        generator: for the random methods.

    Raises:
        TypeError: for a number of landmarks that is none.
        ValueError: for an unknown method, no rows or landmarks, rows that aren't finite, or a random method without a
            generator.
    """
    if method not in ("pivoted", "leverage", "uniform"):
        raise ValueError(f"method: found {method!r}, want 'pivoted', 'leverage' or 'uniform'.")
    X = as_float(X, "X")
    if X.dim() != 2 or len(X) == 0:
        raise ValueError(f"X: found shape {tuple(X.shape)}, want (n, d) with at least one row.")
    most = min(count("num_landmarks", num_landmarks), len(X))
    with torch.no_grad():
        if method == "pivoted":
            tolerance = len(X) * torch.finfo(X.dtype).eps
            factor, order = _matrix(kernel, X).pivoted_cholesky(most, error_tol=tolerance, return_pivots=True)
            return Nystrom(kernel, X[order[: factor.shape[-1]]])
        if generator is None:
            raise ValueError(f"generator: found None, want one for method={method!r}, which is random.")
        order = torch.randperm(len(X), generator=generator, device=generator.device).to(X.device)
        chosen = order[:most] if method == "uniform" else _by_leverage(kernel, X, order, most, generator)
        return Nystrom(kernel, X[chosen])


def ridge_leverage_scores(
    kernel: KernelFunction, X: Tensor, sample: Tensor, weights: Tensor
) -> Callable[[float], Tensor]:
    r"""Approximate diagonals of :math:`K (K + \lambda)^{-1}` from a weighted sample S of rows (Musco & Musco 2017, eq. 6).

    .. math:: \frac1\lambda \left(K - K S (S^T K S + \lambda)^{-1} S^T K\right)_{ii},

    exact if all rows are in the sample with weights 1.

    Args:
        kernel: as for :func:`nystrom`.
        X: (n, d).
        sample: (s, d).
        weights: (s,), one over the root of the probability with which a row came into the sample.

    Returns:
        The scores (n,), within 0 and 1, as a function of the ridge, positive; O(n s) each.
    """
    values, vectors = torch.linalg.eigh(weights.unsqueeze(-1) * to_dense(kernel(sample, sample)) * weights)
    values = values.clamp_min(0).unsqueeze(-1)
    squares = (vectors.mT @ (weights.unsqueeze(-1) * to_dense(kernel(sample, X)))).square()
    variances = _matrix(kernel, X).diagonal(dim1=-2, dim2=-1)
    return lambda ridge: ((variances - (squares / (values + ridge)).sum(-2)) / ridge).clamp(0, 1)


def _by_leverage(kernel: KernelFunction, X: Tensor, order: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Rows sampled by scores that come from a sample of half of them, and so on."""
    size = len(order)
    while size > 2 * count:
        size = (size + 1) // 2
    chosen, weights = order[: min(size, count)], X.new_ones(min(size, count))
    while True:
        candidates = order[:size]
        probability = _inclusion(ridge_leverage_scores(kernel, X[candidates], X[chosen], weights), count)
        index = _systematic_sample(probability, count, generator)
        if size == len(order):
            return candidates[index]
        chosen, weights = candidates[index], probability[index].rsqrt()
        size = min(2 * size, len(order))


def _inclusion(scores: Callable[[float], Tensor], count: int) -> Tensor:
    """Probabilities in proportion to scores, up to 1, that sum to ``count``.

    At the ridge where the scores themselves do, if there is one (our choice): rows that no others explain are sure to be in.
    """
    values = _of_sum(lambda precision: scores(1 / precision), count)
    values = values + torch.finfo(values.dtype).eps  # all remain possible
    return _of_sum(lambda factor: (factor * values).clamp_max(1), count)


def _of_sum(function: Callable[[float], Tensor], total: float) -> Tensor:
    """The values of an increasing function where they sum to ``total``, by bisection of its argument's logarithm."""
    low, high = -30.0, 30.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if float(function(10.0**middle).sum()) < total else (low, middle)
    return function(10.0**high)


def _systematic_sample(probability: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` different indices, each with its probability; these sum to ``count``, and are in random order."""
    start = torch.rand(1, generator=generator, dtype=torch.float64, device=generator.device).to(probability.device)
    ends = probability.double().cumsum(-1)
    ends = ends * (count / ends[-1])
    marks = start + torch.arange(count, dtype=torch.float64, device=probability.device)
    return torch.searchsorted(ends, marks, right=True).clamp_max(len(ends) - 1).unique()


def _matrix(kernel: KernelFunction, X: Tensor) -> Any:
    """Its kernel matrix, of which nothing is computed yet."""
    return kernel(X) if isinstance(kernel, Kernel) else KernelLinearOperator(X, X, covar_func=kernel)
