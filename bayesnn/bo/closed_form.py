r"""Acquisition functions of one point at a time, in closed form from the posterior's marginals, whatever their shape.

For models whose posterior is a copula of histograms or normals (PFNs, neural processes), where an average over joint draws
costs more than the answer: the context is encoded at ``fit``, and a value here is one forward pass of the candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable

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

Marginals = Histogram | Normal
Value = Callable[[Distribution], Tensor]


class ClosedForm(AcquisitionFunction):
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

    def set_X_pending(self, X_pending: Tensor | None = None) -> None:
        """Not for a value whose level is fixed: what is expected of it doesn't change by what is pending.

        Raises:
            UnsupportedError: for any pending points.
        """
        if X_pending is not None:
            raise UnsupportedError(
                "closed forms of one point know of no pending points: bayesnn.bo.suggest(..., pending=...) does"
            )

    @t_batch_mode_transform(expected_q=1)  # type: ignore[arg-type]
    def forward(self, X: Tensor) -> Tensor:
        """(b, 1, d) -> (b,)."""
        marginals = getattr(self.model.posterior(X), "marginals", None)
        if not isinstance(marginals, Marginals):
            raise TypeError("model must have a posterior of histograms or normals, such as a PFN's")
        return self.value(marginals if self.maximize else negated(marginals))[..., 0, 0]


def log_expected_improvement(best: float) -> Value:
    r""":math:`\log E[\max(f - \mathrm{best}, 0)]`, with a histogram's tails."""
    best = number("best", best)
    return lambda law: log_improvement(law, best)


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


def log_improvement(law: Distribution, best: Tensor | float) -> Tensor:
    """:func:`log_expected_improvement` over levels that broadcast against the batch shape."""
    if isinstance(law, Normal):
        return _log_ei_helper((law.loc - best) / law.scale) + law.scale.log()
    assert isinstance(law, Histogram)
    found = law.expected_improvement(best)
    return found.clamp_min(torch.finfo(found.dtype).tiny).log()


def log_probability_above(law: Marginals, bound: float) -> Tensor:
    """The log of P(f > bound); where that is too small for a number, nearer is more all the same."""
    if isinstance(law, Normal):
        return torch.special.log_ndtr((law.loc - bound) / law.scale)
    found = law.probability_of_improvement(bound)
    tiny = torch.finfo(found.dtype).tiny
    farther = math.log(tiny) - ((bound - law.mean) / law.variance.sqrt()).clamp_min(0)
    return torch.where(found > tiny, found.clamp_min(tiny).log(), farther)


def negated(law: Marginals) -> Marginals:
    """The law of -f."""
    return law.affine(0.0, -1.0) if isinstance(law, Histogram) else Normal(-law.loc, law.scale)
