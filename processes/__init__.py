"""Distributions over functions."""

from bayesnn.processes.gaussian import NNGP
from bayesnn.processes.neural import ConditionalNeuralProcess
from bayesnn.processes.student_t import StudentTProcess

__all__ = ["NNGP", "ConditionalNeuralProcess", "StudentTProcess"]
