"""Draws of whole functions that stay the same from call to call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from botorch.posteriors import Posterior
from torch import Tensor

from bayesnn.posteriors import FunctionDraws, FunctionSampler

FunctionDraw = Callable[[Tensor], Tensor]


def function_draws_of(posterior_at: Callable[[Tensor], Posterior], num_draws: int, seed: int) -> FunctionDraw:
    """``num_draws`` functions: X (*batch, q, d) -> (num_draws, *batch, q, m), consistent over points and calls.

    Posteriors made of draws: each function is one of them. Others: the values at all points asked for so far are
    remembered and the next ones drawn jointly with them, so that the cost grows with the cube of that number.
    """
    remembered: list[Tensor] = []
    normals: list[Tensor] = []
    generator = torch.Generator().manual_seed(seed)
    sampler = FunctionSampler(torch.Size([num_draws]), seed=seed)

    def evaluate(X: Tensor) -> Tensor:
        rows = X.reshape(-1, X.shape[-1])
        first = posterior_at(X) if not remembered else None
        if isinstance(first, FunctionDraws):
            return sampler(first)
        points = torch.cat([*remembered, rows])
        posterior = posterior_at(points)
        # (q, m) normals; (q,) for BoTorch's Gaussian with one output; a Student-t's have one more row, the first one.
        rows_of_normals, *outputs = posterior.base_sample_shape
        shape = (num_draws, rows_of_normals - sum(block.shape[1] for block in normals), *outputs)
        normals.append(torch.randn(shape, generator=generator, dtype=torch.float64).to(rows))
        remembered.append(rows.detach())
        values = posterior.rsample_from_base_samples(torch.Size([num_draws]), torch.cat(normals, 1))
        return values[:, -rows.shape[0] :].unflatten(1, X.shape[:-1])

    return evaluate
