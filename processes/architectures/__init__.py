"""Architectures: one definition of a network, for its infinite-width kernels and for finite networks."""

from bayesnn.processes.architectures.attention import PositionalEncoding, SelfAttention
from bayesnn.processes.architectures.combinations import (
    Concatenation,
    Repeated,
    Sequential,
    Sum,
    fourier_mlp,
    mlp,
    residual,
    serial,
)
from bayesnn.processes.architectures.convolutions import Convolution
from bayesnn.processes.architectures.covariance import Covariance, of_each_with_itself, of_inputs
from bayesnn.processes.architectures.finite import FiniteNetwork, finite_network
from bayesnn.processes.architectures.graphs import Aggregate, needs_graphs, unflattened, with_adjacency
from bayesnn.processes.architectures.layers import (
    Activation,
    Dense,
    Dropout,
    Flatten,
    Identity,
    Layer,
    LayerNorm,
    needs_pairs,
)
from bayesnn.processes.architectures.pooling import AveragePooling, GlobalAveragePooling, GlobalSumPooling, SumPooling

__all__ = [
    "Activation",
    "Aggregate",
    "AveragePooling",
    "Concatenation",
    "Convolution",
    "Covariance",
    "Dense",
    "Dropout",
    "FiniteNetwork",
    "Flatten",
    "GlobalAveragePooling",
    "GlobalSumPooling",
    "Identity",
    "Layer",
    "LayerNorm",
    "PositionalEncoding",
    "Repeated",
    "SelfAttention",
    "Sequential",
    "Sum",
    "SumPooling",
    "finite_network",
    "fourier_mlp",
    "mlp",
    "needs_graphs",
    "needs_pairs",
    "of_each_with_itself",
    "of_inputs",
    "residual",
    "serial",
    "unflattened",
    "with_adjacency",
]
