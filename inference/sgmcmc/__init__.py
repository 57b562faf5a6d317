"""Stochastic-gradient Markov chain Monte Carlo: minibatches, no correction, a stated stationary law."""

from bayesnn.inference.sgmcmc.chain import SGMCMC
from bayesnn.inference.sgmcmc.preconditioners import RMS
from bayesnn.inference.sgmcmc.schedules import Constant, Cosine, Cyclical, Polynomial, Schedule
from bayesnn.inference.sgmcmc.sghmc import SGHMC
from bayesnn.inference.sgmcmc.sgld import SGLD

__all__ = ["RMS", "SGHMC", "SGLD", "SGMCMC", "Constant", "Cosine", "Cyclical", "Polynomial", "Schedule"]
