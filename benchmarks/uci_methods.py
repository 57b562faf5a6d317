"""The methods of the UCI benchmark. Settings are the same for all sets; counts of steps depend on the number of rows alone.

The prior is wide, Normal(0, 25 / fan-in) for weights and Normal(0, 9) for biases: with 50 hidden units narrower ones
underfit. It, the learning rate, the schedule of SGHMC and the counts were chosen for all sets together by what the first two
to four splits gave; figures over the other splits alone stand beside those over all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bayesnn import BNN, likelihoods, networks, priors
from bayesnn.configured import Configured
from bayesnn.inference import HMC, DeepEnsemble, Method, NetworkTarget, run
from bayesnn.inference.sgmcmc import RMS, SGHMC, Cosine
from bayesnn.inference.target import Parameters

NUM_HIDDEN = 50
MANY_ROWS = 3000


class Started:
    """A target whose initial points are given."""

    def __init__(self, target: NetworkTarget, points: Parameters) -> None:
        self.target, self.points = target, points

    def __getattr__(self, name: str) -> Any:
        return getattr(self.target, name)

    def initial(self, count: int, generator: torch.Generator) -> Parameters:
        """The first ``count`` of the given points."""
        return {name: values[:count] for name, values in self.points.items()}


@dataclass(frozen=True)
class FromEnsemble(Configured):
    """One member of a deep ensemble for each chain, then a sampler."""

    ensemble: DeepEnsemble
    sampler: Method

    def init(self, target: NetworkTarget, generator: torch.Generator) -> Any:
        """Train the members, and start the chains there."""
        seed = int(torch.randint(2**31, (), generator=generator))
        members = run(self.ensemble, target, seed=seed)
        return self.sampler.init(Started(target, members.parameters), generator)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)


def network(in_features: int, out_features: int) -> networks.MLP:
    """One hidden layer of 50 ReLU units, as in the published rows."""
    return networks.mlp(in_features, out_features, hidden=(NUM_HIDDEN,), activation="relu")


def bnn(method: Method, likelihood: likelihoods.Likelihood | None = None) -> BNN:
    """The network under its prior, with Gaussian noise of unknown size unless told otherwise."""
    likelihood = likelihoods.Gaussian() if likelihood is None else likelihood
    prior = priors.Normal(scale=5.0, bias_scale=3.0)
    return BNN(network, likelihood, prior, method, max_draws=256, scale_inputs=False)


def members(count: int, num_rows: int, held_out: float = 0.0) -> DeepEnsemble:
    """Trained networks, by themselves or where chains start."""
    num_steps = 2000 if num_rows > MANY_ROWS else 600
    return DeepEnsemble(count, num_steps, learning_rate=0.03, batch_size=256, held_out=held_out)


def hmc(num_rows: int) -> BNN:
    """HMC from the members of an ensemble; fewer moves with many rows."""
    if num_rows > MANY_ROWS:
        sampler = HMC(num_chains=4, num_warmup=30, num_draws=20, num_leapfrog=16, initial_step_size=0.003)
    else:
        sampler = HMC(num_chains=4, num_warmup=100, num_draws=150, num_leapfrog=24)
    return bnn(FromEnsemble(members(4, num_rows), sampler))


def sghmc_from_members(num_rows: int) -> FromEnsemble:
    """Step sizes that fall while burning in; draws are taken at the end, where they are small."""
    scale = 2 if num_rows > MANY_ROWS else 1
    sampler = SGHMC(
        num_chains=8,
        num_burn_in=2000 * scale,
        num_draws=32,
        thinning=20 * scale,
        step_size=Cosine(initial=0.015, final=0.001, num_steps=2500 * scale),
        batch_size=256 * scale,
        preconditioner=RMS(),
    )
    return FromEnsemble(members(8, num_rows), sampler)


def sghmc(num_rows: int) -> BNN:
    """SGHMC from the members of an ensemble."""
    return bnn(sghmc_from_members(num_rows))


def sghmc_heteroscedastic(num_rows: int) -> BNN:
    """The same, with a network that also says how the noise depends on x."""
    return bnn(sghmc_from_members(num_rows), likelihoods.HeteroscedasticGaussian())


def ensemble(num_rows: int) -> BNN:
    """A deep ensemble: networks trained side by side, each stopped by the rows that it holds out."""
    return bnn(members(8, num_rows, held_out=0.1))


METHODS: dict[str, Callable[[int], BNN]] = {
    "HMC": hmc,
    "SGHMC": sghmc,
    "deep ensemble": ensemble,
    "SGHMC, noise by x": sghmc_heteroscedastic,
}
RECOMMENDED = "HMC"
