"""Multi-layer perceptrons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from bayesnn.configured import Configured

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "identity": nn.Identity,
}


class MLP(Configured, nn.Module):
    """Linear layers with an activation between them; see :func:`mlp`."""

    def __init__(
        self, in_features: int, out_features: int, hidden: Sequence[int] = (50, 50), activation: str = "tanh"
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, found {activation!r}")
        widths = [in_features, *hidden, out_features]
        if any(not isinstance(width, int) or width < 1 for width in widths):
            raise ValueError(f"in_features, out_features and hidden must be whole numbers from 1, found {widths}")
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), ACTIVATIONS[activation]()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, X: Tensor) -> Tensor:
        """(*batch, in_features) -> (*batch, out_features)."""
        return self.layers(X)

    def forward_members(self, parameters: Mapping[str, Tensor], X: Tensor) -> Tensor:
        """The outputs of S networks at the same rows: parameters stacked to (S, …), X (q, d) -> (S, q, out_features).

        What ``torch.func.vmap`` of ``forward`` gives, but with the biases added inside the batched matrix product and
        rows last, which saves a third of the time where it matters most: in the gradients of a sampler.
        """
        first = next(iter(parameters.values()))
        hidden = X.T.expand(first.shape[0], X.shape[1], X.shape[0])
        for index, layer in enumerate(self.layers):
            if isinstance(layer, nn.Linear):
                weight, bias = parameters[f"layers.{index}.weight"], parameters[f"layers.{index}.bias"]
                hidden = torch.baddbmm(bias.unsqueeze(-1), weight, hidden)
            else:
                hidden = layer(hidden)
        return hidden.mT


def mlp(in_features: int, out_features: int, hidden: Sequence[int] = (50, 50), activation: str = "tanh") -> MLP:
    """A multi-layer perceptron.

    Args:
        in_features: columns of X.
        out_features: function values per point: the likelihood's ``latent_size`` (one per output for most).
        hidden: widths of the hidden layers; () gives a linear model.
        activation: "tanh" (default: smooth, so that gradients of acquisition functions and of the posterior are too),
            "relu", "gelu", "silu" or "identity".

    Raises:
        ValueError: for an unknown activation or a width below 1.
    """
    return MLP(in_features, out_features, hidden, activation)
