r"""How far the shipped networks stay behind the exact posterior predictive of their own priors.

    python benchmarks/pfn_gap.py [--quick] [--networks gp-small bo]

* ``gp-small``: its prior has finitely many hyperparameters, and the exact answer is enumerated.
* ``bo``: objectives of ``SearchTasks``, its prior, with all hyperparameters (relevance, warp, lengthscales, noise)
  marginalised by Monte Carlo: by importance, as many draws of the prior, weighted with the likelihood, as are worth 1,000
  of the posterior, or, where at most 200,000 won't be (judged by the first 3,000), by a population of chains per task,
  annealed from the prior to the posterior with resampling, then run on. Each sweep renews blocks of hyperparameters from
  the prior or moves them at random (Metropolis-Hastings). Both are done twice, with independent draws; the difference is
  reported.

Whether objectives happen to be hard for any network is seen by the gap from the answer that knows their hyperparameters, whose
expectation is had from 1,500 draws: "controlled" is the gap with that as a control variate.

The gap is in nats per observation, positive where the network is worse. The exact answers don't depend on the network: each
is a line of ``benchmarks/results/pfn_gap_cells.jsonl`` when it is there, and run again, the benchmark goes on where it
stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from typing import Any, NamedTuple

import torch
from harness import append_cell, mean_and_stderr, read_cells, write
from joblib import Parallel, delayed
from torch import Tensor

from bayesnn.inference.amortized.gaps import gap_to_exact
from bayesnn.inference.amortized.tasks import GridGPTasks, SearchTasks, TaskBatch
from bayesnn.inference.amortized.tasks.base import Draws
from bayesnn.inference.amortized.tasks.covariances import conditional
from bayesnn.inference.amortized.tasks.optimisation import SearchHyperparameters
from bayesnn.inference.amortized.weights import load_pretrained

NAME = "pfn_gap"
FLOOR = 0.05 * (1 + 1e-9)  # of scaled lengthscales; draws below it are at it
NUM_QUERIES = 40
GP_SIZES = (0, 1, 2, 4, 8, 16, 32, 64, 100)
BO_SIZES = (5, 10, 20, 50, 100)
MOST_DRAWS, TRIAL_DRAWS, IMPORTANCE_BATCH, ENOUGH = 200_000, 3000, 1000, 1000
EFFORT = (128, 300)  # chains of a population and sweeps of each
NUM_OBJECTIVES = 50  # that can be asked for at each n
SEED = 123  # of tasks that no training has seen: trainings draw theirs from other seeds


class Population(NamedTuple):
    """Chains of one task, with their log likelihoods."""

    hyperparameters: SearchHyperparameters
    log_likelihood: Tensor


class Marginalised:
    """p(y | D) of one task of ``SearchTasks``, over all hyperparameters.

    Args:
        prior: the prior.
        X, y: all rows (N, d) and (N,), the first n the context.
        num_features: of the task.
        n: of the context.
        num_chains, num_sweeps: of each population.
    """

    def __init__(
        self, prior: SearchTasks, X: Tensor, y: Tensor, num_features: int, n: int, num_chains: int, num_sweeps: int
    ) -> None:
        self.prior, self.X, self.y, self.n = prior, X, y, n
        self.num_chains, self.num_sweeps = num_chains, num_sweeps
        self.used = (torch.arange(X.shape[-1]) < num_features).double().expand(num_chains, -1)

    def log_predictive(self, seed: int) -> Tensor:
        """Of each query, (N - n,)."""
        found, effective = self.by_importance(seed)
        return found if effective >= ENOUGH else self.by_chains(seed)

    def by_importance(self, seed: int) -> tuple[Tensor, float]:
        """From draws of the prior, and how many draws of the posterior they are worth."""
        weights: list[Tensor] = []
        densities: list[Tensor] = []
        effective = 0.0
        draw = Draws(IMPORTANCE_BATCH, torch.Generator().manual_seed(seed))
        used = self.used[:1].expand(IMPORTANCE_BATCH, -1)
        while effective < ENOUGH:
            drawn = IMPORTANCE_BATCH * len(weights)
            if drawn >= TRIAL_DRAWS and effective * MOST_DRAWS < ENOUGH * drawn:
                break
            log_weights, log_densities = self._evidence_and_queries(self.prior.hyperparameters(draw, used))
            weights.append(log_weights)
            densities.append(log_weights[:, None] + log_densities)
            effective = 1 / float(torch.cat(weights).softmax(0).square().sum())
        return torch.cat(densities).logsumexp(0) - torch.cat(weights).logsumexp(0), effective

    def by_chains(self, seed: int) -> Tensor:
        """From the draws of a population of chains."""
        generator = torch.Generator().manual_seed(seed)
        draw = Draws(self.num_chains, generator)
        population = self._with_likelihood(self.prior.hyperparameters(draw, self.used))
        densities = []
        anneal = self.num_sweeps // 2
        for sweep in range(self.num_sweeps):
            before, power = (min(1.0, max(0, sweep + step) / anneal) ** 2 for step in (0, 1))
            if power > before:
                weights = ((power - before) * population.log_likelihood).softmax(0)
                chosen = torch.multinomial(weights, self.num_chains, replacement=True, generator=generator)
                population = _pick(population, chosen)
            population = self._move(population, power, draw)
            if sweep >= anneal and sweep % 5 == 0:
                densities.append(self._evidence_and_queries(population.hyperparameters)[1])
        return torch.cat(densities).logsumexp(0) - math.log(sum(len(each) for each in densities))

    def _with_likelihood(self, hyperparameters: SearchHyperparameters) -> Population:
        rows = self.X[: self.n].expand(self.num_chains, -1, -1)
        K = self.prior.covariance(rows, hyperparameters)
        y = self.y[: self.n].expand(self.num_chains, -1).unsqueeze(-1)
        return Population(hyperparameters, conditional(K, hyperparameters.noise_std.square(), y, self.n)[2])

    def _evidence_and_queries(self, hyperparameters: SearchHyperparameters) -> tuple[Tensor, Tensor]:
        """log p(context) (B,) and the queries' log densities (B, N - n), for B hyperparameters."""
        noise_var = hyperparameters.noise_std.square()
        rows = self.X.expand(len(noise_var), -1, -1)
        y = self.y[: self.n].expand(len(noise_var), -1).unsqueeze(-1)
        mean, variance, evidence = conditional(self.prior.covariance(rows, hyperparameters), noise_var, y, self.n)
        laws = torch.distributions.Normal(mean, (variance + noise_var[:, None]).sqrt())
        return evidence, laws.log_prob(self.y[self.n :])

    def _move(self, population: Population, power: float, draw: Draws) -> Population:
        """Each block by a fresh draw of the prior in some coordinates (accepted by the likelihood alone), and by steps."""
        own, d = population.hyperparameters, self.X.shape[-1]
        fresh = self.prior.hyperparameters(draw, self.used)
        one = torch.nn.functional.one_hot(draw.integers(int(self.used[0].sum())), d).bool()
        block = draw.integers(4)
        relevant = (draw.uniform(d) >= 0.3).double() * self.used
        replaced = SearchHyperparameters(
            torch.where((one & (block == 0)[:, None]), relevant, own.relevant),
            torch.where((one & (block == 1)[:, None]), fresh.lengthscale, own.lengthscale),
            torch.where((block == 2)[:, None, None], fresh.powers, own.powers),
            torch.where(block == 3, fresh.noise_std, own.noise_std),
        )
        ratio = self._relevance_excess(replaced) - self._relevance_excess(own)
        population = self._accept(population, replaced, ratio, power, draw)
        # Gaussian steps of the log lengthscales above the floor, where the prior has a density.
        own = population.hyperparameters
        free = (self._scaled(own) > FLOOR) & (self.used > 0)
        factor = torch.exp(0.4 * draw.normal(d) * ((draw.uniform(d) < 0.5) & free))
        moved = own._replace(lengthscale=own.lengthscale * factor)
        ratio = self._log_lengthscale_prior(moved, free) - self._log_lengthscale_prior(own, free)
        return self._accept(population, moved, ratio, power, draw)

    def _relevance_excess(self, own: SearchHyperparameters) -> Tensor:
        """Of log p(relevant) over independent features': draws of none are draws of all."""
        d, found = self.used[0].sum(), own.relevant.sum(-1)
        every = ((0.7**d + 0.3**d) / 0.7**d).log()
        return torch.where(found == 0, -torch.inf, torch.where(found == d, every, torch.zeros_like(every)))

    def _scaled(self, own: SearchHyperparameters) -> Tensor:
        return own.lengthscale / self.used.sum(-1, keepdim=True).sqrt()

    def _log_lengthscale_prior(self, own: SearchHyperparameters, free: Tensor) -> Tensor:
        """Of the logarithms of those above the floor; steps don't cross it."""
        scaled = self._scaled(own)
        density = torch.distributions.Gamma(1.2107, 1.5212).log_prob(scaled) + scaled.log()
        density = torch.where(scaled > FLOOR, density, torch.full_like(density, -torch.inf))
        return torch.where(free, density, torch.zeros_like(density)).sum(-1)

    def _accept(
        self, old: Population, proposed: SearchHyperparameters, log_ratio: Tensor, power: float, draw: Draws
    ) -> Population:
        new = self._with_likelihood(proposed)
        gain = power * (new.log_likelihood - old.log_likelihood) + log_ratio
        yes = draw.uniform().log() < gain.nan_to_num(nan=-math.inf)
        parts = zip(new.hyperparameters, old.hyperparameters, strict=True)
        kept = [torch.where(yes.reshape(-1, *[1] * (a.ndim - 1)), a, b) for a, b in parts]
        return Population(SearchHyperparameters(*kept), torch.where(yes, new.log_likelihood, old.log_likelihood))


