"""Kernels of a finite network as it stands: its tangent kernel, its last features' kernel, and its linearisation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bayesnn.inference.members import check_network, plain_attention

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)  # inputs for a network to look up
Parameters = dict[str, Tensor]
Method = Literal["jacobian", "products"]


def empirical_ntk(
    network: nn.Module,
    x1: Tensor,
    x2: Tensor | None = None,
    parameters: Parameters | None = None,
    trace: bool = True,
    method: Method | None = None,
    max_bytes: int = 2**29,
) -> Tensor:
    r"""The tangent kernel of a network at its present parameters (Jacot, Gabriel & Hongler 2018).

    .. math::
        \Theta(x, x')_{op} = \sum_k \frac{\partial f_o(x)}{\partial\theta_k} \frac{\partial f_p(x')}{\partial\theta_k}.

    Two ways to the same value (Novak, Sohl-Dickstein & Schoenholz 2022): contracting the Jacobians of both sets of inputs, or
    pushing the Jacobian of one set through the network's derivative at the other. The second is the cheaper one for all pairs
    of many outputs, unless weights are used many times (convolutions). By default the count of multiplications decides.
    Inputs are taken in blocks: their Jacobians, and what a backward pass keeps for them, stay within about ``max_bytes``
    unless a single derivative is larger. No gradient flows through the result.

    Args:
        network: from (n, *features) to (n,) or (n, *outputs), a function of each row by itself, in its present mode and with
            its present buffers.
        x1: (n, *features), of the parameters' dtype, or whole numbers that the network looks up.
        x2: (m, *features); the same as ``x1`` by default.
        parameters: values of the parameters that the kernel is of, by name: some or all of the network's. Those left out keep
            their values and don't count. Default: the network's own that require gradients.
        trace: the mean over outputs of the kernel of each, whose infinite-width limit is the NTK; False: all pairs of outputs.
        method: "jacobian" or "products"; None chooses.
        max_bytes: of working memory, beside the result and the network.

    Returns:
        (n, m); with ``trace=False`` (n, m, p, p), p the number of outputs of a row.

    Raises:
        ValueError: for an unknown method or parameter, wrong shapes, no parameters, or a network that draws random numbers or
            uses batch statistics in its present mode.
        TypeError: if inputs and parameters have different dtypes, and for whole numbers that the network can't take.
    """
    if method not in (None, "jacobian", "products"):
        raise ValueError(f"method: found {method!r}, want 'jacobian', 'products' or None.")
    if max_bytes < 1:
        raise ValueError(f"max_bytes: found {max_bytes}, want a positive number.")
    own = _check(network, x1, x2, parameters)
    symmetric, other = x2 is None, x1 if x2 is None else x2
    with torch.no_grad(), plain_attention:
        p, like = _num_outputs(network, own, x1), next(iter(own.values()))
        result = like.new_zeros((len(x1), len(other)) if trace else (len(x1), len(other), p, p))
        cost = _cost(network, own, x1[:1])
        size = _block_size(cost, p, max_bytes // like.element_size())
        first, second = _blocks(len(x1), p, *size), _blocks(len(other), p, *size)
        batched = _works(lambda: _jacobian(network, own, x1[:1], like.new_ones(1, p)))
        jacobian = _jacobian if batched else _jacobian_one_by_one
        if method is None:
            method = _cheaper(cost, len(x1), len(other), p, trace, len(second))
            unit = {name: value.unsqueeze(0) for name, value in own.items()}
            if method == "products" and not _works(lambda: _products(network, own, x1[:1], unit)):
                method = "jacobian"
        cotangents = torch.eye(p, dtype=like.dtype, device=like.device)
        left: Parameters = {}
        for index, block in enumerate(second):
            right = jacobian(network, own, other[block.rows], cotangents[block.outputs])
            if method == "products":
                _store_products(result, network, own, x1, block, right, trace)
                continue
            for number, partner in enumerate(first[: index + 1] if symmetric else first):
                if trace and partner.outputs != block.outputs:
                    continue
                if symmetric and number == index:
                    left = right
                elif symmetric or len(first) > 1 or not left:
                    left = jacobian(network, own, x1[partner.rows], cotangents[partner.outputs])
                _store_contraction(result, left, right, partner, block, trace, symmetric and number != index)
        return result / p if trace else result


def empirical_nngp(network: nn.Module, x1: Tensor, x2: Tensor | None = None, layer: str | None = None) -> Tensor:
    r"""Inner products of a network's last hidden features, over their number.

    .. math:: \hat\kappa(x, x') = \frac{1}{N} \sum_{i=1}^N h_i(x) h_i(x').

    Its infinite-width limit is the last hidden layer's E[phi(u) phi(v)]: times the readout's weight variance, plus its bias
    variance, it is the NNGP kernel (Lee et al. 2018).

    Args:
        network: from (n, *features) to outputs.
        x1: (n, *features).
        x2: (m, *features); the same as ``x1`` by default.
        layer: the name of the readout, whose inputs are the features; the last linear layer by default.

    Returns:
        (n, m).

    Raises:
        ValueError: if there is no such layer, or the network doesn't call it.
    """
    modules = dict(network.named_modules())
    if layer is None:
        layer = next((name for name, module in reversed(modules.items()) if isinstance(module, nn.Linear)), None)
    if layer not in modules:
        raise ValueError(f"layer: found {layer!r}, want the name of a layer of the network: the readout.")
    seen: list[Tensor] = []
    hook = modules[layer].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        with torch.no_grad():
            for X in (x1,) if x2 is None else (x1, x2):
                count = len(seen)
                network(X)
                if len(seen) != count + 1:
                    raise ValueError(f"layer: {layer!r} is called {len(seen) - count} times by the network, want once.")
    finally:
        hook.remove()
    first, second = seen[0].flatten(1), seen[-1].flatten(1)
    return first @ second.mT / first.shape[-1]


class LinearisedNetwork(nn.Module):
    r"""A network's first-order expansion in its parameters, which training by gradient flow follows at infinite width.

    .. math:: f(x; \theta) = f(x; \theta_0) + J(x) (\theta - \theta_0)

    (Lee et al. 2019, eq. 3). Its tangent kernel is the network's at :math:`\theta_0`, and stays so.

    It compiles. PyTorch's own transformer layers do in training mode; in evaluation mode only after
    ``torch.backends.mha.set_fastpath_enabled(False)``, since their fast path has no derivative.

    Args:
        network: expanded around its present parameters; it is copied.

    Attributes:
        network: holds :math:`\theta`, to be trained or sampled like any network's.
        centre: holds :math:`\theta_0`, frozen.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)
        self.centre = copy.deepcopy(network).requires_grad_(False)

    def forward(self, X: Tensor) -> Tensor:
        """f(X; theta), of the network's own output shape."""
        centre = dict(self.centre.named_parameters())
        moved = {name: value - centre[name] for name, value in self.network.named_parameters()}
        with sdpa_kernel(SDPBackend.MATH) if torch.compiler.is_compiling() else plain_attention:
            expansion: Any = jvp(lambda own: functional_call(self.centre, own, (X,)), (centre,), (moved,))
        return expansion[0] + expansion[1]


