"""HMC of a Bayesian neural network: chain-leapfrogs per second, against numpyro's vectorised HMC.

    python benchmarks/hmc.py [--quick]

The target is the same on both sides: an MLP 6-50-50-1 with tanh, N(0, 1) priors on all weights, Gaussian noise of
standard deviation 0.1, 100 rows, float64; 16 chains; the same fixed step size and number of leapfrog steps, no adaptation.
numpyro runs in an environment of its own, in a process that stays up and is timed in turn with ours. On both sides every
leapfrog step is one gradient of the full log density of every chain. Two rows: against numpyro's kernel in a loop that is
compiled once beforehand, and against a whole call of ``MCMC.run(chain_method="vectorized")``, which traces and compiles
again every time.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pyro.infer
import torch
from harness import alternate, peer_python, row, seconds, write
from peer import Peer
from torch import Tensor

from bayesnn import likelihoods, networks, priors
from bayesnn.data import Data
from bayesnn.inference import HMC, MCLMC, NUTS, Compiled, NetworkTarget, run
from bayesnn.inference.ess import effective_sample_size
from bayesnn.inference.flat import Density, unravel
from bayesnn.inference.mcmc.chain import MoveInfo, Point
from bayesnn.inference.mcmc.hmc import hmc_move
from bayesnn.inference.mcmc.mass import Mass
from bayesnn.inference.target import log_density

NUM_CHAINS, NUM_LEAPFROG, STEP_SIZE = 16, 32, 1e-3


class FixedPathHMC(HMC):
    """Without the jitter of the path's length, so that both sides take the same number of steps."""

    def move(
        self, density: Density, point: Point, step_size: Tensor, mass: Mass, generator: torch.Generator
    ) -> tuple[Point, MoveInfo]:
        """Always the mean length."""
        return hmc_move(density, point, step_size, mass, generator, self.num_leapfrog)


def data(num_rows: int) -> Data:
    """Standard normal inputs, a smooth function, a little noise."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(num_rows, 6, generator=generator, dtype=torch.float64)
    noise = 0.1 * torch.randn(num_rows, 1, generator=generator, dtype=torch.float64)
    return Data(X, torch.sin(X[:, :1]) + 0.5 * X[:, 1:2] * X[:, 2:3] + noise)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer draws and repeats")
    parser.add_argument(
        "--data", default=os.environ.get("BAYESNN_DATA"), help="folder of the regression sets, for the ESS"
    )
    options = parser.parse_args()
    num_draws, repeats = (10, 3) if options.quick else (40, 7)
    num_rows = 100
    method = FixedPathHMC(
        num_chains=NUM_CHAINS, num_warmup=0, num_draws=num_draws, num_leapfrog=NUM_LEAPFROG, initial_step_size=STEP_SIZE
    )
    prior = priors.Normal(scale=1.0, bias_scale=1.0, fan_in=False)
    target = NetworkTarget(
        networks.mlp(6, 1),
        likelihoods.Gaussian(noise_std=0.1),
        prior,
        data(num_rows),
        torch.ones(1, 1, dtype=torch.float64),
    )
    settings = {
        "num_chains": NUM_CHAINS,
        "num_draws": num_draws,
        "num_leapfrog": NUM_LEAPFROG,
        "step_size": STEP_SIZE,
        "num_rows": num_rows,
    }
    peer = Peer(peer_python("numpyro", ["numpyro==0.21.0"]), "numpyro_hmc.py", settings)
    work = NUM_CHAINS * num_draws * NUM_LEAPFROG
    case = f"MLP 6-50-50-1 tanh, n={num_rows}, float64, {NUM_CHAINS} chains"
    rows, versions = [], peer.versions
    for ours_name, own in (("compiled", Compiled(target)), ("plain", target)):
        run(method, own)  # compile, and warm caches and threads, as the peer has done

        def ours(own: object = own) -> float:
            return work / seconds(lambda: run(method, own))

        for what, name in (("loop", "numpyro, compiled loop"), ("call", "numpyro, MCMC.run")):
            found = alternate(ours, lambda what=what: work / peer.seconds(what), repeats)
            rows.append(row(f"{case}, {ours_name}", "chain-leapfrogs", "1/s", *found, name, "higher"))
        found = alternate(ours, lambda: pyro_speed(target, 3), min(repeats, 5))
        rows.append(row(f"{case}, {ours_name}", "chain-leapfrogs", "1/s", *found, "Pyro, one chain", "higher"))
    peer.close()
    if options.data is not None:
        for name in ("boston", "energy"):
            rows += effective_sizes(Path(options.data) / "uci_regression" / f"{name}.npz", name, options.quick)
    write("hmc", rows, versions)


def pyro_speed(target: NetworkTarget, num_draws: int) -> float:
    """Leapfrogs per second of Pyro's HMC on the same potential, one chain: it runs chains one after the other."""
    shapes = target.shapes()
    size = sum(shape.numel() for shape in shapes.values())

    def potential(parameters: dict[str, Tensor]) -> Tensor:
        return -log_density(target, unravel(parameters["x"].unsqueeze(0), shapes))[0]

    generator = torch.Generator().manual_seed(0)
    start = {"x": 0.1 * torch.randn(size, generator=generator, dtype=torch.float64)}
    kernel = pyro.infer.HMC(
        potential_fn=potential,
        step_size=STEP_SIZE,
        num_steps=NUM_LEAPFROG,
        adapt_step_size=False,
        adapt_mass_matrix=False,
    )
    mcmc = pyro.infer.MCMC(kernel, num_samples=num_draws, warmup_steps=0, initial_params=start, disable_progbar=True)
    return num_draws * NUM_LEAPFROG / seconds(mcmc.run)


