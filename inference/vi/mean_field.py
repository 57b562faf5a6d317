r"""Mean-field Gaussian variational inference (Blundell et al. 2015) with local reparameterisation (Kingma et al. 2015).

:math:`q(\theta) = \prod_j N(\theta_j; \mu_j, \sigma_j^2)` maximises

.. math:: \frac{N}{|B|} \sum_{i \in B} E_q \log p(y_i \mid x_i, \theta) - \mathrm{KL}(q \,\|\, p)

At a temperature T other than 1, log likelihood and log prior count 1 / T times, and q's entropy once.

A linear layer's output under q is Gaussian with mean :math:`X \mu_W^\top + \mu_b` and variance
:math:`X^2 (\sigma_W^2)^\top + \sigma_b^2`; drawing it, a fresh one for each row, instead of the weights makes the gradient
less noisy. The KL to a Gaussian prior is exact. Layers that aren't plain linear maps of (rows, features), or that are
used more than once, have their weights drawn instead, once for each step, and priors that aren't Gaussian have their
KL estimated from those draws.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from bayesnn.checks import check_fields, count, positive
from bayesnn.configured import Configured
from bayesnn.data import Data, minibatch
from bayesnn.inference.draws import WeightPosterior
from bayesnn.inference.flat import unravel
from bayesnn.inference.members import NETWORK, network_parameters
from bayesnn.inference.network_target import NetworkTarget
from bayesnn.inference.optimizer import AdamState, adam_init, adam_step, warmup_cosine
from bayesnn.inference.starting_at import StartingAt
from bayesnn.inference.target import Parameters


class MeanFieldState(NamedTuple):
    """Variational parameters ``{"mean": …, "log_std": …}`` by parameter name, and Adam's moments."""

    variational: dict[str, Tensor]
    adam: AdamState


class MeanFieldInfo(NamedTuple):
    """Of one step: the estimate of the evidence lower bound."""

    elbo: Tensor


