"""Neural processes: networks meta-trained on many functions."""

from bayesnn.processes.neural.conditional import ConditionalNeuralProcess

__all__ = ["ConditionalNeuralProcess"]