def _pick(population: Population, chosen: Tensor) -> Population:
    parts = [value[chosen] for value in population.hyperparameters]
    return Population(SearchHyperparameters(*parts), population.log_likelihood[chosen])


def objectives(n: int) -> TaskBatch:
    """The same ones at each call."""
    return SearchTasks()(NUM_OBJECTIVES, n + NUM_QUERIES, torch.Generator().manual_seed(SEED))


def exact_and_keep(n: int, index: int, effort: tuple[int, int]) -> None:
    """The exact answer's mean log density of one objective's queries, by two populations, on file."""
    torch.set_num_threads(1)
    batch = objectives(n)
    assert batch.num_features is not None
    arguments = (batch.X[index], batch.y[index, :, 0], int(batch.num_features[index]), n, *effort)
    start = time.process_time()
    each = [Marginalised(SearchTasks(), *arguments).log_predictive(seed) for seed in (0, 1)]
    # The densities are averaged, not their logarithms, whose mean is too low.
    exact = float((torch.logaddexp(*each) - math.log(2)).mean())
    seconds, populations = round(time.process_time() - start, 1), [float(found.mean()) for found in each]
    cell = {"n": n, "task": index, "rows": digest(batch, index), "effort": effort, "exact": exact}
    append_cell(NAME, cell | {"populations": populations, "cpu_seconds": seconds})
    print(f"n = {n}, objective {index}: {exact:.4f} {populations} {seconds} s", flush=True)


