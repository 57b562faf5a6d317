"""Distributions over functions."""

from bayesnn.processes.deep_kernel import DeepKernel
from bayesnn.processes.dirichlet_classification import DirichletNNGP, MaximumEvidence
from bayesnn.processes.gaussian import NNGP
from bayesnn.processes.gp import GaussianProcess
from bayesnn.processes.gradient_flow import NTKEnsemble
from bayesnn.processes.learning_curves import LearningCurveProcess
from bayesnn.processes.neural import ConditionalNeuralProcess
from bayesnn.processes.scale_mixture_process import ScaleMixtureProcess
from bayesnn.processes.sparse_gaussian import CollapsedBound, SparseNNGP
from bayesnn.processes.student_t import StudentTProcess
from bayesnn.processes.variational_gaussian import SparseVariational, VariationalNNGP
from bayesnn.processes.variational_student_t import VariationalStudentTProcess

__all__ = [
    "NNGP",
    "CollapsedBound",
    "ConditionalNeuralProcess",
    "DeepKernel",
    "DirichletNNGP",
    "GaussianProcess",
    "LearningCurveProcess",
    "MaximumEvidence",
    "NTKEnsemble",
    "ScaleMixtureProcess",
    "SparseNNGP",
    "SparseVariational",
    "StudentTProcess",
    "VariationalNNGP",
    "VariationalStudentTProcess",
]