@dataclass(frozen=True)
class MeanField(Configured):
    """Mean-field Gaussian variational inference.

    Args:
        num_steps: Adam steps, with a short warm-up and a cosine decay of the learning rate.
        learning_rate: Adam's at its peak; 0.01.
        batch_size: rows for each step, without replacement; None: all.
        num_samples: Monte Carlo samples for each row and step.
        num_draws: networks drawn from q when it is fitted: they are the posterior.
        initial_std: standard deviation of q at the start, as a share of 1 / sqrt(fan-in).

    Raises:
        ValueError: if a count or rate isn't positive.
    """

    num_steps: int = 3000
    learning_rate: float = 0.01
    batch_size: int | None = None
    num_samples: int = 4
    num_draws: int = 256
    initial_std: float = 0.05

    def __post_init__(self) -> None:
        check_fields(self, count, "num_steps", "num_samples", "num_draws")
        check_fields(self, positive, "learning_rate", "initial_std")
        if self.batch_size is not None:
            check_fields(self, count, "batch_size")

    def init(self, target: NetworkTarget, generator: torch.Generator) -> MeanFieldState:
        """Means at the target's initial point, and small standard deviations, or those that are known."""
        variational, known = {}, getattr(target, "variance", None)
        variances = None if known is None else unravel(known, target.shapes())
        for name, value in target.initial(1, generator).items():
            fan_in = math.prod(value.shape[2:]) if value.dim() > 2 and name.startswith(NETWORK) else 1
            log_std = torch.full_like(value[0], math.log(self.initial_std / math.sqrt(fan_in)))
            variational["mean." + name] = value[0]
            variational["log_std." + name] = log_std if variances is None else 0.5 * variances[name][0].log()
        return MeanFieldState(variational, adam_init(variational))

    def continued(
        self, target: NetworkTarget, earlier: WeightPosterior, parts: tuple[int, ...]
    ) -> tuple[MeanField, StartingAt]:
        """A fifth of the steps (our choice), from the means and deviations of an earlier fit's draws."""
        means = {name: values.mean(0, keepdim=True) for name, values in earlier.sampled.items()}
        several = len(earlier) > 1
        variances = {name: values.var(0) for name, values in earlier.sampled.items()} if several else None
        return dataclasses.replace(self, num_steps=-(-self.num_steps // 5)), StartingAt(target, means, variances)

    def step(
        self, target: NetworkTarget, state: MeanFieldState, generator: torch.Generator
    ) -> tuple[MeanFieldState, MeanFieldInfo]:
        """One step of Adam on minus the evidence lower bound, for each of the N observations, times the temperature."""
        batch = minibatch(target.data, self.batch_size, generator)
        leaves = {name: value.detach().requires_grad_() for name, value in state.variational.items()}
        means, log_stds = _split(leaves)
        sampled = _sample(means, log_stds, self.num_samples, generator)
        log_likelihood = self._expected_log_likelihood(target, batch, means, log_stds, sampled, generator)
        bound = len(target.data) / len(batch) * log_likelihood - _divergence(target, means, log_stds, sampled)
        elbo = (bound + (target.temperature - 1) * _entropy(log_stds)) / target.temperature
        loss = -elbo * target.temperature / len(target.data)
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        rate = self.learning_rate * warmup_cosine(int(state.adam.step), self.num_steps, min(100, self.num_steps // 10))
        variational, adam = adam_step(state.variational, gradients, state.adam, rate)
        return MeanFieldState(variational, adam), MeanFieldInfo(elbo.detach())

    def _expected_log_likelihood(
        self,
        target: NetworkTarget,
        batch: Data,
        means: Parameters,
        log_stds: Parameters,
        sampled: Parameters,
        generator: torch.Generator,
    ) -> Tensor:
        local = local_layers(target.network, batch.X[:1])
        own = {name: values[0] for name, values in sampled.items() if name.startswith(NETWORK)}
        own |= {name: means[name] for layer in local for name in _parameter_names(layer, target.network)}
        rows = batch.X.repeat(self.num_samples, 1)
        with _noisy_outputs(target.network, local, log_stds, generator):
            f = functional_call(target.network, network_parameters(own), (rows,))
        f = f.unflatten(0, (self.num_samples, -1))
        return target.likelihood.log_prob(f, batch.Y, target.likelihood_parameters(sampled)).sum(-1).mean()

    def keep(self, state: MeanFieldState, index: int) -> None:
        """Nothing: the draws come from the fitted q."""

    def result(
        self, target: NetworkTarget, state: MeanFieldState, draws: dict[str, Tensor], infos: dict[str, Tensor]
    ) -> WeightPosterior:
        """``num_draws`` independent draws from q, always the same ones for the same fit."""
        means, log_stds = _split(state.variational)
        return WeightPosterior(
            _sample(means, log_stds, self.num_draws, torch.Generator().manual_seed(0)),
            statistics={"elbo": infos["elbo"][-100:]},
        )


def _split(variational: dict[str, Tensor]) -> tuple[Parameters, Parameters]:
    means = {name.removeprefix("mean."): v for name, v in variational.items() if name.startswith("mean.")}
    return means, {name: variational["log_std." + name] for name in means}


def _sample(means: Parameters, log_stds: Parameters, count: int, generator: torch.Generator) -> Parameters:
    def draw(name: str) -> Tensor:
        mean = means[name]
        noise = torch.randn((count, *mean.shape), generator=generator, dtype=mean.dtype)
        return mean + log_stds[name].exp() * noise

    return {name: draw(name) for name in means}


def _entropy(log_stds: Parameters) -> Tensor:
    """-E_q log q."""
    return torch.stack([(log_std + 0.5 * math.log(2 * math.pi * math.e)).sum() for log_std in log_stds.values()]).sum()


def _divergence(target: NetworkTarget, means: Parameters, log_stds: Parameters, sampled: Parameters) -> Tensor:
    """KL(q || p): exact where the prior is Gaussian, else E_q[log q - log p] over the samples."""
    total: Any = 0.0
    for name, mean in means.items():
        log_std, gaussian = log_stds[name], target.gaussian_prior(name)
        if gaussian is not None:
            loc, scale = gaussian
            ratio = (2 * (log_std - math.log(scale))).exp()
            total = total + 0.5 * (ratio + ((mean - loc) / scale).square() - 1 - ratio.log()).sum()
        else:
            # -E log q is the Gaussian's entropy, known exactly; only E log p is left to the samples.
            total = (
                total
                - _entropy({name: log_std})
                - target.prior.log_prob(name.removeprefix(NETWORK), sampled[name]).mean()
            )
    return total


def local_layers(network: nn.Module, X: Tensor) -> list[nn.Linear]:
    """The linear layers whose outputs can be drawn instead of their weights.

    Those called once in a forward pass, on (points, features), with no frozen parameter and none shared with another layer:
    only then is a fresh draw of the output for each row a draw under q.
    """
    calls: dict[nn.Linear, int] = {}

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Linear)
        # Other than one row for one point, the rows share weights.
        calls[module] = calls.get(module, 0) + (1 if inputs[0].shape[:-1] == X.shape[:1] else 2)

    linear = [module for module in network.modules() if type(module) is nn.Linear]
    handles = [module.register_forward_hook(count) for module in linear]
    try:
        with torch.no_grad():
            network(X)
    finally:
        for handle in handles:
            handle.remove()
    uses: dict[int, int] = {}
    for _, parameter in network.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    return [
        layer
        for layer in linear
        if calls.get(layer) == 1 and all(uses[id(p)] == 1 and p.requires_grad for p in layer.parameters())
    ]


def _parameter_names(layer: nn.Module, network: nn.Module) -> list[str]:
    own = {id(parameter) for parameter in layer.parameters()}
    return [NETWORK + name for name, parameter in network.named_parameters() if id(parameter) in own]


@contextmanager
def _noisy_outputs(
    network: nn.Module, layers: list[nn.Linear], log_stds: Parameters, generator: torch.Generator
) -> Iterator[None]:
    """Within it, each of the layers (called with its mean weights) adds the noise that its weights' variances cause."""
    names = {id(parameter): NETWORK + name for name, parameter in network.named_parameters()}
    parameters = {layer: {name: names[id(own)] for name, own in layer.named_parameters()} for layer in layers}

    def add_noise(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert isinstance(module, nn.Linear)
        variances = {name: (2 * log_stds[own]).exp() for name, own in parameters[module].items()}
        variance = F.linear(inputs[0].square(), variances["weight"], variances.get("bias"))
        # All-zero inputs without a bias have no variance, and the root no derivative there.
        std = variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt()
        return output + std * torch.randn(output.shape, generator=generator, dtype=output.dtype)

    handles = [layer.register_forward_hook(add_noise) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
