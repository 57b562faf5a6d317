r"""Several models in one, weighted by how well the mixture of their predictions predicts rows that they haven't seen.

.. math:: \hat w = \arg\max_w \frac1n \sum_i \log \sum_k w_k\, p_k(y_i \mid x_i, D_{-I(i)}), \quad
          w_k \ge 0,\ \sum_k w_k = 1,

with the fold :math:`I(i)` of row i left out (Yao, Vehtari, Simpson and Gelman, Using stacking to average Bayesian predictive
distributions, Bayesian Analysis 2018). Where none of the models is the truth the mixture is often better than any; weights by
marginal likelihoods would end at one model, however little better it is.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from bayesnn.checks import count
from bayesnn.data import Data
from bayesnn.evidence import log_scores
from bayesnn.mixtures import mixture
from bayesnn.model import Model
from bayesnn.posteriors import Mixture
from bayesnn.predictive import Predictive
from bayesnn.registry import named_model, register, surrogate

MEMBERS = ("gp", "nngp", "pfn")
NEGLIGIBLE = 1e-4  # a weight below it is zero: its model isn't fitted


class Stack(Model):
    """A mixture of several models' predictive distributions, with the weights that predict held-out rows best.

    The weights are those of :func:`stacking_weights` for :func:`bayesnn.evidence.log_scores`; then the models with a weight
    are fitted to all rows. It takes as long as ``num_folds + 1`` fits of each model. A model that fails in a fold has no
    weight. A draw from the posterior is a function of one model, chosen by weight, at all points and for all outputs;
    conditioning leaves the weights as they are. With a single row weights are equal.

    Args:
        models: unfitted models of real-valued outcomes, copied for each fit. By name ("stack"): "gp", "nngp" and "pfn".
        num_folds: at most; 10, as the source has it.

    Attributes:
        weights: (K,), one for each model, after ``fit``.

    Raises:
        ValueError: for no models.
        TypeError: for anything but models of real-valued outcomes.
        RuntimeError: in ``fit``, if all models fail, with the reasons.

    Source: Yao, Vehtari, Simpson and Gelman (2018), equation 6, with k folds in place of leave-one-out.
    """

    weights: Tensor

    def __init__(self, models: Sequence[Model], num_folds: int = 10) -> None:
        super().__init__(scale_inputs=False)  # each model scales its own
        self.num_folds = count("num_folds", num_folds, 2)
        self._models, self._fitted = list(models), dict[int, Model]()
        if not self._models:
            raise ValueError("models must hold at least one model, found none")
        for model in self._models:
            if not isinstance(model, Model) or not model.likelihood.standardises:
                found = type(getattr(model, "likelihood", model)).__name__
                raise TypeError(f"models must be bayesnn models of real-valued outcomes, found one of {found}")

    def _fit(self, data: Data, outcome_scale: Tensor, **options: Any) -> None:
        own = {name: options[name] for name in ("seed", "time_budget", "target_ess")}
        if own["time_budget"] is not None:
            own["time_budget"] /= len(self._models) * (min(self.num_folds, len(data)) + 1)
        weights = self._found_weights(data, own)
        self._fitted = {
            index: copy.deepcopy(self._models[index]).fit(data.X, data.Y, **own)
            for index in weights.nonzero().squeeze(-1).tolist()
        }
        self.weights = weights

    def _found_weights(self, data: Data, options: dict[str, Any]) -> Tensor:
        if len(data) == 1:
            return torch.full((len(self._models),), 1 / len(self._models), dtype=torch.float64)
        models = {str(index): model for index, model in enumerate(self._models)}
        scores = log_scores(models, data.X, data.Y, num_folds=self.num_folds, **options)
        if len(scores.failures) == len(models):
            reasons = "; ".join(f"models[{index}]: {reason}" for index, reason in scores.failures.items())
            raise RuntimeError(f"no model could predict the rows that were held out: {reasons}")
        weights = stacking_weights(torch.stack(list(scores.by_row.values()), -1))
        weights = torch.where(weights < NEGLIGIBLE, torch.zeros_like(weights), weights)
        return weights / weights.sum()

    @property
    def _log_weights(self) -> Tensor:
        return self.weights[list(self._fitted)].log()

    def _latent(self, X: Tensor) -> Mixture:
        return Mixture([model.posterior(X) for model in self._fitted.values()], self._log_weights)

    def _observations(self, latent: Any, X: Tensor) -> Mixture:
        parts = [model.posterior(X, observation_noise=True) for model in self._fitted.values()]
        return Mixture(parts, self._log_weights)

    def _predictive(self, X: Tensor) -> Predictive:
        return mixture([model.predict(X) for model in self._fitted.values()], self._log_weights)

    @property
    def draws_are_functions(self) -> bool:
        """Whether a draw's value at a point is the same whatever other points are asked for: of all models."""
        return all(getattr(model, "draws_are_functions", True) for model in self._fitted.values())

    @property
    def batch_shape(self) -> torch.Size:
        """Empty, or one entry for each set of fantasies."""
        return next(iter(self._fitted.values())).batch_shape if self._fitted else torch.Size([])

    def condition_on_observations(self, X: Tensor, Y: Tensor, **kwargs: Any) -> Self:
        """Each model after more observations; the weights stay as they are."""
        scaled, standardised = self._observed(X, Y)
        conditioned = self._copy()
        conditioned._conditioned = True
        conditioned._fitted = {
            index: model.condition_on_observations(scaled, standardised, **kwargs)
            for index, model in self._fitted.items()
        }
        return conditioned

    def _state(self) -> dict[str, Tensor]:
        tensors = {"weights": self.weights}
        for index, model in self._fitted.items():
            tensors |= {f"models.{index}.{name}": tensor for name, tensor in model.fitted_tensors().items()}
        return tensors

    def _set_state(self, tensors: dict[str, Tensor]) -> None:
        self.weights, self._fitted = tensors["weights"], {}
        for index in self.weights.nonzero().squeeze(-1).tolist():
            prefix = f"models.{index}."
            own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            self._fitted[index] = copy.deepcopy(self._models[index]).take_fitted_tensors(own)


