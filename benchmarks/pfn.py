r"""Speed of a prior-data fitted network: its forward pass, its cache, and its answer beside Gaussian processes'.

    python benchmarks/pfn.py [--quick] [--threads 1]

* **forward**: our set transformer against automl's ``pfns`` (in an environment of its own), of the same width, depth, heads
  and outputs, random weights, float32, contexts and queries in one call.
* **cache**: the acquisition function of one suggestion, n = 50 rows of 6 features, 8 starts from 256 points, with the context
  encoded once at ``fit``, against encoding it anew for each evaluation, and for each candidate of each evaluation, as
  BoTorch's ``PFNModel`` does (the same values; the same optimiser and seed).
* **posterior**: the shipped "bo" against BoTorch's fully Bayesian Gaussian process (SAAS; NUTS at its defaults of 512 warm-up
  steps and 256 draws, thinned to 16), from data to predictions at 40 queries of 6 features, with 50 rows; and their mean
  negative log densities on the same queries, which say whether the answers are equally good. The tasks are draws of
  ``SearchTasks``, on which the network was trained (the process has another prior), and Hartmann-6 with noise, which neither
  has seen.
  BoTorch runs it on JAX: ``pip install "botorch[fully_bayesian]"``.
* **step**: one suggestion from the same data, fit and acquisition, against ``SingleTaskGP`` with the log expected improvement.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from botorch.acquisition.analytic import LogExpectedImprovement
from botorch.fit import fit_fully_bayesian_model_nuts, fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.fully_bayesian import SaasFullyBayesianSingleTaskGP
from botorch.models.transforms import Standardize
from botorch.optim import optimize_acqf
from botorch.test_functions import Hartmann
from botorch.utils.sampling import manual_seed
from gpytorch.mlls import ExactMarginalLogLikelihood
from harness import alternate, mean_and_stderr, peer_python, row, seconds, write
from peer import Peer
from torch import Tensor

from bayesnn import PFN
from bayesnn.bo import ClosedForm, log_expected_improvement
from bayesnn.inference.amortized import SetTransformer
from bayesnn.inference.amortized.tasks import SearchTasks

WIDTH, LAYERS, HEADS, EXPANSION, BUCKETS, FEATURES = 96, 6, 4, 2, 200, 8
CASES = {"1 task, 100 rows, 1,000 queries": (1, 100, 1000), "64 tasks, 50 rows, 50 queries": (64, 50, 50)}
N, D, NUM_QUERIES, STARTS, POINTS = 50, 6, 40, 8, 256


def forward(repeats: int, threads: int, rows: list[dict[str, Any]]) -> dict[str, str]:
    """Ours and the peer's in turn."""
    settings = {
        "width": WIDTH,
        "layers": LAYERS,
        "heads": HEADS,
        "expansion": EXPANSION,
        "outputs": 2 * BUCKETS,
        "features": FEATURES,
        "threads": threads,
    }
    borders = torch.linspace(-4, 4, BUCKETS + 1).tolist()
    network = SetTransformer(FEATURES, borders, (1.0, 1.0), WIDTH, LAYERS, HEADS, EXPANSION).eval()
    own_parameters = sum(parameter.numel() for parameter in network.parameters())
    peer = Peer(peer_python("pfns", [f"torch=={torch.__version__}", "pfns==0.4.2"]), "pfns_forward.py", settings)
    for name, (tasks, n, q) in CASES.items():
        peer.ask(json.dumps([tasks, n, q]))
        parts = (torch.randn(tasks, n, FEATURES), torch.randn(tasks, n, 1), torch.randn(tasks, q, FEATURES))

        def ours(parts: tuple[Tensor, ...] = parts) -> float:
            with torch.no_grad():
                return seconds(lambda: network.query(network.encode(parts[0], parts[1]), parts[2]))

        ours(), peer.seconds("run")
        found = alternate(ours, lambda: peer.seconds("run"), repeats)
        line = row(f"forward, {name}", "time", "s", *found, "pfns", "lower")
        rows.append(line | {"parameters": own_parameters, "peer_parameters": int(peer.versions["parameters"])})
    peer.close()
    return {"pfns": peer.versions["pfns"]}


class EachTime(PFN):
    """Encodes its context again for each evaluation."""

    def _marginals(self, context: Any, X: Tensor, latent_only: bool = False) -> Any:
        return super()._marginals(self._encode(context.X, context.Y), X, latent_only)


class EachCandidate(PFN):
    """Encodes its context again for each evaluation and each candidate, as BoTorch's own PFNModel does."""

    def _marginals(self, context: Any, X: Tensor, latent_only: bool = False) -> Any:
        parts = (part.expand(*X.shape[:-2], *part.shape) for part in (context.X, context.Y))
        return super()._marginals(self._encode(*parts), X, latent_only)


