"""Bayesian optimisation: any model of this library decides what to try next."""

from bayesnn.bo.ask import ask
from bayesnn.bo.auto import AutoSurrogate
from bayesnn.bo.bandit import NeuralBandit
from bayesnn.bo.closed_form import ClosedForm, log_expected_improvement, probability_of_improvement, quantile
from bayesnn.bo.evaluations import Evaluation
from bayesnn.bo.executors import RayExecutor
from bayesnn.bo.exploration import fast_cb, square_cb
from bayesnn.bo.fidelity import Fidelity
from bayesnn.bo.gradient_policies import NeuralThompson, NeuralUCB
from bayesnn.bo.minimize import maximize, minimize
from bayesnn.bo.parameters import Ordinal, When
from bayesnn.bo.regression_policies import NeuFastCB, NeuSquareCB
from bayesnn.bo.result import Interrupted, Result
from bayesnn.bo.sampler import SurrogateSampler
from bayesnn.bo.space import Space
from bayesnn.bo.stopping import little_expected, no_improvement
from bayesnn.bo.suggest import SpaceExhaustedError, suggest

__all__ = [
    "AutoSurrogate",
    "ClosedForm",
    "Evaluation",
    "Fidelity",
    "Interrupted",
    "NeuFastCB",
    "NeuSquareCB",
    "NeuralBandit",
    "NeuralThompson",
    "NeuralUCB",
    "Ordinal",
    "RayExecutor",
    "Result",
    "Space",
    "SpaceExhaustedError",
    "SurrogateSampler",
    "When",
    "ask",
    "fast_cb",
    "little_expected",
    "log_expected_improvement",
    "maximize",
    "minimize",
    "no_improvement",
    "probability_of_improvement",
    "quantile",
    "square_cb",
    "suggest",
]
