"""How a posterior is computed; knows no processes and no front end."""

from bayesnn.inference.compiled import Compiled
from bayesnn.inference.draws import WeightPosterior
from bayesnn.inference.ensembles import DeepEnsemble
from bayesnn.inference.mcmc import HMC
from bayesnn.inference.run import Method, run
from bayesnn.inference.sgmcmc import RMS, SGHMC, SGLD
from bayesnn.inference.target import FunctionTarget, NetworkTarget, Target
from bayesnn.inference.vi import MeanField

__all__ = [
    "HMC",
    "RMS",
    "SGHMC",
    "SGLD",
    "Compiled",
    "DeepEnsemble",
    "FunctionTarget",
    "MeanField",
    "Method",
    "NetworkTarget",
    "Target",
    "WeightPosterior",
    "run",
]
