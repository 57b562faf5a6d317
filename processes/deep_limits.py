r"""What infinitely wide networks that are also infinitely deep classify by (Radhakrishnan, Belkin & Uhler 2023).

On the unit sphere, and with a dual activation normalised to :math:`\check\phi(1) = 1`, the kernel of L hidden layers is
:math:`K_L = \check\phi \circ \cdots \circ \check\phi(x \cdot x')`. As L grows, the classifier that interpolates the training
labels with it tends to one of three, whatever else the activation is:

- :math:`\check\phi(0) \neq 0`: the majority vote of all training points;
- :math:`\check\phi(0) = \check\phi'(0) = 0`: the nearest neighbour;
- :math:`\check\phi(0) = 0, \check\phi'(0) > 0`: a singular kernel's (Hilbert's) vote.

As in the paper, inner products of inputs are taken to be at least 0: opposite points have the kernel -1 under an odd dual. The
limits are exact in infinite depth only; the tangent kernel comes near them at depths far above :math:`1 / (1 - x \cdot x')`,
the NNGP kernel sooner.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bayesnn.checks import check_fields, count, positive
from bayesnn.configured import Configured

_ZERO = 1e-9
_STEP = 1e-4


class Dual(Protocol):
    """A dual activation; of its moments, kappa and kappa_dot are needed."""

    def moments(self, var1: Tensor, var2: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
        """E[phi(u) phi(v)] and E[phi'(u) phi'(v)]."""
        ...


class DeepLimit(Configured):
    """A vote of training points, weighted by where they are."""

    @abstractmethod
    def log_weights(self, X: Tensor, X_new: Tensor) -> Tensor:
        """Log weights of the training points' votes, (*batch, q, n), for points on the sphere; no vote is -inf."""

    def votes(self, X: Tensor, labels: Tensor, X_new: Tensor, num_classes: int | None = None) -> Tensor:
        """Each class's share of the votes at new points.

        Where new points coincide with training points, only those vote: the kernel is infinite there. Shares of a regression
        on labels, not calibrated probabilities.

        Args:
            X: training inputs (*batch, n, d); projected to the sphere by :func:`to_sphere`.
            labels: (*batch, n), whole numbers from 0 on.
            X_new: (*batch, q, d), projected too. Its batch dimensions broadcast against those of X.
            num_classes: one more than the largest label by default.

        Returns:
            (*batch, q, num_classes), summing to 1. Equal shares are ties.

        Raises:
            ValueError: for shapes that don't fit, labels out of range, no training points, or an input that is zero.
            TypeError: for labels that aren't whole numbers, arguments that aren't tensors, or inputs of different dtypes.
        """
        num_classes = _check(X, labels, X_new, num_classes)
        X, X_new = to_sphere(X), to_sphere(X_new)
        coincide = _distance(X_new, X) <= _coincidence(X)
        log_weights = self.log_weights(X, X_new)
        only = torch.where(coincide, 0.0, -math.inf).to(log_weights)
        log_weights = torch.where(coincide.any(-1, keepdim=True), only, log_weights)
        share = torch.softmax(log_weights, -1)
        one_hot = torch.nn.functional.one_hot(labels.long(), num_classes).to(share)
        return share @ one_hot

    def predict(self, X: Tensor, labels: Tensor, X_new: Tensor, num_classes: int | None = None) -> Tensor:
        """The class with most votes, (*batch, q); of tied ones the smallest. Arguments are those of :meth:`votes`."""
        votes = self.votes(X, labels, X_new, num_classes)
        most = votes.amax(-1, keepdim=True)
        tied = votes >= most * (1 - 16 * torch.finfo(votes.dtype).eps)
        return tied.int().argmax(-1)


@dataclass(frozen=True)
class MajorityVote(DeepLimit):
    """Every training point has one vote everywhere: ReLU's limit, and that of all activations with E[phi(u)] other than 0."""

    def log_weights(self, X: Tensor, X_new: Tensor) -> Tensor:
        """0 for all."""
        batch = torch.broadcast_shapes(X.shape[:-2], X_new.shape[:-2])
        return X.new_zeros(*batch, X_new.shape[-2], X.shape[-2])


@dataclass(frozen=True)
class NearestNeighbour(DeepLimit):
    """The nearest training point decides; equally near ones, up to rounding, share the vote."""

    def log_weights(self, X: Tensor, X_new: Tensor) -> Tensor:
        """0 for the nearest, -inf for the others."""
        distance = _distance(X_new, X)
        nearest = distance.amin(-1, keepdim=True)
        return torch.where(distance <= nearest + _coincidence(X), 0.0, -math.inf).to(distance)


