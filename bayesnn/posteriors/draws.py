"""Weighted draws of whole functions, and a sampler that never redraws them."""

from __future__ import annotations

from typing import Any

import torch
from botorch.posteriors import Posterior, PosteriorList
from botorch.sampling.base import MCSampler
from botorch.sampling.get_sampler import GetSampler
from botorch.sampling.list_sampler import ListSampler
from botorch.sampling.normal import IIDNormalSampler, SobolQMCNormalSampler
from torch import Tensor


class FunctionDraws(Posterior):
    r"""S draws of a function at q points, with optional log-weights: :math:`p(f) = \sum_s w_s \delta_{f_s}`.

    Draw ``s`` is one function: the same member for every point, every t-batch element and every later call.

    Args:
        values: (*batch, S, q, m).
        log_weights: (*batch, S) or (S,), unnormalised; None means equal weights. Where they have batch dimensions of
            their own (one set of weights for each fantasy), the functions are the same for all of them.

    Raises:
        ValueError: if the shapes don't fit.
    """

    def __init__(self, values: Tensor, log_weights: Tensor | None = None) -> None:
        if values.dim() < 3:
            raise ValueError(f"values must have shape (*batch, S, q, m), found {tuple(values.shape)}")
        if log_weights is not None and log_weights.shape[-1] != values.shape[-3]:
            raise ValueError(f"log_weights must end in S={values.shape[-3]}, found {tuple(log_weights.shape)}")
        if log_weights is not None:
            batch = torch.broadcast_shapes(values.shape[:-3], log_weights.shape[:-1])
            values = values.expand(*batch, *values.shape[-3:])
        self.values = values
        self.log_weights = None if log_weights is None else torch.log_softmax(log_weights, -1)

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def batch_shape(self) -> torch.Size:
        return self.values.shape[:-3]

    @property
    def num_draws(self) -> int:
        """How many functions."""
        return self.values.shape[-3]

    @property
    def base_sample_shape(self) -> torch.Size:
        return torch.Size([])

    @property
    def batch_range(self) -> tuple[int, int]:
        return (0, 0)

    def _extended_shape(self, sample_shape: torch.Size = torch.Size()) -> torch.Size:  # noqa: B008
        return torch.Size(sample_shape) + self.batch_shape + self.values.shape[-2:]

    @property
    def weights(self) -> Tensor:
        """Normalised weights, broadcastable against ``values``: (*batch, S, 1, 1)."""
        if self.log_weights is None:
            return self.values.new_full((self.num_draws, 1, 1), 1 / self.num_draws)
        return self.log_weights.exp()[..., None, None]

    @property
    def mean(self) -> Tensor:
        return (self.weights * self.values).sum(-3)

    @property
    def variance(self) -> Tensor:
        """Variance between the draws, (*batch, q, m): of the mixture of point masses, without Bessel's correction."""
        return (self.weights * (self.values - self.mean.unsqueeze(-3)).square()).sum(-3)

    def rsample_from_base_samples(self, sample_shape: torch.Size, base_samples: Tensor) -> Tensor:
        """Functions picked by uniforms of shape ``sample_shape``: (*sample_shape, *batch, q, m).

        Raises:
            ValueError: for base samples that aren't uniforms.
        """
        # In double precision: single would round the upper end of a draw's share up to the next draw.
        uniforms = base_samples.reshape(-1).to(self.device, torch.float64)
        if bool(((uniforms < 0) | (uniforms > 1)).any()):
            raise ValueError(
                "base samples must be uniforms, one for each function: use get_sampler(posterior, sample_shape)"
            )
        if self.log_weights is None:
            index = (uniforms * self.num_draws).long().clamp_max(self.num_draws - 1)
            picked = self.values.index_select(-3, index)
        else:
            cdf = self.log_weights.double().exp().cumsum(-1).expand(self.values.shape[:-2]).contiguous()
            index = torch.searchsorted(cdf, uniforms.expand(*cdf.shape[:-1], -1).contiguous())
            index = index.clamp_max(self.num_draws - 1)[..., None, None]
            picked = self.values.gather(-3, index.expand(*index.shape[:-2], *self.values.shape[-2:]))
        return picked.movedim(-3, 0).reshape(self._extended_shape(sample_shape))

    def rsample(self, sample_shape: torch.Size | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Functions picked at random; as everywhere in BoTorch, without a generator torch's default one is used."""
        shape = torch.Size([1]) if sample_shape is None else torch.Size(sample_shape)
        return self.rsample_from_base_samples(shape, torch.rand(shape, generator=generator, dtype=torch.float64))

    def affine(self, loc: Tensor, scale: Tensor) -> FunctionDraws:
        """The posterior of ``loc + scale * f``; loc and scale broadcast against (q, m)."""
        return FunctionDraws(loc + scale * self.values, self.log_weights)

    def outputs(self, indices: list[int]) -> FunctionDraws:
        """The posterior of some of the outputs."""
        return FunctionDraws(self.values[..., indices], self.log_weights)

    def transformed(self, transform: Any, X: Tensor) -> FunctionDraws:
        """The posterior of a BoTorch ``PosteriorTransform``'s value, applied to each draw: one output."""
        return FunctionDraws(transform.evaluate(self.values, X=X.unsqueeze(-3)).unsqueeze(-1), self.log_weights)


class FunctionSampler(MCSampler):
    """One stratified uniform per draw, shared by the whole t-batch and never redrawn."""

    base_samples: Tensor | None

    def forward(self, posterior: FunctionDraws) -> Tensor:  # type: ignore[override]
        """Draws of shape (*sample_shape, *batch, q, m)."""
        if self.base_samples is None:
            count = self.sample_shape.numel()
            generator = torch.Generator().manual_seed(self.seed)
            strata = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator).double()
            self.register_buffer("base_samples", (strata / count).reshape(self.sample_shape))
        assert self.base_samples is not None
        return posterior.rsample_from_base_samples(self.sample_shape, self.base_samples)

    def _update_base_samples(self, posterior: Posterior, base_sampler: MCSampler) -> None:
        self.base_samples = base_sampler.base_samples  # type: ignore[assignment]


