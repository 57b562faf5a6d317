r"""An unnormalised log density over parameters: what a method works on.

The target alone owns N, the scaling of minibatches and the temperature:

.. math:: \log \pi(\theta) = \frac1T \Big[ \log p(\theta) + \frac{N}{|B|} \sum_{i \in B} \log p(y_i \mid x_i, \theta) \Big]

Parameters are a dict of tensors with one leading dimension for chains, members or particles; everything is vectorised
over it and returns one number for each.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from bayesnn.data import Data
from bayesnn.files import fingerprint
from bayesnn.likelihoods import Likelihood, ParameterPrior
from bayesnn.priors import Normal, PerLayer, Prior, location

Parameters = dict[str, Tensor]
NETWORK, LIKELIHOOD = "network.", "likelihood."


class FlatGaussian(NamedTuple):
    """A Gaussian prior over all parameters as one vector: (P,) each, and the sum of the log normalisers."""

    loc: Tensor
    precision: Tensor
    log_normaliser: float


class Target(Protocol):
    """What a method may ask of its target."""

    data: Data
    temperature: float
    flat_gaussian_prior: FlatGaussian | None
    """The prior, if it is Gaussian in every parameter."""

    def log_prior(self, parameters: Parameters) -> Tensor:
        """log p(theta), (C,)."""
        ...

    def log_likelihood(self, parameters: Parameters, batch: Data | None = None) -> Tensor:
        """The sum over a batch (None: all data) of log p(y | x, theta), (C,)."""
        ...

    def initial(self, count: int, generator: torch.Generator) -> Parameters:
        """``count`` starting points."""
        ...

    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every parameter, without the leading dimension."""
        ...


def log_density(target: Target, parameters: Parameters, batch: Data | None = None) -> Tensor:
    """The target's (tempered) log density up to a constant, with a minibatch scaled up to all N data: (C,)."""
    scale = 1.0 if batch is None else len(target.data) / len(batch)
    log_joint = target.log_prior(parameters) + scale * target.log_likelihood(parameters, batch)
    return log_joint / target.temperature


