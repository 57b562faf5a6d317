"""Bayesian optimisation: any model of this library decides what to try next."""

from bayesnn.bo.auto import AutoSurrogate
from bayesnn.bo.closed_form import ClosedForm, log_expected_improvement, probability_of_improvement, quantile
from bayesnn.bo.minimize import maximize, minimize
from bayesnn.bo.result import Evaluation, Interrupted, Result
from bayesnn.bo.sampler import SurrogateSampler
from bayesnn.bo.space import Space
from bayesnn.bo.suggest import SpaceExhaustedError, suggest

__all__ = [
    "AutoSurrogate",
    "ClosedForm",
    "Evaluation",
    "Interrupted",
    "Result",
    "Space",
    "SpaceExhaustedError",
    "SurrogateSampler",
    "log_expected_improvement",
    "maximize",
    "minimize",
    "probability_of_improvement",
    "quantile",
    "suggest",
]