def effective_sizes(path: Path, name: str, quick: bool) -> list[dict[str, object]]:
    """Effective draws of function values a second, warm-up included: the smallest over 50 held-out points."""
    arrays = np.load(path, allow_pickle=False)
    train, test = arrays["train_idx"][0].astype(int), arrays["test_idx"][0].astype(int)
    X, y = torch.from_numpy(arrays["X"]).double(), torch.from_numpy(arrays["y"]).double()
    loc, scale = X[train].mean(0), X[train].std(0).clamp_min(1e-9)
    X, Y = (X - loc) / scale, ((y - y[train].mean()) / y[train].std()).unsqueeze(-1)
    data, points = Data(X[train], Y[train]), X[test][:50]
    folder = Path(tempfile.mkdtemp())
    np.savez(folder / "data.npz", X=data.X.numpy(), Y=data.Y.numpy(), points=points.numpy())
    num_chains, num_warmup, num_draws, depth = (4, 50, 50, 6) if quick else (4, 200, 200, 8)
    settings = {
        "data": str(folder / "data.npz"),
        "num_chains": num_chains,
        "num_warmup": num_warmup,
        "num_draws": num_draws,
        "max_depth": depth,
    }
    network = networks.mlp(X.shape[1], 1, hidden=(50,))
    target = NetworkTarget(network, likelihoods.Gaussian(), priors.Normal(), data, torch.ones(1, 1).double())
    methods = {
        "NUTS": NUTS(num_chains=num_chains, num_warmup=num_warmup, num_draws=num_draws, max_depth=depth),
        "MCLMC": MCLMC(num_chains=num_chains, num_warmup=num_warmup, num_draws=num_draws, thinning=50),
    }
    peer = Peer(peer_python("numpyro", ["numpyro==0.21.0"]), "numpyro_nuts.py", settings)
    compiled, found = Compiled(target), {label: [] for label in ("NUTS", "MCLMC", "peer")}
    for method in methods.values():  # compile
        run(dataclasses.replace(method, num_warmup=2, num_draws=2), compiled)
    for seed in range(1 if quick else 2):
        elapsed = peer.seconds(str(folder / "peer.npy"))
        values = torch.from_numpy(np.load(folder / "peer.npy", allow_pickle=False))
        found["peer"].append(float(effective_sample_size(values).min()) / elapsed)
        for label, method in methods.items():
            began = time.perf_counter()
            posterior = run(method, compiled, seed=seed)
            elapsed = time.perf_counter() - began
            values = posterior.posterior(target.network, points).values.squeeze(-1)
            found[label].append(float(effective_sample_size(posterior.by_chain(values)).min()) / elapsed)
    peer.close()
    case = f"{name}, MLP {X.shape[1]}-50-1, learned noise, {num_chains} chains"
    return [
        row(f"{case}, {label}", "function-space ESS", "1/s", found[label], found["peer"], "numpyro NUTS", "higher")
        for label in methods
    ]


if __name__ == "__main__":
    main()