class _Cost(NamedTuple):
    """Of one row: what a forward pass multiplies (times two), and what a derivative of one output keeps."""

    flops: int
    num_parameters: int
    kept: int


class _Block(NamedTuple):
    rows: slice
    outputs: slice


def _check(network: nn.Module, x1: Tensor, x2: Tensor | None, parameters: Parameters | None) -> Parameters:
    check_network(network)
    known = dict(network.named_parameters())
    if parameters is None:
        parameters = {name: value for name, value in known.items() if value.requires_grad}
    for name, value in parameters.items():
        if name not in known:
            raise ValueError(f"parameters: the network has no {name!r}; it has {', '.join(known)}.")
        if value.shape != known[name].shape:
            raise ValueError(f"parameters: {name!r} has shape {tuple(value.shape)}, want {tuple(known[name].shape)}.")
        if x1.dtype not in INTEGERS and value.dtype != x1.dtype:
            raise TypeError(f"x1: found {x1.dtype}, but the parameter {name!r} is {value.dtype}: convert one of them.")
    if not parameters:
        raise ValueError("parameters: none to differentiate with respect to; the network's don't require gradients.")
    if x1.dim() < 1 or len(x1) == 0:
        raise ValueError(f"x1: found shape {tuple(x1.shape)}, want at least one row.")
    if x2 is not None and (x2.shape[1:] != x1.shape[1:] or x2.dim() != x1.dim() or len(x2) == 0):
        raise ValueError(f"x2: found shape {tuple(x2.shape)}, want rows like those of x1, {tuple(x1.shape)}.")
    if x2 is not None and x2.dtype != x1.dtype:
        raise TypeError(f"x2: found {x2.dtype}, want that of x1, {x1.dtype}.")
    return {name: value.detach() for name, value in parameters.items()}


def _num_outputs(network: nn.Module, own: Parameters, x1: Tensor) -> int:
    try:
        return functional_call(network, own, (x1[:1],)).numel()
    except RuntimeError as error:
        if x1.dtype in INTEGERS:
            raise TypeError(f"x1: found {x1.dtype}, which the network can't take: {error}") from error
        raise


def _cost(network: nn.Module, own: Parameters, row: Tensor) -> _Cost:
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    tracked = {name: value.clone().requires_grad_() for name, value in own.items()}
    keep = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
    with FlopCounterMode(display=False) as counter, torch.enable_grad(), keep:
        functional_call(network, tracked, (row,))
    return _Cost(counter.get_total_flops(), sum(value.numel() for value in own.values()), kept)


