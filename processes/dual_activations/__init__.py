"""What elementwise functions do to a Gaussian covariance: the activations of infinitely wide networks."""

from bayesnn.processes.dual_activations.base import DualActivation, DualMoments
from bayesnn.processes.dual_activations.numerical import Numerical
from bayesnn.processes.dual_activations.piecewise_linear import Abs, Identity, LeakyReLU, ReLU, Sign
from bayesnn.processes.dual_activations.polynomials import Hermite, Monomial, Polynomial, RectifiedMonomial
from bayesnn.processes.dual_activations.registry import dual_activation
from bayesnn.processes.dual_activations.smooth import GELU, RBF, Cos, Erf, Exp, Gaussian, Sin

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
