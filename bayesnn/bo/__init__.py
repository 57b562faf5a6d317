"""Bayesian optimisation: any model of this library decides what to try next."""

from bayesnn.bo.minimize import maximize, minimize
from bayesnn.bo.result import Evaluation, Interrupted, Result
from bayesnn.bo.sampler import SurrogateSampler
from bayesnn.bo.space import Space
from bayesnn.bo.suggest import SpaceExhaustedError, suggest

__all__ = [
    "Evaluation",
    "Interrupted",
    "Result",
    "Space",
    "SpaceExhaustedError",
    "SurrogateSampler",
    "maximize",
    "minimize",
    "suggest",
]
