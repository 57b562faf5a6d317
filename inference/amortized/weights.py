"""Reading and writing trained networks: safetensors that describe their network, and a model card in JSON beside."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import nn

import bayesnn.pretrained
from bayesnn.configured import build, describe
from bayesnn.files import read_tensors, write_tensors


def save_network(path: str | Path, network: nn.Module, card: dict[str, Any]) -> None:
    """Write ``path`` (weights, the network's description and the card) and the card again as JSON beside it."""
    path = Path(path)
    write_tensors(path, network.state_dict(), {"network": describe(network), "card": card})
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path.with_suffix(".json"))


def load_network(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Build the network that :func:`save_network` wrote, in evaluation mode, and its card. Runs no code from the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it isn't a complete bayesnn file, or holds something else than a network and its weights.
    """
    tensors, description = read_tensors(path)
    if "network" not in description:
        raise ValueError(f"{str(path)!r} holds no network, but {sorted(description)}")
    network = build(description["network"])
    if not isinstance(network, nn.Module):
        raise ValueError(f"{str(path)!r} describes a {type(network).__name__}, not a network")
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if wanted != found:
        differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise ValueError(f"{str(path)!r} has other weights than its network needs: {', '.join(differing[:5])}")
    network.load_state_dict(tensors)
    return network.eval(), description["card"]


def pretrained_names() -> list[str]:
    """Names of the networks that ship with the package."""
    return sorted(path.stem for path in _folder().glob("*.safetensors"))


def load_pretrained(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The network ``name`` that ships with the package, and its model card.

    Raises:
        ValueError: if there is none of this name.
    """
    if name not in pretrained_names():
        raise ValueError(f"name must be one of {', '.join(pretrained_names())}; got {name!r}")
    return load_network(_folder() / f"{name}.safetensors")


def _folder() -> Path:
    return Path(bayesnn.pretrained.__path__[0])
