"""Partly stochastic networks: some parameters are sampled, the others stay where they were learned.

A posterior over a part of the weights can be as good as one over all, and is cheaper to sample (Sharma, Farquhar, Nalisnick
and Rainforth, Do Bayesian neural networks need to be fully stochastic?, 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from bayesnn.data import Data
from bayesnn.files import fingerprint
from bayesnn.inference.target import LIKELIHOOD, NETWORK, NetworkTarget, Parameters

Stochastic = str | Sequence[str]


def stochastic_names(network: nn.Module, stochastic: Stochastic) -> list[str]:
    """The names of the network's parameters that are to be sampled.

    Args:
        network: any module.
        stochastic: "all"; "last": those of the last module, in the order of registration, that has parameters of its own;
            or names or patterns (as in a shell) of parameters.

    Raises:
        ValueError: if a pattern matches no parameter.
    """
    names = [name for name, _ in network.named_parameters()]
    if isinstance(stochastic, str):
        if stochastic == "all":
            return names
        if stochastic != "last":
            raise ValueError(f"stochastic must be 'all', 'last' or a list of names or patterns, found {stochastic!r}")
        last = names[-1].rpartition(".")[0]
        return [name for name in names if name.rpartition(".")[0] == last]
    if not stochastic:
        raise ValueError(
            "stochastic must name at least one parameter, found an empty list; DeepEnsemble learns all of them"
        )
    for pattern in stochastic:
        if not any(fnmatch(name, pattern) for name in names):
            raise ValueError(f"stochastic: {pattern!r} matches none of the network's parameters {names}")
    return [name for name in names if any(fnmatch(name, pattern) for pattern in stochastic)]


class PartialTarget:
    """The posterior of some of a network's parameters given the others; the likelihood's parameters are sampled too.

    Args:
        target: of all parameters.
        names: the network's parameters that are sampled, without their prefix.
        learned: values of all parameters, (*shape) each: the others stay there, and chains begin there.
    """

    def __init__(self, target: NetworkTarget, names: Sequence[str], learned: Parameters) -> None:
        self._target = target
        sampled = {NETWORK + name for name in names}
        self._shapes = {n: shape for n, shape in target.shapes().items() if n in sampled or n.startswith(LIKELIHOOD)}
        self._learned = {name: learned[name] for name in self._shapes}
        self.fixed_parameters = {name: learned[name] for name in target.shapes() if name not in self._shapes}
        self.flat_gaussian_prior = None
        self.fingerprint = fingerprint(target.fingerprint, *sorted(self._shapes), *self.fixed_parameters.values())

    def __getattr__(self, name: str) -> Any:
        if name == "_target":  # while being unpickled in another process
            raise AttributeError(name)
        return getattr(self._target, name)

    def shapes(self) -> dict[str, torch.Size]:
        """Of the sampled parameters."""
        return self._shapes

    def initial(self, count: int, generator: torch.Generator) -> Parameters:
        """All chains at the learned values."""
        return {name: value.expand(count, *value.shape).clone() for name, value in self._learned.items()}

    def sample_prior(self, count: int, generator: torch.Generator) -> Parameters:
        """Draws from the prior of the sampled parameters."""
        drawn = self._target.sample_prior(count, generator)
        return {name: drawn[name] for name in self._shapes}

    def completed(self, parameters: Parameters) -> Parameters:
        """All parameters: those given, and the fixed ones for each of them (views, not copies)."""
        count = next(iter(parameters.values())).shape[0]
        return parameters | {name: value.expand(count, *value.shape) for name, value in self.fixed_parameters.items()}

    def log_prior(self, parameters: Parameters) -> Tensor:
        """Of the sampled parameters, (C,)."""
        return self._target.log_prior(parameters)

    def log_likelihood(self, parameters: Parameters, batch: Data | None = None) -> Tensor:
        """The sum over the batch of log p(y | x, theta), (C,)."""
        return self._target.log_likelihood(self.completed(parameters), batch)

    def pointwise_log_likelihood(self, parameters: Parameters, batch: Data | None = None) -> Tensor:
        """log p(y | x, theta) of every row of the batch, (C, |B|)."""
        return self._target.pointwise_log_likelihood(self.completed(parameters), batch)
