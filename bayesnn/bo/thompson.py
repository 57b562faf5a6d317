"""Thompson sampling: one draw of the function, whose best point is tried."""

from __future__ import annotations

from collections.abc import Callable

import torch
from botorch.acquisition import AcquisitionFunction
from botorch.models.model import Model as BotorchModel
from botorch.utils.transforms import t_batch_mode_transform
from torch import Tensor

from bayesnn.posteriors import FunctionDraws, FunctionSampler, function_draws

Merit = Callable[[Tensor], Tensor]


class _Draw(AcquisitionFunction):
    def set_X_pending(self, X_pending: Tensor | None = None) -> None:
        """Pending points change nothing: another suggestion is another draw."""


class ThompsonDraw(_Draw):
    """A draw's merit at each candidate, for posteriors that consist of draws: one of them, everywhere the same.

    Args:
        model: of codes.
        merit: values (…, m) -> (…, 1), more is better.
        seed: of the choice.
    """

    def __init__(self, model: BotorchModel, merit: Merit, seed: int) -> None:
        super().__init__(model)
        self.merit = merit
        self.sampler = FunctionSampler(torch.Size([1]), seed=seed)

    @t_batch_mode_transform(expected_q=1)  # type: ignore[arg-type]
    def forward(self, X: Tensor) -> Tensor:
        """(b, 1, d) -> (b,)."""
        posterior = self.model.posterior(X)
        assert isinstance(posterior, FunctionDraws)
        return self.merit(self.sampler(posterior)[0])[..., 0, 0]


class ThompsonAtPlaces(_Draw):
    """A draw's merit at finitely many places, drawn jointly, for any other posterior.

    Args:
        model: of codes.
        merit: values (…, m) -> (…, 1), more is better.
        choices: codes (N, d), the only candidates.
        seed: of the draw.
    """

    def __init__(self, model: BotorchModel, merit: Merit, choices: Tensor, seed: int) -> None:
        super().__init__(model)
        self.choices = choices
        with torch.no_grad():
            draw = function_draws(model.posterior(choices), 1, seed)
        self.merits = merit(draw.values[0])[:, 0]

    @t_batch_mode_transform(expected_q=1)  # type: ignore[arg-type]
    def forward(self, X: Tensor) -> Tensor:
        """(b, 1, d) -> (b,), of the place nearest to each candidate."""
        return self.merits[torch.cdist(X[..., 0, :], self.choices).argmin(-1)]
