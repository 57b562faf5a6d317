"""Learned block proposals on grids that they weren't trained on: effective samples, against Gibbs sampling.

    python benchmarks/learned_proposals.py [--quick]

One proposal for blocks of 2 x 2 binary variables is meta-trained on random grids, once. It is then used on unseen grids:
random ones (tables of standard normals times a coupling, as frustrated as a spin glass) and an ordered one (an Ising model at
inverse temperature 0.4). All 2 x 2 blocks are visited, stride 1, those that aren't neighbours at the same time. Peers:

- single sites: Gibbs sampling of one variable at a time, all sites of one colour of the chessboard at the same time;
- sites in turn: the same without the chessboard, one site after another, as it is usually written (smaller grids only);
- exact blocks: Gibbs sampling of the very same blocks by enumeration of their 16 values, the best that any proposal can do.

A site's effective sample size is that of the mean of its value, over 16 chains. Rows are about the median site and the worst
one (of those whose probability is within 0.02 … 0.98 by exact blocks), per second with warm-up included, and per sweep.
Where the worst site has hardly more effective samples than there are chains, those chains have not found each other, and
the figure is too high rather than too low. One thread: the tensors are small.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import torch
from harness import row, seconds, write
from torch import Tensor

from bayesnn.inference import run
from bayesnn.inference.ess import effective_sample_size
from bayesnn.inference.mcmc.learned import (
    BlockMetropolis,
    BlockProposal,
    BlockTarget,
    Gibbs,
    Grid,
    GridBlocks,
    ProposalTarget,
    ProposalTraining,
)
from bayesnn.inference.mcmc.learned.target import Group

NUM_CHAINS = 16


def ising(size: int, inverse_temperature: float) -> Grid:
    """No field, and the same preference for equal neighbours everywhere."""
    table = inverse_temperature * torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    return Grid(torch.zeros(size, size, 2), table.expand(size, size - 1, 2, 2), table.expand(size - 1, size, 2, 2))


def in_turn(grid: Grid) -> BlockTarget:
    """Sites that are visited one after another."""
    target = BlockTarget(grid, grid.blocks(1, 1))
    target.groups = [Group(block.variables.unsqueeze(0), grid.conditionals([block])) for block in target.blocks]
    return target


class Case:
    """One sampler on one grid: draws are kept after a warm-up of a quarter of them."""

    def __init__(self, method: BlockMetropolis, target: BlockTarget, num_draws: int) -> None:
        self.method = dataclasses.replace(method, num_chains=NUM_CHAINS, num_warmup=num_draws // 4, num_draws=num_draws)
        self.target, self.time, self.acceptance = target, 0.0, 0.0
        run(dataclasses.replace(self.method, num_warmup=2, num_draws=2), target)

    def values(self, seed: int) -> Tensor:
        """Draws (chains, draws, sites), timed."""
        found: list[Any] = []
        self.time = seconds(lambda: found.append(run(self.method, self.target, seed=seed)))
        self.acceptance = float(found[0].statistics["acceptance"].mean())
        return found[0].by_chain(found[0].parameters["values"].double())

    def measure(self, seed: int, sites: Tensor) -> dict[str, float]:
        """Effective samples of the median and the worst site, per second and per sweep of one chain."""
        sizes = effective_sample_size(self.values(seed)[..., sites]).nan_to_num(nan=0.0)
        sweeps = NUM_CHAINS * self.method.num_draws
        return {
            f"ESS {site}, per {unit}": float(size) / amount
            for site, size in (("median site", sizes.median()), ("worst site", sizes.min()))
            for unit, amount in (("second", self.time), ("sweep", sweeps))
        }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less training, the smaller grids and one seed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    num_steps, seeds, scale = (500, 1, 1) if options.quick else (3000, 2, 2)
    source = GridBlocks(2, 2, max_coupling=4.0)
    examples = source(4000, torch.Generator().manual_seed(1))
    proposal = BlockProposal(4, examples.conditional.features.shape[-1], 2, hidden=64)
    trained: list[BlockProposal] = []
    training = ProposalTraining(num_steps=num_steps, batch_size=512, learning_rate=4e-3)
    training_time = seconds(lambda: trained.append(run(training, ProposalTarget(proposal, source))))
    with torch.no_grad():
        divergence = examples.conditional.exact().log_prob(examples.values) - trained[0](examples.conditional).log_prob(
            examples.values
        )
    rows, acceptances = [], {}
    for size in (10,) if options.quick else (10, 20):
        grids = {
            f"random, coupling {coupling:g}": Grid.random(size, size, 2, coupling, torch.Generator().manual_seed(6))
            for coupling in (1.0, 2.0, 3.0)
        } | {"ordered, 0.4": ising(size, 0.4)}
        for name, grid in grids.items():
            blocks, case = grid.blocks(2, 2), f"{size} x {size}, {name}"
            ours = Case(BlockMetropolis(), BlockTarget(grid, blocks, trained[0]), 200 * scale)
            peers = {
                "exact blocks": Case(Gibbs(), BlockTarget(grid, blocks), 200 * scale),
                "single sites": Case(Gibbs(), BlockTarget(grid, grid.blocks(1, 1)), 1600 * scale),
            }
            if size == 10:
                peers["sites in turn"] = Case(Gibbs(), in_turn(grid), 100 * scale)
            mean = peers["exact blocks"].values(100).mean((0, 1))
            sites = ((mean > 0.02) & (mean < 0.98)).nonzero().flatten()
            found: dict[str, list[dict[str, float]]] = {"ours": [], **{peer: [] for peer in peers}}
            for seed in range(seeds):
                for label, sampler in {"ours": ours, **peers}.items():
                    found[label].append(sampler.measure(seed, sites))
            acceptances[case] = ours.acceptance
            for peer in peers:
                for metric in found["ours"][0]:
                    own, other = ([run_[metric] for run_ in found[label]] for label in ("ours", peer))
                    rows.append(row(case, metric, "1", own, other, peer, "higher"))
    write(
        "learned_proposals",
        rows,
        {},
        training={"seconds": training_time, "steps": num_steps, "divergence_from_exact": float(divergence.mean())},
        acceptance=acceptances,
    )


if __name__ == "__main__":
    main()
