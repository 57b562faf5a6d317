"""Recipes: a network, the prior over its tasks and its training, as a file. Those of the networks that ship, ship too."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bayesnn.pretrained
from bayesnn.checks import check_fields, count, positive
from bayesnn.configured import Configured, build, describe
from bayesnn.histogram import prior_borders, prior_tail_scales, refined_borders
from bayesnn.inference.amortized.deep_set import DeepSetNetwork
from bayesnn.inference.amortized.meta_training import MetaTraining
from bayesnn.inference.amortized.transformer import SetClassifier, SetTransformer

NUM_SAMPLES = 4000  # tasks by whose outcomes a histogram's borders are placed


@dataclass(frozen=True)
class Recipe(Configured):
    """A network, the prior over its tasks and its training.

    Attributes:
        name: of the file.
        prior: over tasks, with ``max_features``.
        training: steps, context sizes, learning rate …
        network: "transformer", "classifier" (of a prior's ``max_classes``) or "deep-set".
        settings: of the network: ``width``, ``num_layers`` …
        num_buckets: of a transformer's histograms, whose borders come from the prior.
        seed: of the initial weights and of the training.
        before: the recipe of the network that this training goes on from, which also says what kind of network it is; None:
            it begins with random weights.
        max_width: with ``before``, the histograms' buckets are split until none is wider, and more are added outside them, as
            far as this prior's outcomes reach; the predictions at the start stay the same (but in the tails, where they get
            the new buckets' shape). None: they stay as they are.
        more_layers: with ``before``, so many are added to a transformer's or a classifier's, the identity at the start.
        num_processes: with ``before``, so many Gaussian processes are added beside a transformer's histograms, see
            ``process_heads``.

    Raises:
        ValueError: for an unknown kind of network, numbers out of range, a ``max_width`` of a network without histograms, or
            ``more_layers`` of one without layers.
    """

    name: str
    prior: Any
    training: MetaTraining
    network: str = "transformer"
    settings: dict[str, Any] | None = None
    num_buckets: int = 200
    seed: int = 0
    before: Recipe | None = None
    max_width: float | None = None
    more_layers: int = 0
    num_processes: int = 0

    def __post_init__(self) -> None:
        check_fields(self, partial(count, least=3), "num_buckets")
        check_fields(self, partial(count, least=0), "seed", "more_layers", "num_processes")
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name):
            raise ValueError(f"name must be a file's name of letters, digits, '-', '_' and '.', found {self.name!r}")
        if not isinstance(self.training, MetaTraining):
            raise TypeError(f"training must be a MetaTraining, found {type(self.training).__name__}")
        if not callable(self.prior) or not hasattr(self.prior, "max_features"):
            raise TypeError(f"prior must be a prior over tasks that has max_features, found {self.prior!r}")
        if self.settings is not None and not isinstance(self.settings, dict):
            raise TypeError(f"settings must be a dictionary or None, found {self.settings!r}")
        if (self.network == "classifier") != hasattr(self.prior, "max_classes") and self.network in NETWORKS:
            raise ValueError(
                f"network must be 'classifier' for a prior of classes, and no other, found {self.network!r}"
            )
        if self.network not in NETWORKS:
            raise ValueError(f"network must be one of {', '.join(NETWORKS)}, found {self.network!r}")
        if self.before is None and self.max_width is not None:
            raise ValueError("max_width refines the network of a recipe before, and there is none: choose num_buckets")
        if self.before is None and self.more_layers:
            raise ValueError("more_layers deepens the network of a recipe before, and there is none: choose num_layers")
        if self.before is None and self.num_processes:
            raise ValueError(
                "num_processes are added to the network of a recipe before, and there is none: take settings"
            )
        if self.before is not None:
            self._check_before(self.before)

    def _check_before(self, before: Any) -> None:
        if not isinstance(before, Recipe):
            raise TypeError(f"before must be a Recipe or None, found {type(before).__name__}")
        if (before.network, before.settings) != (self.network, self.settings):
            raise ValueError(
                f"network and settings must be those of the recipe before, {before.network!r} and {before.settings}, found "
                f"{self.network!r} and {self.settings}"
            )
        if before.prior.max_features != self.prior.max_features:
            raise ValueError(
                f"prior must have as many features as the one before, {before.prior.max_features}, found "
                f"{self.prior.max_features}"
            )
        if self.max_width is not None:
            positive("max_width", self.max_width)
            if self.network != "transformer":
                raise ValueError(f"max_width is of histograms, which a network of kind {self.network!r} doesn't have")
        if self.num_processes and self.network != "transformer":
            raise ValueError(f"num_processes is of transformers, a network of kind {self.network!r} has none")
        if self.more_layers and self.network == "deep-set":
            raise ValueError("more_layers is of transformers, a network of kind 'deep-set' has none")

    def build_network(self, before: nn.Module | None = None) -> nn.Module:
        """As the training begins with it.

        Args:
            before: the trained network of the recipe before; None: an untrained one.

        Raises:
            ValueError: for settings that the network doesn't have.
        """
        if self.before is not None:
            network = self.before.build_network() if before is None else before
            if self.max_width is not None:
                network = _refined(network, self, self.max_width)
            network = _deepened(network, self) if self.more_layers else network
            return _with_processes(network, self) if self.num_processes else network
        try:
            return NETWORKS[self.network](self, **(self.settings or {}))
        except TypeError as error:
            raise ValueError(f"settings of the recipe {self.name!r} don't fit its network: {error}") from error


def _transformer(recipe: Recipe, **settings: Any) -> SetTransformer:
    samples = _outcomes(recipe)
    borders = prior_borders(samples, recipe.num_buckets)
    tails, largest = prior_tail_scales(samples, borders), _largest(recipe)
    return SetTransformer(
        recipe.prior.max_features, borders.tolist(), tails.tolist(), largest=largest, seed=recipe.seed, **settings
    )


def _classifier(recipe: Recipe, **settings: Any) -> SetClassifier:
    largest = _largest(recipe)[:1]
    return SetClassifier(
        recipe.prior.max_features, recipe.prior.max_classes, largest=largest, seed=recipe.seed, **settings
    )


def _deep_set(recipe: Recipe, **settings: Any) -> DeepSetNetwork:
    return DeepSetNetwork(recipe.prior.max_features, largest=_largest(recipe), seed=recipe.seed, **settings)


def _refined(network: nn.Module, recipe: Recipe, max_width: float) -> SetTransformer:
    assert isinstance(network, SetTransformer)
    samples = _outcomes(recipe)
    borders = refined_borders(network.borders, samples, max_width)
    return network.refined(borders.tolist(), prior_tail_scales(samples, borders).tolist())


def _deepened(network: nn.Module, recipe: Recipe) -> nn.Module:
    assert isinstance(network, SetTransformer | SetClassifier)
    return network.deepened(recipe.more_layers, recipe.seed)


def _with_processes(network: nn.Module, recipe: Recipe) -> nn.Module:
    assert isinstance(network, SetTransformer)
    return network.with_processes(recipe.num_processes, recipe.seed)


def _outcomes(recipe: Recipe) -> Tensor:
    batch = recipe.prior(NUM_SAMPLES, 16, torch.Generator().manual_seed(recipe.seed))
    return torch.cat([values.flatten() for values in (batch.y, batch.f) if values is not None]).float()


def _largest(recipe: Recipe) -> list[float]:
    """Of inputs and outcomes, in tasks as long as the longest in training."""
    rows = recipe.training.max_context + recipe.training.num_queries
    batch = recipe.prior(max(1, NUM_SAMPLES * 16 // rows), rows, torch.Generator().manual_seed(recipe.seed))
    return [float(values.abs().max()) for values in (batch.X, batch.y)]


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "transformer": _transformer,
    "classifier": _classifier,
    "deep-set": _deep_set,
}


def read_recipe(path: str | Path) -> Recipe:
    """The recipe of a file, or that of a network that ships with the package, by its name.

    Raises:
        FileNotFoundError: if there is neither.
        ValueError: if the file holds no recipe.
    """
    shipped = Path(bayesnn.pretrained.__path__[0]) / "recipes" / f"{path}.json"
    place = shipped if shipped.exists() else Path(path)
    if not place.exists():
        names = sorted(file.stem for file in shipped.parent.glob("*.json"))
        raise FileNotFoundError(f"no recipe {str(path)!r}: want a file, or one of {', '.join(names)}")
    try:
        description = json.loads(place.read_text(encoding="utf-8"))
        settings = description["arguments"].get("settings")
        if isinstance(settings, dict) and "dict" not in settings:  # as people write it
            description["arguments"]["settings"] = {"dict": settings}
        recipe = build(description)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{str(path)!r} holds no recipe: {error}") from error
    if not isinstance(recipe, Recipe):
        raise ValueError(f"{str(path)!r} holds no recipe, but a {type(recipe).__name__}")
    return recipe


def write_recipe(path: str | Path, recipe: Recipe) -> None:
    """Write a recipe as JSON.

    Raises:
        TypeError: for a prior of your own that isn't ``Configured``.
    """
    Path(path).write_text(json.dumps(describe(recipe), indent=2) + "\n", encoding="utf-8")
