"""Models of real variables: Gaussian mixtures tied together along the edges of a graph, and their blocks' conditionals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bayesnn.files import fingerprint
from bayesnn.inference.mcmc.learned.graph import both_ways, graph_blocks, neighbourhood
from bayesnn.inference.mcmc.learned.models import Block, draw_index


def log_normal(values: Tensor, loc: Tensor, std: Tensor) -> Tensor:
    """log N(values; loc, std^2)."""
    return -0.5 * ((values - loc) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)


def _pulls(values: Tensor, coupling: Tensor, edges: Tensor) -> Tensor:
    """-1/2 sum of lambda (x_i - x_j)^2: (*n, V), (*n, E) -> (*n)."""
    return -0.5 * (coupling * (values[..., edges[:, 0]] - values[..., edges[:, 1]]).square()).sum(-1)


def absorb(
    log_weights: Tensor, means: Tensor, stds: Tensor, total: Tensor, pulled: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log weights, means and stds of mixtures times exp(-total x^2 / 2 + pulled x), the factor of known neighbours.

    For neighbours x_j at the ends of edges of coupling lambda_j, total = sum lambda_j and pulled = sum lambda_j x_j.
    """
    precision = stds.square().reciprocal()
    posterior = precision + total
    loc = (precision * means + pulled) / posterior
    log_mass = 0.5 * (precision / posterior).log() + 0.5 * (
        loc * (precision * means + pulled) - precision * means.square()
    )
    return log_weights + log_mass, loc, posterior.rsqrt()


class JointMixture:
    """A mixture of Gaussians with full covariances: log weights (*n, L), means (*n, L, b) and precisions (*n, L, b, b)."""

    def __init__(self, log_weights: Tensor, means: Tensor, precisions: Tensor) -> None:
        self.log_weights, self.means = log_weights.log_softmax(-1), means
        self.roots = torch.linalg.cholesky(precisions)

    def sample(self, generator: torch.Generator) -> Tensor:
        """Values, (*n, b)."""
        chosen = draw_index(self.log_weights.exp(), generator)[..., None, None]
        means = self.means.gather(-2, chosen.expand(*chosen.shape[:-1], self.means.shape[-1])).squeeze(-2)
        chosen = chosen.unsqueeze(-1).expand(*chosen.shape[:-1], *self.roots.shape[-2:])
        roots = self.roots.expand(*chosen.shape[:-3], *self.roots.shape[-3:]).gather(-3, chosen).squeeze(-3)
        noise = torch.randn(*means.shape, 1, generator=generator, dtype=means.dtype)
        return means + torch.linalg.solve_triangular(roots.mT, noise, upper=True).squeeze(-1)

    def log_prob(self, values: Tensor) -> Tensor:
        """(*n, b) -> (*n)."""
        whitened = (self.roots.mT @ (values.unsqueeze(-2) - self.means).unsqueeze(-1)).squeeze(-1)
        log_det = self.roots.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        each = log_det - 0.5 * whitened.square().sum(-1) - 0.5 * values.shape[-1] * math.log(2 * math.pi)
        return torch.logsumexp(self.log_weights + each, -1)


class MixtureConditional:
    r"""Blocks of a mixture field, with the values around them absorbed into the mixture of each variable,

    .. math:: \log p(x_B \mid x_C) = \sum_{i \in B} \log \sum_k \omega_{ik} N(x_i; \mu_{ik}, \sigma_{ik}^2)
        - \tfrac12 \sum_{i \sim j} \lambda_{ij} (x_i - x_j)^2 + \mathrm{const}.

    Args:
        log_weights: log omega, normalised or not, (*n, b, K).
        means: mu, (*n, b, K).
        stds: sigma, (*n, b, K), or with dimensions of n missing in front.
        coupling: lambda, (*n, e), or with dimensions of n missing in front.
        edges: the motif's, (e, 2).
    """

    def __init__(self, log_weights: Tensor, means: Tensor, stds: Tensor, coupling: Tensor, edges: Tensor) -> None:
        self.log_weights, self.means, self.stds = log_weights.log_softmax(-1), means, stds.expand_as(means)
        self.coupling, self.edges = coupling, edges

    @property
    def features(self) -> Tensor:
        """Log weights relative to the last, means, log standard deviations, logs of 1 + lambda: b (3 K - 1) + e numbers."""
        logits = (self.log_weights - self.log_weights[..., -1:])[..., :-1]
        own = torch.cat([logits.clamp(-8, 8), self.means, self.stds.log()], -1).flatten(-2)
        return torch.cat([own, self.coupling.log1p().expand(*own.shape[:-1], -1)], -1)

    def log_density(self, values: Tensor) -> Tensor:
        """(*n, b) -> (*n)."""
        each = torch.logsumexp(self.log_weights + log_normal(values.unsqueeze(-1), self.means, self.stds), -1)
        return each.sum(-1) + _pulls(values, self.coupling, self.edges)

    def exact(self) -> JointMixture:
        """The K^b Gaussians, one for each choice of a component for each variable."""
        size, components = self.means.shape[-2:]
        choices = torch.tensor(list(itertools.product(range(components), repeat=size)))
        places = torch.arange(size)
        log_weights, means, stds = (
            part[..., places, choices] for part in (self.log_weights, self.means, self.stds)
        )  # (*n, L, b)
        precision = torch.diag_embed(stds.square().reciprocal()) + _laplacian(self.coupling, self.edges, size)
        weighted = means / stds.square()
        loc = torch.linalg.solve(precision, weighted)
        log_mass = (log_weights - stds.log() - 0.5 * means * weighted + 0.5 * loc * weighted).sum(-1)
        return JointMixture(log_mass - 0.5 * torch.logdet(precision), loc, precision)


