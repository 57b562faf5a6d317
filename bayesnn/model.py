"""The one base class: a model is fitted to data and answers with a posterior over functions and a prediction of y.

Inputs are scaled and outcomes standardised inside; everything comes back in the user's units. Every model is a BoTorch
model, so that any acquisition function that works with joint draws works with it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from botorch.models.model import Model as BotorchModel
from botorch.posteriors import Posterior
from botorch.sampling.base import MCSampler
from botorch.sampling.get_sampler import get_sampler
from torch import Tensor

from bayesnn.checks import positive
from bayesnn.configured import Configured, build, describe
from bayesnn.data import Data, Scaling, as_float, check_inputs, check_variance, identity, standardisation
from bayesnn.distributions import sample
from bayesnn.files import read_tensors, write_tensors
from bayesnn.functions import FunctionDraw, function_draws_of
from bayesnn.likelihoods import Gaussian, Likelihood
from bayesnn.posteriors import FunctionDraws, Gaussian as GaussianPosterior, function_draws
from bayesnn.predictive import Predictive


class NotFittedError(RuntimeError):
    """A prediction was asked of a model that hasn't seen data."""


class Model(Configured, BotorchModel):
    """Base class of all models.

    A family implements ``_fit``, ``_latent`` (the posterior of its latent functions in standardised units),
    ``_state``/``_set_state`` (its tensors) and ``condition_on_observations``.

    Args:
        likelihood: p(y | f).
        scale_inputs: standardise the columns of X; switch it off for inputs that are on a common scale already.
    """

    def __init__(self, likelihood: Likelihood | None = None, scale_inputs: bool = True) -> None:
        super().__init__()
        self.likelihood = Gaussian() if likelihood is None else likelihood
        self.scale_inputs = scale_inputs
        self._data: Data | None = None
        self._inputs: Scaling
        self._outcomes: Scaling
        self._outputs: list[int] | None = None
        self._conditioned = False

    # What a family implements ---------------------------------------------------------------------------------------

    def _fit(self, data: Data, outcome_scale: Tensor, **options: Any) -> None:
        """Fit to standardised data; ``options`` go to :func:`bayesnn.inference.run.run` where there is a run."""
        raise TypeError(f"{type(self).__name__} doesn't define how it is fitted")

    def _latent(self, X: Tensor) -> Posterior:
        """The posterior of the latent functions at scaled inputs, in standardised units."""
        raise TypeError(f"{type(self).__name__} doesn't define its posterior")

    def _latent_beside(self, shared: Tensor) -> Callable[[Tensor], Posterior]:
        """:meth:`_latent` at scaled rows (k, d) and, after these, at X (*batch, q, d)."""
        return lambda X: self._latent(torch.cat([shared.expand(*X.shape[:-2], *shared.shape), X], -2))

    def _likelihood_parameters(self) -> dict[str, Tensor]:
        """The likelihood's parameters in standardised units, stacked like the draws."""
        return {}

    def _input_scaling(self, X: Tensor) -> Scaling:
        """How the columns of X are scaled."""
        return standardisation(X, "X") if self.scale_inputs else identity(X.shape[-1], X)

    def _outcome_scaling(self, Y: Tensor) -> Scaling:
        """How real-valued outcomes are scaled."""
        return standardisation(Y, "Y")

    def _state(self) -> dict[str, Tensor]:
        """The fitted tensors that ``save`` writes."""
        return {}

    def _set_state(self, tensors: dict[str, Tensor]) -> None:
        """Take the fitted tensors back; ``self._data`` is there already."""

    # Fitting ---------------------------------------------------------------------------------------------------------

    def fit(
        self,
        X: Any,
        Y: Any,
        *,
        seed: int = 0,
        progress: bool = False,
        callbacks: Sequence[Any] = (),
        checkpoint: str | Path | None = None,
        time_budget: float | None = None,
        target_ess: float | None = None,
    ) -> Self:
        """Fit the model to data.

        Args:
            X: inputs (n, d): tensor, array or data frame; its dtype is the model's.
            Y: outcomes (n, m) or (n,); class labels (n,) whole numbers.
            seed: of every random draw in the fit.
            progress: show a progress bar where fitting takes steps. (Exact processes have none: they leave this and the next
                two arguments aside.)
            callbacks: called as ``callback(index, state, info)`` after every step.
            checkpoint: a folder from which an interrupted fit goes on with the same result.
            time_budget: seconds after which a fit that takes steps ends with what it has.
            target_ess: a fit that samples ends as soon as the smallest effective sample size of the function values at eight
                of the inputs reaches this.

        Returns:
            The model itself.

        Raises:
            TypeError, ValueError: for data that can't be used, before any work starts.
            TimeoutError: if the time is up before the first draw.
        """
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be a whole number, found {seed!r}")
        if time_budget is not None:
            positive("time_budget", time_budget)
        X = check_inputs(X).detach()
        Y = self.likelihood.check(Y, X.shape[0], X).detach()
        inputs = self._input_scaling(X)
        standardised = self.likelihood.standardises
        outcomes = self._outcome_scaling(Y) if standardised else identity(Y.shape[-1], X)
        check_variance(outcomes, "Y")
        data = Data(inputs.standardise(X), outcomes.standardise(Y) if standardised else Y)
        self._fit(
            data,
            outcomes.scale,
            seed=seed,
            progress=progress,
            callbacks=callbacks,
            checkpoint=checkpoint,
            time_budget=time_budget,
            target_ess=target_ess,
        )
        self._data, self._inputs, self._outcomes = data, inputs, outcomes
        self._outputs, self._conditioned = None, False
        return self.eval()

    def _require_fitted(self) -> Data:
        if self._data is None:
            raise NotFittedError(f"this {type(self).__name__} isn't fitted yet: call fit(X, Y) first")
        return self._data

    @property
    def train_inputs(self) -> tuple[Tensor]:
        """The inputs it was fitted to, in the user's units, (n, d)."""
        data = self._require_fitted()
        return (self._inputs.loc + self._inputs.scale * data.X,)

    @property
    def train_targets(self) -> Tensor:
        """The outcomes it was fitted to, in the user's units, (n, m)."""
        data = self._require_fitted()
        return self._outcomes.loc + self._outcomes.scale * data.Y if self.likelihood.standardises else data.Y

    @property
    def num_outputs(self) -> int:
        """How many functions the posterior is over."""
        if self._outputs is not None:
            return len(self._outputs)
        m = self._require_fitted().Y.shape[-1]
        latent = self.likelihood.latent_size(m)
        return self.likelihood.function_values(self._data.X.new_zeros(1, latent)).shape[-1]  # type: ignore[union-attr]

    @property
    def batch_shape(self) -> torch.Size:
        """Empty: one model, whatever the t-batch."""
        return torch.Size([])

    # Answers ---------------------------------------------------------------------------------------------------------

    def _scaled(self, X: Any) -> Tensor:
        data = self._require_fitted()
        X = check_inputs(X, num_features=data.X.shape[-1], batched=True)
        return self._inputs.standardise(X.to(data.X))

    def posterior(
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: Any = None,
    ) -> Posterior:
        """p(f(X) | D), joint over the q points.

        Args:
            X: (*batch, q, d).
            output_indices: which outputs; all by default.
            observation_noise: True: the posterior of observations (for draws, with the same noise at every call); a
                tensor that broadcasts to (*batch, q, m): their noise variances.
            posterior_transform: a BoTorch posterior transform, applied to the draws.

        Raises:
            NotFittedError: before ``fit``.
            TypeError, ValueError: for inputs that can't be used.
        """
        scaled = self._scaled(X)
        if output_indices is not None:
            self._check_outputs("output_indices", output_indices)
        latent = self._latent(scaled)
        if observation_noise is True:
            posterior = self._observations(latent, scaled)
        else:
            posterior = self._functions(latent)
            if isinstance(observation_noise, Tensor):
                posterior = _with_noise_var(posterior, observation_noise.to(scaled) / self._outcomes.scale.square())
        posterior = self._in_own_units(posterior, scaled)
        if output_indices is not None:
            posterior = posterior.outputs(list(output_indices))
        if posterior_transform is not None:
            posterior = posterior.transformed(posterior_transform, torch.as_tensor(X))
        return posterior

    def posterior_beside(self, shared: Tensor) -> Callable[[Tensor], Posterior]:
        """:meth:`posterior` at rows that all batches share and at their own, for many calls with the same shared rows.

        Args:
            shared: (k, d), constants: they get no gradients.

        Returns:
            A function of X (*batch, q, d): the posterior at (*batch, k + q, d), the shared rows first in each batch.

        Raises:
            NotFittedError: before ``fit``.
            TypeError, ValueError: for inputs that can't be used.
        """
        scaled = self._scaled(shared).detach()
        if scaled.dim() != 2:
            raise ValueError(f"shared must have shape (k, d), found {tuple(scaled.shape)}")
        latent_beside = self._latent_beside(scaled)

        def posterior(X: Tensor) -> Posterior:
            scaled = self._scaled(X)
            return self._in_own_units(self._functions(latent_beside(scaled)), scaled)

        return posterior

    def _in_own_units(self, posterior: Any, X: Tensor) -> Any:
        """The posterior of standardised function values in the user's units, of the outputs that there are."""
        posterior = posterior.affine(self._outcomes.loc.to(X), self._outcomes.scale.to(X))
        return posterior if self._outputs is None else posterior.outputs(self._outputs)

    def _functions(self, latent: Posterior) -> Any:
        if isinstance(latent, FunctionDraws):
            return FunctionDraws(self.likelihood.function_values(latent.values), latent.log_weights)
        return latent

    def _observations(self, latent: Posterior, X: Tensor) -> Any:
        """The posterior of observations at scaled inputs, in standardised units."""
        parameters = self._likelihood_parameters()
        if isinstance(latent, GaussianPosterior) and isinstance(self.likelihood, Gaussian):
            return latent.with_noise((2 * parameters["log_noise_std"]).exp().expand_as(latent.mean))
        draws = function_draws(latent, 256)
        observed = self.likelihood(draws.values, parameters)
        noisy = sample(observed, torch.Size([]), torch.Generator().manual_seed(0), num_shared=X.dim() - 2)
        return FunctionDraws(noisy.to(draws.values), draws.log_weights)

    def predict(self, X: Any) -> Predictive:
        """p(y | X, D): mean, variance and its parts, quantiles, intervals, log density, in the user's units.

        Args:
            X: (*batch, q, d).

        Raises:
            NotFittedError: before ``fit``.
            TypeError: for some of the classes of one label alone (``subset_output``).
            TypeError, ValueError: for inputs that can't be used.
        """
        scaled = self._scaled(X)
        with torch.no_grad():
            predictive = self._predictive(scaled)
        if self.likelihood.standardises:
            predictive = predictive.affine(self._outcomes.loc, self._outcomes.scale)
        return predictive if self._outputs is None else predictive.outputs(self._outputs)

    def _predictive(self, X: Tensor) -> Predictive:
        return self.likelihood.predictive(self._latent(X), self._likelihood_parameters())

    def draw_functions(self, num_draws: int, seed: int = 0) -> FunctionDraw:
        """Functions drawn from the posterior, as one callable: X (*batch, q, d) -> (num_draws, *batch, q, m).

        The same draw is the same function at all points and in all calls.

        Raises:
            NotFittedError: before ``fit``.
        """
        self._require_fitted()
        return function_draws_of(self.posterior, num_draws, seed)

    # More data, fewer outputs ---------------------------------------------------------------------------------------

    def condition_on_observations(self, X: Tensor, Y: Tensor, **kwargs: Any) -> Self:
        """The model after more observations, without refitting; the model itself stays as it is.

        Args:
            X: (*batch, q, d).
            Y: (*fantasies, *batch, q, m), in the user's units.

        Raises:
            NotFittedError: before ``fit``.
            TypeError, ValueError: for observations that can't be used.
        """
        raise TypeError(f"{type(self).__name__} can't take in more observations without refitting")

    def fantasize(self, X: Tensor, sampler: MCSampler, observation_noise: Tensor | None = None, **kwargs: Any) -> Self:
        """The model after imagined observations at X: (*sample_shape, *batch) copies in one, as BoTorch's look-ahead needs."""
        noise: bool | Tensor = True if observation_noise is None else observation_noise
        posterior = self.posterior(X, observation_noise=noise)
        if isinstance(posterior, FunctionDraws):
            # BoTorch's look-ahead brings a sampler of normals; draws need their own.
            sampler = get_sampler(posterior, sampler.sample_shape, seed=sampler.seed)  # type: ignore[arg-type]
        return self.condition_on_observations(X, sampler(posterior))

    def _observed(self, X: Any, Y: Any) -> tuple[Tensor, Tensor]:
        """Further observations, checked, as scaled inputs and standardised outcomes."""
        if self._outputs is not None:
            raise TypeError(
                "some of a model's outputs can't take in observations: let the whole model do, then subset_output"
            )
        scaled = self._scaled(X)
        Y, m = as_float(Y, "Y"), self._require_fitted().Y.shape[-1]
        if Y.dim() < 2 or Y.shape[-2:] != (scaled.shape[-2], m):
            raise ValueError(f"Y must have shape (…, {scaled.shape[-2]}, {m}) for these X, found {tuple(Y.shape)}")
        return scaled, self._outcomes.standardise(Y.to(scaled)) if self.likelihood.standardises else Y

    def subset_output(self, idcs: list[int]) -> Self:
        """The same fitted model, with some of its outputs only."""
        self._check_outputs("idcs", idcs)
        subset = self._copy()
        subset._outputs = list(idcs) if self._outputs is None else [self._outputs[index] for index in idcs]
        return subset

    def _check_outputs(self, name: str, indices: Sequence[int]) -> None:
        if any(not 0 <= index < self.num_outputs for index in indices):
            raise ValueError(f"{name} must lie in 0 … {self.num_outputs - 1}, found {list(indices)}")

    def _copy(self) -> Self:
        """A shallow copy that can be given other modules and attributes without touching this one."""
        twin = copy.copy(self)
        for registry in ("_modules", "_parameters", "_buffers"):
            object.__setattr__(twin, registry, dict(getattr(self, registry)))
        return twin

    # Files -----------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the fitted model to one safetensors file with a JSON description; it holds the training data too.

        Raises:
            NotFittedError: before ``fit``.
            ValueError: for a model that has taken in observations since: fit one to all data instead.
        """
        self._require_fitted()
        if self._conditioned:
            raise ValueError("a conditioned model can't be saved: fit the model to all observations and save that")
        arguments, missing = {}, []
        for name, value in self._saved_arguments().items():
            try:
                arguments[name] = describe(value)
            except TypeError:
                missing.append(name)
        description = {"format": 1, "class": self._saved_as, "arguments": arguments, "missing": missing}
        description |= {"outputs": self._outputs}
        write_tensors(path, self.fitted_tensors(), description)

    def fitted_tensors(self) -> dict[str, Tensor]:
        """All that a fit found, with the data: what the constructor's arguments don't say.

        Raises:
            NotFittedError: before ``fit``.
        """
        data = self._require_fitted()
        tensors = {"data.X": data.X, "data.Y": data.Y}
        tensors |= {"inputs.loc": self._inputs.loc, "inputs.scale": self._inputs.scale}
        tensors |= {"outcomes.loc": self._outcomes.loc, "outcomes.scale": self._outcomes.scale}
        return tensors | {f"state.{name}": tensor for name, tensor in self._state().items()}

    def take_fitted_tensors(self, tensors: dict[str, Tensor]) -> Self:
        """Become the model whose :meth:`fitted_tensors` these are; it must have been built with the same arguments."""
        self._data = Data(tensors["data.X"], tensors["data.Y"])
        self._inputs = Scaling(tensors["inputs.loc"], tensors["inputs.scale"])
        self._outcomes = Scaling(tensors["outcomes.loc"], tensors["outcomes.scale"])
        self._set_state({n.removeprefix("state."): t for n, t in tensors.items() if n.startswith("state.")})
        return self.eval()

    def _saved_arguments(self) -> dict[str, Any]:
        return dict(self._arguments)

    @classmethod
    def load(cls, path: str | Path, **arguments: Any) -> Self:
        """Read a fitted model that :meth:`save` wrote. Runs no code from the file.

        Args:
            path: the file.
            arguments: constructor arguments that couldn't be saved (a network of your own), or that replace saved ones.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file isn't a model of this class, or an argument is missing.
        """
        tensors, description = read_tensors(path)
        found = Configured._classes.get(str(description.get("class")))
        if description.get("format") != 1 or found is None or not issubclass(found, cls):
            raise ValueError(
                f"{str(path)!r} holds a {description.get('class')!r}, not a {cls.__name__} of this version"
            )
        missing = [name for name in description["missing"] if name not in arguments]
        if missing:
            raise ValueError(
                f"{', '.join(missing)} of {found.__name__} couldn't be saved (code of your own): "
                f"load(path, {', '.join(f'{name}=…' for name in missing)})"
            )
        model = found(**({name: build(value) for name, value in description["arguments"].items()} | arguments))
        model._outputs = description["outputs"]
        return model.take_fitted_tensors(tensors)


def _with_noise_var(posterior: Any, noise_var: Tensor) -> Any:
    if isinstance(posterior, GaussianPosterior):
        return posterior.with_noise(noise_var.expand_as(posterior.mean))
    draws = function_draws(posterior, 256)
    # The same noise for every t-batch element.
    noise = torch.randn(draws.values.shape[-3:], generator=torch.Generator().manual_seed(0), dtype=draws.values.dtype)
    std = noise_var.sqrt().expand(torch.broadcast_shapes(noise_var.shape, draws.values.shape[-2:])).unsqueeze(-3)
    return FunctionDraws(draws.values + std * noise, draws.log_weights)
