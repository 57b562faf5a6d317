"""How networks that answer by one forward pass are made: a recipe is a file, and running it again reproduces its network.

    bayesnn pretrain RECIPE --out FOLDER [--checkpoint FOLDER] [--devices N] [--precision bf16-mixed]

trains a network, or goes on from the checkpoint, and writes its weights and its model card. The recipes of the networks
that ship with the package ship with it (``bayesnn pretrain gp-small``).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bayesnn.pretrained
from bayesnn.checks import check_fields, count
from bayesnn.configured import Configured, build, describe
from bayesnn.files import read_tensors
from bayesnn.histogram import prior_borders, prior_tail_scales
from bayesnn.inference.amortized.deep_set import DeepSetNetwork
from bayesnn.inference.amortized.gaps import gap_to_exact, held_out_nll
from bayesnn.inference.amortized.meta_training import MetaInfo, MetaState, MetaTarget, MetaTraining
from bayesnn.inference.amortized.tasks import TaskBatch
from bayesnn.inference.amortized.transformer import SetClassifier, SetTransformer
from bayesnn.inference.amortized.weights import save_network
from bayesnn.inference.run import run

HELD_OUT_SEED = 1
CONTEXT_SIZES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)
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

    Raises:
        ValueError: for an unknown kind of network, or numbers out of range.
    """

    name: str
    prior: Any
    training: MetaTraining
    network: str = "transformer"
    settings: dict[str, Any] | None = None
    num_buckets: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, partial(count, least=3), "num_buckets")
        check_fields(self, partial(count, least=0), "seed")
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

    def build_network(self) -> nn.Module:
        """Untrained.

        Raises:
            ValueError: for settings that the network doesn't have.
        """
        try:
            return NETWORKS[self.network](self, **(self.settings or {}))
        except TypeError as error:
            raise ValueError(f"settings of the recipe {self.name!r} don't fit its network: {error}") from error


def _transformer(recipe: Recipe, **settings: Any) -> SetTransformer:
    batch = _sample(recipe)
    samples = torch.cat([values.flatten() for values in (batch.y, batch.f) if values is not None]).float()
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


def _sample(recipe: Recipe) -> TaskBatch:
    return recipe.prior(NUM_SAMPLES, 16, torch.Generator().manual_seed(recipe.seed))


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


def launched_fabric(accelerator: str, devices: int, precision: str) -> Any:
    """Lightning's Fabric, with its processes started.

    Raises:
        ValueError: if it isn't installed.
    """
    try:
        from lightning_fabric import Fabric  # an optional dependency
    except ImportError as error:
        raise ValueError("other devices and precisions need lightning-fabric: pip install bayesnn[pretrain]") from error
    fabric = Fabric(accelerator=accelerator, devices=devices, precision=precision)  # type: ignore[arg-type]
    fabric.launch()
    return fabric


def train(
    recipe: Recipe,
    checkpoint: str | Path | None = None,
    fabric: Any = None,
    log: Callable[[str], None] = print,
    log_every: int = 200,
) -> nn.Module:
    """Run a recipe to its end, from the checkpoint on if there is one.

    Args:
        recipe: what is trained on what.
        checkpoint: a folder that the state is kept in.
        fabric: a launched ``Fabric``: its device, precision and the other processes; the step's gradient is the mean over
            all processes, each of which draws tasks of its own. None: this process, on the CPU.
        log: told of the loss, and where the prior knows it of the gap to the exact answer on 16 tasks.
        log_every: steps between.

    Returns:
        The network, on the CPU.
    """
    count("log_every", log_every)
    network = recipe.build_network()
    rank = 0
    if fabric is not None:
        network, rank = network.to(fabric.device), fabric.global_rank
    losses: list[float] = []

    def report(index: int, state: MetaState, info: MetaInfo) -> None:
        losses.append(float(info.loss))
        if (index + 1) % log_every == 0 and rank == 0:
            recent = torch.tensor(losses[-log_every:])
            log(f"step {index + 1} mean loss {recent.mean():.4f}{_live_gap(recipe, network, state)}")

    target = MetaTarget(network, recipe.prior, fabric)
    place = checkpoint
    if checkpoint is not None and fabric is not None and fabric.world_size > 1:
        place = _own_copy(Path(checkpoint), fabric)
    run(recipe.training, target, seed=recipe.seed, callbacks=[report], checkpoint=place, checkpoint_every=log_every)
    return network.cpu()