def _laplacian(coupling: Tensor, edges: Tensor, size: int) -> Tensor:
    """The precision matrix of the pulls, (*n, 1, b, b)."""
    ends = torch.eye(size, dtype=coupling.dtype)
    differences = ends[edges[:, 0]] - ends[edges[:, 1]]
    return torch.einsum("...e,ei,ej->...ij", coupling, differences, differences).unsqueeze(-3)


class MixtureField:
    r"""Real variables with a Gaussian mixture each, pulled towards each other along the edges of a graph,

    .. math:: \log p(x) = \sum_i \log \sum_k \pi_{ik} N(x_i; m_{ik}, s_{ik}^2)
        - \tfrac12 \sum_{i \sim j} \lambda_{ij} (x_i - x_j)^2 + \mathrm{const}.

    With one component it is a Gaussian Markov random field; with several it has up to K^V modes. A block's conditional is of
    the same form: :math:`\exp(-\lambda (x_i - x_j)^2 / 2)` of a known :math:`x_j` is a Gaussian factor of each component.

    Args:
        edges: (E, 2), each pair of variables once.
        coupling: lambda >= 0, (E,).
        log_weights: log pi, normalised or not, (V, K).
        means: m, (V, K).
        stds: s > 0, (V, K).

    Raises:
        ValueError: if shapes don't belong together, an edge isn't between two of the variables or is there twice, or a
            parameter is out of its range.
    """

    cardinality: int | None = None

    def __init__(self, edges: Tensor, coupling: Tensor, log_weights: Tensor, means: Tensor, stds: Tensor) -> None:
        num_variables = len(means)
        if means.dim() != 2 or not means.shape == log_weights.shape == stds.shape:
            shapes = tuple(means.shape), tuple(log_weights.shape), tuple(stds.shape)
            raise ValueError(f"means, log_weights and stds must be (V, K), found {shapes}")
        if edges.dim() != 2 or edges.shape != (len(coupling), 2):
            raise ValueError(f"edges must be (E, 2) for E = {len(coupling)} couplings, found {tuple(edges.shape)}")
        if edges.numel() and not 0 <= int(edges.min()) <= int(edges.max()) < num_variables:
            raise ValueError(f"edges must be between variables 0 … {num_variables - 1}")
        if len({frozenset(pair) for pair in edges.tolist() if len(set(pair)) == 2}) != len(edges):
            raise ValueError("each edge must join two different variables, and be there once")
        if not all(bool(part.isfinite().all()) for part in (coupling, log_weights, means, stds)):
            raise ValueError("coupling, log_weights, means and stds must be finite")
        if bool((coupling < 0).any()) or bool((stds <= 0).any()):
            raise ValueError("coupling must not be negative, and stds must be positive")
        self.edges, self.coupling = edges, coupling.double()
        self.log_weights, self.means, self.stds = log_weights.double().log_softmax(-1), means.double(), stds.double()

    @classmethod
    def random(cls, edges: Tensor, num_components: int, coupling: float, generator: torch.Generator) -> MixtureField:
        """Means of scale 2, standard deviations around 1/2, logits of scale 1/2, couplings uniform up to ``coupling``."""
        shape = (int(edges.max()) + 1, num_components)
        log_weights, means, log_stds = torch.randn(3, *shape, generator=generator, dtype=torch.float64).unbind()
        pulls = coupling * torch.rand(len(edges), generator=generator, dtype=torch.float64)
        return cls(edges, pulls, 0.5 * log_weights, 2 * means, 0.5 * (0.3 * log_stds).exp())

    @property
    def fingerprint(self) -> str:
        """A hash of the graph and the parameters."""
        return fingerprint("mixture field", self.edges, self.coupling, self.log_weights, self.means, self.stds)

    def initial(self, count: int, generator: torch.Generator) -> Tensor:
        """Each variable from its own mixture, as if there were no edges."""
        chosen = draw_index(self.log_weights.exp().expand(count, -1, -1), generator).unsqueeze(-1)
        noise = torch.randn(count, len(self.means), generator=generator, dtype=torch.float64)
        means, stds = (part.expand(count, -1, -1).gather(-1, chosen).squeeze(-1) for part in (self.means, self.stds))
        return means + stds * noise

    def log_density(self, values: Tensor) -> Tensor:
        """(C, V) -> (C,)."""
        each = torch.logsumexp(self.log_weights + log_normal(values.unsqueeze(-1), self.means, self.stds), -1)
        return each.sum(-1) + _pulls(values, self.coupling, self.edges)

    def blocks(self, sets: Sequence[Sequence[int]]) -> list[Block]:
        """Blocks of these sets of variables, of one size, with their neighbours."""
        return graph_blocks(self.edges, sets)

    def conditionals(self, blocks: Sequence[Block]) -> Callable[[Tensor], MixtureConditional]:
        """From values (C, V) to the conditionals of these blocks, (C, G)."""
        places, couplings = neighbourhood(self.edges, blocks), both_ways(self.coupling)
        variables, pulls = torch.stack([block.variables for block in blocks]), couplings[places.outer]
        log_weights, means, stds = (part[variables] for part in (self.log_weights, self.means, self.stds))
        total = pulls.sum(-1, keepdim=True)

        def at(values: Tensor) -> MixtureConditional:
            pulled = (pulls * values[:, places.neighbours]).sum(-1, keepdim=True)
            absorbed = absorb(log_weights, means, stds, total, pulled)
            return MixtureConditional(*absorbed, couplings[places.inner], blocks[0].edges)

        return at
