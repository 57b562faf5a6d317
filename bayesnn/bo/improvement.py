r"""The expected improvement in closed form from marginals of any shape, under limits and beside pending configurations.

For models whose posterior is a copula of histograms or normals (PFNs, neural processes), where an average over joint draws
costs more than the answer: contexts are encoded beforehand, and a value here is one forward pass of the candidates.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from botorch.acquisition import AcquisitionFunction
from botorch.models.model import Model as BotorchModel
from botorch.utils.transforms import t_batch_mode_transform
from torch import Tensor

from bayesnn.bo.closed_form import Marginals, log_improvement, log_probability_above, negated
from bayesnn.bo.fantasies import fantasised
from bayesnn.bo.outcomes import Outcomes
from bayesnn.posteriors.copula import of_outputs

MOST_FANTASIES = 8
"""Twice as many for each unknown number, up to this: time grows with their number. Beside three or six pending configurations,
what 1, 4, 8, 16 and 32 fantasies suggest loses 0.14, 0.07, 0.05, 0.01 and 0.01 of the log expected improvement by 256 of them;
beside one, 0.01, however many (the network "bo", 2 to 6 inputs, 12 and 50 rows, 6 data sets)."""


class MarginalImprovement(AcquisitionFunction):
    r"""The log expected improvement over the best mean, under limits, averaged over fantasies of what is pending.

    .. math:: \log \frac1S \sum_s E[\max(f(x) - b_s, 0) \mid D_s] \prod_j P(g_j(x) \text{ keeps its limit} \mid D_s),

    :math:`D_s` being the data with the s-th fantasy of the pending observations and :math:`b_s` the best posterior mean, given
    :math:`D_s`, of the tried and pending configurations that keep the limits. Outcomes are taken as independent. Where none
    keeps them in any fantasy, it is the probability alone that counts. Where none does in some fantasies only, the worst of
    their means stands for the best there: whatever keeps the limits is an improvement. A network isn't quite certain of f even
    where it has seen a value, so that suggestions of a batch may lie close together.

    Args:
        model: fitted, whose posterior has ``marginals``; beside pending configurations, it must take in observations.
        tried: (n, d), n at least 1.
        outcomes: of one objective.
        num_fantasies: S; None: 4 for one outcome at one configuration, otherwise 8 (``MOST_FANTASIES``).
        seed: of the fantasies.

    Source: Gardner et al., Bayesian optimization with inequality constraints (ICML 2014), equations 4 and 5; Snoek, Larochelle
    and Adams (2012), "Practical Bayesian optimization of machine learning algorithms", section 3.2.
    """

    def __init__(
        self, model: BotorchModel, tried: Tensor, outcomes: Outcomes, num_fantasies: int | None = None, seed: int = 0
    ) -> None:
        super().__init__(model)
        self.tried, self.outcomes, self.num_fantasies, self.seed = tried, outcomes, num_fantasies, seed
        self.set_X_pending(None)

    def set_X_pending(self, X_pending: Tensor | None = None) -> None:
        """Draw fantasies of the observations at pending configurations (k, d), in place of those before."""
        self.X_pending = X_pending  # type: ignore[assignment]
        self.given, known = self.model, self.tried
        if X_pending is not None:
            enough = min(MOST_FANTASIES, 2 ** (1 + len(X_pending) * self.model.num_outputs))
            self.given = fantasised(self.model, X_pending, self.num_fantasies or enough, self.seed)
            known = torch.cat([known, X_pending])
        with torch.no_grad():
            posterior: Any = self.given.posterior(known)
            self.best = best_mean(posterior.mean, self.outcomes)

    @t_batch_mode_transform(expected_q=1)  # type: ignore[arg-type]
    def forward(self, X: Tensor) -> Tensor:
        """(b, 1, d) -> (b,)."""
        if self.X_pending is None:
            return self._value(X)
        values = self._value(X.unsqueeze(-3))  # (b, S)
        return values.logsumexp(-1) - math.log(values.shape[-1])

    def _value(self, X: Tensor) -> Tensor:
        posterior: Any = self.given.posterior(X)
        return log_feasible_improvement(posterior.marginals, self.outcomes, self.best)


def best_mean(means: Tensor, outcomes: Outcomes) -> Tensor | None:
    """The best merit among means (*batch, k, m) that keep the limits, (*batch,); None if none does in the whole batch."""
    merits = outcomes.merits(means)[..., 0]
    if not outcomes.limits:
        return merits.amax(-1)
    kept = (outcomes.excesses(means) <= 0).all(-1)
    if not kept.any():
        return None
    best = merits.masked_fill(~kept, -math.inf).amax(-1)
    return torch.where(kept.any(-1), best, merits.amin(-1))


def log_feasible_improvement(marginals: Marginals, outcomes: Outcomes, best: Tensor | None) -> Tensor:
    """The log of the improvement expected over ``best`` times the probability that all limits are kept: (*batch,).

    Args:
        marginals: of one point, batch shape (*batch, 1, m).
        outcomes: of one objective.
        best: a merit, shape broadcastable to (*batch,); None: the log probability alone.
    """
    parts = []
    if best is not None:
        law = _outcome(marginals, outcomes.objectives[0], outcomes.directions[0] == "maximize")
        parts.append(log_improvement(law, best[..., None, None]))
    for index, sign, bound in outcomes.limits:
        above = sign == ">="
        parts.append(log_probability_above(_outcome(marginals, index, above), bound if above else -bound))
    return torch.stack(parts).sum(0)[..., 0, 0]


def _outcome(marginals: Marginals, index: int, above: bool) -> Marginals:
    """One of the outcomes, (*batch, 1, 1), turned around where less is better."""
    law = of_outputs(marginals, [index])
    return law if above else negated(law)
