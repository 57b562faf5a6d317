"""What elementwise functions do to a Gaussian covariance: the activations of infinitely wide networks."""

from bayesnn.processes.dual_activations.base import DualActivation, DualMoments
from bayesnn.processes.dual_activations.error_functions import GELU, Erf, Gaussian
from bayesnn.processes.dual_activations.exponentials import RBF, Cos, Exp, Sin
from bayesnn.processes.dual_activations.numerical import Numerical
from bayesnn.processes.dual_activations.piecewise_linear import Abs, Identity, LeakyReLU, ReLU, Sign
from bayesnn.processes.dual_activations.polynomials import Hermite, Monomial, Polynomial, RectifiedMonomial
from bayesnn.processes.dual_activations.registry import dual_activation

__all__ = [
    "GELU",
    "RBF",
    "Abs",
    "Cos",
    "DualActivation",
    "DualMoments",
    "Erf",
    "Exp",
    "Gaussian",
    "Hermite",
    "Identity",
    "LeakyReLU",
    "Monomial",
    "Numerical",
    "Polynomial",
    "ReLU",
    "RectifiedMonomial",
    "Sign",
    "Sin",
    "dual_activation",
]
