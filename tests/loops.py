"""Small runs for the tests of the loop, of its checkpoints and of interruptions."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bayesnn import likelihoods, networks, priors
from bayesnn.configured import Configured
from bayesnn.data import Data
from bayesnn.inference import HMC, DeepEnsemble, MeanField, NetworkTarget

METHODS = {
    "hmc": HMC(num_chains=2, num_warmup=20, num_draws=20, num_leapfrog=4),
    "mean-field": MeanField(num_steps=40, num_draws=8, batch_size=7),
    "ensemble": DeepEnsemble(num_members=3, num_steps=40, batch_size=7, check_every=3),
}


def target(seed=0, dtype=torch.float64, **options):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(20, 2, generator=generator, dtype=torch.float64).to(dtype)
    data = Data(X, X.sum(-1, keepdim=True).tanh())
    settings = {"network": networks.mlp(2, 1, hidden=(5,)), "prior": priors.Normal()} | options
    return NetworkTarget(settings["network"], likelihoods.Gaussian(), settings["prior"], data, torch.ones(1, 1))


class CountState(NamedTuple):
    total: Tensor
    nested: dict[str, Tensor]


class CountInfo(NamedTuple):
    draw: Tensor


@dataclass(frozen=True)
class Count(Configured):
    """Adds up random numbers."""

    num_steps: int = 10
    stop_at: int = -1

    def init(self, target, generator):
        return CountState(torch.zeros(2), {"last": torch.zeros(())})

    def step(self, target, state, generator):
        draw = torch.rand((), generator=generator)
        return CountState(state.total + draw, {"last": draw}), CountInfo(draw)

    def keep(self, state, index):
        return {"total": state.total} if index % 2 else None

    def result(self, target, state, draws, infos):
        return state, draws, infos


def assert_equal(first, second):
    assert first.parameters.keys() == second.parameters.keys()
    for group in ("parameters", "statistics"):
        for name, value in getattr(first, group).items():
            assert torch.equal(value, getattr(second, group)[name]), name


class Stop(Exception):
    pass


def stop_after(steps):
    def callback(index, state, info):
        if index + 1 == steps:
            raise Stop

    return callback
