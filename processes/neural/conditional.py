"""Conditional neural processes (Garnelo et al., ICML 2018)."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from bayesnn.inference.amortized.model import AmortizedModel, Bounds, Joint
from bayesnn.likelihoods import HeteroscedasticGaussian
from bayesnn.registry import register


class ConditionalNeuralProcess(AmortizedModel):
    """A deep set summarises the context, a perceptron decodes a Gaussian at each query.

    Cheaper than a transformer (its cost is linear in the context) and less exact: the summary has a fixed size, so that
    it underfits large or nearly noiseless contexts and doesn't interpolate. Meta-trained on tasks drawn from a prior over
    functions; the shipped "gp-small" on the same Gaussian processes as the PFN's. Train one for your own functions with
    ``meta_fit(prior)``.

    Args:
        network: a ``DeepSetNetwork``, or the name of one that ships; "gp-small" by default.
        max_context: most rows; None: what the card says, or no limit.
        bounds, joint, neighbours: see ``PFN``.

    Raises:
        ValueError: if no network of that name ships; at fit, for more rows or columns than it was trained on.
    """

    prefix: ClassVar[str] = "cnp"

    def __init__(
        self,
        network: nn.Module | str = "gp-small",
        max_context: int | None = None,
        bounds: Bounds | None = None,
        joint: Joint = "copula",
        neighbours: int | None = None,
    ) -> None:
        super().__init__(network, HeteroscedasticGaussian(), max_context, bounds, joint, neighbours)


register("cnp", ConditionalNeuralProcess)
