"""Kernels of infinitely wide networks, and of finite ones."""

from bayesnn.processes.kernels.infinite_width import InfiniteWidthKernel, NNGPKernel, NTKKernel

__all__ = ["InfiniteWidthKernel", "NNGPKernel", "NTKKernel"]
