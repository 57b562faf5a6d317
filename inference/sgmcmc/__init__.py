"""Stochastic-gradient Markov chain Monte Carlo: minibatches, no correction, a stated stationary law."""

from bayesnn.inference.sgmcmc.baoab import BAOAB
from bayesnn.inference.sgmcmc.chain import SGMCMC
from bayesnn.inference.sgmcmc.preconditioners import RMS
from bayesnn.inference.sgmcmc.schedules import Constant, Cosine, Cyclical, Polynomial, Schedule
from bayesnn.inference.sgmcmc.sghmc import SGHMC
from bayesnn.inference.sgmcmc.sgld import SGLD
from bayesnn.inference.sgmcmc.sgnht import SGNHT
from bayesnn.inference.sgmcmc.structured import Structured

__all__ = [
    "BAOAB",
    "RMS",
    "SGHMC",
    "SGLD",
    "SGMCMC",
    "SGNHT",
    "Constant",
    "Cosine",
    "Cyclical",
    "Polynomial",
    "Schedule",
    "Structured",
]