def stacking_weights(log_densities: Tensor, tolerance: float = 1e-9, max_steps: int = 20_000) -> Tensor:
    r"""The weights of a mixture that maximise the mean log density of rows.

    The function is concave. Expectation-maximisation, :math:`w_k \leftarrow w_k g_k` with
    :math:`g_k = \frac1n \sum_i p_{ik} / \sum_j w_j p_{ij}`, climbs at each step, and what is left to climb is at most
    :math:`\log \max_k g_k`, which tells when to stop.

    Args:
        log_densities: of n rows under K models (n, K). Rows that no model thinks possible count for nothing.
        tolerance: nats for each row that the result may lie below the maximum.
        max_steps: after which it is taken as it is.

    Returns:
        Weights (K,), which sum to 1.

    Raises:
        ValueError: for densities of another shape, or if no row is possible under any model.
    """
    if log_densities.dim() != 2:
        raise ValueError(f"log_densities must have shape (n, K), found {tuple(log_densities.shape)}")
    highest = log_densities.double().amax(1, keepdim=True)
    possible = torch.isfinite(highest.squeeze(1))
    if not bool(possible.any()):
        raise ValueError("log_densities must have a row with a finite entry, found none")
    densities = (log_densities.double() - highest)[possible].exp()
    weights = torch.full_like(densities[0], 1 / densities.shape[1])
    for _ in range(max_steps):
        growth = (densities / (densities @ weights).unsqueeze(1)).mean(0)
        if float(growth.max().log()) <= tolerance:
            break
        weights = weights * growth
    return weights / weights.sum()


def _registered(by_name: Any) -> Any:
    def make(**options: Any) -> Stack:
        members = {} if "models" in options else {"models": [by_name(name) for name in MEMBERS]}
        return Stack(**members | options)

    return make


register("stack", _registered(named_model), _registered(surrogate))
