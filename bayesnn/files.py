"""Writing tensors and JSON so that a killed process never leaves half a file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write tensors and a JSON description to one safetensors file, atomically (write beside, then rename)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(copies, partial, metadata={"description": json.dumps(description, sort_keys=True)})
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_tensors` wrote: the tensors and the description. Runs no code from the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it isn't a bayesnn file (truncated, tampered with, or something else).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {})["description"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not a complete bayesnn file: {error}") from error
    return tensors, description


def flatten(tree: Any, prefix: str = "") -> dict[str, Tensor]:
    """Name the tensors of nested dicts and named tuples by their path: ``{"state.params.weight": ...}``."""
    if isinstance(tree, Tensor):
        return {prefix: tree}
    return {
        name: tensor
        for key, child in children(tree)
        for name, tensor in flatten(child, f"{prefix}.{key}" if prefix else key).items()
    }


def unflatten(tensors: Mapping[str, Tensor], like: Any, prefix: str = "") -> Any:
    """Inverse of :func:`flatten`: fill the structure of ``like`` with the named tensors."""
    if isinstance(like, Tensor):
        return tensors[prefix].to(like.device)
    filled = {key: unflatten(tensors, child, f"{prefix}.{key}" if prefix else key) for key, child in children(like)}
    return filled if isinstance(like, dict) else type(like)(**filled)


def children(tree: Any) -> list[tuple[str, Any]]:
    if isinstance(tree, dict):
        return list(tree.items())
    if isinstance(tree, tuple) and hasattr(tree, "_asdict"):
        named: NamedTuple = tree  # type: ignore[assignment]
        return list(named._asdict().items())
    raise TypeError(f"a state is made of tensors, dicts and named tuples, not {type(tree).__name__}")


def fingerprint(*parts: Tensor | str) -> str:
    """A short hash of the contents of tensors and texts: tells whether a checkpoint belongs to these data."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode())
        else:
            digest.update(str((tuple(part.shape), part.dtype)).encode())
            digest.update(part.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


__all__ = ["fingerprint", "flatten", "read_tensors", "unflatten", "write_tensors"]
