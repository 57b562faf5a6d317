r"""An unnormalised log density over parameters: what a method works on.

The target alone owns N, the scaling of minibatches and the temperature:

.. math:: \log \pi(\theta) = \frac1T \Big[ \log p(\theta) + \frac{N}{|B|} \sum_{i \in B} \log p(y_i \mid x_i, \theta) \Big]

Parameters are a dict of tensors with one leading dimension for chains, members or particles; everything is vectorised
over it and returns one number for each.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bayesnn.data import Data

Parameters = dict[str, Tensor]


class FlatGaussian(NamedTuple):
    """A Gaussian prior over all parameters as one vector: (P,) each, and the sum of the log normalisers."""

    loc: Tensor
    precision: Tensor
    log_normaliser: float


class Target(Protocol):
    """What a method may ask of its target."""

    data: Data
    temperature: float
    flat_gaussian_prior: FlatGaussian | None
    """The prior, if it is Gaussian in every parameter."""

    def log_prior(self, parameters: Parameters) -> Tensor:
        """log p(theta), (C,)."""
        ...

    def log_likelihood(self, parameters: Parameters, batch: Data | None = None) -> Tensor:
        """The sum over a batch (None: all data) of log p(y | x, theta), (C,)."""
        ...

    def initial(self, count: int, generator: torch.Generator) -> Parameters:
        """``count`` starting points."""
        ...

    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every parameter, without the leading dimension."""
        ...


def log_density(target: Target, parameters: Parameters, batch: Data | None = None) -> Tensor:
    """The target's (tempered) log density up to a constant, with a minibatch scaled up to all N data: (C,)."""
    scale = 1.0 if batch is None else len(target.data) / len(batch)
    log_joint = target.log_prior(parameters) + scale * target.log_likelihood(parameters, batch)
    return log_joint / target.temperature