@GetSampler.register(FunctionDraws)
def _function_sampler(
    posterior: FunctionDraws, sample_shape: torch.Size, *, seed: int | None = None
) -> FunctionSampler:
    # With as many samples as equally weighted draws, each is used exactly once: the expectation is exact.
    count = sample_shape.numel()
    if posterior.log_weights is None:
        count = min(count, posterior.num_draws)
    return FunctionSampler(sample_shape=torch.Size([count]), seed=0 if seed is None else seed)


_botorch_list_sampler = GetSampler.dispatch(PosteriorList)


@GetSampler.register(PosteriorList)
def _list_sampler(posterior: PosteriorList, sample_shape: torch.Size, *, seed: int | None = None) -> MCSampler:
    """For models side by side, some of them made of draws: BoTorch wants as many samples of each.

    Each gets an order of its own: draws of two models fitted with one seed resemble each other one by one, and must not
    be paired like that. A list without draws gets BoTorch's own sampler.
    """
    draws = [own for own in posterior.posteriors if isinstance(own, FunctionDraws)]
    if not draws:
        return _botorch_list_sampler(posterior, sample_shape=sample_shape, seed=seed)
    count, sizes = sample_shape.numel(), {own.num_draws for own in draws if own.log_weights is None}
    if len(sizes) == 1:  # each draw equally often
        size = min(sizes)
        all_draws = all(isinstance(own, FunctionDraws) and own.log_weights is None for own in posterior.posteriors)
        count = min(count, size) if all_draws else max(1, count // size) * size
    samplers: list[MCSampler] = []
    for index, own in enumerate(posterior.posteriors):
        kind = FunctionSampler if isinstance(own, FunctionDraws) else IIDNormalSampler
        samplers.append(kind(sample_shape=torch.Size([count]), seed=(0 if seed is None else seed) + index))
    return ListSampler(*samplers)


def function_draws(posterior: Posterior, num_draws: int, seed: int = 0) -> FunctionDraws:
    """Any posterior as function draws: quasi-random functions, the same for every t-batch element."""
    if isinstance(posterior, FunctionDraws):
        return posterior
    sampler = SobolQMCNormalSampler(sample_shape=torch.Size([num_draws]), seed=seed)
    return FunctionDraws(sampler(posterior).movedim(0, -3))


def transformed_draws(posterior: Posterior, transform: Any, X: Tensor, num_draws: int = 256) -> FunctionDraws:
    """A BoTorch ``PosteriorTransform`` of a posterior that isn't Gaussian: applied to 256 fixed quasi-random draws."""
    return function_draws(posterior, num_draws).transformed(transform, X)
