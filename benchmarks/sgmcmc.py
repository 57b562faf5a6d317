"""Stochastic-gradient HMC: chain-steps per second, against blackjax and posteriors.

    python benchmarks/sgmcmc.py [--quick]

The target is the same on all sides: a perceptron 8-50-50-1 with ReLU, N(0, 1) priors and Gaussian noise of standard deviation
0.1, or a small convolutional network on 8 x 8 images with 10 classes; 1000 rows, batches of 32, float32. A chain-step is one
minibatch gradient and one update of one chain. All sides share a minibatch among their chains. blackjax runs a scan that is
compiled beforehand, with ten gradients for each momentum and minibatch (its default); posteriors runs eagerly, vmapped over
chains, with one thread or all of them, whichever is faster; ours runs compiled (``Compiled``, compiled beforehand too), and,
for 16 chains, plain.
"""

from __future__ import annotations

import argparse

import torch
from harness import alternate, peer_python, row, seconds, write
from peer import Peer
from torch import nn

from bayesnn import likelihoods, networks, priors
from bayesnn.data import Data
from bayesnn.inference import SGHMC, Compiled, NetworkTarget, run

NUM_ROWS, BATCH_SIZE, THINNING = 1000, 32, 20
NETWORKS = {"mlp": "MLP 8-50-50-1 ReLU", "conv": "conv 8-16, 8 x 8 images"}


def target(network: str) -> NetworkTarget:
    """The same posterior as the peers'."""
    generator = torch.Generator().manual_seed(0)
    prior = priors.Normal(scale=1.0, bias_scale=1.0, fan_in=False)
    if network == "conv":
        X = torch.randn(NUM_ROWS, 64, generator=generator)
        Y = torch.randint(10, (NUM_ROWS, 1), generator=generator)
        module = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, 10),
        )
        return NetworkTarget(module, likelihoods.Categorical(10), prior, Data(X, Y), torch.ones(1, 1))
    X = torch.randn(NUM_ROWS, 8, generator=generator)
    data = Data(X, torch.sin(X[:, :1]))
    perceptron = networks.mlp(8, 1, activation="relu")
    return NetworkTarget(perceptron, likelihoods.Gaussian(noise_std=0.1), prior, data, torch.ones(1, 1))


def num_draws(network: str, num_chains: int, compiled: bool, quick: bool) -> int:
    """Draws (20 steps each) for about a second's run."""
    rate = {("mlp", True): 45000, ("mlp", False): 12000, ("conv", True): 3000, ("conv", False): 3000}[network, compiled]
    per_step = rate / num_chains if num_chains > 4 else rate / 10
    return max(2, int((0.3 if quick else 1.0) * per_step / THINNING))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter runs, fewer repeats, 16 chains only")
    options = parser.parse_args()
    repeats = 3 if options.quick else 5
    threads = torch.get_num_threads()
    pythons = {
        "blackjax": peer_python("blackjax", ["blackjax==1.7.1"]),
        "posteriors": peer_python("posteriors", ["posteriors==0.1.3", "torch==2.13.0"]),
    }
    rows, versions = [], {}
    cases = [("mlp", 16), ("mlp", 1), ("mlp", 256), ("conv", 1), ("conv", 16), ("conv", 256)]
    cases = cases[:1] if options.quick else cases
    for network, num_chains in cases:
        plain = target(network)
        for ours_name, own in (("compiled", Compiled(plain)), ("plain", plain)):
            count = num_draws(network, num_chains, ours_name == "compiled", options.quick)
            method = SGHMC(
                num_chains=num_chains,
                num_burn_in=0,
                num_draws=count,
                thinning=THINNING,
                step_size=1e-5,
                batch_size=BATCH_SIZE,
            )
            run(method, own)  # compiles, and warms caches
            work = num_chains * count * THINNING

            def ours(method: SGHMC = method, own: object = own, work: int = work) -> float:
                return work / seconds(lambda: run(method, own))

            for name, python in pythons.items():
                if ours_name == "plain" and (name == "blackjax" or num_chains != 16):
                    continue
                best: dict[str, object] = {}
                for num_threads in (1, threads) if name == "posteriors" and threads > 1 else (threads,):
                    steps = max(20, count * THINNING // (10 if name == "posteriors" else 1) // 10 * 10)
                    settings = {
                        "network": network,
                        "num_chains": num_chains,
                        "num_steps": steps,
                        "batch_size": BATCH_SIZE,
                        "num_rows": NUM_ROWS,
                        "step_size": 1e-5,
                        "num_threads": num_threads,
                    }
                    peer = Peer(python, f"{name}_sghmc.py", settings)
                    found = alternate(ours, lambda p=peer, n=num_chains * steps: n / p.seconds("run"), repeats)
                    versions |= peer.versions
                    peer.close()
                    case = f"{NETWORKS[network]}, {num_chains} chains, {ours_name}"
                    line = row(case, "chain-steps", "1/s", *found, name, "higher")
                    best = line if not best or line["peer"] > best["peer"] else best  # type: ignore[operator]
                rows.append(best)
                print(f"{best['case']}: {best['ours']:.0f}, {name} {best['peer']:.0f}", flush=True)
    write("sgmcmc", rows, versions)


if __name__ == "__main__":
    main()
