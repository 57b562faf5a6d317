"""Reading and writing trained networks: safetensors that describe their network, and a model card in JSON beside."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

import bayesnn.pretrained
from bayesnn.configured import build, describe
from bayesnn.files import read_tensors, write_tensors


def save_network(path: str | Path, network: nn.Module, card: dict[str, Any]) -> None:
    """Write ``path`` (weights, the network's description and the card) and the card again as JSON beside it.

    The card gets the digest, ``sha256``, of the weights, the network's description and the card itself: they belong together.
    """
    path, card = Path(path), card | {"sha256": _digest(network, card)}
    write_tensors(path, network.state_dict(), {"network": describe(network), "card": card})
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path.with_suffix(".json"))


def load_network(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Build the network that :func:`save_network` wrote, in evaluation mode, and its card. Runs no code from the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it isn't a complete bayesnn file, holds something else than a network and its weights, or if the weights
            aren't those of its card, or the card isn't the one beside it.
    """
    tensors, description = read_tensors(path)
    if not isinstance(description, dict) or "network" not in description:
        raise ValueError(f"{str(path)!r} holds no network, but {sorted(description)}")
    card, beside = description.get("card"), Path(path).with_suffix(".json")
    if not isinstance(card, dict):
        raise ValueError(f"{str(path)!r} has no card: fetch or train it again")
    try:
        network = build(description["network"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} describes no network of this version: {error}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"{str(path)!r} describes a {type(network).__name__}, not a network")
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if wanted != found:
        differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise ValueError(f"{str(path)!r} has other weights than its network needs: {', '.join(differing[:5])}")
    built = {name: value.clone() for name, value in network.named_buffers()}
    network.load_state_dict(tensors)
    if not all(bool(value.isfinite().all()) for value in tensors.values()):
        raise ValueError(f"{str(path)!r} has weights that aren't finite: fetch or train it again")
    if any(not torch.equal(value, built[name]) for name, value in network.named_buffers()):
        raise ValueError(f"{str(path)!r} describes another network than its weights are of: fetch or train it again")
    if card.get("sha256") != _digest(network, card):
        raise ValueError(f"{str(path)!r} isn't as it was written, by its digest: fetch or train it again")
    if beside.exists() and _read_json(beside) != json.loads(json.dumps(card)):
        raise ValueError(
            f"{str(beside)!r} isn't the card that was written with {str(path)!r}: fetch or export it again"
        )
    return network.eval(), card


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # of JSON or of UTF-8
        return None


def _digest(network: nn.Module, card: dict[str, Any]) -> str:
    rest = {name: value for name, value in card.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps([describe(network), rest], sort_keys=True).encode())
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def pretrained_names() -> list[str]:
    """Names of the networks that ship with the package."""
    return sorted(path.stem for path in _folder().glob("*.safetensors"))


def load_pretrained(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The network ``name`` that ships with the package, a copy of one's own, and its model card.

    Raises:
        ValueError: if there is none of this name.
    """
    network, card = copy.deepcopy(shipped(name))
    return network.requires_grad_(True), card


def shipped(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """:func:`load_pretrained` without a copy: read and checked once in a process, and shared, so not to be changed.

    A search asks a new model for each suggestion, and to read a network takes several times as long as to ask it.
    """
    if name not in pretrained_names():
        raise ValueError(f"name must be one of {', '.join(pretrained_names())}; got {name!r}")
    path = _folder() / f"{name}.safetensors"
    return _shared(path, path.stat().st_mtime_ns)


@lru_cache
def _shared(path: Path, written_at: int) -> tuple[nn.Module, dict[str, Any]]:
    network, card = load_network(path)
    _SHARED.add(network)
    return network.requires_grad_(False), card


def frozen(network: nn.Module, like: Tensor) -> nn.Module:
    """The network as it is now, in a tensor's dtype and place, not to be changed: a copy, of a shared network one for all."""
    return (_frozen_once if network in _SHARED else _frozen)(network, like.dtype, like.device)


def _frozen(network: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    return copy.deepcopy(network).to(device, dtype).eval().requires_grad_(False)


_SHARED: WeakSet[nn.Module] = WeakSet()
_frozen_once = lru_cache(_frozen)


def _folder() -> Path:
    return Path(bayesnn.pretrained.__path__[0])
