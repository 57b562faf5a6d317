"""Markov chain Monte Carlo with Metropolis–Hastings correction: exact as the chain grows long."""

from bayesnn.inference.mcmc.hmc import HMC
from bayesnn.inference.mcmc.nuts import NUTS

__all__ = ["HMC", "NUTS"]