def _block_size(cost: _Cost, p: int, budget: int) -> tuple[int, int]:
    """Rows and outputs of a block such that two blocks' derivatives, twice over for temporaries, fit."""
    derivatives = max(1, budget // (4 * (cost.num_parameters + cost.kept)))
    outputs = min(p, derivatives)
    return max(1, derivatives // outputs), outputs


def _blocks(n: int, p: int, rows: int, outputs: int) -> list[_Block]:
    return [
        _Block(slice(i, min(i + rows, n)), slice(o, min(o + outputs, p)))
        for i in range(0, n, rows)
        for o in range(0, p, outputs)
    ]


def _cheaper(cost: _Cost, n: int, m: int, p: int, trace: bool, num_blocks: int) -> Method:
    pairs = n * m * p
    # A backward pass costs about two forward ones, a tangent as much beside the values that all tangents share.
    contraction = 2 * pairs * cost.num_parameters * (1 if trace else p) + 2 * cost.flops * p * (m + n * num_blocks)
    products = 2 * pairs * cost.flops + 2 * cost.flops * p * m
    return "products" if 0 < products < contraction else "jacobian"


def _works(attempt: Callable[[], object]) -> bool:
    """Whether torch.func has rules for all that the network does."""
    try:
        attempt()
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _jacobian(network: nn.Module, own: Parameters, rows: Tensor, cotangents: Tensor) -> Parameters:
    """Derivatives of k combinations (k, p) of the outputs at b rows: (b, k, …) for each parameter."""

    def of_row(row: Tensor) -> Parameters:
        pull: Any = vjp(lambda values: functional_call(network, values, (row.unsqueeze(0),)).reshape(-1), own)[1]
        return vmap(lambda cotangent: pull(cotangent)[0])(cotangents)

    return vmap(of_row)(rows)


def _jacobian_one_by_one(network: nn.Module, own: Parameters, rows: Tensor, cotangents: Tensor) -> Parameters:
    """The same for what vmap has no rule for."""
    tracked = {name: value.clone().requires_grad_() for name, value in own.items()}
    found: dict[str, list[Tensor]] = {name: [] for name in own}
    for row in rows.split(1):
        with torch.enable_grad():
            values = functional_call(network, tracked, (row,)).reshape(-1)
        for cotangent in cotangents:
            gradients = torch.autograd.grad(
                values, list(tracked.values()), cotangent, retain_graph=True, materialize_grads=True
            )
            for name, gradient in zip(own, gradients, strict=True):
                found[name].append(gradient)
    return {name: torch.stack(list_).unflatten(0, (len(rows), -1)) for name, list_ in found.items()}


def _products(network: nn.Module, own: Parameters, rows: Tensor, tangents: Parameters) -> Tensor:
    """Derivatives of all outputs at n rows along t directions: (t, n, p)."""

    def values(parameters: Parameters) -> Tensor:
        return vmap(lambda row: functional_call(network, parameters, (row.unsqueeze(0),)).reshape(-1))(rows)

    return vmap(lambda tangent: jvp(values, (own,), (tangent,))[1])(tangents)


def _store_products(
    result: Tensor, network: nn.Module, own: Parameters, x1: Tensor, block: _Block, right: Parameters, trace: bool
) -> None:
    outputs = range(block.outputs.start, block.outputs.stop)
    tangents = {name: value.flatten(0, 1) for name, value in right.items()}
    step = block.rows.stop - block.rows.start
    for start in range(0, len(x1), step):
        here = slice(start, min(start + step, len(x1)))
        found = _products(network, own, x1[here], tangents).unflatten(0, (step, len(outputs)))  # (m', k, n', p)
        if trace:
            same = torch.stack([found[:, index, :, output] for index, output in enumerate(outputs)])
            result[here, block.rows] += same.sum(0).mT
        else:
            result[here, block.rows, :, block.outputs] = found.permute(2, 0, 3, 1)


def _store_contraction(
    result: Tensor, left: Parameters, right: Parameters, here: _Block, there: _Block, trace: bool, mirror: bool
) -> None:
    n, k = next(iter(left.values())).shape[:2]
    m, q = next(iter(right.values())).shape[:2]
    # For a trace, the outputs are one more dimension to contract.
    shapes = ((n, -1), (m, -1)) if trace else ((n * k, -1), (m * q, -1))
    total = result.new_zeros(shapes[0][0], shapes[1][0])
    for name, own in left.items():
        total.addmm_(own.reshape(shapes[0]), right[name].reshape(shapes[1]).mT)
    if trace:
        result[here.rows, there.rows] += total
        if mirror:
            result[there.rows, here.rows] += total.mT
        return
    pairs = total.reshape(n, k, m, q).permute(0, 2, 1, 3)
    result[here.rows, there.rows, here.outputs, there.outputs] = pairs
    if mirror:
        result[there.rows, here.rows, there.outputs, here.outputs] = pairs.permute(1, 0, 3, 2)
