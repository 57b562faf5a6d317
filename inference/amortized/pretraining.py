"""How networks that answer by one forward pass are trained by their recipes, watched, resumed and written down.

    bayesnn pretrain RECIPE --out FOLDER [--checkpoint FOLDER] [--start FILE] [--devices N] [--precision bf16-mixed]

trains a network, or goes on from the checkpoint, and writes its weights and its model card (``bayesnn pretrain gp-small``).
"""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bayesnn.checks import count
from bayesnn.configured import describe
from bayesnn.files import read_tensors
from bayesnn.inference.amortized.gaps import gap_to_exact, held_out_nll
from bayesnn.inference.amortized.meta_training import MetaInfo, MetaState, MetaTarget
from bayesnn.inference.amortized.recipes import Recipe
from bayesnn.inference.amortized.weights import load_network, save_network
from bayesnn.inference.run import run

HELD_OUT_SEED = 1
CONTEXT_SIZES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)


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
    start: nn.Module | None = None,
) -> nn.Module:
    """Run a recipe to its end, from the checkpoint on if there is one.

    Args:
        recipe: what is trained on what.
        checkpoint: a folder that the state is kept in.
        fabric: a launched ``Fabric``: its device, precision and the other processes; the step's gradient is the mean over
            all processes, each of which draws tasks of its own. None: this process, on the CPU.
        log: told of the loss, and where the prior knows it of the gap to the exact answer on 16 tasks.
        log_every: steps between.
        start: the trained network of the recipe before, see :func:`load_start`; None: that recipe is run first, if there is
            one, with its state in the checkpoint's folder ``before``.

    Returns:
        The network, on the CPU.
    """
    count("log_every", log_every)
    if recipe.before is not None and start is None:
        folder = None if checkpoint is None else Path(checkpoint) / "before"
        start = train(recipe.before, folder, fabric, log, log_every)
    network = recipe.build_network(start).train()
    rank = 0
    if fabric is not None:
        network, rank = network.to(fabric.device), fabric.global_rank
    losses: deque[float] = deque(maxlen=log_every)

    def report(index: int, state: MetaState, info: MetaInfo) -> None:
        losses.append(float(info.loss))
        if (index + 1) % log_every == 0 and rank == 0:
            log(f"step {index + 1} mean loss {sum(losses) / len(losses):.4f}{_live_gap(recipe, network, state)}")

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


def load_start(recipe: Recipe, path: str | Path) -> tuple[nn.Module, str]:
    """The network of the recipe before, from its file, and what it was trained on.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the recipe has none before it, or the file is of another, or its training didn't end.
    """
    if recipe.before is None:
        raise ValueError(f"the recipe {recipe.name!r} begins with random weights, so there is no start")
    network, card = load_network(path)
    if card.get("recipe") != json.loads(json.dumps(describe(recipe.before))):
        raise ValueError(f"{str(path)!r} isn't of the recipe before {recipe.name!r}, by its card")
    if card.get("steps_done") != recipe.before.training.num_steps:
        raise ValueError(
            f"{str(path)!r} has {card.get('steps_done')} steps behind it, its recipe has {recipe.before.training.num_steps}"
        )
    return network, str(card.get("hardware"))


def from_checkpoint(recipe: Recipe, checkpoint: str | Path, start: nn.Module | None = None) -> tuple[nn.Module, int]:
    """The network as the checkpoint left it, and the number of steps behind it; ``start`` is that of :func:`train`.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if it is damaged, or of another recipe.
    """
    tensors, description = read_tensors(Path(checkpoint) / "state.safetensors")
    if recipe.before is not None and start is None:
        start, _ = from_checkpoint(recipe.before, Path(checkpoint) / "before")
    network = recipe.build_network(start)
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


def steps_before(recipe: Recipe) -> int:
    """Of the trainings that its own goes on from."""
    return 0 if recipe.before is None else recipe.before.training.num_steps + steps_before(recipe.before)


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
        "steps_before": steps_before(recipe),
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
