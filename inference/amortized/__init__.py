"""Amortised inference: networks that have learned, from data sets drawn from a prior, to answer with the posterior."""

from bayesnn.inference.amortized.classifier import PFNClassifier
from bayesnn.inference.amortized.deep_set import DeepSetNetwork
from bayesnn.inference.amortized.gaps import gap_to_exact
from bayesnn.inference.amortized.meta_training import MetaTraining
from bayesnn.inference.amortized.pfn import PFN
from bayesnn.inference.amortized.tasks import (
    BNNTasks,
    CausalTasks,
    GPTasks,
    GridGPTasks,
    MixtureTasks,
    SearchTasks,
    TaskBatch,
    TaskPrior,
)
from bayesnn.inference.amortized.transformer import SetClassifier, SetTransformer

__all__ = [
    "PFN",
    "BNNTasks",
    "CausalTasks",
    "DeepSetNetwork",
    "GPTasks",
    "GridGPTasks",
    "MetaTraining",
    "MixtureTasks",
    "PFNClassifier",
    "SearchTasks",
    "SetClassifier",
    "SetTransformer",
    "TaskBatch",
    "TaskPrior",
    "gap_to_exact",
]
