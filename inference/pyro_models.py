"""Pyro models as targets, and our targets as Pyro models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pyro
import pyro.distributions
import torch
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor
from torch.distributions import constraints
from torch.func import vmap

from bayesnn.data import Data
from bayesnn.inference.members import NETWORK
from bayesnn.inference.network_target import NetworkTarget
from bayesnn.inference.target import FlatGaussian, Parameters


class PyroTarget:
    """A Pyro model with real latent variables as a target.

    Parameters are the latent sites by name, in the unconstrained space of Pyro's own transforms, whose log Jacobians are part
    of the density; :meth:`constrain` takes draws back to the sites' own values. Chains are evaluated by vmap where that gives
    what Pyro gives; else (a model that branches on values, say) one after the other, as Pyro does it.

    Args:
        model: a Pyro model; data are its arguments.
        *arguments: of the model.
        **keywords: of the model.

    Raises:
        ValueError: if a latent variable is discrete, or there is none.
    """

    temperature = 1.0
    flat_gaussian_prior: FlatGaussian | None = None

    def __init__(self, model: Callable[..., Any], *arguments: Any, **keywords: Any) -> None:
        with torch.random.fork_rng(devices=[]):  # the prototype's values aren't used
            sites: dict[str, Any] = dict(pyro.poutine.trace(model).get_trace(*arguments, **keywords).nodes)
            latent = {
                n: s
                for n, s in sites.items()
                if s["type"] == "sample" and not s["is_observed"] and not _is_subsample(s)
            }
            discrete = [name for name, site in latent.items() if site["fn"].support.is_discrete]
            if discrete:
                raise ValueError(
                    f"a target needs real latent variables, but {', '.join(discrete)} are discrete: sum them out"
                )
            if not latent:
                raise ValueError("the model has no latent variables: there is nothing to sample")
            prototype, potential, transforms, _ = initialize_model(model, model_args=arguments, model_kwargs=keywords)
        self._potential, self._transforms = potential, transforms
        self._model = lambda: model(*arguments, **keywords)
        self._shapes = {name: value.shape for name, value in prototype.items()}
        self._dtype = next(iter(prototype.values())).dtype
        self.data = Data(torch.empty(0, 0), torch.empty(0, 0))
        self._vmapped = self._can_be_vmapped()

    def _can_be_vmapped(self) -> bool:
        points = self.initial(2, torch.Generator().manual_seed(0))
        try:
            with pyro.validation_enabled(False):
                found, wanted = self._all_at_once(points), self._one_by_one(points)
        except (RuntimeError, ValueError, NotImplementedError):
            return False
        return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-5, equal_nan=True)

    def shapes(self) -> dict[str, torch.Size]:
        """The unconstrained shape of every site."""
        return self._shapes

    def initial(self, count: int, generator: torch.Generator) -> Parameters:
        """Uniform on [-2, 2] in the unconstrained space, as Stan begins."""
        return {
            name: 4 * torch.rand((count, *shape), generator=generator, dtype=torch.float64).to(self._dtype) - 2
            for name, shape in self._shapes.items()
        }

    def log_prior(self, parameters: Parameters) -> Tensor:
        """The whole log density, (C,): Pyro doesn't tell prior and likelihood apart."""
        # Without validation: where a trajectory diverges the density is NaN or zero, which rejects the move, and no error. It
        # branches on values, too, which vmap can't do.
        with pyro.validation_enabled(False):
            return self._all_at_once(parameters) if self._vmapped else self._one_by_one(parameters)

    def _one_by_one(self, parameters: Parameters) -> Tensor:
        count = next(iter(parameters.values())).shape[0]
        each = ({name: values[index] for name, values in parameters.items()} for index in range(count))
        return torch.stack([-self._potential(one) for one in each])

    def _all_at_once(self, parameters: Parameters) -> Tensor:
        return vmap(self._log_density)(parameters)

    def _log_density(self, parameters: Parameters) -> Tensor:
        sites = self.constrain(parameters)
        trace = pyro.poutine.trace(pyro.poutine.condition(self._model, sites)).get_trace()
        total = torch.as_tensor(trace.log_prob_sum())
        for name, transform in self._transforms.items():
            total = total - transform.log_abs_det_jacobian(sites[name], parameters[name]).sum()
        return total

    def log_likelihood(self, parameters: Parameters, batch: Data | None = None) -> Tensor:
        """Zero: it is in ``log_prior``."""
        first = next(iter(parameters.values()))
        return first.new_zeros(first.shape[0])

    def constrain(self, parameters: Parameters) -> Parameters:
        """Draws in the sites' own spaces."""
        return {
            name: self._transforms[name].inv(values) if name in self._transforms else values
            for name, values in parameters.items()
        }


def _is_subsample(site: dict[str, Any]) -> bool:
    return type(site["fn"]).__name__ == "_Subsample"


class _NetworkPrior(pyro.distributions.TorchDistribution):
    """The prior of one parameter tensor as a distribution with that tensor as its event."""

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, target: NetworkTarget, name: str) -> None:
        self._target, self._name = target, name
        super().__init__(torch.Size(), target.shapes()[name], validate_args=False)

    @property
    def support(self) -> Any:
        """All real tensors."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws, from torch's global generator as everywhere in Pyro."""
        count = max(1, torch.Size(sample_shape).numel())
        seed = int(torch.randint(2**62, ()))
        drawn = self._target.sample_prior(count, torch.Generator().manual_seed(seed))[self._name]
        return drawn.reshape(*sample_shape, *self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p of (*batch, *shape), (*batch)."""
        batch = value.shape[: value.dim() - len(self.event_shape)]
        flat = value.reshape(-1, *self.event_shape)
        return self._target.log_prior({self._name: flat}).reshape(batch)


def pyro_model(target: NetworkTarget) -> Callable[[], Tensor]:
    """A network's posterior as a Pyro model.

    Its sample sites are named as our parameters (``network.<name>`` and ``likelihood.<name>``) and have our priors; the
    log-likelihood of all data is a factor named ``y``. Returns the function values at the data, (n, p).
    """

    def model() -> Tensor:
        parameters = {name: pyro.sample(name, _NetworkPrior(target, name)) for name in target.shapes()}
        pyro.factor("y", target.log_likelihood({name: value.unsqueeze(0) for name, value in parameters.items()})[0])
        own = {name.removeprefix(NETWORK): value for name, value in parameters.items() if name.startswith(NETWORK)}
        f: Tensor = torch.func.functional_call(target.network, own, (target.data.X,))
        return f

    return model
