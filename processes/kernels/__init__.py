"""Kernels of infinitely wide networks."""

from bayesnn.processes.kernels.dual_activations import DualActivation, DualMoments, dual_activation
from bayesnn.processes.kernels.nngp import NNGPKernel

__all__ = ["DualActivation", "DualMoments", "NNGPKernel", "dual_activation"]
