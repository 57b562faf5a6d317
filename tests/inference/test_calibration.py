"""Simulation-based calibration (Talts et al. 2018) of a small network's posterior.

Parameters from the prior, data from the parameters, draws from the posterior given the data: the rank of the truth among the
draws is uniform, of every quantity. Weights have permutation symmetries; the quantities are function values at three points,
and the log density of prior and likelihood together, which sees the data (Modrák et al. 2023). The data sets are the chains
of one run.
"""

import pytest
import torch

from bayesnn import likelihoods, networks, priors
from bayesnn.data import Data
from bayesnn.inference import NUTS, SMC, AdjustedMCLMC, NetworkTarget, run
from bayesnn.inference.draws import WeightPosterior
from bayesnn.inference.mcmc.hmc import HMC, hmc_move

X = torch.linspace(-2, 2, 8, dtype=torch.float64).unsqueeze(-1)
PLACES = torch.tensor([[-3.0], [0.3], [1.5]], dtype=torch.float64)


class ManyDataSets(NetworkTarget):
    """A network's posteriors given many data sets, one for each chain: Y (C, N, 1)."""

    def __init__(self, num_data_sets=400, seed=0):
        network = networks.mlp(1, 1, hidden=(3,), activation="tanh")
        super().__init__(
            network,
            likelihoods.Gaussian(noise_std=0.3),
            priors.Normal(scale=2.0),
            Data(X, torch.zeros_like(X)),
            torch.ones(1, 1, dtype=torch.float64),
        )
        generator = torch.Generator().manual_seed(seed)
        self.truth = self.sample_prior(num_data_sets, generator)
        f = self.functions(self.truth, X)
        self.Y = f + 0.3 * torch.randn(f.shape, generator=generator, dtype=torch.float64)

    def functions(self, parameters, X):
        return WeightPosterior(parameters).posterior(self.network, X).values

    def pointwise_log_likelihood(self, parameters, batch=None):
        f = self.functions(parameters, X)
        return self.likelihood.log_prob(f, self.Y[: len(f)], self.fixed)

    def quantities(self, parameters, index=None):
        """(S, 4), of one set of parameters for each data set, or of any for one of them."""
        Y = self.Y if index is None else self.Y[index]
        with torch.no_grad():
            log_likelihood = self.likelihood.log_prob(self.functions(parameters, X), Y, self.fixed).sum(-1)
            log_density = self.log_prior(parameters) + log_likelihood
            return torch.cat([self.functions(parameters, PLACES).squeeze(-1), log_density.unsqueeze(-1)], -1)


class Hot:
    """A mass whose momenta are too large for their kinetic energy."""

    def __init__(self, mass):
        self._mass = mass

    def __getattr__(self, name):
        return getattr(self._mass, name)

    def momentum(self, noise):
        return 1.3 * self._mass.momentum(noise)


class HotHMC(HMC):
    def move(self, density, point, step_size, mass, generator):
        return hmc_move(density, point, step_size, Hot(mass), generator, self.num_leapfrog)


class BlindTarget(ManyDataSets):
    """The prior."""

    def pointwise_log_likelihood(self, parameters, batch=None):
        return 0.0 * super().pointwise_log_likelihood(parameters)


OPTIONS = {"num_chains": 400, "num_warmup": 200, "num_draws": 320}
SAMPLERS = {
    "hmc": HMC(num_leapfrog=8, **OPTIONS),
    "hmc, low-rank": HMC(num_leapfrog=8, mass="low-rank", **OPTIONS),
    "nuts": NUTS(max_depth=4, **OPTIONS),
    "adjusted mclmc": AdjustedMCLMC(num_leapfrog=8, **OPTIONS),
}


def ranks(target, posterior, num_draws=31):
    """The truth's rank among so many evenly spaced draws of each chain, (C, 4)."""
    chains = {name: posterior.by_chain(values) for name, values in posterior.parameters.items()}
    length = len(posterior) // posterior.num_chains
    index = torch.linspace(0, length - 1, num_draws).long()
    draws = torch.stack([target.quantities({name: v[:, i] for name, v in chains.items()}) for i in index])
    return (draws < target.quantities(target.truth)).sum(0)


def p_values(found, num_draws=31):
    """Of the chi-squared test that ranks 0 … num_draws are uniform, in eight bins, for each quantity."""
    counts = torch.nn.functional.one_hot(found * 8 // (num_draws + 1), 8).double().sum(0)
    expected = len(found) / 8
    statistic = ((counts - expected).square() / expected).sum(-1)
    return torch.special.gammaincc(torch.tensor(3.5).double(), statistic / 2)


@pytest.mark.parametrize("name", SAMPLERS)
def test_ranks_are_uniform(name):
    target = ManyDataSets()
    found = p_values(ranks(target, run(SAMPLERS[name], target, seed=1)))
    assert found.min() > 1e-3, found


def test_smc_s_ranks_are_uniform():
    target, num_particles = ManyDataSets(100), 127
    found = []
    for index, y in enumerate(target.Y):
        one = NetworkTarget(target.network, target.likelihood, target.prior, Data(X, y), torch.ones(1, 1).double())
        posterior = run(SMC(num_particles=num_particles, num_moves=2), one, seed=index)
        particles = target.quantities(posterior.parameters, index)
        truth = target.quantities({name: v[index : index + 1] for name, v in target.truth.items()}, index)
        found.append((particles < truth).sum(0))
    found = p_values(torch.stack(found), num_particles)
    assert found.min() > 1e-3, found


def test_a_broken_sampler_is_noticed():
    target = ManyDataSets()
    found = p_values(ranks(target, run(HotHMC(num_leapfrog=8, **OPTIONS), target, seed=1)))
    assert found.min() < 1e-6, found


def test_the_log_density_notices_a_sampler_that_never_looks_at_the_data():
    target = ManyDataSets()
    found = p_values(ranks(target, run(SAMPLERS["hmc"], BlindTarget(), seed=1)))
    assert found[:3].min() > 1e-3 and found[3] < 1e-6, found
