"""Adam and Muon as pure functions, a learning-rate schedule and gradient clipping.

Parameters are ``dict[str, Tensor]``; Adam goes element by element, so that members, chains or particles stacked along a
leading dimension are updated exactly as each would be alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

Params = dict[str, Tensor]


class AdamState(NamedTuple):
    """Adam's memory: the steps taken (a scalar int64) and the running first and second moments of the gradient."""

    step: Tensor
    first: Params
    second: Params


def adam_init(params: Params) -> AdamState:
    """The state before the first step."""
    return AdamState(
        step=torch.zeros((), dtype=torch.int64),
        first={name: torch.zeros_like(value) for name, value in params.items()},
        second={name: torch.zeros_like(value) for name, value in params.items()},
    )


def adam_step(
    params: Params,
    grads: Params,
    state: AdamState,
    lr: float | Tensor,
    weight_decay: float = 0.0,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> tuple[Params, AdamState]:
    r"""One step of Adam that descends along ``grads``; nothing is changed in place.

    With :math:`m \leftarrow \beta_1 m + (1-\beta_1) g`, :math:`v \leftarrow \beta_2 v + (1-\beta_2) g^2` and the bias
    corrections :math:`\hat m = m/(1-\beta_1^t)`, :math:`\hat v = v/(1-\beta_2^t)`,

    .. math:: w \leftarrow w - \eta \lambda w - \eta\, \hat m / (\sqrt{\hat v} + \epsilon).

    The weight decay :math:`\lambda` is decoupled from the moments (AdamW).

    Args:
        params: the parameters.
        grads: gradients of the loss, under the same names.
        state: from :func:`adam_init` or the step before.
        lr: learning rate :math:`\eta`; a tensor broadcasts against every parameter.
        weight_decay: :math:`\lambda`.
        betas: decay rates of the two moments; the paper's.
        eps: :math:`\epsilon`; the paper's.

    Returns:
        The new parameters and the new state.

    Source: Kingma and Ba, Adam (ICLR 2015), algorithm 1; Loshchilov and Hutter, Decoupled weight decay (ICLR 2019).
    """
    step = state.step + 1
    count = int(step)
    first_correction, second_correction = 1 - betas[0] ** count, 1 - betas[1] ** count
    new_params, first, second = {}, {}, {}
    for name, value in params.items():
        grad = grads[name]
        first[name] = torch.lerp(state.first[name], grad, 1 - betas[0])
        second[name] = (state.second[name] * betas[1]).addcmul_(grad, grad, value=1 - betas[1])
        direction = first[name] / ((second[name] / second_correction).sqrt_().add_(eps))
        decayed = value - lr * weight_decay * value if weight_decay else value
        new_params[name] = decayed - lr / first_correction * direction
    return new_params, AdamState(step, first, second)


def muon_init(params: Params) -> Params:
    """The momentum before the first step."""
    return {name: torch.zeros_like(value) for name, value in params.items()}


def muon_step(
    params: Params, grads: Params, momentum: Params, lr: float, weight_decay: float = 0.0, *, beta: float = 0.95
) -> tuple[Params, Params]:
    r"""One step of Muon, for the weight matrices of hidden layers; nothing is changed in place.

    With :math:`M \leftarrow \beta M + (1 - \beta) G` and the singular value decomposition
    :math:`(1 - \beta) G + \beta M = U S V^\top`, nearly

    .. math:: W \leftarrow (1 - \eta \lambda) W - \eta \sqrt{\max(1, \text{rows} / \text{columns})}\; U V^\top.

    Every direction in a matrix is moved by the same amount, also those whose gradients are small. :math:`U V^\top` comes from
    five Newton-Schulz iterations, which bring the singular values to about 0.7 to 1.2.

    Args:
        params: matrices.
        grads: gradients of the loss, under the same names.
        momentum: from :func:`muon_init` or the step before.
        lr: :math:`\eta`.
        weight_decay: :math:`\lambda`, decoupled.
        beta: decay rate of the momentum; the author's.

    Returns:
        The new matrices and the new momentum.

    Source: Jordan et al., Muon: an optimizer for hidden layers in neural networks (2024); equal to ``torch.optim.Muon``,
    in the matrices' own precision instead of bfloat16.
    """
    momentum = {name: torch.lerp(momentum[name], grads[name], 1 - beta) for name in params}
    by_shape: dict[torch.Size, list[str]] = {}
    for name, value in params.items():
        by_shape.setdefault(value.shape, []).append(name)
    new = {}
    for (rows, columns), names in by_shape.items():
        directions = _orthogonalised(torch.stack([torch.lerp(grads[name], momentum[name], beta) for name in names]))
        for name, direction in zip(names, directions, strict=True):
            new[name] = (1 - lr * weight_decay) * params[name] - lr * max(1.0, rows / columns) ** 0.5 * direction
    return {name: new[name] for name in params}, momentum


def _orthogonalised(matrices: Tensor) -> Tensor:
    """Nearly U V^T of each of the matrices (*batch, rows, columns) U S V^T."""
    a, b, c = 3.4445, -4.7750, 2.0315  # Jordan's: steepest at 0, at the price of values only near 1
    tall = matrices.shape[-2] > matrices.shape[-1]
    X = matrices.mT if tall else matrices
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if tall else X


def clip_by_norm(grads: Params, max_norm: float) -> tuple[Params, Tensor]:
    """Scale all gradients by one factor so that their joint Euclidean norm is at most ``max_norm``.

    Returns:
        The clipped gradients, and the norm before clipping (a scalar).
    """
    norm = torch.stack([grad.square().sum() for grad in grads.values()]).sum().sqrt()
    factor = max_norm / norm.clamp_min(max_norm)
    return {name: grad * factor for name, grad in grads.items()}, norm


def warmup_cosine(step: int, num_steps: int, num_warmup: int) -> float:
    """Factor on the learning rate at ``step`` (from 0): linear up to 1 over the warm-up, then half a cosine to 0.

    The first step already has the factor ``1 / (num_warmup + 1)``, so that no step is wasted.
    """
    if step < num_warmup:
        return (step + 1) / (num_warmup + 1)
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
