"""The methods of the UCI benchmark. Settings are the same for all sets; counts of steps depend on the number of rows alone."""

from __future__ import annotations

from collections.abc import Callable

from bayesnn import BNN, likelihoods, networks, priors
from bayesnn.inference import HMC, DeepEnsemble, Method

HIDDEN = 50


def network(in_features: int, out_features: int) -> networks.MLP:
    """One hidden layer of 50 ReLU units, as in the published rows."""
    return networks.mlp(in_features, out_features, hidden=(HIDDEN,), activation="relu")


def bnn(method: Method, likelihood: likelihoods.Likelihood | None = None) -> BNN:
    """The network with Gaussian noise of unknown size and Normal(0, 2 / fan-in) weights."""
    likelihood = likelihoods.Gaussian() if likelihood is None else likelihood
    return BNN(network, likelihood, priors.Normal(), method, max_draws=256, scale_inputs=False)


def hmc(num_rows: int) -> BNN:
    """HMC; fewer draws of more rows."""
    num_draws = 300 if num_rows < 3000 else 100
    return bnn(HMC(num_chains=4, num_warmup=200, num_draws=num_draws, num_leapfrog=24))


def ensemble(num_rows: int) -> BNN:
    """A deep ensemble as in Lakshminarayanan et al. (2017): networks that also learn how the noise depends on x."""
    method = DeepEnsemble(num_members=5, num_steps=2000, batch_size=100, held_out=0.1, check_every=50)
    return bnn(method, likelihoods.HeteroscedasticGaussian())


METHODS: dict[str, Callable[[int], BNN]] = {"HMC": hmc, "deep ensemble": ensemble}
RECOMMENDED = "HMC"
