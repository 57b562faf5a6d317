"""Distributions over functions."""

from bayesnn.processes.gaussian import NNGP
from bayesnn.processes.neural import ConditionalNeuralProcess

__all__ = ["NNGP", "ConditionalNeuralProcess"]
