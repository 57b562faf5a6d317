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
        ValueError: for an unknown method, no rows or landmarks, or a random method without a generator.
    """
    if method not in ("pivoted", "leverage", "uniform"):
        raise ValueError(f"method: found {method!r}, want 'pivoted', 'leverage' or 'uniform'.")
    if X.dim() != 2 or len(X) == 0:
        raise ValueError(f"X: found shape {tuple(X.shape)}, want (n, d) with at least one row.")
    if num_landmarks < 1:
        raise ValueError(f"num_landmarks: found {num_landmarks}, want at least 1.")
    count = min(num_landmarks, len(X))
    with torch.no_grad():
        if method == "pivoted":
            tolerance = len(X) * torch.finfo(X.dtype).eps
            factor, order = _matrix(kernel, X).pivoted_cholesky(count, error_tol=tolerance, return_pivots=True)
            return Nystrom(kernel, X[order[: factor.shape[-1]]])
        if generator is None:
            raise ValueError(f"generator: found None, want one for method={method!r}, which is random.")
        order = torch.randperm(len(X), generator=generator, device=generator.device).to(X.device)
        chosen = order[:count] if method == "uniform" else _by_leverage(kernel, X, order, count, generator)
        return Nystrom(kernel, X[chosen])


def ridge_leverage_scores(
    kernel: KernelFunction, X: Tensor, sample: Tensor, weights: Tensor, ridge: Tensor | float
) -> Tensor:
    r"""Approximate diagonal of :math:`K (K + \lambda)^{-1}` from a weighted sample S of rows (Musco & Musco 2017, eq. 6).

    .. math:: \frac1\lambda \left(K - K S (S^T K S + \lambda)^{-1} S^T K\right)_{ii},

    exact if all rows are in the sample with weights 1.

    Args:
        kernel: as for :func:`nystrom`.
        X: (n, d).
        sample: (s, d).
        weights: (s,), one over the root of the probability with which a row came into the sample.
        ridge: lambda, positive.

    Returns:
        (n,), within 0 and 1.
    """
    inner = weights.unsqueeze(-1) * to_dense(kernel(sample, sample)) * weights
    inner = inner + ridge * torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
    cross = weights.unsqueeze(-1) * to_dense(kernel(sample, X))
    explained = (cross * torch.linalg.solve(inner, cross)).sum(-2)
    return ((_matrix(kernel, X).diagonal(dim1=-2, dim2=-1) - explained) / ridge).clamp(0, 1)


def _by_leverage(kernel: KernelFunction, X: Tensor, order: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Rows sampled by scores that come from a sample of half of them, and so on."""
    size = len(order)
    while size > 2 * count:
        size = (size + 1) // 2
    chosen, weights = order[: min(size, count)], X.new_ones(min(size, count))
    while True:
        weighted = weights.unsqueeze(-1) * to_dense(kernel(X[chosen], X[chosen])) * weights
        values = torch.linalg.eigvalsh(weighted)
        # What half of the landmarks could not explain, shared by them.
        least = values.sum() * torch.finfo(values.dtype).eps ** 0.5
        ridge = torch.maximum(values[: (len(values) + 1) // 2].clamp_min(0).sum(), least) / max(1, count // 2)
        candidates = order[:size]
        scores = ridge_leverage_scores(kernel, X[candidates], X[chosen], weights, ridge)
        scores = scores + torch.finfo(scores.dtype).tiny ** 0.5  # all remain possible
        index = torch.multinomial(scores.to(generator.device), count, generator=generator).to(X.device)
        if size == len(order):
            return candidates[index]
        chosen = candidates[index]
        weights = (count * scores[index] / scores.sum()).clamp_max(1).rsqrt()
        size = min(2 * size, len(order))


def _matrix(kernel: KernelFunction, X: Tensor) -> Any:
    """Its kernel matrix, of which nothing is computed yet."""
    return kernel(X) if isinstance(kernel, Kernel) else KernelLinearOperator(X, X, covar_func=kernel)  # type: ignore[call-arg]
