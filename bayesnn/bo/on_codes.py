"""A model of features, asked at a search space's codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from botorch.models.model import Model as BotorchModel
from botorch.posteriors import Posterior
from torch import Tensor

from bayesnn.bo.acquisition import draws_are_functions
from bayesnn.bo.space import Space
from bayesnn.bo.training_features import training_features


class OnCodes(BotorchModel):
    """A model of features, asked at codes.

    Args:
        model: of features.
        space: whose codes they are.
    """

    def __init__(self, model: BotorchModel, space: Space) -> None:
        super().__init__()
        self.model, self.space = model, space
        self.feature_dtype = training_features(model).dtype
        self._shared: Tensor | None = None
        self._beside: Callable[[Tensor], Posterior] | None = None
        # BoTorch then averages the acquisition function over the model's batch dimension.
        self._is_ensemble, self._is_fully_bayesian = model._is_ensemble, model._is_fully_bayesian

    @property
    def num_outputs(self) -> int:
        return self.model.num_outputs

    @property
    def batch_shape(self) -> torch.Size:
        return self.model.batch_shape

    @property
    def draws_are_functions(self) -> bool:
        return draws_are_functions(self.model)

    @property
    def answers_locally(self) -> bool:
        """Whether each query has a context of its own, so that several contexts cost several times as much."""
        return bool(getattr(self.model, "answers_locally", False))

    def share(self, codes: Tensor) -> None:
        """Compute what concerns these codes (k, d) once, where :meth:`posterior` finds them first in each of several batches.

        They are constants then and get no gradients. Nothing changes for models without ``posterior_beside``.
        """
        beside: Any = getattr(self.model, "posterior_beside", None)
        if codes is not self._shared and beside is not None:
            self._shared, self._beside = codes, beside(self._features(codes))

    def posterior(self, X: Tensor, *args: Any, **kwargs: Any) -> Posterior:
        own = None if args or any(value is not None for value in kwargs.values()) else self._own(X)
        if own is None or self._beside is None:
            return self.model.posterior(self._features(X), *args, **kwargs)
        return self._beside(own)

    def condition_on_observations(self, X: Tensor, Y: Tensor, **kwargs: Any) -> OnCodes:
        """The model after observations Y, in its own units, at codes X."""
        return OnCodes(self.model.condition_on_observations(self._features(X), Y, **kwargs), self.space)

    def _own(self, X: Tensor) -> Tensor | None:
        """The features that follow the shared codes; None if those don't come first."""
        if self._shared is None or X.dim() < 3 or X.shape[-2] <= len(self._shared):
            return None
        first, own = X.split([len(self._shared), X.shape[-2] - len(self._shared)], -2)
        return self._features(own) if torch.equal(first, self._shared.expand_as(first)) else None

    def _features(self, codes: Tensor) -> Tensor:
        return self.space.encode(codes).to(self.feature_dtype)
