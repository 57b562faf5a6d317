"""Markov chain Monte Carlo: exact as the chain grows long, where there is a Metropolis–Hastings correction."""

from bayesnn.inference.mcmc.adjusted_mclmc import AdjustedMCLMC
from bayesnn.inference.mcmc.hmc import HMC
from bayesnn.inference.mcmc.mala import MALA
from bayesnn.inference.mcmc.mclmc import MCLMC
from bayesnn.inference.mcmc.nuts import NUTS
from bayesnn.inference.mcmc.random_walk import RandomWalk

__all__ = ["HMC", "MALA", "MCLMC", "NUTS", "AdjustedMCLMC", "RandomWalk"]
