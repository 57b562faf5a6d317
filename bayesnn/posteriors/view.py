"""Any posterior, moment-matched to a Gaussian."""

from __future__ import annotations

import torch
from botorch.posteriors import GPyTorchPosterior, Posterior

from bayesnn.posteriors.copula import Copula
from bayesnn.posteriors.draws import FunctionDraws
from bayesnn.posteriors.gaussian import Gaussian
from bayesnn.posteriors.mixture import Mixture
from bayesnn.posteriors.scale_mixture import ScaleMixture
from bayesnn.posteriors.student_t import StudentT


def gaussian_view(posterior: Posterior) -> Gaussian:
    """Moment-match a posterior to a joint Gaussian: the same mean and, over points, the same covariance.

    Exact for :class:`Gaussian`; for function draws and the others it is the Gaussian closest in Kullback–Leibler
    divergence (from the posterior to the view). Copulas keep their marginal moments and the copula's correlation.
    """
    if isinstance(posterior, GPyTorchPosterior):
        return posterior if isinstance(posterior, Gaussian) else Gaussian(posterior.distribution)
    if isinstance(posterior, FunctionDraws):
        centred = (posterior.values - posterior.mean.unsqueeze(-3)).movedim(-1, -3)  # (*batch, m, S, q)
        weights = posterior.weights.squeeze(-1).unsqueeze(-3)
        covariance = centred.mT @ (weights * centred)
    elif isinstance(posterior, StudentT | ScaleMixture):
        covariance = posterior.scale * (
            posterior.variance / posterior.scale.diagonal(dim1=-2, dim2=-1).mT
        ).mT.unsqueeze(-1)
    elif isinstance(posterior, Copula):
        root = posterior.variance.sqrt().mT.unsqueeze(-1) * posterior.root
        covariance = root @ root.mT
    elif isinstance(posterior, Mixture):
        away = [(part.mean - posterior.mean).mT.unsqueeze(-1) for part in posterior.parts]  # (*batch, m, q, 1)
        within = [gaussian_view(part).output_covariance.to_dense() for part in posterior.parts]
        second = torch.stack([own + far @ far.mT for own, far in zip(within, away, strict=True)], -1)
        covariance = second @ posterior.log_weights.exp().to(second)
    else:
        raise TypeError(f"no Gaussian view of {type(posterior).__name__}")
    return Gaussian.from_moments(posterior.mean, covariance)
