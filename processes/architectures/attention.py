r"""Self-attention of infinite width (Hron et al. 2020), and encodings of positions.

With dot products of queries and keys divided by their width n (not its root) and equal weights for both, attention weights
tend to a function of the input's own covariances:

.. math:: f(x)_i = \sum_j G(x)_{ij}\, W_O W_V h(x)_j, \qquad
    G(x)_{ij} = \operatorname{softmax}_j\big(\sigma_K^2\, K_{ij}(x, x)\big).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesnn.checks import check_fields, positive
from bayesnn.processes.architectures.covariance import Covariance
from bayesnn.processes.architectures.layers import Plain, Variances, Weighted, check_variances, with_weights
from bayesnn.processes.architectures.mixing import as_matrices, as_pairs, mixed
from bayesnn.processes.architectures.pooling import check_pairs


@dataclass(frozen=True)
class SelfAttention(Weighted):
    r"""Every position attends to all positions of its input; a residual branch and a ``LayerNorm`` are up to the user.

    Covariances are :math:`K' = \sigma_w^2\, G(x) K G(x')^T + \sigma_b^2`. Values and outputs both have weights that are
    trained, so that the tangent kernel is :math:`\Theta' = \sigma_w^2\, G(x) (\Theta + 2 K) G(x')^T + \sigma_b^2`; what
    comes through G vanishes with the width. Finite networks have one head: with more of them, the limit is the same.

    Args:
        weight_var: the product of the variances of values' and outputs' weights, over their fan-in.
        bias_var: of the biases of the outputs.
        key_var: of the weights of keys and queries, over their fan-in: how sharp attention is.

    Raises:
        ValueError: if a variance is negative.
    """

    weight_var: float = 1.0
    bias_var: float = 0.0
    key_var: float = 1.0

    def __post_init__(self) -> None:
        check_variances(self.weight_var, self.bias_var)
        check_variances(self.key_var, 0.0, "key_var")

    def variances(self) -> list[tuple[float, float]]:
        """Those of values and outputs, and of the biases."""
        return [(self.weight_var, self.bias_var)]

    def mixes_positions(self) -> bool:
        """Yes."""
        return True

    def propagate(self, covariance: Covariance, variances: Variances) -> Covariance:
        """Weighted means over both positions of a pair, times the weight variance.

        Raises:
            ValueError: if covariances aren't of pairs of positions.
        """
        check_pairs(self, covariance)
        num = covariance.num_positions
        left, right = (
            torch.softmax(self.key_var * as_matrices(own, num), -1) for own in (covariance.first, covariance.second)
        )
        attended = mixed(covariance, left, right)
        if attended.tangent is not None:  # the weights of values, beside the outputs' that with_weights adds
            attended = attended.replace(tangent=attended.tangent + attended.between)
        return with_weights(attended, *variances[0])


@dataclass(frozen=True)
class PositionalEncoding(Plain):
    r"""Adds a Gaussian random vector of each position, the same one for all inputs, which is trained as weights are:

    .. math:: K'_{i i'} = K_{i i'} + v R_{i i'}, \qquad \Theta'_{i i'} = \Theta_{i i'} + v R_{i i'}.

    It belongs after a layer with weights, where there are many channels.

    Args:
        variance: v.
        lengthscale: None: vectors of different positions are independent, R is the identity; else
            :math:`R_{i i'} = \exp(-|i - i'|^2 / 2 \ell^2)`, in positions.

    Raises:
        TypeError: if one isn't a number.
        ValueError: if one isn't positive.
    """

    variance: float = 1.0
    lengthscale: float | None = None

    def __post_init__(self) -> None:
        check_fields(self, positive, "variance", *([] if self.lengthscale is None else ["lengthscale"]))

    def covariance(self, sizes: tuple[int, ...], like: Tensor) -> Tensor:
        """v R for positions of these sizes, (h w, h' w')."""
        grid = torch.meshgrid(*(torch.arange(size, device=like.device) for size in sizes), indexing="ij")
        places = torch.stack([axis.flatten() for axis in grid], -1)
        distances = (places[:, None] - places[None]).square().sum(-1).to(like.dtype)
        if self.lengthscale is None:
            return self.variance * (distances == 0).to(like.dtype)
        return self.variance * torch.exp(-distances / (2 * self.lengthscale**2))

    def propagate(self, covariance: Covariance, variances: Variances) -> Covariance:
        """The encodings' covariances on top.

        Raises:
            ValueError: if inputs have no positions.
        """
        num = covariance.num_positions
        if num == 0:
            raise ValueError("PositionalEncoding needs inputs with positions, found vectors")
        if not covariance.pairs:
            return covariance.map(lambda values: values + self.variance)
        sizes = tuple(covariance.first.shape[-2 * num :: 2])
        return covariance.map(functools.partial(torch.add, as_pairs(self.covariance(sizes, covariance.first), sizes)))
