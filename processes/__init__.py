"""Distributions over functions."""

from bayesnn.processes.gaussian import NNGP
from bayesnn.processes.neural import ConditionalNeuralProcess
from bayesnn.processes.scale_mixture_process import ScaleMixtureProcess
from bayesnn.processes.student_t import StudentTProcess
from bayesnn.processes.variational_student_t import VariationalStudentTProcess

__all__ = ["NNGP", "ConditionalNeuralProcess", "ScaleMixtureProcess", "StudentTProcess", "VariationalStudentTProcess"]
