"""Prior-data fitted networks (Müller et al., Transformers can do Bayesian inference, ICLR 2022)."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from bayesnn.inference.amortized.model import AmortizedModel
from bayesnn.likelihoods import Histogram
from bayesnn.registry import register


class PFN(AmortizedModel):
    """A transformer that has seen data sets from a prior and answers with the posterior predictive in one forward pass.

    Its prediction is a histogram with tails, so that it need not be Gaussian. What it knows is its prior: the shipped
    "gp-small" learned from Gaussian processes with 1 to 10 features and contexts of at most 400 rows, noisy or not, from
    smooth to linear (see its card). It answers anything else as if it were one of those.

    Args:
        network: a ``SetTransformer``, or the name of one that ships; "gp-small" by default.
        max_context: most rows; None: what the card says, or no limit.

    Raises:
        ValueError: if no network of that name ships; at fit, for more rows or columns than it was trained on.
    """

    prefix: ClassVar[str] = "pfn"

    def __init__(self, network: nn.Module | str = "gp-small", max_context: int | None = None) -> None:
        super().__init__(network, Histogram(), max_context)


register("pfn", PFN)
