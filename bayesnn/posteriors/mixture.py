"""Several posteriors in one: a function is one model's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from botorch.posteriors import Posterior
from torch import Tensor

from bayesnn.posteriors.draws import FunctionDraws, transformed_draws
from bayesnn.posteriors.shared_normals import SharedNormalPosterior


class Mixture(SharedNormalPosterior):
    r"""A mixture of joint posteriors of any kinds, :math:`p(f) = \sum_k w_k\, p_k(f)`.

    A draw is a function of one model, which is the same at all points, for all outputs and in all t-batch elements.

    Args:
        parts: posteriors of this library over the same points, of shape (*batch, q, m). Mixtures among them are dissolved.
        log_weights: (K,), unnormalised, finite.

    Raises:
        ValueError: if there isn't one finite weight for each part.
    """

    def __init__(self, parts: Sequence[Posterior], log_weights: Tensor) -> None:
        if log_weights.shape != (len(parts),) or not bool(torch.isfinite(log_weights).all()):
            raise ValueError(f"log_weights must be {len(parts)} finite numbers, one for each part, found {log_weights}")
        shares = log_weights.double().log_softmax(0)
        self.parts: list[Any] = []
        logs: list[Tensor] = []
        for part, log_weight in zip(parts, shares, strict=True):
            self.parts += part.parts if isinstance(part, Mixture) else [part]
            logs.append(log_weight + part.log_weights if isinstance(part, Mixture) else log_weight[None])
        self.log_weights: Tensor = torch.cat(logs)

    @property
    def _mean_like(self) -> Tensor:  # type: ignore[override]
        return self.mean

    @property
    def base_sample_shape(self) -> torch.Size:
        # Row 0 says which model's function it is, row 1 how wide, where a model's functions are of random width (or which one,
        # where there are finitely many). Both come first, so that a cached baseline keeps them when points follow.
        *batch, q, m = self.mean.shape
        return torch.Size([*batch, q + 2, m])

    @cached_property
    def mean(self) -> Tensor:
        return self._average([part.mean for part in self.parts])

    @cached_property
    def variance(self) -> Tensor:
        """Within and between the models, (*batch, q, m)."""
        return self._average([part.variance + (part.mean - self.mean).square() for part in self.parts])

    def _average(self, values: list[Tensor]) -> Tensor:
        weights = self.log_weights.exp().tolist()
        return sum(weight * value for weight, value in zip(weights, values, strict=True))

    def rsample_from_base_samples(self, sample_shape: torch.Size, base_samples: Tensor) -> Tensor:
        """Functions from normals of shape (*sample_shape, *batch, 2 + q, m): (*sample_shape, *batch, q, m)."""
        shape = torch.Size(sample_shape)
        normals = base_samples.to(self.mean).expand(*shape, *self.base_sample_shape)
        normals = normals.reshape(-1, *self.base_sample_shape)
        first = normals.flatten(1, -3)[:, 0, :2, 0] if self.batch_shape else normals[:, :2, 0]
        upper = self.log_weights.exp().cumsum(0)
        chosen = torch.searchsorted(upper, torch.special.ndtr(first[:, 0].double())).clamp_max(len(upper) - 1)
        values, order = [], []
        for index, part in enumerate(self.parts):
            rows = (chosen == index).nonzero().squeeze(-1)
            if len(rows):
                values.append(_draw(part, normals[rows], torch.special.ndtr(first[rows, 1].double())))
                order.append(rows)
        return torch.cat(values)[torch.cat(order).argsort()].reshape(*shape, *self.mean.shape)

    def affine(self, loc: Tensor, scale: Tensor) -> Mixture:
        """The posterior of ``loc + scale * f``; loc and scale are (1, m)."""
        return Mixture([part.affine(loc, scale) for part in self.parts], self.log_weights)

    def outputs(self, indices: list[int]) -> Mixture:
        """The posterior of some of the outputs."""
        return Mixture([part.outputs(indices) for part in self.parts], self.log_weights)

    def transformed(self, transform: Any, X: Tensor) -> FunctionDraws:
        """The posterior of a BoTorch ``PosteriorTransform``'s value, through draws."""
        return transformed_draws(self, transform, X)


def _draw(part: Any, normals: Tensor, uniforms: Tensor) -> Tensor:
    """S functions of one model, (S, *batch, q, m), from normals (S, *batch, 2 + q, m) and uniforms (S,)."""
    shape = normals.shape[:1]
    if isinstance(part, FunctionDraws):
        return part.rsample_from_base_samples(shape, uniforms)
    if len(part.base_sample_shape) < normals.dim() - 1:  # BoTorch's Gaussian of one output
        return part.rsample_from_base_samples(shape, normals[..., 2:, 0])
    # With a row more than points, where the width is random.
    return part.rsample_from_base_samples(shape, normals[..., -part.base_sample_shape[-2] :, :])
