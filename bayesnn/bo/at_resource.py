"""A search over configurations at one resource, with a model of configurations and resources together."""

from __future__ import annotations

from typing import Any

import torch
from botorch.models.model import Model as BotorchModel
from botorch.posteriors import Posterior
from torch import Tensor

from bayesnn.bo.space import Configuration, Space
from bayesnn.bo.training_features import training_features


class AtResource(Space):
    """A space whose codes (and features) have one more column, the last: a resource on the log scale, 0 to 1.

    What is looked for has the resource of the search, and so has whatever it is compared with.

    Args:
        space: of configurations.
        resource: of the search, its code.
        first: the code of the resource at which an evaluation gives its first value.
    """

    def __init__(self, space: Space, resource: float, first: float) -> None:
        self.space, self.resource, self.first = space, resource, first
        self.parameters, self.conditions = space.parameters, space.conditions

    @property
    def size(self) -> float:
        """How many configurations there are."""
        return self.space.size

    @property
    def bounds(self) -> Tensor:
        """The lowest and the highest code, (2, d + 1); the resource is fixed."""
        return _with(self.space.bounds, self.resource)

    def compared(self, codes: Tensor) -> Tensor:
        """Codes (n, d + 1), at any resources, at that of the search, each configuration once."""
        return _with(codes[:, :-1].unique(dim=0), self.resource)

    def begun(self, codes: Tensor) -> Tensor:
        """Codes (n, d + 1) at the resource where an evaluation that begins now gives its first value."""
        return _with(codes[:, :-1], self.first)

    def snap(self, codes: Tensor) -> Tensor:
        """The codes of the nearest configurations (*batch, d + 1), at the resource of the search."""
        return _with(self.space.snap(codes[..., :-1]), self.resource)

    def encode(self, codes: Tensor) -> Tensor:
        """Codes (*batch, d + 1) -> features (*batch, num_features + 1), at their own resources."""
        return torch.cat([self.space.encode(codes[..., :-1]), codes[..., -1:]], -1)

    def decode(self, features: Tensor) -> Tensor:
        """Features (n, num_features + 1) -> codes (n, d + 1), undoing :meth:`encode`."""
        return torch.cat([self.space.decode(features[..., :-1]), features[..., -1:].detach().double()], -1)

    def configurations(self, codes: Tensor) -> list[Configuration]:
        """Codes (n, d + 1) -> the nearest configurations."""
        return self.space.configurations(codes[..., :-1])

    def sobol(self, num_points: int, seed: int, skip: int = 0) -> Tensor:
        """The space's own sequence, at the resource of the search."""
        return _with(self.space.sobol(num_points, seed, skip), self.resource)

    def grid(self) -> Tensor:
        """The codes of all configurations, (size, d + 1), at the resource of the search."""
        return _with(self.space.grid(), self.resource)


class ModelAtResource(BotorchModel):
    """A joint model as one of configurations alone, each after the same resource.

    Args:
        joint: fitted to features with the resource's code as their last column.
        resource: the code.
    """

    def __init__(self, joint: BotorchModel, resource: float) -> None:
        super().__init__()
        self.joint, self.resource = joint, resource

    @property
    def num_outputs(self) -> int:
        return self.joint.num_outputs

    @property
    def batch_shape(self) -> torch.Size:
        return self.joint.batch_shape

    @property
    def train_inputs(self) -> tuple[Tensor]:
        """The features of the configurations that it knows something of, each once."""
        return (training_features(self.joint)[:, :-1].unique(dim=0),)

    def posterior(self, X: Tensor, *args: Any, **kwargs: Any) -> Posterior:
        """At features (*batch, q, num_features)."""
        return self.joint.posterior(_with(X, self.resource), *args, **kwargs)


def _with(values: Tensor, resource: float) -> Tensor:
    return torch.cat([values, torch.full_like(values[..., :1], resource)], -1)