class NetworkTarget:
    """The posterior of a network's weights and of its likelihood's free parameters.

    Parameters are named ``network.<name>`` and ``likelihood.<name>``.

    Args:
        network: any module whose output depends on its input and parameters alone.
        likelihood: p(y | f).
        prior: p(w) of the network's weights.
        data: standardised inputs (n, d) and targets (n, m).
        outcome_scale: (1, m), the standardised unit in units of y.
        temperature: 1 for the Bayes posterior; below 1 a cold posterior.

    Raises:
        ValueError: if the network has layers whose output depends on the batch or on chance, or gives another number of
            function values than the likelihood needs.
    """

    def __init__(
        self,
        network: nn.Module,
        likelihood: Likelihood,
        prior: Prior | PerLayer,
        data: Data,
        outcome_scale: Tensor,
        temperature: float = 1.0,
    ) -> None:
        check_network(network)
        self.network = copy.deepcopy(network).to(data.X).requires_grad_(False)
        self.likelihood, self.prior, self.data, self.temperature = likelihood, prior, data, temperature
        self.fixed = likelihood.fixed_parameters(outcome_scale.to(data.X))
        # The density and all it depends on; the network's initial weights aren't among that.
        self.fingerprint = fingerprint(
            repr((self.network, likelihood, prior, temperature)), data.X, data.Y, outcome_scale, *self.network.buffers()
        )
        self._check_output()
        self._shapes = {NETWORK + name: parameter.shape for name, parameter in self.network.named_parameters()}
        self._shapes |= {name: torch.Size([1, data.Y.shape[-1]]) for name in self.parameter_priors}
        self.flat_gaussian_prior = self._flat_gaussian_prior()

    def _check_output(self) -> None:
        if not any(True for _ in self.network.parameters()):
            raise ValueError("network has no parameters: there is nothing to learn")
        columns = self.data.X.shape[-1]
        try:
            with torch.no_grad():
                found = self.network(self.data.X[:1])
        except RuntimeError as error:
            raise ValueError(f"network can't take X of shape (1, {columns}): {error}") from error
        wanted = self.likelihood.latent_size(self.data.Y.shape[-1])
        if found.shape != (1, wanted):
            raise ValueError(
                f"network must map (n, {columns}) to (n, {wanted}) for {type(self.likelihood).__name__} with "
                f"{self.data.Y.shape[-1]} output(s), found {tuple(found.shape)} for one row"
            )
        stacked = {name: parameter.unsqueeze(0) for name, parameter in self.network.named_parameters()}
        try:
            apply_network(self.network, stacked, self.data.X[:1])
        except RuntimeError as error:
            raise ValueError(
                "network can't be evaluated for many sets of weights at once: its forward must be made of torch operations "
                f"without random numbers and without branches on values ({error})"
            ) from error

    @property
    def parameter_priors(self) -> dict[str, ParameterPrior]:
        """The Gaussian priors of the likelihood's parameters, by their full names."""
        return {LIKELIHOOD + name: prior for name, prior in self.likelihood.parameter_priors().items()}

    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every parameter, without the leading dimension."""
        return self._shapes

    def initial(self, count: int, generator: torch.Generator) -> Parameters:
        """Weights from Normal(0, 1 / fan-in) whatever the prior; likelihood parameters where they say."""
        dtype, initialiser = self.data.X.dtype, Normal(scale=1.0, bias_scale=0.1)
        parameters = {}
        for name, shape in self.shapes().items():
            if name in self.parameter_priors:
                parameters[name] = torch.full((count, *shape), self.parameter_priors[name].initial, dtype=dtype)
            else:
                noise = torch.randn((count, *shape), generator=generator, dtype=dtype)
                parameters[name] = location(name, shape) + initialiser.scale_of(name, shape) * noise
        return parameters

    def sample_prior(self, count: int, generator: torch.Generator) -> Parameters:
        """``count`` independent draws from the prior."""
        dtype, parameters = self.data.X.dtype, {}
        for name, shape in self.shapes().items():
            if name in self.parameter_priors:
                loc, scale, _ = self.parameter_priors[name]
                noise = torch.randn((count, *shape), generator=generator, dtype=torch.float64)
                parameters[name] = (loc + scale * noise).to(dtype)
            else:
                parameters[name] = self.prior.sample(name.removeprefix(NETWORK), shape, count, generator, dtype)
        return parameters

    def gaussian_prior(self, name: str) -> tuple[float, float] | None:
        """Mean and standard deviation of a parameter's prior if it is a zero-mean or likelihood Gaussian, else None."""
        if name in self.parameter_priors:
            return self.parameter_priors[name].loc, self.parameter_priors[name].scale
        shape, short = self.shapes()[name], name.removeprefix(NETWORK)
        scale = self.prior.gaussian_scale(short, shape)
        return None if scale is None else (location(short, shape), scale)

    def _flat_gaussian_prior(self) -> FlatGaussian | None:
        moments = [(self.gaussian_prior(name), shape.numel()) for name, shape in self._shapes.items()]
        rows = [gaussian for gaussian, size in moments if gaussian is not None for _ in range(size)]
        if len(rows) < sum(size for _, size in moments):
            return None
        loc, scale = torch.tensor(rows, dtype=torch.float64).unbind(-1)
        log_normaliser = float(-(scale.log() + 0.5 * math.log(2 * math.pi)).sum())
        return FlatGaussian(loc.to(self.data.X), scale.square().reciprocal().to(self.data.X), log_normaliser)

    def log_prior(self, parameters: Parameters) -> Tensor:
        """log p(weights) + log p(likelihood parameters), (C,)."""
        total: Tensor | float = 0.0
        for name, values in parameters.items():
            if name in self.parameter_priors:
                loc, scale, _ = self.parameter_priors[name]
                density = torch.distributions.Normal(loc, scale, validate_args=False)
                total = total + density.log_prob(values).flatten(1).sum(-1)
            else:
                total = total + self.prior.log_prob(name.removeprefix(NETWORK), values)
        assert isinstance(total, Tensor)
        return total

    def log_likelihood(self, parameters: Parameters, batch: Data | None = None) -> Tensor:
        """The sum over the batch of log p(y | x, theta), (C,)."""
        return self.pointwise_log_likelihood(parameters, batch).sum(-1)

    def pointwise_log_likelihood(self, parameters: Parameters, batch: Data | None = None) -> Tensor:
        """log p(y | x, theta) of every row of the batch, (C, |B|)."""
        batch = self.data if batch is None else batch
        f = apply_network(self.network, network_parameters(parameters), batch.X)
        return self.likelihood.log_prob(f, batch.Y, self.likelihood_parameters(parameters))

    def likelihood_parameters(self, parameters: Parameters) -> Parameters:
        """The likelihood's parameters by their short names, fixed ones included."""
        free = {name.removeprefix(LIKELIHOOD): v for name, v in parameters.items() if name.startswith(LIKELIHOOD)}
        return self.fixed | free


