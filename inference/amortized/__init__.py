"""Amortised inference: networks that have learned, from data sets drawn from a prior, to answer with the posterior."""

from bayesnn.inference.amortized.deep_set import DeepSetNetwork
from bayesnn.inference.amortized.meta_training import MetaTraining, gap_to_exact
from bayesnn.inference.amortized.pfn import PFN
from bayesnn.inference.amortized.tasks import GPTasks, TaskBatch, TaskPrior
from bayesnn.inference.amortized.transformer import SetTransformer

__all__ = [
    "PFN",
    "DeepSetNetwork",
    "GPTasks",
    "MetaTraining",
    "SetTransformer",
    "TaskBatch",
    "TaskPrior",
    "gap_to_exact",
]
