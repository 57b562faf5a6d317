"""Networks as targets: the posterior of a network's weights and of its likelihood's free parameters."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from bayesnn.checks import positive
from bayesnn.data import Data, check_inputs
from bayesnn.files import fingerprint
from bayesnn.inference.flat import unravel
from bayesnn.inference.members import NETWORK, apply_network, check_members, check_network, network_parameters
from bayesnn.inference.target import FlatGaussian, Parameters
from bayesnn.likelihoods import Likelihood, ParameterPrior
from bayesnn.priors import Normal, PerLayer, Prior, location

LIKELIHOOD = "likelihood."


def _check_data(data: Data, likelihood: Likelihood) -> None:
    X, Y = data
    if not X.is_floating_point():
        raise ValueError(f"data.X must be floating-point numbers, found {X.dtype}")
    if Y.is_floating_point() and Y.dtype != X.dtype:
        raise ValueError(f"data.Y must have the type of data.X, {X.dtype}, found {Y.dtype}")
    if Y.dim() != 2:
        raise ValueError(f"data.Y must have shape (n, m), found {tuple(Y.shape)}")
    try:
        check_inputs(X)
        likelihood.check(Y, len(X), like=X)
    except (TypeError, ValueError) as error:
        raise ValueError(f"data.{error}") from error


class NetworkTarget:
    """The posterior of a network's weights and of its likelihood's free parameters.

    Parameters are named ``network.<name>`` and ``likelihood.<name>``. A parameter that is used in several places is one
    parameter, under its first name. Frozen ones (``requires_grad_(False)``) are constants: they have no prior, and stay as
    they are in the network.

    Args:
        network: any module whose output for a row depends on that row and its parameters alone. Where it wants images or
            sequences, it makes them of rows: ``nn.Sequential(nn.Unflatten(1, (3, 32, 32)), nn.Conv2d(…), …)``. Its members
            are evaluated by vmap; where that can't be done (recurrent layers, branches on values), one after the other.
        likelihood: p(y | f).
        prior: p(w) of the network's weights.
        data: standardised inputs (n, d) and targets (n, m).
        outcome_scale: (1, m), the standardised unit in units of y.
        temperature: 1 for the Bayes posterior; below 1 a cold posterior.

    Raises:
        ValueError: if the network's output depends on the other rows, on chance or on earlier calls, or it gives another
            number of function values than the likelihood needs, or has no parameters that aren't frozen; if the data aren't
            finite numbers of one floating-point type in as many rows, or none that the likelihood is of; or if the temperature
            isn't positive.
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
        positive("temperature", temperature)
        _check_data(data, likelihood)
        self.network = copy.deepcopy(network).to(data.X)
        self.likelihood, self.prior, self.data, self.temperature = likelihood, prior, data, temperature
        self.outcome_scale = outcome_scale
        self.fixed = likelihood.fixed_parameters(outcome_scale.to(data.X))
        own = dict(self.network.named_parameters())
        self.frozen = {NETWORK + name: value.detach() for name, value in own.items() if not value.requires_grad}
        self._frozen_network = network_parameters(self.frozen)
        self._shapes = {NETWORK + name: value.shape for name, value in own.items() if value.requires_grad}
        if not self._shapes:
            raise ValueError(
                "network has no parameters" + (" that aren't frozen" if own else "") + ": nothing to learn"
            )
        self._shapes |= {name: torch.Size([1, data.Y.shape[-1]]) for name in self.parameter_priors}
        # The density and all it depends on; the network's initial weights aren't among that.
        self.fingerprint = fingerprint(
            repr((self.network, likelihood, prior, temperature)), data.X, data.Y, outcome_scale, *self.network.buffers(),
            *self.frozen, *self.frozen.values(),
        )  # fmt: skip
        self._check_network()
        self.flat_gaussian_prior = self._flat_gaussian_prior()

    def _check_network(self) -> None:
        columns = self.data.X.shape[-1]
        try:
            with torch.no_grad():
                found = self.network(self.data.X[:1])
        except Exception as error:
            raise ValueError(f"network can't take X of shape (1, {columns}): {error}") from error
        wanted = self.likelihood.latent_size(self.data.Y.shape[-1])
        if found.shape != (1, wanted):
            raise ValueError(
                f"network must map (n, {columns}) to (n, {wanted}) for {type(self.likelihood).__name__} with "
                f"{self.data.Y.shape[-1]} output(s), found {tuple(found.shape)} for one row"
            )
        two = network_parameters(self.initial(2, torch.Generator().manual_seed(0)))
        check_members(self.network, two, self.data.X[:3], self._frozen_network)

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
        f = self.functions(parameters, batch.X)
        return self.likelihood.log_prob(f, batch.Y, self.likelihood_parameters(parameters))

    def functions(self, parameters: Parameters, X: Tensor) -> Tensor:
        """The latent function values at scaled inputs X (q, d), (C, q, p)."""
        return apply_network(self.network, network_parameters(parameters), X, self._frozen_network)

    def watched(self, position: Tensor) -> Tensor:
        """Each chain's function values at up to eight training inputs, (C, 8 p), of positions (C, P)."""
        places = torch.linspace(0, len(self.data) - 1, min(8, len(self.data))).long()
        with torch.no_grad():
            return self.functions(unravel(position, self.shapes()), self.data.X[places]).flatten(1)

    def likelihood_parameters(self, parameters: Parameters) -> Parameters:
        """The likelihood's parameters by their short names, fixed ones included."""
        free = {name.removeprefix(LIKELIHOOD): v for name, v in parameters.items() if name.startswith(LIKELIHOOD)}
        return self.fixed | free