def network_parameters(parameters: Parameters) -> Parameters:
    """The network's parameters by their short names."""
    return {name.removeprefix(NETWORK): v for name, v in parameters.items() if name.startswith(NETWORK)}


def apply_network(network: nn.Module, parameters: Parameters, X: Tensor) -> Tensor:
    """Every member's function values at the same points: parameters (S, …), X (q, d) -> (S, q, p).

    By vmap for any module; a module that has ``forward_members`` does it itself.
    """
    batched: Callable[[Parameters, Tensor], Tensor] | None = getattr(network, "forward_members", None)
    if batched is not None:
        return batched(parameters, X)

    def member(own: Parameters) -> Tensor:
        return functional_call(network, own, (X,))

    return vmap(member)(parameters)


def check_network(network: nn.Module) -> None:
    """Refuse a network that isn't a function of its input and parameters alone.

    Raises:
        ValueError: naming the layer, if it uses batch statistics or random numbers in its present mode.
    """
    for name, module in network.named_modules():
        batch_norm = isinstance(module, nn.modules.batchnorm._NormBase)
        if batch_norm and (module.training or module.running_mean is None):
            raise ValueError(
                f"layer {name!r} ({type(module).__name__}) uses batch statistics, so that the likelihood of one point depends "
                "on the others and there is no posterior. Call network.eval() to use its running statistics, or use LayerNorm"
            )
        dropout = isinstance(module, nn.modules.dropout._DropoutNd)
        if dropout and module.training and module.p > 0:
            raise ValueError(
                f"layer {name!r} ({type(module).__name__}) draws random numbers, so that the density isn't a function of the "
                "parameters. Call network.eval(), or remove it"
            )


class FunctionTarget:
    """A plain log density as a target.

    Args:
        log_density: from parameters with a leading dimension, dict of (C, …), to (C,). With ``sample_prior``, the
            log-likelihood alone.
        initial: from (count, generator) to starting points.
        log_prior: for methods that begin at the prior (SMC), its log density, dict of (C, …) to (C,).
        sample_prior: from (count, generator) to draws of it.

    Raises:
        ValueError: if only one of log_prior and sample_prior is given, or the density doesn't give one number for each point.
    """

    def __init__(
        self,
        log_density: Callable[[Parameters], Tensor],
        initial: Callable[[int, torch.Generator], Parameters],
        log_prior: Callable[[Parameters], Tensor] | None = None,
        sample_prior: Callable[[int, torch.Generator], Parameters] | None = None,
    ) -> None:
        if (log_prior is None) != (sample_prior is None):
            raise ValueError("log_prior and sample_prior must be given together, or not at all")
        self._log_density, self._log_prior, self.initial = log_density, log_prior, initial
        if sample_prior is not None:
            self.sample_prior = sample_prior
        self.data, self.temperature = Data(torch.empty(0, 0), torch.empty(0, 0)), 1.0
        self.flat_gaussian_prior: FlatGaussian | None = None
        example = initial(2, torch.Generator())
        self._shapes = {name: values.shape[1:] for name, values in example.items()}
        found = log_density(example)
        if found.shape != (2,):
            raise ValueError(
                f"log_density must give one number for each of its points, (C,): found shape {tuple(found.shape)} for C = 2"
            )

    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every parameter, without the leading dimension."""
        return self._shapes

    def log_prior(self, parameters: Parameters) -> Tensor:
        """The given log prior; else the whole log density."""
        return (self._log_prior or self._log_density)(parameters)

    def log_likelihood(self, parameters: Parameters, batch: Data | None = None) -> Tensor:
        """What the log prior leaves of the density: zero if none is given. There are no data but those inside it."""
        if self._log_prior is not None:
            return self._log_density(parameters)
        first = next(iter(parameters.values()))
        return first.new_zeros(first.shape[0])
