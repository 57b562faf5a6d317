"""Prior-data fitted networks (Müller et al., Transformers can do Bayesian inference, ICLR 2022)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from bayesnn.inference.amortized.model import AmortizedModel, Bounds, Joint
from bayesnn.inference.amortized.transformer import SetClassifier
from bayesnn.likelihoods import Histogram
from bayesnn.registry import register


class PFN(AmortizedModel):
    """A transformer that has seen data sets from a prior and answers with the posterior predictive, without training.

    Its prediction is a histogram with tails, so that it need not be Gaussian. What it knows is its prior, see the network's
    card: "regression" learned from Gaussian processes and random networks of 1 to 10 features, with at most 400 rows; "bo"
    from objectives as optimisation meets them, of 1 to 8 features, at most 100 rows (as a surrogate it takes 2,000);
    "gp-small" from Gaussian processes of 1 or 2 features with hyperparameters from a small set. It answers anything else as if
    it were one of those, and refuses more rows, more features and values far outside what it was trained on (with
    ``neighbours`` there may be any number of rows).

    An answer is one forward pass; of "bo", it is a mixture with Gaussian processes whose hyperparameters that pass reads off
    the context and, from 30 rows on, five gradient steps improve (see ``process_heads`` and ``evidence_ascent``). Their time
    is cubic in the rows and their memory quadratic: for 2,000 rows some 2 s, and 130 MB for each set of fantasies.

    Args:
        network: a ``SetTransformer``, or the name of one that ships; "regression" by default.
        max_context: most rows; None: what the card says, or no limit.
        bounds: known bounds (low, high) of all inputs, or one pair for each, as search spaces have; None: inputs are
            standardised by their own means and deviations.
        joint: what ties points together: a Gaussian "copula", or draws one after the other ("autoregressive").
        neighbours: each query sees this many rows, the nearest ones (of standardised inputs); then there may be any number of
            rows, and the bias that all rows leave vanishes as they grow (Nagler, ICML 2023); but every query has a context of
            its own to encode. None: all rows.

    Raises:
        ValueError: if no network of that name ships, for bounds that don't increase, or another ``joint``; at fit, for more
            rows or columns than it was trained on, for inputs outside the bounds, for values far from all that it was trained
            on, and for an outcome so far from the others that these look alike (of an input, that is warned of).
    """

    prefix: ClassVar[str] = "pfn"

    def __init__(
        self,
        network: nn.Module | str = "regression",
        max_context: int | None = None,
        bounds: Bounds | None = None,
        joint: Joint = "copula",
        neighbours: int | None = None,
    ) -> None:
        super().__init__(network, Histogram(), max_context, bounds, joint, neighbours)
        if isinstance(self._asked, SetClassifier):
            raise TypeError("network must answer with histograms, found a SetClassifier: that is PFNClassifier's")


ROWS = 2000
"""So many rows of a search are seen at most, twenty times as many as "bo" was trained on. From 200 to 2,000 rows of three test
functions it predicts held-out values as well as from the nearest 100, or better: mean log densities are from 0.12 less to 0.56
more."""


def _for_searches(**options: Any) -> PFN:
    """A search may outgrow the rows that the network was trained on; other networks have their own limits."""
    if not options.keys() & {"network", "max_context", "neighbours"}:
        options["max_context"] = ROWS
    return PFN(**{"network": "bo", "bounds": (0.0, 1.0)} | options)


register("pfn", PFN, _for_searches)