def digest(batch: TaskBatch, index: int) -> str:
    """Of an objective's rows: those of another prior are others."""
    return hashlib.sha256(batch.X[index].numpy().tobytes() + batch.y[index].numpy().tobytes()).hexdigest()[:16]


def kept(effort: tuple[int, int]) -> dict[tuple[int, int], dict[str, Any]]:
    """The cells on file, of these objectives."""
    batches = {n: objectives(n) for n in BO_SIZES}
    return {
        (cell["n"], cell["task"]): cell
        for cell in read_cells(NAME)
        if cell["effort"] == list(effort) and cell["rows"] == digest(batches[cell["n"]], cell["task"])
    }


class SearchGaps(NamedTuple):
    """Of "bo", in nats per query, of each objective at one n: from the exact answer, and from the one that knows all
    hyperparameters.
    """

    own: Tensor
    exact: Tensor
    known: Tensor

    @property
    def gap(self) -> Tensor:
        """From the exact answer."""
        return self.exact - self.own

    @property
    def from_known(self) -> Tensor:
        """From the answer that knows all hyperparameters."""
        return self.known - self.own


def search_gaps(network: Any, n: int, cells: list[dict[str, Any]]) -> SearchGaps:
    """Of the first objectives, whose exact answers are on file."""
    batch, m = objectives(n), len(cells)
    assert batch.num_features is not None
    X, y = batch.X[:m].float(), batch.y[:m].float()
    with torch.no_grad():
        _, law = network(X[:, :n], y[:, :n], X[:, n:], batch.num_features[:m])
        own = law.log_prob(y[:, n:, 0]).double().mean(-1)
    exact = torch.tensor([cell["exact"] for cell in cells], dtype=torch.float64)
    return SearchGaps(own, exact, SearchTasks().exact(batch, n).log_y[:m].double().mean(-1))


