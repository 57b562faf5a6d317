"""Prior-data fitted networks for tables with classes (Hollmann et al., TabPFN, ICLR 2023)."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from bayesnn.inference.amortized.model import AmortizedModel, Bounds
from bayesnn.inference.amortized.transformer import SetClassifier
from bayesnn.likelihoods import Categorical
from bayesnn.posteriors import FunctionDraws


class PFNClassifier(AmortizedModel):
    """A transformer that has seen tables from a prior and answers with the probabilities of classes in one forward pass.

    What it knows is its prior, see the network's card. The probabilities are the posterior predictive; a network doesn't tell
    what of their uncertainty is the function's, so that ``epistemic`` is 0 and the posterior is one draw.

    Args:
        likelihood: Categorical, of at most as many classes as the network's.
        network: a ``SetClassifier``, or the name of one that ships with the package.
        max_context: most rows; None: what the card says, or no limit.
        bounds, neighbours: see ``PFN``.

    Raises:
        ValueError: if no network of that name ships, or for more classes than it knows; at fit, for more rows or columns
            than it was trained on.
        TypeError: if the likelihood isn't Categorical.
    """

    prefix: ClassVar[str] = "pfn"

    def __init__(
        self,
        likelihood: Categorical,
        network: nn.Module | str = "tabular-classification",
        max_context: int | None = None,
        bounds: Bounds | None = None,
        neighbours: int | None = None,
    ) -> None:
        if not isinstance(likelihood, Categorical):
            raise TypeError(f"likelihood must be likelihoods.Categorical, found {likelihood!r}")
        super().__init__(network, likelihood, max_context, bounds, neighbours=neighbours)
        if not isinstance(self._asked, SetClassifier):
            raise TypeError(f"network must be a SetClassifier, found {type(self.network).__name__}")
        if likelihood.num_classes > self._asked.num_outputs:
            raise ValueError(
                f"likelihood must have at most {self._asked.num_outputs} classes, as many as the network was trained on; "
                f"found {likelihood.num_classes}"
            )

    def _latent(self, X: Tensor) -> FunctionDraws:
        (classes,) = self._marginals(self._context, X)
        assert isinstance(self.likelihood, Categorical)
        assert isinstance(classes, torch.distributions.Categorical)
        logits = classes.logits[..., 0, : self.likelihood.num_classes]
        return FunctionDraws(logits.unsqueeze(-3))

    def _predictive(self, X: Tensor) -> Any:
        return self.likelihood.predictive_class(self.likelihood(self._latent(X).values, {}))

    def _observations(self, latent: Any, X: Tensor) -> Any:
        return super(AmortizedModel, self)._observations(latent, X)

    def condition_on_observations(self, X: Tensor, Y: Tensor, **kwargs: Any) -> Self:
        """Not for classes: fit the model to all rows, which takes no training.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("classes can't be conditioned on one by one: fit the model to all rows")

    def _saved_arguments(self) -> dict[str, Any]:
        names = ("likelihood", "network", "max_context", "bounds", "neighbours")
        return {name: getattr(self, name) for name in names}
