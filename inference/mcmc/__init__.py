"""Markov chain Monte Carlo with Metropolis–Hastings correction: exact as the chain grows long."""

from bayesnn.inference.mcmc.hmc import HMC

__all__ = ["HMC"]
