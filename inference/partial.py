"""Partly stochastic networks: some parameters are sampled, the others stay where they were learned.

A posterior over a part of the weights can be as good as one over all, and is cheaper to sample (Sharma, Farquhar, Nalisnick
and Rainforth, Do Bayesian neural networks need to be fully stochastic?, 2023).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from fnmatch import fnmatch

from torch import nn

from bayesnn.inference.members import NETWORK
from bayesnn.inference.network_target import NetworkTarget
from bayesnn.inference.target import Parameters

Stochastic = str | Sequence[str]


def stochastic_names(network: nn.Module, stochastic: Stochastic) -> list[str]:
    """The names of the network's parameters that are to be sampled.

    A parameter that is used in several places goes by any of its names, and is given by its first.

    Args:
        network: any module; its frozen parameters (``requires_grad_(False)``) aren't sampled in any case.
        stochastic: "all"; "last": those of the last module, in the order of registration, that has parameters of its own;
            or names or patterns (as in a shell) of parameters.

    Raises:
        TypeError: if it is something else.
        ValueError: if a pattern matches no parameter, or frozen ones only.
    """
    first: dict[int, str] = {}
    names = {}  # every name to the first name of the same parameter
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names[name] = first.setdefault(id(parameter), name)
    free = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    if isinstance(stochastic, str):
        if stochastic not in ("all", "last"):
            raise ValueError(f"stochastic must be 'all', 'last' or a list of names or patterns, found {stochastic!r}")
        modules = {name: _module(name) for name in names}
        last = next((modules[name] for name in reversed(names) if names[name] in free), None)
        chosen = {names[name] for name in names if stochastic == "all" or modules[name] == last}
        return [name for name in free if name in chosen]
    if not isinstance(stochastic, Sequence) or not all(isinstance(pattern, str) for pattern in stochastic):
        raise TypeError(f"stochastic must be 'all', 'last' or a list of names or patterns, found {stochastic!r}")
    if not stochastic:
        raise ValueError(
            "stochastic must name at least one parameter, found an empty list; DeepEnsemble learns all of them"
        )
    chosen = set()
    for pattern in stochastic:
        matching = {names[name] for name in names if fnmatch(name, pattern)}
        if not matching:
            raise ValueError(f"stochastic: {pattern!r} matches none of the network's parameters {list(names)}")
        if matching.isdisjoint(free):
            raise ValueError(f"stochastic: {pattern!r} matches frozen parameters only: {sorted(matching)}")
        chosen |= matching
    return [name for name in free if name in chosen]


def _module(name: str) -> str:
    # A parametrised tensor's own parameters (weight normalisation …) belong to the layer that uses it.
    return name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]


def partial_target(target: NetworkTarget, names: Sequence[str], learned: Parameters) -> NetworkTarget:
    """The posterior of some of a network's parameters, and of the likelihood's, given the network's others.

    It is a target like any other, over a network whose other parameters are frozen. Below the first of the sampled
    parameters, features are computed once for all chains.

    Args:
        target: of all parameters.
        names: the network's parameters that are sampled, without their prefix.
        learned: values (*shape) of the others at least, by their full names.

    Raises:
        ValueError: if a name is none of the network's free parameters.
    """
    unknown = [name for name in names if NETWORK + name not in target.shapes()]
    if unknown:
        raise ValueError(f"names must be free parameters of the network, found {unknown}")
    network = copy.deepcopy(target.network)
    for name, parameter in network.named_parameters():
        if parameter.requires_grad and name not in names:
            parameter.requires_grad_(False).copy_(learned[NETWORK + name])
    return NetworkTarget(
        network, target.likelihood, target.prior, target.data, target.outcome_scale, target.temperature
    )
