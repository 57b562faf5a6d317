"""Bayesian optimisation: any model of this library decides what to try next."""

from bayesnn.bo.closed_form import ClosedForm, log_expected_improvement, probability_of_improvement, quantile
from bayesnn.bo.minimize import maximize, minimize
from bayesnn.bo.parameters import Ordinal, When
from bayesnn.bo.result import Evaluation, Interrupted, Result
from bayesnn.bo.sampler import SurrogateSampler
from bayesnn.bo.space import Space
from bayesnn.bo.suggest import SpaceExhaustedError, suggest

__all__ = [
    "ClosedForm",
    "Evaluation",
    "Interrupted",
    "Ordinal",
    "Result",
    "Space",
    "SpaceExhaustedError",
    "SurrogateSampler",
    "When",
    "log_expected_improvement",
    "maximize",
    "minimize",
    "probability_of_improvement",
    "quantile",
    "suggest",
]
