"""Groups of parameters: which of them a structured sampler keeps together."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch

import torch
from torch import Tensor

Grouping = str | tuple[tuple[str, ...], ...]
NAMED = ("layer", "neuron", "parameter", "random", "permuted")


def check_grouping(groups: Grouping, num_groups: int | None) -> None:
    """Check that the groups are named, or patterns, and have a number where they need one.

    Raises:
        TypeError: if they are neither a name nor tuples of patterns.
        ValueError: if the name is unknown, or a number is missing or too much.
    """
    if isinstance(groups, str):
        if groups not in NAMED:
            raise ValueError(f"groups must be one of {', '.join(NAMED)}, or tuples of name patterns, found {groups!r}")
        if (groups in ("random", "permuted")) != (num_groups is not None):
            raise ValueError(f"num_groups goes with groups 'random' and 'permuted', found {num_groups} with {groups!r}")
        return
    if not isinstance(groups, Sequence) or not all(map(_are_patterns, groups)) or not groups:
        raise TypeError(
            f"groups must be one of {', '.join(NAMED)}, or tuples of name patterns, one for each group, found {groups!r}"
        )
    if num_groups is not None:
        raise ValueError("num_groups goes with groups 'random' and 'permuted', not with patterns")


def _are_patterns(group: object) -> bool:
    if isinstance(group, str) or not isinstance(group, Sequence):
        return False
    return all(isinstance(pattern, str) for pattern in group)


def assign(
    groups: Grouping, shapes: dict[str, torch.Size], num_groups: int | None, generator: torch.Generator
) -> Tensor:
    """The group of every parameter in the order of the flat vector, (P,), numbered from 0.

    Args:
        groups: "layer" (all tensors of a module), "neuron" (a row of a weight with its bias), "parameter" (each by itself),
            "random" or "permuted" (index modulo their number) with ``num_groups`` groups of equal size; or tuples of name
            patterns (as in a shell), one for each group.
        shapes: of the parameters.
        num_groups: for "random" and "permuted".
        generator: for "random".

    Raises:
        ValueError: if a parameter matches no pattern, or a pattern no parameter.
    """
    sizes = [shape.numel() for shape in shapes.values()]
    count = sum(sizes)
    if groups == "parameter":
        return torch.arange(count)
    if groups in ("random", "permuted"):
        assert num_groups is not None
        order = torch.randperm(count, generator=generator) if groups == "random" else torch.arange(count)
        return order % num_groups
    if isinstance(groups, str):
        keys: list[object] = []
        for name, shape in shapes.items():
            module = name.rpartition(".")[0]
            rows = shape[0] if groups == "neuron" and len(shape) else 1
            keys += [(module, row) for row in range(rows) for _ in range(shape.numel() // rows)]
    else:
        keys = []
        for name, size in zip(shapes, sizes, strict=True):
            matching = [index for index, patterns in enumerate(groups) if any(fnmatch(name, p) for p in patterns)]
            if not matching:
                raise ValueError(f"groups: parameter {name!r} matches no pattern in {groups}")
            keys += [matching[0]] * size
        unused = set(range(len(groups))) - set(keys)
        if unused:
            raise ValueError(
                f"groups: {[groups[index] for index in sorted(unused)]} match no parameter of {list(shapes)}"
            )
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return torch.tensor([numbers[key] for key in keys])
