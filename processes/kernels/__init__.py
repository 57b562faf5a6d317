"""Kernels of infinitely wide networks, and of finite ones."""

from bayesnn.processes.kernels.factories import FourierKernel, KernelFactory, MLPKernel
from bayesnn.processes.kernels.infinite_width import InfiniteWidthKernel, NNGPKernel, NTKKernel

__all__ = ["FourierKernel", "InfiniteWidthKernel", "KernelFactory", "MLPKernel", "NNGPKernel", "NTKKernel"]
