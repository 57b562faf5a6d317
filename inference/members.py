"""One network with many sets of weights: its members, evaluated side by side."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from bayesnn.data import BayesnnWarning
from bayesnn.inference.process_wide import ProcessWide
from bayesnn.inference.target import Parameters

NETWORK = "network."
EVALUATION = "members_are_evaluated"
ONE_BY_ONE, PLAIN_ATTENTION = "one by one", "with plain attention"


def network_parameters(parameters: Parameters) -> Parameters:
    """The network's parameters by their short names."""
    return {name.removeprefix(NETWORK): v for name, v in parameters.items() if name.startswith(NETWORK)}


def apply_network(network: nn.Module, parameters: Parameters, X: Tensor, shared: Parameters | None = None) -> Tensor:
    """Every member's function values at the same points, (S, q, p).

    By vmap for any module; a module that has ``forward_members`` does it itself. One that :func:`check_members` has found
    to be beyond vmap is called for one member after another, one with fused attention does without that.

    Args:
        network: from (q, d) to (q, p).
        parameters: (S, …) each.
        X: (q, d).
        shared: parameters that all members have in common, without the leading dimension. What depends on nothing else (the
            features below a stochastic last layer, say) is computed once for all members.
    """
    batched: Callable[[Parameters, Tensor], Tensor] | None = getattr(network, "forward_members", None)
    if batched is not None and not shared:
        return batched(parameters, X)
    common = shared or {}

    def member(own: Parameters) -> Tensor:
        return functional_call(network, own | common, (X,))

    if getattr(network, EVALUATION, None) == ONE_BY_ONE:
        count = next(iter(parameters.values())).shape[0]
        return torch.stack([member({name: values[s] for name, values in parameters.items()}) for s in range(count)])
    with nullcontext() if torch.compiler.is_compiling() else backends(network):
        return vmap(member)(parameters)


@contextmanager
def _plain_attention() -> Iterator[None]:
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


plain_attention = ProcessWide(_plain_attention)


def backends(network: nn.Module | None) -> AbstractContextManager[None]:
    """Within it, PyTorch takes kernels that can evaluate the network's members; a compiled program is called within it too."""
    # The fused kernels of attention and of whole encoder layers have no rule for many weights, or no derivative there.
    return plain_attention if getattr(network, EVALUATION, None) == PLAIN_ATTENTION else nullcontext()


def check_network(network: nn.Module) -> None:
    """Refuse a network that isn't a function of its input and parameters alone.

    Raises:
        ValueError: naming the layer, if it uses batch statistics or random numbers in its present mode.
    """
    for name, module in network.named_modules():
        layer = f"layer {name!r} ({type(module).__name__})"
        batch_norm = isinstance(module, nn.modules.batchnorm._NormBase) and not _over_points(module)
        if batch_norm and (module.training or module.running_mean is None):
            raise ValueError(
                f"{layer} uses batch statistics, so that the likelihood of one point depends "
                "on the others and there is no posterior. Call network.eval() to use its running statistics, or use LayerNorm"
            )
        dropout = module.p if isinstance(module, nn.modules.dropout._DropoutNd) else 0.0
        if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
            dropout = module.dropout
        if module.training and dropout > 0:
            raise ValueError(
                f"{layer} draws random numbers, so that the density isn't a function of the "
                "parameters. Call network.eval(), or remove it"
            )


def _over_points(module: nn.Module) -> bool:
    """Whether a normalisation layer takes each point by itself."""
    return isinstance(module, nn.modules.instancenorm._InstanceNorm) and not module.track_running_stats


