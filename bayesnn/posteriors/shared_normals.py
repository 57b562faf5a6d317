"""What posteriors have in common whose draws are a fixed map of standard normals."""

from __future__ import annotations

import torch
from botorch.posteriors import Posterior
from botorch.sampling.get_sampler import GetSampler
from botorch.sampling.normal import NormalMCSampler, SobolQMCNormalSampler
from torch import Tensor


class SharedNormalPosterior(Posterior):
    """Posteriors that are a fixed map of standard normals: what BoTorch's normal samplers need to know of them."""

    _mean_like: Tensor

    @property
    def device(self) -> torch.device:
        return self._mean_like.device

    @property
    def dtype(self) -> torch.dtype:
        return self._mean_like.dtype

    @property
    def batch_shape(self) -> torch.Size:
        return self._mean_like.shape[:-2]

    @property
    def base_sample_shape(self) -> torch.Size:
        return self._mean_like.shape

    @property
    def batch_range(self) -> tuple[int, int]:
        return (0, -2)

    def _extended_shape(self, sample_shape: torch.Size = torch.Size()) -> torch.Size:  # noqa: B008
        return torch.Size(sample_shape) + self._mean_like.shape

    def rsample_from_base_samples(self, sample_shape: torch.Size, base_samples: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} doesn't say how base samples become function values")

    def rsample(self, sample_shape: torch.Size | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Random functions; as everywhere in BoTorch, without a generator torch's default one is used."""
        shape = torch.Size([1]) if sample_shape is None else torch.Size(sample_shape)
        # One set of normals for the whole t-batch: a draw is one function.
        per_function = (*shape, *(1 for _ in self.batch_shape), *self.base_sample_shape[-2:])
        normals = torch.randn(per_function, generator=generator, dtype=torch.float64)
        return self.rsample_from_base_samples(shape, normals.to(self._mean_like))


@GetSampler.register(SharedNormalPosterior)
def _normal_sampler(
    posterior: SharedNormalPosterior, sample_shape: torch.Size, *, seed: int | None = None
) -> NormalMCSampler:
    return SobolQMCNormalSampler(sample_shape=sample_shape, seed=0 if seed is None else seed)
