"""Kernels averaged over random finite networks, and kernels of explicit features such as theirs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from gpytorch.kernels import Kernel
from gpytorch.models import exact_prediction_strategies
from linear_operator.operators import LowRankRootLinearOperator, MatmulLinearOperator, RootLinearOperator
from torch import Tensor, nn

from bayesnn.processes.kernels.empirical import empirical_ntk

MakeNetwork = Callable[[torch.Generator], nn.Module]


class MonteCarloKernels(NamedTuple):
    """Averages over networks, (n, m) each, and their standard errors; those of the tangent kernel are None if not wanted."""

    nngp: Tensor
    nngp_error: Tensor
    ntk: Tensor | None
    ntk_error: Tensor | None


def monte_carlo_kernel(
    make_network: MakeNetwork,
    x1: Tensor,
    x2: Tensor | None,
    num_networks: int,
    generator: torch.Generator,
    tangent: bool = True,
) -> MonteCarloKernels:
    r"""The NNGP and tangent kernels of any architecture, by drawing networks of it.

    .. math::
        \hat K(x, x') = \frac{1}{S p} \sum_{s, o} f_{so}(x) f_{so}(x'), \qquad
        \hat\Theta(x, x') = \frac{1}{S p} \sum_{s, o} \nabla f_{so}(x) \cdot \nabla f_{so}(x').

    Both are those of the networks' own width, without bias; the infinite-width kernels differ by O(1 / width). The standard
    errors shrink with the square root of ``num_networks``, and are of averages over a network's outputs first: outputs of one
    network depend on each other.

    Args:
        make_network: draws a network from its prior, with all randomness from the generator.
        x1: (n, *features).
        x2: (m, *features); None for the same as ``x1``.
        num_networks: at least 2.
        generator: of the networks.
        tangent: whether the tangent kernel is wanted too; it costs the most.

    Raises:
        ValueError: for fewer than 2 networks.
    """
    if num_networks < 2:
        raise ValueError(f"num_networks: found {num_networks}, want at least 2 for a standard error.")
    nngp, ntk = _Moments(), _Moments()
    with torch.no_grad():
        for _ in range(num_networks):
            network = make_network(generator)
            first = network(x1).reshape(len(x1), -1)
            second = first if x2 is None else network(x2).reshape(len(x2), -1)
            nngp.add(first @ second.mT / first.shape[-1])
            if tangent:
                ntk.add(empirical_ntk(network, x1, x2))
    return MonteCarloKernels(nngp.mean, nngp.error(), ntk.mean if tangent else None, ntk.error() if tangent else None)


class _Moments:
    """Welford's running mean and variance."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Any = 0.0
        self._squares: Any = 0.0

    def add(self, value: Tensor) -> None:
        self.count += 1
        change = value - self.mean
        self.mean = self.mean + change / self.count
        self._squares = self._squares + change * (value - self.mean)

    def error(self) -> Tensor:
        return (self._squares / (self.count - 1) / self.count).sqrt()


class RandomFeatures(nn.Module):
    r"""Outputs of random networks as features: :math:`\phi(x) \cdot \phi(x') \approx K(x, x')`, their NNGP kernel.

    .. math:: \phi(x) = \frac{1}{\sqrt{S p}} (f_{11}(x), \ldots, f_{Sp}(x))

    The error falls with the root of the number of features S p, as far as outputs are independent: those of one network are,
    in the limit of infinite width.

    Args:
        make_network: draws a network from its prior, with all randomness from the generator: from (n, d) to (n, p).
        num_networks: S, at least 1.
        generator: of the networks.

    Raises:
        ValueError: for fewer than one network.
    """

    def __init__(self, make_network: MakeNetwork, num_networks: int, generator: torch.Generator) -> None:
        super().__init__()
        if num_networks < 1:
            raise ValueError(f"num_networks: found {num_networks}, want at least 1.")
        self.networks = nn.ModuleList(make_network(generator) for _ in range(num_networks)).requires_grad_(False)

    def forward(self, X: Tensor) -> Tensor:
        """Features (*batch, n, S p) of X (*batch, n, d)."""
        rows = X.reshape(-1, X.shape[-1])
        features = torch.cat([network(rows).reshape(len(rows), -1) for network in self.networks], -1)
        return (features / math.sqrt(features.shape[-1])).reshape(*X.shape[:-1], -1)


class FeatureKernel(Kernel):
    r"""A GPyTorch kernel of explicit features, :math:`k(x, x') = \phi(x) \cdot \phi(x')`.

    Of low rank, and taken as such: with D features, regression on n points costs O(n D^2). Scale it with ``ScaleKernel``.
    Features may be :class:`RandomFeatures`, a Nyström approximation, or the last layer of a network of your own, whose
    parameters are then learned as hyperparameters.

    Args:
        features: from (*batch, n, d) to (*batch, n, D).
        **kwargs: ``active_dims``, as for every GPyTorch kernel.
    """

    def __init__(self, features: nn.Module, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.features = features

    @property
    def is_stationary(self) -> bool:
        """False: it depends on where the inputs are."""
        return False

    def forward(
        self, x1: Tensor, x2: Tensor, diag: bool = False, last_dim_is_batch: bool = False, **params: Any
    ) -> Any:
        """The kernel of x1 (*batch, n, d) and x2 (*batch, m, d), lazy: (*batch, n, m); with ``diag`` of pairs, (*batch, n).

        Raises:
            ValueError: if ``last_dim_is_batch`` is set; GPyTorch has deprecated it.
        """
        if last_dim_is_batch:
            raise ValueError("last_dim_is_batch: found True; GPyTorch deprecates it, add kernels with active_dims.")
        apart = x1 is not x2 and (x1.requires_grad or x2.requires_grad)
        equal = not apart and x1.shape == x2.shape and torch.equal(x1, x2)
        first = self.features(x1)
        second = first if equal else self.features(x2)
        if diag:
            return (first * second).sum(-1)
        if not equal:
            return MatmulLinearOperator(first, second.mT)
        return LowRankRootLinearOperator(first) if first.shape[-1] < first.shape[-2] else RootLinearOperator(first)

    def prediction_strategy(self, train_inputs: Any, train_prior_dist: Any, train_labels: Any, likelihood: Any) -> Any:
        """GPyTorch's own for kernels of explicit features."""
        return exact_prediction_strategies.LinearPredictionStrategy(
            train_inputs, train_prior_dist, train_labels, likelihood
        )
