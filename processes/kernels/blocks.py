"""Kernel matrices block by block: what is computed on the way stays in the cache, and is computed again for gradients.

A matrix takes the memory of its entries alone, forwards and backwards, however many layers made it; only small ones keep what
is computed on the way. Blocks are spread over threads, each on its own: a block's operations are too small to be worth
sharing. Where both inputs are the same, only the blocks on and above the diagonal are computed. Results don't depend on the
number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

BlockKernel = Callable[..., Tensor]
"""From x1 (*batch, n, ·), x2 (*batch, m, ·) and parameters to (*batch, n, m)."""

ENTRIES = 2**18  # of one block, over all batches: two megabytes in float64

Result = TypeVar("Result")


class Block(NamedTuple):
    """A part of a matrix."""

    rows: slice
    columns: slice


def blockwise(
    kernel: BlockKernel, x1: Tensor, x2: Tensor, *parameters: Tensor, entries: int = 1, diagonal: Tensor | None = None
) -> Tensor:
    """``kernel(x1, x2, *parameters)``, computed block by block; first-order gradients with respect to all tensors.

    Args:
        kernel: symmetric in its inputs. Tensors that it uses besides its arguments get no gradients.
        x1: (*batch, n, ·).
        x2: (*batch, m, ·). If it is ``x1`` itself, or both are equal and need no gradients, half of the matrix is computed.
        *parameters: with the batch dimensions that the kernel wants.
        entries: how many numbers the kernel keeps on the way for each entry of the matrix.
        diagonal: (*batch, n), what is put in the diagonal's place, and gets its gradients.
    """
    same = x1 is x2 or (x1.shape == x2.shape and not (x1.requires_grad or x2.requires_grad) and torch.equal(x1, x2))
    if x1.shape[:-1].numel() * x2.shape[-2] * entries <= ENTRIES // 8:
        # So small a matrix costs what its operations cost, not its entries: none is done twice.
        values = kernel(x1, x1 if same else x2, *parameters)
        return values if diagonal is None else _with_diagonal(values, diagonal)
    result: Tensor = _Blockwise.apply(kernel, entries, x1, None if same else x2, diagonal, *parameters)
    return result


def _with_diagonal(matrix: Tensor, diagonal: Tensor) -> Tensor:
    return matrix.diagonal_scatter(diagonal.expand(matrix.shape[:-1]), dim1=-2, dim2=-1)


def by_rows(function: Callable[[Tensor, Tensor], Tensor], x1: Tensor, x2: Tensor, entries: int) -> Tensor:
    """``function(x1, x2)`` (*batch, n) of pairs of rows, some rows at a time; computed again for gradients.

    Args:
        function: of x1 (*batch, n, ·) and x2 (*batch, n, ·).
        x1: (*batch, n, ·).
        x2: likewise.
        entries: how many numbers the function keeps on the way for each row.
    """
    num_rows = max(1, ENTRIES // (entries * max(1, x1.shape[:-2].numel())))
    if x1.shape[-2] <= num_rows:
        return function(x1, x2)
    pieces = zip(x1.split(num_rows, -2), x2.split(num_rows, -2), strict=True)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.cat([checkpoint(function, first, second, **options) for first, second in pieces], -1)


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernel: BlockKernel,
        entries: int,
        x1: Tensor,
        x2: Tensor | None,
        diagonal: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        second = x1 if x2 is None else x2
        ctx.kernel, ctx.entries, ctx.same = kernel, entries, x2 is None
        ctx.diagonal = None if diagonal is None else diagonal.shape
        ctx.save_for_backward(x1, second, *parameters)
        probe = kernel(x1[..., :0, :], second[..., :0, :], *parameters)  # the batch that broadcasting gives
        matrix = probe.new_empty(*probe.shape[:-2], x1.shape[-2], second.shape[-2])

        def fill(block: Block) -> None:
            with torch.no_grad():
                values = kernel(x1[..., block.rows, :], second[..., block.columns, :], *parameters)
            matrix[..., block.rows, block.columns] = values
            if ctx.same and block.rows != block.columns:
                matrix[..., block.columns, block.rows] = values.mT

        for _ in _spread(fill, _blocks(matrix, entries, ctx.same)):
            pass
        if diagonal is not None:
            matrix.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
        return matrix

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x1, x2, *parameters = ctx.saved_tensors
        needs1, needs2, needs_diagonal, *needs = ctx.needs_input_grad[2:]
        needs2 = needs2 or (ctx.same and needs1)

        def pull(block: Block) -> list[Tensor]:
            cotangent = grad[..., block.rows, block.columns]
            if ctx.same and block.rows != block.columns:
                cotangent = cotangent + grad[..., block.columns, block.rows].mT
            offset = block.rows.start - block.columns.start
            if ctx.diagonal is not None and -cotangent.shape[-2] < offset < cotangent.shape[-1]:
                cotangent = cotangent.clone()
                cotangent.diagonal(offset, -2, -1).zero_()
            left = x1[..., block.rows, :].detach().requires_grad_(needs1)
            right = x2[..., block.columns, :].detach().requires_grad_(needs2)
            leaves = [value.detach().requires_grad_(need) for value, need in zip(parameters, needs, strict=True)]
            with torch.enable_grad():
                values = ctx.kernel(left, right, *leaves)
            wanted = [leaf for leaf in (left, right, *leaves) if leaf.requires_grad]
            return list(torch.autograd.grad(values, wanted, cotangent, materialize_grads=True))

        grad1 = torch.zeros_like(x1) if needs1 else None
        grad2 = grad1 if ctx.same else torch.zeros_like(x2) if needs2 else None
        totals = [torch.zeros_like(value) if need else None for value, need in zip(parameters, needs, strict=True)]
        blocks = list(_blocks(grad, ctx.entries, ctx.same))
        for block, found in zip(blocks, _spread(pull, blocks), strict=True):
            pieces = iter(found)
            if grad1 is not None:
                grad1[..., block.rows, :] += next(pieces)
            if grad2 is not None:
                grad2[..., block.columns, :] += next(pieces)
            for total in totals:
                if total is not None:
                    total += next(pieces)
        of_diagonal = grad.diagonal(dim1=-2, dim2=-1).sum_to_size(ctx.diagonal) if needs_diagonal else None
        return None, None, grad1, None if ctx.same else grad2, of_diagonal, *totals


def _blocks(matrix: Tensor, entries: int, same: bool) -> Iterator[Block]:
    *batch, n, m = matrix.shape
    most = max(1, ENTRIES // (entries * max(1, torch.Size(batch).numel())))
    # Squares of the same, so that few blocks lie on the diagonal; long rows of others.
    height = int(most**0.5) if same else most // max(1, min(m, most // 32))
    rows = _even_parts(n, max(1, height))
    columns = rows if same else _even_parts(m, max(1, most // max(1, height)))
    for index, row in enumerate(rows):
        for column in columns[index:] if same else columns:
            yield Block(row, column)


def _even_parts(length: int, most: int) -> list[slice]:
    num = -(-length // most)
    ends = [length * index // num for index in range(num + 1)] if num else []
    return [slice(start, end) for start, end in pairwise(ends)]


def _spread(function: Callable[[Block], Result], blocks: Iterator[Block] | list[Block]) -> Iterator[Result]:
    """The results in the blocks' order, computed by as many threads as PyTorch uses."""
    blocks, num_threads = list(blocks), torch.get_num_threads()
    if num_threads == 1 or len(blocks) < 2 or torch.is_inference_mode_enabled():
        return map(function, blocks)
    return _threads(num_threads).map(function, blocks)


@cache
def _threads(num_threads: int) -> ThreadPoolExecutor:
    # The number of threads that a thread's own operations use is the thread's own setting.
    return ThreadPoolExecutor(num_threads, "bayesnn blocks", initializer=torch.set_num_threads, initargs=(1,))