def task(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """X, y of the context and of the queries, X in the unit cube, of an objective with exactly D features."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        batch = SearchTasks()(1, N + NUM_QUERIES, generator)
        assert batch.num_features is not None
        if int(batch.num_features[0]) == D:
            X, y = batch.X[0, :, :D] / math.sqrt(12) + 0.5, batch.y[0]
            return X[:N], y[:N], X[N:], y[N:]


def hartmann(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Likewise, at uniform points, with noise of a twentieth of the values' deviation."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.rand(N + NUM_QUERIES, D, generator=generator, dtype=torch.float64)
    y = -Hartmann(D)(X)[:, None]
    y = y + 0.05 * y.std() * torch.randn(y.shape, generator=generator, dtype=torch.float64)
    return X[:N], y[:N], X[N:], y[N:]


TASKS = {"a draw of SearchTasks": task, "Hartmann-6 with noise": hartmann}


def searched(acquisition: Any, seed: int) -> Tensor:
    """Where it is largest."""
    bounds = torch.stack([torch.zeros(D), torch.ones(D)]).double()
    with manual_seed(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return optimize_acqf(acquisition, bounds, q=1, num_restarts=STARTS, raw_samples=POINTS)[0]


def pfn_step(X: Tensor, y: Tensor, model: Callable[[], PFN] = lambda: PFN("bo", bounds=(0.0, 1.0))) -> Tensor:
    """One suggestion."""
    fitted = model().fit(X, y)
    return searched(ClosedForm(fitted, log_expected_improvement(float(y.max()))), 0)


def gp_step(X: Tensor, y: Tensor) -> Tensor:
    """One suggestion of the default Gaussian process."""
    gp = SingleTaskGP(X, y)
    fit_gpytorch_mll(ExactMarginalLogLikelihood(gp.likelihood, gp))
    return searched(LogExpectedImprovement(gp, best_f=y.max()), 0)


def saas(X: Tensor, y: Tensor, X_new: Tensor, seed: int, quick: bool) -> Any:
    """Predictive means and variances (draws, queries) of the fully Bayesian process."""
    gp = SaasFullyBayesianSingleTaskGP(X, y, outcome_transform=Standardize(1))
    steps = {"warmup_steps": 16, "num_samples": 16, "thinning": 4} if quick else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit_fully_bayesian_model_nuts(gp, **steps, disable_progbar=True, seed=seed)
    with torch.no_grad():
        found = gp.posterior(X_new, observation_noise=True)
    return found.distribution.mean, found.distribution.variance


def posterior(what: str, num_tasks: int, quick: bool, rows: list[dict[str, Any]]) -> None:
    """Time from data to predictions, and their log densities."""
    own_times, times, own_nll, nll = [], [], [], []
    for seed in range(num_tasks):
        X, y, X_new, y_new = TASKS[what](seed)
        start = time.perf_counter()
        answer = PFN("bo", bounds=(0.0, 1.0)).fit(X, y).predict(X_new)
        own_times.append(time.perf_counter() - start)
        own_nll.append(-float(answer.log_prob(y_new).mean()))
        start = time.perf_counter()
        mean, variance = saas(X, y, X_new, seed, quick)
        times.append(time.perf_counter() - start)
        laws = torch.distributions.Normal(mean, variance.sqrt())
        values = y_new.squeeze(-1).expand_as(mean)
        nll.append(-float((laws.log_prob(values).logsumexp(0) - math.log(len(mean))).mean()))
        print(
            f"{what} {seed}: {own_times[-1]:.4f} s, {times[-1]:.1f} s, NLL {own_nll[-1]:.3f}, {nll[-1]:.3f}", flush=True
        )
    rows.append(row(f"posterior, {what}", "time", "s", own_times, times, "SAAS by NUTS", "lower"))
    difference, error = mean_and_stderr([b - a for a, b in zip(own_nll, nll, strict=True)])
    rows.append(
        {
            "case": f"posterior, {what}",
            "metric": "negative log density",
            "unit": "nats",
            "ours": statistics.fmean(own_nll),
            "peer": statistics.fmean(nll),
            "peer_name": "SAAS by NUTS",
            "ratio": math.exp(difference),
            "better": "lower",
            "difference": difference,
            "stderr": error,
            "all_ours": own_nll,
            "all_peer": nll,
        }
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description="Speed of a prior-data fitted network.")
    parser.add_argument("--quick", action="store_true", help="few repeats, and a sampler of few steps")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    repeats, num_tasks = (3, 2) if options.quick else (15, 8)
    rows: list[dict[str, Any]] = []
    versions = forward(repeats, options.threads, rows)
    X, y, _, _ = task(0)
    few, own_step = max(2, repeats // 3), pfn_step(X, y)
    for name, kind in (("anew for each evaluation", EachTime), ("anew for each candidate", EachCandidate)):

        def peer(kind: type[PFN] = kind) -> Tensor:
            return pfn_step(X, y, lambda: kind("bo", bounds=(0.0, 1.0)))

        assert torch.allclose(own_step, peer(), atol=1e-4), (own_step, peer())
        found = alternate(lambda: seconds(lambda: pfn_step(X, y)), lambda peer=peer: seconds(peer), few)
        rows.append(row("cache, 50 rows, 6 features", "time of one suggestion", "s", *found, name, "lower"))
    gp_step(X, y)
    found = alternate(lambda: seconds(lambda: pfn_step(X, y)), lambda: seconds(lambda: gp_step(X, y)), few)
    rows.append(row("step, 50 rows, 6 features", "time of one suggestion", "s", *found, "SingleTaskGP", "lower"))
    for what in TASKS:
        posterior(what, num_tasks, options.quick, rows)
    write("pfn", rows, versions, threads=options.threads, quick=options.quick)


if __name__ == "__main__":
    main()
