"""Chains spread over processes, or over the machines of a cluster, through joblib's backends.

Within a process chains are vectorised; this is for more cores than one process uses well. Every group of chains is a run of
its own, with its own seed and its own checkpoint, so that a killed worker costs only what it had not saved.
"""

from __future__ import annotations

import dataclasses
import warnings
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import joblib
import torch
from torch import Tensor

from bayesnn.checks import count
from bayesnn.data import BayesnnWarning
from bayesnn.inference.draws import WeightPosterior
from bayesnn.inference.run import check_method, run


def run_chains(
    method: Any,
    target: Any,
    *,
    num_groups: int,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    max_restarts: int = 3,
    time_budget: float | None = None,
    progress: bool = False,
) -> WeightPosterior:
    """Run a sampler's chains in groups, each in a worker with one thread.

    By default the workers are processes of this machine (loky). ``with joblib.parallel_config(backend="dask"): …`` sends
    them to a Dask cluster, ``backend="ray"`` to Ray, ``backend="sequential"`` runs them here one after the other; the draws
    are the same everywhere. The method and the target travel to the workers; the checkpoint's folder must be one that all
    of them see.

    Args:
        method: a sampler; it adapts within each group by itself.
        target: what it samples.
        num_groups: of chains, and workers at once; at most the method's number of chains, which it should divide.
        seed: the groups' seeds are drawn from a generator with this one.
        checkpoint: a folder, with a folder in it for each group.
        checkpoint_every: steps between two writes.
        max_restarts: how often groups are sent out again after a worker died; those that had finished, or have a checkpoint,
            go on from there. (Dask sends them out again by itself.)
        time_budget: seconds after which each group ends with the draws that it has; of all groups as many are taken as the
            slowest has. (There is no effective sample size to stop at: groups don't know of each other's draws.)
        progress: show the progress of the first group, for all.

    Returns:
        The draws of all chains, group by group.

    Raises:
        TypeError: if the method has no chains.
        ValueError: if there are fewer chains than groups.
        TimeoutError: if the time is up before a group's first draw.
        BrokenProcessPool: if workers died more than ``max_restarts`` times.
    """
    check_method(method)
    if not hasattr(method, "num_chains"):
        raise TypeError(f"run_chains needs a method with chains (HMC(), SGHMC() …), found {method!r}: use run")
    total = method.num_chains
    if not 1 <= count("num_groups", num_groups, least=0) <= total:
        raise ValueError(f"num_groups must lie between 1 and the method's {total} chains, found {num_groups}")
    sizes = [total // num_groups + (index < total % num_groups) for index in range(num_groups)]
    seeds = torch.randint(2**62, (num_groups,), generator=torch.Generator().manual_seed(seed)).tolist()
    folders = [
        None if checkpoint is None else str(Path(checkpoint) / f"group-{index:03d}") for index in range(num_groups)
    ]
    options = {"checkpoint_every": count("checkpoint_every", checkpoint_every), "time_budget": time_budget}
    tasks = [
        joblib.delayed(_run_group)(
            with_num_chains(method, sizes[index]),
            target,
            options | {"seed": seeds[index], "checkpoint": folders[index], "progress": progress and index == 0},
        )
        for index in range(num_groups)
    ]
    for restart in range(max_restarts + 1):
        try:
            return concatenate(joblib.Parallel(n_jobs=num_groups)(tasks))
        except BrokenProcessPool as error:
            if restart == max_restarts:
                raise
            warnings.warn(
                f"a worker died ({type(error).__name__}); its chains start again", BayesnnWarning, stacklevel=2
            )
    raise AssertionError


def _run_group(method: Any, target: Any, options: dict[str, Any]) -> WeightPosterior:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        posterior: WeightPosterior = run(method, target, **options)
        return posterior
    finally:
        torch.set_num_threads(num_threads)


def with_num_chains(method: Any, num_chains: int) -> Any:
    """The same method with another number of chains; for one that wraps a sampler, with that many in the sampler."""
    names = [field.name for field in dataclasses.fields(method)]
    if "num_chains" in names:
        return dataclasses.replace(method, num_chains=num_chains)
    inner = next(name for name in names if hasattr(getattr(method, name), "num_chains"))
    return dataclasses.replace(method, **{inner: with_num_chains(getattr(method, inner), num_chains)})


def concatenate(posteriors: list[WeightPosterior]) -> WeightPosterior:
    """Posteriors of separate chains as one; of chains of different lengths, as many draws as the shortest have."""
    num_draws = min(len(p) // p.num_chains for p in posteriors)

    def chains(posterior: WeightPosterior, values: Tensor) -> Tensor:
        return posterior.by_chain(values)[:, :num_draws].flatten(0, 1)

    def joined(name: str) -> Tensor:
        values = [posterior.statistics[name] for posterior in posteriors]
        of_draws = values[0].dim() == 2
        return torch.cat([own[:num_draws] for own in values], 1) if of_draws else torch.stack(values, -1)

    first = posteriors[0]
    parameters = {name: torch.cat([chains(p, p.sampled[name]) for p in posteriors]) for name in first.sampled}
    log_weights = [chains(p, p.log_weights) for p in posteriors if p.log_weights is not None]
    return WeightPosterior(
        parameters,
        sum(p.num_chains for p in posteriors),
        torch.cat(log_weights) if log_weights else None,
        {name: joined(name) for name in first.statistics},
        first.fixed,
        {name: torch.cat([p.groups[name] for p in posteriors]) for name in first.groups},
    )
