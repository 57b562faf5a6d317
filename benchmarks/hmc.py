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
import json
import subprocess
from pathlib import Path
from typing import IO

import torch
from harness import alternate, peer_python, row, seconds, write

from bayesnn import likelihoods, networks, priors
from bayesnn.data import Data
from bayesnn.inference import HMC, NetworkTarget, run

NUM_CHAINS, NUM_LEAPFROG, STEP_SIZE = 16, 32, 1e-3


class FixedPathHMC(HMC):
    """Without the jitter of the path's length, so that both sides take the same number of steps."""

    def num_leapfrog_steps(self, generator: torch.Generator) -> int:
        """Always the mean."""
        return self.num_leapfrog


def data(num_rows: int) -> Data:
    """Standard normal inputs, a smooth function, a little noise."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(num_rows, 6, generator=generator, dtype=torch.float64)
    noise = 0.1 * torch.randn(num_rows, 1, generator=generator, dtype=torch.float64)
    return Data(X, torch.sin(X[:, :1]) + 0.5 * X[:, 1:2] * X[:, 2:3] + noise)


class Peer:
    """The peer's process: it compiles once, then answers each line with the seconds that one run took."""

    def __init__(self, python: Path, settings: dict[str, int | float]) -> None:
        script = Path(__file__).parent / "peers" / "numpyro_hmc.py"
        self.process = subprocess.Popen(
            [str(python), str(script), json.dumps(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.versions: dict[str, str] = json.loads(self._pipe(self.process.stdout).readline())

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe

    def seconds(self, what: str) -> float:
        """Run the compiled ``loop`` or the whole ``call`` once."""
        stdin = self._pipe(self.process.stdin)
        stdin.write(f"{what}\n")
        stdin.flush()
        return float(self._pipe(self.process.stdout).readline())

    def close(self) -> None:
        """End the process."""
        self._pipe(self.process.stdin).close()
        self.process.wait()


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer draws and repeats")
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
    peer = Peer(peer_python("numpyro", ["numpyro==0.21.0"]), settings)
    work = NUM_CHAINS * num_draws * NUM_LEAPFROG
    run(method, target)  # warm caches and threads as the peer's compilation does
    case = f"MLP 6-50-50-1 tanh, n={num_rows}, float64, {NUM_CHAINS} chains"
    rows = []
    for what, name in (("loop", "numpyro, compiled loop"), ("call", "numpyro, MCMC.run")):
        ours, theirs = alternate(
            lambda: work / seconds(lambda: run(method, target)), lambda what=what: work / peer.seconds(what), repeats
        )
        rows.append(row(case, "chain-leapfrogs", "1/s", ours, theirs, name, "higher"))
    peer.close()
    write("hmc", rows, peer.versions)


if __name__ == "__main__":
    main()