@dataclass(frozen=True)
class SingularKernel(DeepLimit):
    r"""Votes weighted by :math:`\|x - x_i\|^{-\alpha}` (Devroye, Györfi & Krzyżak 1998, there called the Hilbert kernel).

    The limit of deep networks has this singularity, times a factor that stays within positive bounds. Consistent, that is as
    good as any classifier with enough data, for :math:`\alpha = d` on the sphere :math:`S^d` in d + 1 dimensions.

    Args:
        exponent: alpha.

    Raises:
        TypeError: if the exponent isn't a number.
        ValueError: if it isn't positive and finite.
    """

    exponent: float

    def __post_init__(self) -> None:
        check_fields(self, positive, "exponent")

    def log_weights(self, X: Tensor, X_new: Tensor) -> Tensor:
        """-alpha log |x - x_i|; infinite at coincident points."""
        return -self.exponent * _distance(X_new, X).log()


def which_limit(dual: Dual) -> DeepLimit:
    r"""The limit of networks with this activation, from its dual's values at 0 and slopes at 0 and 1.

    The exponent of a singular kernel is :math:`\alpha = -2 \ln\check\phi'(0) / \ln\check\phi'(1)`. With inputs on the unit
    sphere and weights of variance :math:`1 / \check\phi(1)`, no biases.

    Args:
        dual: a dual activation.

    Raises:
        ValueError: if the activation is linear, constant on the unit Gaussian, or without a derivative in the mean square.
    """
    one = torch.ones(4, dtype=torch.float64)
    kappa, kappa_dot = dual.moments(one, one, torch.tensor([0.0, 1.0, _STEP, -_STEP], dtype=torch.float64))
    at_zero, at_one, above, below = kappa.tolist()
    slope_zero, slope_one = kappa_dot[:2].tolist()
    if not at_one > 0:
        raise ValueError("dual: E[phi(u)^2] is zero for a unit Gaussian u, so that there is no kernel.")
    at_zero, slope_zero, slope_one = at_zero / at_one, slope_zero / at_one, slope_one / at_one
    if abs(at_zero) > _ZERO:
        return MajorityVote()
    if abs((above - below) / (2 * _STEP * at_one) - slope_zero) > 1e-4:
        raise ValueError(
            "dual: kappa_dot isn't the derivative of kappa; the activation isn't continuous and has no tangent kernel."
        )
    if abs(slope_zero) <= _ZERO:
        return NearestNeighbour()
    if slope_zero >= 1 - _ZERO:
        raise ValueError("dual: the activation is linear on the unit sphere, so that no depth changes the kernel.")
    if not 1 < slope_one < math.inf:
        raise ValueError(f"dual: its slope at 1 is {slope_one}, want a finite one above 1: E[phi'(u)^2] has to exist.")
    return SingularKernel(-2 * math.log(slope_zero) / math.log(slope_one))


def to_sphere(X: Tensor) -> Tensor:
    """Rows (…, d) over their length.

    Raises:
        ValueError: if a row is zero, or isn't finite.
    """
    # Divided by the largest entry first: squares of huge or tiny ones leave the range of numbers.
    largest = X.abs().amax(-1, keepdim=True)
    if not bool((torch.isfinite(largest) & (largest > 0)).all()):
        raise ValueError("X: a row is zero or not finite, and has no place on the sphere.")
    scaled = X / largest
    return scaled / torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)


def _distance(X_new: Tensor, X: Tensor) -> Tensor:
    # From differences: from inner products, near points would be known to the root of rounding only.
    return torch.cdist(X_new, X, compute_mode="donot_use_mm_for_euclid_dist")


def _coincidence(X: Tensor) -> float:
    """What the rounding of a projection can do to a distance."""
    return 4 * torch.finfo(X.dtype).eps


def _check(X: Tensor, labels: Tensor, X_new: Tensor, num_classes: int | None) -> int:
    for name, value in (("X", X), ("labels", labels), ("X_new", X_new)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: found {type(value).__name__}, want a tensor: torch.as_tensor({name}).")
    if X_new.dtype != X.dtype:
        raise TypeError(f"X_new: found {X_new.dtype}, want {X.dtype} as X has: X_new.to(X).")
    if X.dim() < 2 or X.shape[-2] == 0 or X.shape[-1] == 0:
        raise ValueError(f"X: found shape {tuple(X.shape)}, want (*batch, n, d) with at least one row and column.")
    if X_new.dim() < 2 or X_new.shape[-1] != X.shape[-1]:
        raise ValueError(f"X_new: found shape {tuple(X_new.shape)}, want (*batch, q, {X.shape[-1]}).")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels: found {labels.dtype}, want whole numbers.")
    if labels.shape != X.shape[:-1]:
        raise ValueError(
            f"labels: found shape {tuple(labels.shape)}, want {tuple(X.shape[:-1])}, one for each row of X."
        )
    most = int(labels.max())
    num_classes = most + 1 if num_classes is None else count("num_classes", num_classes)
    if int(labels.min()) < 0 or most >= num_classes:
        raise ValueError(f"labels: found {int(labels.min())} to {most}, want 0 to {num_classes - 1}.")
    return num_classes
