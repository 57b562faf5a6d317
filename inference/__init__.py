"""How a posterior is computed; knows no processes and no front end."""

from bayesnn.inference.compiled import Compiled
from bayesnn.inference.draws import WeightPosterior
from bayesnn.inference.ensembles import DeepEnsemble
from bayesnn.inference.function_target import FunctionTarget
from bayesnn.inference.mcmc import HMC, MALA, MCLMC, NUTS, AdjustedMCLMC, RandomWalk
from bayesnn.inference.network_target import NetworkTarget
from bayesnn.inference.parallel import run_chains
from bayesnn.inference.pyro_models import PyroTarget, pyro_model
from bayesnn.inference.run import Method, run
from bayesnn.inference.sgmcmc import BAOAB, RMS, SGHMC, SGLD, SGNHT, Constant, Cosine, Cyclical, Polynomial, Structured
from bayesnn.inference.smc import SMC
from bayesnn.inference.starting_at import StartingAt
from bayesnn.inference.target import Target
from bayesnn.inference.vi import MeanField
from bayesnn.inference.warm_start import WarmStarted

__all__ = [
    "BAOAB",
    "HMC",
    "MALA",
    "MCLMC",
    "NUTS",
    "RMS",
    "SGHMC",
    "SGLD",
    "SGNHT",
    "SMC",
    "AdjustedMCLMC",
    "Compiled",
    "Constant",
    "Cosine",
    "Cyclical",
    "DeepEnsemble",
    "FunctionTarget",
    "MeanField",
    "Method",
    "NetworkTarget",
    "Polynomial",
    "PyroTarget",
    "RandomWalk",
    "StartingAt",
    "Structured",
    "Target",
    "WarmStarted",
    "WeightPosterior",
    "pyro_model",
    "run",
    "run_chains",
]
