"""Probabilistic and Bayesian deep learning on PyTorch: one likelihood interface, one posterior interface."""

from importlib.metadata import version

from bayesnn import likelihoods, metrics, networks, priors
from bayesnn.bnn import BNN
from bayesnn.data import BayesnnWarning
from bayesnn.inference.amortized import PFN
from bayesnn.model import Model, NotFittedError
from bayesnn.predictive import Predictive
from bayesnn.processes import NNGP, ConditionalNeuralProcess, GaussianProcess, StudentTProcess
from bayesnn.registry import named_model, surrogate, surrogates
from bayesnn.stacking import Stack

__version__ = version("bayesnn")
load = Model.load

__all__ = [
    "BNN",
    "NNGP",
    "PFN",
    "BayesnnWarning",
    "ConditionalNeuralProcess",
    "GaussianProcess",
    "Model",
    "NotFittedError",
    "Predictive",
    "Stack",
    "StudentTProcess",
    "likelihoods",
    "load",
    "metrics",
    "named_model",
    "networks",
    "priors",
    "surrogate",
    "surrogates",
]
