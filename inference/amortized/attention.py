"""Attention whose heads weigh rows by their distance from the query, feature by feature, besides what they read from tokens:

.. math:: \\mathrm{logit}_{hij} = q_{hi}^\\top k_{hj} / \\sqrt{w} - \\sum_d s_{hd}(i)\\, (x_{id} - x_{jd})^2,

with sharpnesses s > 0 that depend on the querying token; of more than 8 features, x are 8 learned combinations. Products of
tokens alone must learn what near means, and in a network of this size do so slowly. (The null key has distance 0.)

The distances are ours.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST_DISTANCES = 8
SHARPNESS = (0.3, 50.0)  # at the start, of the farthest- and of the nearest-sighted head
MAX_LOG_SHARPNESS = 8.0


class DistanceLayer(nn.Module):
    """Pre-norm attention to given keys and values, then a pre-norm MLP.

    A weighted squared distance is an inner product, of :math:`(2 s x, -s)` and :math:`(x', x'^2)`, up to a term of the query
    alone, which cancels: so distances are more columns of queries and keys, and no matrix of distances is ever built.
    """

    def __init__(self, width: int, num_heads: int, expansion: int, max_features: int) -> None:
        super().__init__()
        self.num_heads, self.num_distances = num_heads, min(max_features, MOST_DISTANCES)
        self.head_width = width // num_heads
        self.combines = max_features > MOST_DISTANCES
        self.combine = nn.Identity() if not self.combines else nn.Linear(max_features, MOST_DISTANCES, bias=False)
        self.to_sharpness = nn.Linear(width, num_heads * self.num_distances)
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_query = nn.Linear(width, width)
        self.to_key_value = nn.Linear(width, 2 * width)
        self.null = nn.Parameter(torch.zeros(2, num_heads, 1, width // num_heads))
        self.merge = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, expansion * width), nn.GELU(), nn.Linear(expansion * width, width))

    def start(self) -> None:
        """As the identity, with heads that look from near to far."""
        for linear in (self.merge, self.mlp[-1]):
            assert isinstance(linear, nn.Linear)
            nn.init.zeros_(linear.weight)
        low, high = (math.log(bound) for bound in SHARPNESS)
        with torch.no_grad():
            self.to_sharpness.weight.mul_(0.3)
            self.to_sharpness.bias.copy_(
                torch.linspace(low, high, self.num_heads).repeat_interleave(self.num_distances)
            )

    def keys_and_values(self, context: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Of context tokens (B, n, width) at (B, n, d): two of (B, heads, n+1, …)."""
        both = (
            self.to_key_value(self.norm_attention(context))
            .unflatten(-1, (2, self.num_heads, -1))
            .permute(2, 0, 3, 1, 4)
        )
        key, value = torch.cat([both, self.null[:, None].expand(-1, len(context), -1, -1, -1)], -2)
        places = self.combine(places)
        rows = F.pad(torch.cat([places, places.square()], -1), (0, 1))
        rows = torch.cat([rows, F.pad(rows.new_ones(len(rows), 1, 1), (rows.shape[-1] - 1, 0))], 1)
        key = torch.cat([key, rows.unsqueeze(1).expand(-1, self.num_heads, -1, -1)], -1)
        # Values as wide as the keys: the fused kernels want that.
        return key, F.pad(value, (0, key.shape[-1] - value.shape[-1]))

    def basis(self, places: Tensor) -> tuple[Tensor, Tensor]:
        r"""What queries' sharpnesses s are multiplied with: 2 x and -1, (B, 1, q, 2, d), and :math:`x^2`, (B, 1, q, d).

        Of :math:`-s (x - x')^2 = 2 s x \cdot x' - s \cdot x'^2 - s x^2` the first two terms are products with rows' keys; the
        last is left out, and added to the null key's logit instead, whose distance is 0. All times the root of a head's width,
        by which attention divides.
        """
        at = self.combine(places).unsqueeze(1)
        # Squared distances are differences of large numbers: never in half precision.
        at, root = at.to(torch.promote_types(at.dtype, torch.float32)), math.sqrt(self.head_width)
        return torch.stack([2 * root * at, torch.full_like(at, -root)], -2), root * at.square()

    def forward(self, tokens: Tensor, basis: tuple[Tensor, Tensor], key: Tensor, value: Tensor) -> Tensor:
        """Tokens (B, q, width) with their :meth:`basis`, keys and values of :meth:`keys_and_values`."""
        normed = self.norm_attention(tokens)
        heads, (of_rows, square) = self.num_heads, basis
        query = self.to_query(normed).unflatten(-1, (heads, self.head_width)).transpose(1, 2)
        log_sharpness = self.to_sharpness(normed).unflatten(-1, (heads, self.num_distances)).transpose(1, 2)
        sharpness = log_sharpness.clamp(max=MAX_LOG_SHARPNESS).to(square).exp()
        of_null = (sharpness * square).sum(-1, keepdim=True)
        query = torch.cat([query.to(square), (sharpness.unsqueeze(-2) * of_rows).flatten(-2), of_null], -1)
        with torch.autocast(query.device.type, enabled=False):
            attended = F.scaled_dot_product_attention(
                query, key.to(square), value.to(square), scale=self.head_width**-0.5
            )
        attended = attended.to(value)
        tokens = tokens + self.merge(attended[..., : self.head_width].transpose(1, 2).flatten(-2))
        return tokens + self.mlp(self.norm_mlp(tokens))