def check_members(network: nn.Module, parameters: Parameters, X: Tensor, shared: Parameters) -> None:
    """Check that a network can have members, and find out whether vmap can evaluate them.

    If vmap can't, or gives other values or gradients than one member after the other, the network is marked for
    :func:`apply_network`, and a warning says so.

    Args:
        network: from (q, d) to (q, p).
        parameters: two members, (2, …) each.
        X: a few rows.
        shared: as in :func:`apply_network`.

    Raises:
        ValueError: if the output depends on chance, on other rows or on earlier calls, or has no gradient; or the module's
            own ``forward_members`` gives something else than its ``forward``.
    """
    members = [{name: values[s] for name, values in parameters.items()} | shared for s in range(2)]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        before = [buffer.clone() for buffer in network.buffers()]
        first = torch.stack([functional_call(network, own, (X,)) for own in members])
        if any(not torch.equal(old, new) for old, new in zip(before, network.buffers(), strict=True)):
            raise ValueError(
                "network changes its buffers when it's called, so that its output depends on earlier calls: network.eval() "
                "may keep it from that"
            )
        torch.default_generator.manual_seed(1)
        second = torch.stack([functional_call(network, own, (X,)) for own in members])
        if not _close([second], [first]):
            raise ValueError(
                "network draws random numbers in its forward, so that the density isn't a function of the parameters. Call "
                "network.eval(), or remove them"
            )
        rows = [torch.cat([functional_call(network, own, (row,)) for row in X.split(1)]) for own in members]
        if not _close([torch.stack(rows)], [first]):
            raise ValueError(
                "network gives a row another output beside other rows than alone: it must depend on its own row only. "
                "Recurrent and attention layers take (n, d) for one sequence: unflatten the rows first"
            )
    # One by one is what all must agree with.
    own_way = getattr(network, "forward_members", None) is not None and not shared
    reference = _values_and_gradients(_one_by_one(network, shared), parameters, X)
    with warnings.catch_warnings():
        if not own_way:  # vmap warns when it falls back to a loop inside
            warnings.filterwarnings("error", message="There is a performance drop", category=UserWarning)
        reason = _mismatch(network, parameters, X, shared, reference)
    if not reason:
        return
    if own_way:
        raise ValueError(f"network.forward_members must give what forward gives for each member: {reason}")
    setattr(network, EVALUATION, PLAIN_ATTENTION)
    if reason := _mismatch(network, parameters, X, shared, reference):
        setattr(network, EVALUATION, ONE_BY_ONE)
        warnings.warn(
            "network is evaluated for one set of weights after another, which takes longer with many chains: vmap can't do it "
            f"({reason})",
            BayesnnWarning,
            stacklevel=4,
        )


def _mismatch(network: nn.Module, parameters: Parameters, X: Tensor, shared: Parameters, wanted: list[Tensor]) -> str:
    """Why the members aren't evaluated rightly; empty if they are."""
    try:
        with torch.no_grad():
            values = apply_network(network, parameters, X, shared)
        found = _values_and_gradients(lambda p, rows: apply_network(network, p, rows, shared), parameters, X)
    except (RuntimeError, UserWarning) as error:
        return str(error).splitlines()[0]
    same = _close([values, *found], [wanted[0], *wanted])
    return "" if same else "its values or gradients aren't those of one member after the other"


def _one_by_one(network: nn.Module, shared: Parameters) -> Callable[[Parameters, Tensor], Tensor]:
    def function(parameters: Parameters, X: Tensor) -> Tensor:
        members = [{name: values[s] for name, values in parameters.items()} | shared for s in range(2)]
        return torch.stack([functional_call(network, own, (X,)) for own in members])

    return function


def _values_and_gradients(
    function: Callable[[Parameters, Tensor], Tensor], parameters: Parameters, X: Tensor
) -> list[Tensor]:
    leaves = {name: values.detach().requires_grad_() for name, values in parameters.items()}
    with torch.enable_grad():
        values = function(leaves, X)
        if not values.requires_grad:
            raise ValueError("network's output has no gradient with respect to any of its parameters")
        # Not the plain sum: many layers' gradients vanish for that.
        gradients = torch.autograd.grad(values.square().sum(), list(leaves.values()), materialize_grads=True)
    return [values.detach(), *gradients]


def _close(found: list[Tensor], wanted: list[Tensor]) -> bool:
    """Equal up to the rounding of some layers, relative to the largest entry."""
    for ours, theirs in zip(found, wanted, strict=True):
        ours, theirs = ours.nan_to_num(), theirs.nan_to_num()
        if ours.numel() and (ours - theirs).abs().max() > ours.new_tensor(torch.finfo(ours.dtype).eps).sqrt() * (
            1 + theirs.abs().max()
        ):
            return False
    return True
