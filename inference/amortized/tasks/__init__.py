"""Priors over tasks."""

from bayesnn.inference.amortized.tasks.base import Exact, Process, TaskBatch, TaskPrior
from bayesnn.inference.amortized.tasks.causal import CausalTasks
from bayesnn.inference.amortized.tasks.gaussian import GPTasks
from bayesnn.inference.amortized.tasks.grid import GridGPTasks
from bayesnn.inference.amortized.tasks.mixtures import MixtureTasks
from bayesnn.inference.amortized.tasks.networks import BNNTasks
from bayesnn.inference.amortized.tasks.optimisation import SearchTasks

__all__ = [
    "BNNTasks",
    "CausalTasks",
    "Exact",
    "GPTasks",
    "GridGPTasks",
    "MixtureTasks",
    "Process",
    "SearchTasks",
    "TaskBatch",
    "TaskPrior",
]
