r"""L-BFGS as a pure function: quasi-Newton descent for smooth functions of a few hundred variables that cost much.

The state is made of tensors, so that an optimisation can be checkpointed and goes on as if nothing had happened.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bayesnn.inference.optimizer import Params

Objective = Callable[[Params], tuple[Tensor, Params]]

_SUFFICIENT = 1e-4  # share of the decrease that the slope promises, Nocedal and Wright's
_SLOPE = 0.9  # share of the slope that may be left, theirs too
_MAX_EVALUATIONS = 20  # of a line search


class LBFGSState(NamedTuple):
    """Where the descent is, and the last moves and changes of the gradient, the newest last.

    ``params``, ``gradient`` by name; ``value`` (); ``moves`` and ``changes`` (memory, P), zero where there is none yet;
    ``converged`` (), a truth value.
    """

    params: Params
    value: Tensor
    gradient: Params
    moves: Tensor
    changes: Tensor
    converged: Tensor


def lbfgs_init(params: Params, objective: Objective, memory: int = 10) -> LBFGSState:
    """The state before the first step.

    Args:
        params: where to start.
        objective: the function to minimise and its gradient; infinite or NaN where it isn't defined.
        memory: how many moves are remembered.

    Raises:
        ValueError: if the objective isn't finite at the start.
    """
    value, gradient = objective(params)
    flat = _flat(gradient)
    if not (bool(torch.isfinite(value)) and bool(torch.isfinite(flat).all())):
        raise ValueError(
            f"the objective must be finite at the start, found {float(value)} with gradient {flat.tolist()}"
        )
    empty = flat.new_zeros(memory, flat.numel())
    return LBFGSState(params, value, gradient, empty, empty, torch.tensor(False))


def lbfgs_step(state: LBFGSState, objective: Objective, tolerance: float = 1e-5, max_change: float = 2.0) -> LBFGSState:
    r"""One move along :math:`-H g`, with H from the two-loop recursion, to a point that satisfies the weak Wolfe conditions.

    These are found by bisection (Lewis & Overton 2013), which bears a function that is undefined at some points. At the end,
    where no entry of the gradient is larger than ``tolerance`` or no point along the line is better, the state stays as it is.

    Args:
        state: from :func:`lbfgs_init` or the step before.
        objective: as there.
        tolerance: of the gradient's entries.
        max_change: of a parameter in one trial.

    Source: Nocedal & Wright, Numerical Optimization (2006), algorithm 7.4.
    """
    gradient = _flat(state.gradient)
    if bool(state.converged) or float(gradient.abs().max()) <= tolerance:
        return state._replace(converged=torch.tensor(True))
    direction = -_times_inverse_hessian(gradient, state.moves, state.changes)
    slope = gradient @ direction
    if not bool(slope < 0):
        direction, slope = -gradient, -gradient @ gradient
    first = not bool(state.changes.any())
    largest = max_change / float(direction.abs().max())
    step = min(largest, 0.1 * largest if first else 1.0)
    low, high = 0.0, math.inf
    best: tuple[Tensor, Params, Params, Tensor] | None = None
    for _ in range(_MAX_EVALUATIONS):
        move = step * direction
        params = _moved(state.params, move)
        value, found = objective(params)
        new = _flat(found)
        finite = bool(torch.isfinite(value)) and bool(torch.isfinite(new).all())
        if not finite or bool(value > state.value + _SUFFICIENT * step * slope):
            high = step
        else:
            best = value, params, found, move
            if bool(new @ direction >= _SLOPE * slope) or step == largest:
                break
            low = step
        step = (low + high) / 2 if math.isfinite(high) else min(2 * step, largest)
    if best is None:
        if bool(state.changes.any()):  # once more, along the gradient
            empty = torch.zeros_like(state.moves)
            return lbfgs_step(state._replace(moves=empty, changes=empty), objective, tolerance, max_change)
        return state._replace(converged=torch.tensor(True))
    value, params, found, move = best
    change = _flat(found) - gradient
    moves, changes = state.moves, state.changes
    if float(change @ move) > 1e-12 * float(change.norm() * move.norm()):
        moves, changes = torch.cat([moves[1:], move[None]]), torch.cat([changes[1:], change[None]])
    converged = torch.tensor(float(state.value - value) <= 1e-8 * max(1.0, abs(float(value))))
    return LBFGSState(params, value, found, moves, changes, converged)


def _times_inverse_hessian(gradient: Tensor, moves: Tensor, changes: Tensor) -> Tensor:
    """The two-loop recursion over the pairs that aren't zero."""
    pairs = [(move, change, move @ change) for move, change in zip(moves, changes, strict=True) if bool(change.any())]
    weights = []
    for move, change, product in reversed(pairs):
        weight = move @ gradient / product
        gradient = gradient - weight * change
        weights.append(weight)
    if pairs:
        _, change, product = pairs[-1]
        gradient = gradient * product / (change @ change)
    for (move, change, product), weight in zip(pairs, reversed(weights), strict=True):
        gradient = gradient + move * (weight - change @ gradient / product)
    return gradient


def _flat(values: Params) -> Tensor:
    return torch.cat([value.detach().double().reshape(-1) for value in values.values()])


def _moved(params: Params, move: Tensor) -> Params:
    parts = move.split([value.numel() for value in params.values()])
    return {n: v + part.reshape(v.shape).to(v) for (n, v), part in zip(params.items(), parts, strict=True)}
