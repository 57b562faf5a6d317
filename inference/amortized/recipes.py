"""How the networks that ship with the package were made; running a recipe again continues or reproduces it.

    python -m bayesnn.inference.amortized.recipes pfn --out FOLDER [--checkpoint FOLDER] [--export]

trains from scratch, or from the checkpoint on if there is one, and writes ``pfn-gp-small.safetensors`` and its model
card. ``--export`` writes them from the checkpoint as it stands, without training.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from bayesnn.files import read_tensors
from bayesnn.histogram import prior_borders, prior_tail_scales
from bayesnn.inference.amortized.deep_set import DeepSetNetwork
from bayesnn.inference.amortized.meta_training import MetaInfo, MetaState, MetaTarget, MetaTraining, gap_to_exact
from bayesnn.inference.amortized.tasks import GPTasks, TaskPrior, standardise_context
from bayesnn.inference.amortized.transformer import SetTransformer
from bayesnn.inference.amortized.weights import save_network
from bayesnn.inference.run import run

SEED = 0
HELD_OUT_SEED = 1
CONTEXT_SIZES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 400)


class Recipe(NamedTuple):
    """A network, the prior over its tasks and its training."""

    name: str
    network: Callable[[TaskPrior], nn.Module]
    prior: GPTasks
    training: MetaTraining


def standardised_outcomes(prior: TaskPrior, generator: torch.Generator, num_batches: int = 400) -> torch.Tensor:
    """A sample of query values in standardised units, from contexts of 4 to 256 rows, to place histogram borders by."""
    values = []
    for _ in range(num_batches):
        n = int(4 * 64 ** torch.rand((), generator=generator).item())
        batch = prior(4, n + 32, generator)
        loc, scale = standardise_context(batch.y[:, :n])
        values += [(batch.y[:, n:] - loc) / scale, (batch.f[:, n:] - loc) / scale]
    return torch.cat([value.flatten() for value in values])


def set_transformer(prior: TaskPrior, num_buckets: int = 120) -> SetTransformer:
    """A transformer with borders from the prior."""
    samples = standardised_outcomes(prior, torch.Generator().manual_seed(SEED))
    borders = prior_borders(samples, num_buckets).float()
    tail_scales = prior_tail_scales(samples.float(), borders)
    return SetTransformer(GPTasks().max_features, borders.tolist(), tail_scales.tolist(), seed=SEED)


def deep_set(prior: TaskPrior) -> DeepSetNetwork:
    """A conditional neural process's network."""
    return DeepSetNetwork(GPTasks().max_features, seed=SEED)


RECIPES = {
    "pfn": Recipe(
        "pfn-gp-small",
        set_transformer,
        GPTasks(),
        MetaTraining(
            num_steps=30_000,
            max_context=400,
            num_queries=40,
            rows_per_step=1536,
            max_tasks=24,
            lr=1e-3,
            num_warmup=1000,
        ),
    ),
    "cnp": Recipe(
        "cnp-gp-small",
        deep_set,
        GPTasks(),
        MetaTraining(
            num_steps=30_000,
            max_context=400,
            num_queries=48,
            rows_per_step=3072,
            max_tasks=48,
            lr=1e-3,
            num_warmup=1000,
        ),
    ),
}


def train(
    recipe: Recipe, checkpoint: str | Path | None, log: Callable[[str], None] = print, log_every: int = 200
) -> nn.Module:
    """Run a recipe to its end."""
    network = recipe.network(recipe.prior)
    losses: list[float] = []

    def report(index: int, state: MetaState, info: MetaInfo) -> None:
        losses.append(float(info.loss))
        if (index + 1) % log_every == 0:
            recent = torch.tensor(losses[-log_every:])
            log(f"step {index + 1} median loss {recent.median():.4f} mean loss {recent.mean():.4f}")

    target = MetaTarget(network, recipe.prior)
    run(recipe.training, target, seed=SEED, callbacks=[report], checkpoint=checkpoint, checkpoint_every=log_every)
    return network


def from_checkpoint(recipe: Recipe, checkpoint: str | Path) -> tuple[nn.Module, int]:
    """The network as the checkpoint left it, and the number of steps behind it."""
    tensors, description = read_tensors(Path(checkpoint) / "state.safetensors")
    network = recipe.network(recipe.prior)
    prefix = "state.params."
    params = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    network.load_state_dict(network.state_dict() | params)
    return network, int(description["step"])


def export(
    recipe: Recipe, network: nn.Module, num_steps: int, folder: str | Path, num_tasks: int = 512
) -> dict[str, Any]:
    """Measure the network on held-out tasks and write weights and card into ``folder``; returns the card."""
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    card = {
        "name": recipe.name,
        "network": type(network).__name__,
        "num_parameters": sum(parameter.numel() for parameter in network.parameters()),
        "max_features": recipe.prior.max_features,
        "max_context": recipe.training.max_context,
        "prior": {"class": type(recipe.prior).__name__} | asdict(recipe.prior),
        "training": asdict(recipe.training),
        "steps_done": num_steps,
        "seed": SEED,
        "hardware": "CPU, one thread",
        "torch": torch.__version__,
        "licence": "MIT",
        "held_out": {
            "what": "fresh draws of the prior; nats per query; the exact GP knows each task's hyperparameters",
            "seed": HELD_OUT_SEED,
            "num_tasks": num_tasks,
            "by_context_size": gap_to_exact(network.eval(), recipe.prior, generator, num_tasks, CONTEXT_SIZES),
        },
    }
    save_network(Path(folder) / f"{recipe.name}.safetensors", network, card)
    return card


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train a network that ships with the package.")
    parser.add_argument("recipe", choices=sorted(RECIPES))
    parser.add_argument("--out", required=True, help="folder for the weights and the model card")
    parser.add_argument("--checkpoint", help="folder to continue from and to keep the state in")
    parser.add_argument("--export", action="store_true", help="write the checkpoint's weights without training")
    options = parser.parse_args(arguments)
    recipe = RECIPES[options.recipe]
    if options.export:
        if options.checkpoint is None:
            parser.error("--export needs --checkpoint")
        network, num_steps = from_checkpoint(recipe, options.checkpoint)
    else:
        network, num_steps = train(recipe, options.checkpoint), recipe.training.num_steps
    card = export(recipe, network, num_steps, options.out)
    print(json.dumps(card["held_out"], indent=2))


if __name__ == "__main__":
    main()
