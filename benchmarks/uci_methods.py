"""The methods of the UCI benchmark. Settings are the same for all sets; counts of steps depend on the number of rows alone.

The prior is wide, Normal(0, 25 / fan-in) for weights and Normal(0, 9) for biases: with 50 hidden units narrower ones
underfit. It, the learning rate, the schedule of SGHMC and the counts were chosen for all sets together by what the first two
to four splits gave; figures over the other splits alone stand beside those over all.
"""

from __future__ import annotations

from collections.abc import Callable

from bayesnn import BNN, likelihoods, networks, priors
from bayesnn.inference import (
    HMC,
    MCLMC,
    RMS,
    SGHMC,
    SMC,
    Cosine,
    DeepEnsemble,
    Method,
    Structured,
    WarmStarted,
)

NUM_HIDDEN = 50
MANY_ROWS = 3000


def network(in_features: int, out_features: int) -> networks.MLP:
    """One hidden layer of 50 ReLU units, as in the published rows."""
    return networks.mlp(in_features, out_features, hidden=(NUM_HIDDEN,), activation="relu")


def bnn(method: Method, likelihood: likelihoods.Likelihood | None = None, prior: priors.Normal | None = None) -> BNN:
    """The network under the wide prior, with Gaussian noise of unknown size, unless told otherwise."""
    likelihood = likelihoods.Gaussian() if likelihood is None else likelihood
    prior = priors.Normal(scale=5.0, bias_scale=3.0) if prior is None else prior
    return BNN(network, likelihood, prior, method, max_draws=256, scale_inputs=False)


def members(num_steps: int, held_out: float = 0.0, num_members: int = 8) -> DeepEnsemble:
    """Trained networks, by themselves or where chains start (then as many as there are chains)."""
    return DeepEnsemble(num_members, num_steps, learning_rate=0.03, batch_size=256, held_out=held_out)


def mclmc(num_rows: int) -> BNN:
    """Microcanonical Langevin from the members of an ensemble; fewer chains and draws, and longer training, with many rows."""
    if num_rows > MANY_ROWS:
        sampler = MCLMC(num_chains=4, num_warmup=30, num_draws=20, thinning=10)
        return bnn(WarmStarted(sampler, DeepEnsemble(4, 4000, learning_rate=0.02, batch_size=512, held_out=0.0)))
    return bnn(WarmStarted(MCLMC(num_chains=8, num_warmup=100, num_draws=100, thinning=10), members(600)))


def warm_sghmc(num_rows: int) -> WarmStarted:
    """Step sizes that fall while burning in; draws are taken at the end, where they are small."""
    longer = 2 if num_rows > MANY_ROWS else 1
    sampler = SGHMC(
        num_chains=8,
        num_burn_in=2000 * longer,
        num_draws=32,
        thinning=20 * longer,
        step_size=Cosine(initial=0.015, final=0.001, num_steps=2500 * longer),
        batch_size=256 * longer,
        preconditioner=RMS(),
        friction=1.0,
    )
    return WarmStarted(sampler, members(2000 if num_rows > MANY_ROWS else 600))


def sghmc(num_rows: int) -> BNN:
    """SGHMC from the members of an ensemble."""
    return bnn(warm_sghmc(num_rows))


def sghmc_heteroscedastic(num_rows: int) -> BNN:
    """The same, with a network that also says how the noise depends on x."""
    return bnn(warm_sghmc(num_rows), likelihoods.HeteroscedasticGaussian())


def structured(num_rows: int) -> BNN:
    """SGHMC whose layers are made independent, from the members of an ensemble; the schedule is SGHMC's."""
    base = SGHMC(
        num_chains=4,
        num_burn_in=2000,
        num_draws=64,
        thinning=10,
        step_size=Cosine(initial=0.015, final=0.001, num_steps=2500),
        batch_size=512 if num_rows > MANY_ROWS else 256,
        preconditioner=RMS(),
        friction=1.0,
    )
    return bnn(WarmStarted(Structured(base, groups="layer"), members(2000 if num_rows > MANY_ROWS else 600)))


def smc(num_rows: int) -> BNN:
    """SMC from the narrower default prior: few particles find their way from draws of the wide one to the posterior."""
    sampler = HMC(num_leapfrog=16, initial_step_size=0.1)
    return bnn(SMC(16 if num_rows > MANY_ROWS else 64, sampler=sampler, num_moves=1), prior=priors.Normal())


def ensemble(num_rows: int) -> BNN:
    """A deep ensemble: networks trained side by side, each stopped by the rows that it holds out."""
    return bnn(members(2000 if num_rows > MANY_ROWS else 600, held_out=0.1))


METHODS: dict[str, Callable[[int], BNN]] = {
    "MCLMC": mclmc,
    "SGHMC": sghmc,
    "S-SGMCMC": structured,
    "SMC": smc,
    "deep ensemble": ensemble,
    "SGHMC, noise by x": sghmc_heteroscedastic,
}
RECOMMENDED = "MCLMC"
