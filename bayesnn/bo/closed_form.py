r"""Acquisition functions of one point at a time, in closed form from the posterior's marginals, whatever their shape.

For models whose posterior is a copula of histograms or normals (PFNs, neural processes), where an average over joint draws
costs more than the answer: the context is encoded at ``fit``, and a value here is one forward pass of the candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from botorch.acquisition import AcquisitionFunction
from botorch.acquisition.analytic import _log_ei_helper
from botorch.exceptions.errors import UnsupportedError
from botorch.models.model import Model as BotorchModel
from botorch.utils.transforms import t_batch_mode_transform
from torch import Tensor
from torch.distributions import Distribution, Normal

from bayesnn.checks import fraction, number
from bayesnn.histogram import Histogram

Value = Callable[[Distribution], Tensor]


class _OfOnePoint(AcquisitionFunction):
    """Knows of no pending points."""

    def set_X_pending(self, X_pending: Tensor | None = None) -> None:
        """Not for closed forms.

        Raises:
            UnsupportedError: for any pending points.
        """
        if X_pending is not None:
            raise UnsupportedError("closed forms know of no pending points: take one that averages over draws")


class ClosedForm(_OfOnePoint):
    """A value of f's marginal at each candidate.

    Args:
        model: fitted, of one outcome, whose posterior has ``marginals``.
        value: of a marginal (*batch,): :func:`log_expected_improvement`, :func:`probability_of_improvement`, :func:`quantile`.
        maximize: whether larger outcomes are better; otherwise the marginals of -f are valued (and levels are of -f).

    Raises:
        ValueError: for a model of several outcomes.
        TypeError: for one whose posterior has no marginals in closed form.
    """

    def __init__(self, model: BotorchModel, value: Value, maximize: bool = True) -> None:
        super().__init__(model)
        if model.num_outputs != 1:
            raise ValueError(
                f"model must have one outcome, found {model.num_outputs}: give model.subset_output([index])"
            )
        self.value, self.maximize = value, maximize
        self.X_pending = None  # type: ignore[assignment]

    @t_batch_mode_transform(expected_q=1)  # type: ignore[arg-type]
    def forward(self, X: Tensor) -> Tensor:
        """(b, 1, d) -> (b,)."""
        marginals = getattr(self.model.posterior(X), "marginals", None)
        if not isinstance(marginals, (Histogram, Normal)):
            raise TypeError("model must have a posterior of histograms or normals, such as a PFN's")
        return self.value(marginals if self.maximize else _negated(marginals))[..., 0, 0]


class UnderLimits(_OfOnePoint):
    r"""The log expected improvement times the probability that all limits are kept, outcomes being independent.

    .. math:: \log E[\max(f - \mathrm{best}, 0)] + \sum_j \log P(g_j \text{ keeps its limit})

    Source: Gardner et al., Bayesian optimization with inequality constraints (ICML 2014), equations 4 and 5.

    Args:
        model: fitted, of several outcomes, whose posterior has ``marginals``.
        objective: the objective's index.
        maximize: whether it is maximised.
        limits: (index, "<=" or ">=", bound) of the others.
        best: of tried configurations that keep the limits, the best merit (-f where f is minimised); None where there is none
            yet: then it is the probability alone that counts.
    """

    def __init__(
        self,
        model: BotorchModel,
        objective: int,
        maximize: bool,
        limits: Sequence[tuple[int, str, float]],
        best: float | None,
    ) -> None:
        super().__init__(model)
        improvement = None if best is None else log_expected_improvement(best)
        self.X_pending = None  # type: ignore[assignment]
        self.parts = [] if improvement is None else [(objective, maximize, improvement)]
        for index, sign, bound in limits:
            above = sign == ">="
            self.parts.append((index, above, _log_probability_above(bound if above else -bound)))

    @t_batch_mode_transform(expected_q=1)  # type: ignore[arg-type]
    def forward(self, X: Tensor) -> Tensor:
        """(b, 1, d) -> (b,)."""
        posterior: Any = self.model.posterior(X)
        marginals = posterior.marginals
        laws = {True: marginals, False: _negated(marginals)}
        return sum((value(laws[maximize])[..., 0, index] for index, maximize, value in self.parts), X.new_zeros(()))


def _log_probability_above(bound: float) -> Value:
    def value(law: Distribution) -> Tensor:
        if isinstance(law, Normal):
            return torch.special.log_ndtr((law.loc - bound) / law.scale)
        found = probability_of_improvement(bound)(law)
        tiny = torch.finfo(found.dtype).tiny
        # Where it is too small for a number, nearer is better all the same.
        farther = math.log(tiny) - ((bound - law.mean) / law.variance.sqrt()).clamp_min(0)
        return torch.where(found > tiny, found.clamp_min(tiny).log(), farther)

    return value


def _negated(law: Histogram | Normal) -> Distribution:
    return law.affine(0.0, -1.0) if isinstance(law, Histogram) else Normal(-law.loc, law.scale)


def log_expected_improvement(best: float) -> Value:
    r""":math:`\log E[\max(f - \mathrm{best}, 0)]`, with a histogram's tails."""
    best = number("best", best)

    def value(law: Distribution) -> Tensor:
        if isinstance(law, Normal):
            return _log_ei_helper((law.loc - best) / law.scale) + law.scale.log()
        assert isinstance(law, Histogram)
        found = law.expected_improvement(best)
        return found.clamp_min(torch.finfo(found.dtype).tiny).log()

    return value


def probability_of_improvement(best: float) -> Value:
    """P(f > best), with a histogram's tails."""
    best = number("best", best)

    def value(law: Distribution) -> Tensor:
        if isinstance(law, Normal):
            return torch.special.ndtr((law.loc - best) / law.scale)
        assert isinstance(law, Histogram)
        return law.probability_of_improvement(best)

    return value


def quantile(level: float) -> Value:
    """The ``level``-quantile of f: an upper confidence bound that knows the marginal's shape (0.5 to 1 explores)."""
    level = fraction("level", level)
    return lambda law: law.icdf(torch.full_like(law.mean, level))
