"""Posteriors over function values at points, p(f(X) | D), always joint over the q points.

Each kind is a BoTorch posterior with a sampler of its own, so that an acquisition function sees the same function
at every point, in every t-batch element and in every later call:

* :class:`FunctionDraws`: weighted draws of whole functions (networks, ensembles, particles);
* :class:`Gaussian`: BoTorch's ``GPyTorchPosterior``, so that everything specific to GPs works natively;
* :class:`StudentT`: multivariate t, one chi-squared variable per function;
* :class:`ScaleMixture`: a Gaussian with a random factor of its covariance, known through weighted draws;
* :class:`Copula`: marginals of any shape (a histogram, a Gaussian) tied together by a Gaussian copula;
* :class:`Mixture`: several of them with weights, one model for each function;
* :func:`gaussian_view`: any of them, moment-matched to a Gaussian, for acquisition functions that insist.
"""

from bayesnn.posteriors.copula import Copula, correlation_root
from bayesnn.posteriors.draws import FunctionDraws, FunctionSampler, function_draws
from bayesnn.posteriors.gaussian import Gaussian
from bayesnn.posteriors.mixture import Mixture
from bayesnn.posteriors.scale_mixture import ScaleMixture
from bayesnn.posteriors.student_t import StudentT
from bayesnn.posteriors.view import gaussian_view

__all__ = [
    "Copula",
    "FunctionDraws",
    "FunctionSampler",
    "Gaussian",
    "Mixture",
    "ScaleMixture",
    "StudentT",
    "correlation_root",
    "function_draws",
    "gaussian_view",
]
