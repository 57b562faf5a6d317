"""Architectures: one definition of a network, for its infinite-width kernels and for finite networks."""

from bayesnn.processes.architectures.combinations import (
    Concatenation,
    Repeated,
    Sequential,
    Sum,
    mlp,
    residual,
    serial,
)
from bayesnn.processes.architectures.covariance import Covariance, of_each_with_itself, of_inputs
from bayesnn.processes.architectures.layers import Activation, Dense, Dropout, Flatten, Identity, Layer, LayerNorm

__all__ = [
    "Activation",
    "Concatenation",
    "Covariance",
    "Dense",
    "Dropout",
    "Flatten",
    "Identity",
    "Layer",
    "LayerNorm",
    "Repeated",
    "Sequential",
    "Sum",
    "mlp",
    "of_each_with_itself",
    "of_inputs",
    "residual",
    "serial",
]
