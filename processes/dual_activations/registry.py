"""Dual activations by name."""

from __future__ import annotations

import warnings

from bayesnn.data import BayesnnWarning
from bayesnn.processes.dual_activations.base import DualActivation
from bayesnn.processes.dual_activations.error_functions import GELU, Erf, Gaussian
from bayesnn.processes.dual_activations.exponentials import RBF, Cos, Exp, Sin
from bayesnn.processes.dual_activations.numerical import FUNCTIONS, Numerical
from bayesnn.processes.dual_activations.piecewise_linear import Abs, Identity, LeakyReLU, ReLU, Sign

_CLOSED_FORMS: dict[str, type[DualActivation]] = {
    dual.name: dual for dual in (Identity, ReLU, LeakyReLU, Abs, Sign, Erf, GELU, Sin, Cos, Exp, Gaussian, RBF)
}


def dual_activation(activation: str | DualActivation) -> DualActivation:
    """The dual of an activation function.

    Args:
        activation: ``"identity"``, ``"relu"``, ``"leaky_relu"``, ``"abs"``, ``"sign"``, ``"erf"``, ``"gelu"``,
            ``"sin"``, ``"cos"``, ``"exp"``, ``"gaussian"`` or ``"rbf"`` with the defaults of their classes; the name
            of one without a closed form (see :class:`Numerical`), which gives quadrature and a warning; or a dual
            activation, returned as it is.

    Raises:
        ValueError: if the name is unknown.
        TypeError: if it is neither a name nor a dual activation.
    """
    if isinstance(activation, DualActivation):
        return activation
    if not isinstance(activation, str):
        raise TypeError(
            f"activation: found {type(activation).__name__}, want a name or a DualActivation; "
            "Numerical(function) makes one of any elementwise function."
        )
    if activation in _CLOSED_FORMS:
        return _CLOSED_FORMS[activation]()
    if activation not in FUNCTIONS:
        closed, numerical = (", ".join(repr(name) for name in names) for names in (_CLOSED_FORMS, FUNCTIONS))
        raise ValueError(
            f"activation: found {activation!r}; a closed form is known for {closed}; quadrature does {numerical}. "
            "Polynomials and other functions are objects: Monomial(3), Numerical(function)."
        )
    dual = Numerical(activation)
    warnings.warn(
        f"activation: no closed form is known for {activation!r}; its kernel comes from quadrature with "
        f"{dual.num_points} points. Numerical({activation!r}, num_points) does so without this warning.",
        BayesnnWarning,
        stacklevel=2,
    )
    return dual
