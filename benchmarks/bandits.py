r"""Neural contextual bandits on classification sets, beside LinUCB and chance.

    python benchmarks/bandits.py --data DIR [--quick] [--rounds 2000] [--seeds 2] [--datasets adult …] [--policies ucb …]

A round shows the features of a row, drawn without replacement; arms are classes, and the reward is 1 for the right one.
For mushrooms the arms are the usual ones: not to eat, which brings 0, and to eat, which brings 5 if it is edible, and
otherwise 5 or -35 with even chances. Policies are told the range of rewards, nothing else.

Regret is the expected reward of the best arm, for those who know the class, less that of the arm pulled, summed over
rounds and in units of the rewards; mistakes are the rounds in which another than the best arm was pulled. The order of
rows, and what mushrooms bring, are the same for all policies of one seed.

Categories become one column each, numbers are standardised, and all is scaled to a mean square of 1, with the moments of
the whole set: contexts are no secret, classes are. All policies are at their defaults; ``linucb`` is a ridge regression
for each arm, with a constant, unit penalty, and 0.1 standard deviations of exploration, as ours.

The defaults of ours were chosen, among a handful, on 500 rounds of mushroom and covertype with seed 100.

Every run is a line of ``benchmarks/results/bandits_cells.jsonl`` when it is finished: run again, the benchmark goes on
where it stopped. ``DIR`` has ``bandits/mushroom.npz`` and so on; by default it is the environment's BAYESNN_DATA.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from harness import append_cell, mean_and_stderr, read_cells, write
from torch import Tensor

from bayesnn.bo import NeuralBandit

NAME = "bandits"
OURS, PEERS = ("square-cb", "fast-cb", "thompson", "ucb"), ("linucb", "random")
FILES = {"mushroom": "mushroom", "adult": "adult", "covertype": "covertype_kaggle_train"}
ADULT_CATEGORIES = (
    "workclass",
    "education",
    "marital-status",
    "occupation",
    "relationship",
    "race",
    "sex",
    "native-country",
)


class Stream(NamedTuple):
    """Contexts (T, d), the reward that each arm would bring and its expectation (T, K), and the range of rewards."""

    contexts: Tensor
    rewards: Tensor
    expected: Tensor
    reward_range: tuple[float, float]


class Bandit(Protocol):
    """What all policies are."""

    def ask(self, context: Tensor) -> Any: ...

    def tell(self, context: Tensor, arm: Any, reward: Tensor) -> None: ...


def stream(folder: Path, name: str, seed: int, num_rounds: int) -> Stream:
    """The rounds of one seed."""
    with np.load(folder / "bandits" / f"{FILES[name]}.npz", allow_pickle=False) as file:
        X, y, names = file["X"], file["y"].astype(int), file["feature_names"]
    categories = {"mushroom": tuple(names), "adult": ADULT_CATEGORIES, "covertype": ()}[name]
    columns = []
    for column, feature in zip(X.T.astype(float), names, strict=True):
        if feature in categories:
            columns.append((column[:, None] == np.unique(column)).astype(float))
        elif column.std() > 0:
            columns.append(((column - column.mean()) / column.std())[:, None])
    contexts = np.concatenate(columns, 1)
    contexts /= np.sqrt(np.square(contexts).mean())
    generator = np.random.default_rng(seed)
    chosen = generator.permutation(len(y))[:num_rounds]
    if name == "mushroom":
        poisonous = y[chosen] == 1
        unlucky = poisonous & (generator.random(len(chosen)) < 0.5)
        nothing = np.zeros(len(chosen))
        rewards = np.stack([nothing, np.where(unlucky, -35.0, 5.0)], 1)
        expected = np.stack([nothing, np.where(poisonous, -15.0, 5.0)], 1)
    else:
        rewards = expected = np.eye(y.max() + 1)[y[chosen]]
    found = [torch.as_tensor(part) for part in (contexts[chosen], rewards, expected)]
    return Stream(found[0], found[1], found[2], (-35.0, 5.0) if name == "mushroom" else (0.0, 1.0))


class LinUCB:
    """A ridge regression of rewards for each arm, and the arm of the largest upper bound (Li et al. 2010, disjoint)."""

    def __init__(self, num_arms: int, num_features: int, reward_range: tuple[float, float], exploration: float) -> None:
        self.low, self.high = reward_range
        self.exploration = exploration
        self.covariances = torch.eye(num_features + 1, dtype=torch.float64).repeat(num_arms, 1, 1)
        self.moments = torch.zeros(num_arms, num_features + 1, dtype=torch.float64)

    def ask(self, context: Tensor) -> int:
        """The arm."""
        x = torch.cat([context, context.new_ones(1)])
        spread = self.covariances @ x
        return int(((self.moments * spread).sum(-1) + self.exploration * (spread @ x).sqrt()).argmax())

    def tell(self, context: Tensor, arm: int, reward: Tensor) -> None:
        """Learn by the formula of Sherman and Morrison."""
        x = torch.cat([context, context.new_ones(1)])
        spread = self.covariances[arm] @ x
        self.covariances[arm] -= torch.outer(spread, spread) / (1 + x @ spread)
        self.moments[arm] += (reward - self.low) / (self.high - self.low) * x


class Chance:
    """Any arm, whatever the context."""

    def __init__(self, num_arms: int, seed: int) -> None:
        self.num_arms, self.generator = num_arms, torch.Generator().manual_seed(seed)

    def ask(self, context: Tensor) -> int:
        """The arm."""
        return int(torch.randint(self.num_arms, (), generator=self.generator))

    def tell(self, context: Tensor, arm: int, reward: Tensor) -> None:
        """Learn nothing."""


def bandit(policy: str, rounds: Stream, seed: int) -> Bandit:
    """A policy before its first round."""
    num_arms, num_features = rounds.rewards.shape[1], rounds.contexts.shape[1]
    peers: dict[str, Callable[[], Bandit]] = {
        "linucb": lambda: LinUCB(num_arms, num_features, rounds.reward_range, exploration=0.1),
        "random": lambda: Chance(num_arms, seed),
    }
    if policy in peers:
        return peers[policy]()
    return NeuralBandit(num_arms, num_features, policy, reward_range=rounds.reward_range, seed=seed)


def play(policy: str, rounds: Stream, seed: int) -> dict[str, Any]:
    """All rounds, one after the other."""
    player, regrets, start = bandit(policy, rounds, seed), [], time.process_time()
    for context, rewards, expected in zip(rounds.contexts, rounds.rewards, rounds.expected, strict=True):
        arm = player.ask(context)
        player.tell(context, arm, rewards[arm])
        regrets.append(float(expected.max() - expected[arm]))
    spent = time.process_time() - start
    halves = [sum(regrets[: len(regrets) // 2]), sum(regrets[len(regrets) // 2 :])]
    mistakes = sum(regret > 0 for regret in regrets)
    return {"regret": sum(halves), "regret_of_halves": halves, "mistakes": mistakes, "cpu_seconds": spent}


def rows(cells: list[dict[str, Any]], num_rounds: int) -> list[dict[str, Any]]:
    """Each of ours beside each peer, over the seeds that both have."""
    table = {(c["dataset"], c["policy"], c["seed"]): c for c in cells if c["rounds"] == num_rounds}
    result = []
    for name, own, peer in [(name, own, peer) for name in FILES for own in OURS for peer in PEERS]:
        seeds = sorted({seed for *_, seed in table if {(name, own, seed), (name, peer, seed)} <= table.keys()})
        for metric in ("regret", "mistakes") if seeds else ():
            found = [[float(table[name, policy, seed][metric]) for seed in seeds] for policy in (own, peer)]
            ours, other = (statistics.fmean(values) for values in found)
            result.append(
                {
                    "case": f"{name}, {own}",
                    "metric": metric,
                    "unit": "reward" if metric == "regret" else "rounds",
                    "ours": ours,
                    "peer": other,
                    "peer_name": peer,
                    "ratio": other / ours if ours else None,
                    "better": "lower",
                    "stderr": [mean_and_stderr(values)[1] for values in found],
                    "seeds": seeds,
                    "all_ours": found[0],
                    "all_peer": found[1],
                    "cpu_seconds": statistics.fmean(table[name, own, seed]["cpu_seconds"] for seed in seeds),
                }
            )
    return result


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description="Neural contextual bandits on classification sets.")
    parser.add_argument("--data", default=os.environ.get("BAYESNN_DATA"), help="folder with bandits/*.npz")
    parser.add_argument("--quick", action="store_true", help="200 rounds, one seed, mushrooms; nothing is kept")
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=2, help="how many; 0 only reports the runs on file")
    parser.add_argument("--datasets", nargs="+", choices=FILES, default=list(FILES))
    parser.add_argument("--policies", nargs="+", choices=OURS + PEERS, default=list(OURS + PEERS))
    options = parser.parse_args()
    if not options.data:
        parser.error("give --data, or set BAYESNN_DATA")
    torch.set_num_threads(1)  # the work of a round is too small to share
    if options.quick:
        options.rounds, options.seeds, options.datasets = 200, 1, ["mushroom"]
    cells = [] if options.quick else read_cells(NAME)
    done = {(cell["dataset"], cell["policy"], cell["seed"], cell["rounds"]) for cell in cells}
    for seed in range(options.seeds):
        for name in options.datasets:
            rounds = stream(Path(options.data), name, seed, options.rounds)
            for policy in options.policies:
                if (name, policy, seed, options.rounds) in done:
                    continue
                key = {"dataset": name, "policy": policy, "seed": seed, "rounds": options.rounds}
                cells.append(key | play(policy, rounds, seed))
                if not options.quick:
                    append_cell(NAME, cells[-1])
                regret, mistakes, spent = (cells[-1][field] for field in ("regret", "mistakes", "cpu_seconds"))
                print(f"{name:10} {policy:10} {seed} {regret:9.1f} {mistakes:6d} {spent:7.1f} s", flush=True)
    write(NAME, rows(cells, options.rounds), {}, quick=options.quick, rounds=options.rounds)


if __name__ == "__main__":
    main()