def controlled(gaps: dict[int, SearchGaps], expected: dict[str, dict[str, float]]) -> dict[int, tuple[float, float]]:
    r"""For each n the mean gap and its standard error with the gap from known hyperparameters, g', as a control variate.

    Some draws of objectives are harder than others, for the network as for the exact answer, and :math:`g'` tells which: its
    expectation is known well from many more draws, that cost next to nothing. The estimate is
    :math:`\bar g - \beta (\bar g' - E g')`, with :math:`\beta` the slope of g over g' within all n together.
    """
    centred = [[part - part.mean() for part in (found.gap, found.from_known)] for found in gaps.values()]
    slope = float(sum((g * k).sum() for g, k in centred) / sum(k.square().sum() for _, k in centred))
    result = {}
    for n, found in gaps.items():
        mean, error = mean_and_stderr((found.gap - slope * found.from_known).tolist())
        of_many = expected[str(n)]
        result[n] = mean + slope * of_many["gap_y"], math.hypot(error, slope * of_many["stderr_y"])
    return result


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description="Gaps to the exact posterior predictive.")
    parser.add_argument("--quick", action="store_true", help="few tasks")
    parser.add_argument("--objectives", type=int, default=10, help="for each n, at most 50")
    parser.add_argument("--jobs", type=int, default=1, help="objectives at once, each with one thread")
    parser.add_argument("--networks", nargs="+", choices=("gp-small", "bo"), default=("gp-small", "bo"))
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []

    def add(case: str, own: float, exact: float, gap: float, error: float, **more: Any) -> None:
        line = {"case": case, "metric": "test_ll", "unit": "nats", "ours": own, "peer": exact, "peer_name": "exact"}
        rows.append(line | {"ratio": math.exp(-gap), "better": "higher", "gap": gap, "stderr": error} | more)
        print(f"{case}: gap {gap:.4f} ± {error:.4f} {more}", flush=True)

    if "gp-small" in options.networks:
        network, _ = load_pretrained("pfn-gp-small")
        tasks = 32 if options.quick else 512
        table = gap_to_exact(network, GridGPTasks(), torch.Generator().manual_seed(SEED), tasks, GP_SIZES, NUM_QUERIES)
        for n, found in table.items():
            more = {"gap_of_f": found["gap_f"], "tasks": tasks}
            add(
                f"gp-small, n = {n}",
                -found["nll_y"],
                -found["exact_nll_y"],
                found["gap_y"],
                found["stderr_y"],
                **more,
            )
    if "bo" in options.networks:
        network, _ = load_pretrained("pfn-bo")
        tasks, effort = (2, (64, 100)) if options.quick else (options.objectives, EFFORT)
        done = kept(effort)
        wanted = [(n, index) for index in range(tasks) for n in BO_SIZES if (n, index) not in done]
        Parallel(n_jobs=options.jobs)(delayed(exact_and_keep)(*key, effort) for key in wanted)
        done = kept(effort)
        gaps = {n: search_gaps(network, n, [done[n, index] for index in range(tasks)]) for n in BO_SIZES}
        many = 32 if options.quick else 1500
        generator = torch.Generator().manual_seed(SEED + 1)
        expected = gap_to_exact(network, SearchTasks(), generator, many, BO_SIZES, NUM_QUERIES)
        by_size = controlled(gaps, expected)
        for n, found in gaps.items():
            populations = torch.tensor([done[n, index]["populations"] for index in range(tasks)])
            more = {"between_populations": float(populations.diff(dim=-1).abs().mean()), "tasks": tasks}
            more |= {"controlled_gap": by_size[n][0], "controlled_stderr": by_size[n][1]}
            gap, error = mean_and_stderr(found.gap.tolist())
            add(f"bo, n = {n}", float(found.own.mean()), float(found.exact.mean()), gap, error, **more)
        plain = [mean_and_stderr(found.gap.tolist()) for found in gaps.values()]
        for name, column in {"": plain, ", controlled": list(by_size.values())}.items():
            gap = sum(value for value, _ in column) / len(column)
            error = math.hypot(*(value for _, value in column)) / len(column)
            print(f"bo, mean over n{name}: {gap:.4f} ± {error:.4f}")
    write(NAME, rows, {}, quick=options.quick)


if __name__ == "__main__":
    main()