def _own_copy(checkpoint: Path, fabric: Any) -> Path:
    """Where a process keeps the state, which is the same for all: at the start each has a copy of the first one's."""
    name = "state.safetensors"
    if fabric.global_rank == 0:
        for rank in range(1, fabric.world_size):
            folder = checkpoint / f"process-{rank}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).unlink(missing_ok=True)
            if (checkpoint / name).exists():
                shutil.copyfile(checkpoint / name, folder / name)
    fabric.barrier()
    return checkpoint / f"process-{fabric.global_rank}" if fabric.global_rank else checkpoint


def _live_gap(recipe: Recipe, network: nn.Module, state: MetaState) -> str:
    if not hasattr(recipe.prior, "exact"):
        return ""
    n = min(16, recipe.training.max_context)
    device = next(iter(state.average.values())).device
    generator = torch.Generator(device).manual_seed(HELD_OUT_SEED)
    network.load_state_dict(network.state_dict() | state.average)
    row = gap_to_exact(network, recipe.prior, generator, 16, (n,), num_queries=16)[str(n)]
    return f", gap to the exact answer at n = {n}: {row['gap_y']:.3f} nats"


def note_hardware(checkpoint: str | Path, hardware: str) -> str:
    """Keep beside the state what it is trained on, for the card; returns all that it has been trained on."""
    path = Path(checkpoint) / "hardware.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if hardware not in lines:
        lines.append(hardware)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return "; ".join(lines)


def noted_hardware(checkpoint: str | Path) -> str:
    """What :func:`note_hardware` has kept, or "not noted"."""
    path = Path(checkpoint) / "hardware.txt"
    return "; ".join(path.read_text(encoding="utf-8").splitlines()) if path.exists() else "not noted"


def from_checkpoint(recipe: Recipe, checkpoint: str | Path) -> tuple[nn.Module, int]:
    """The network as the checkpoint left it, and the number of steps behind it.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if it is damaged, or of another recipe.
    """
    tensors, description = read_tensors(Path(checkpoint) / "state.safetensors")
    network = recipe.build_network()
    wanted = {
        "method": describe(recipe.training),
        "target": MetaTarget(network, recipe.prior).fingerprint,
        "seed": recipe.seed,
    }
    for key, value in wanted.items():
        if description.get(key) != json.loads(json.dumps(value)):
            raise ValueError(
                f"checkpoint {str(checkpoint)!r} isn't of the recipe {recipe.name!r}: it has another {key}"
            )
    prefix = "state.average."
    params = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    network.load_state_dict(network.state_dict() | params)
    return network, int(description["step"])


def export(
    recipe: Recipe, network: nn.Module, num_steps: int, folder: str | Path, hardware: str, num_tasks: int = 512
) -> dict[str, Any]:
    """Measure the network on held-out tasks and write weights and card into ``folder``; returns the card."""
    card = {
        "name": recipe.name,
        "recipe": describe(recipe),
        "num_parameters": sum(parameter.numel() for parameter in network.parameters()),
        "max_features": recipe.prior.max_features,
        "max_context": recipe.training.max_context,
        "seed": recipe.seed,
        "steps_done": num_steps,
        "hardware": hardware,
        "torch": torch.__version__,
        "licence": "MIT",
    }
    measure = gap_to_exact if hasattr(recipe.prior, "exact") else held_out_nll
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    most = recipe.training.max_context
    sizes = [*(n for n in CONTEXT_SIZES if n < most), most]
    card["held_out"] = {
        "what": "fresh draws of the prior; nats per query; what the exact answer knows is in the prior's documentation",
        "seed": HELD_OUT_SEED,
        "num_tasks": num_tasks,
        "by_context_size": measure(network.eval(), recipe.prior, generator, num_tasks, sizes),
    }
    save_network(Path(folder) / f"{recipe.name}.safetensors", network, card)
    return card
