"""Kernels of finite networks against Jacobians taken one derivative at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bayesnn.processes.kernels import empirical
from bayesnn.processes.kernels.empirical import LinearisedNetwork, empirical_nngp, empirical_ntk


def rows(n: int, *features: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, *features, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def initialised(network: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return network.to(dtype)


def naive_ntk(network: nn.Module, x1: Tensor, x2: Tensor, names: list[str] | None = None) -> Tensor:
    """(n, m, p, p), one backward pass for each output of each row."""
    parameters = dict(network.named_parameters())
    chosen = [v for k, v in parameters.items() if (v.requires_grad if names is None else k in names)]

    def jacobian(X: Tensor) -> Tensor:
        derivatives = []
        for row in X.split(1):
            for value in network(row).reshape(-1):
                gradients = torch.autograd.grad(value, chosen, retain_graph=True, materialize_grads=True)
                derivatives.append(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        return torch.stack(derivatives).unflatten(0, (len(X), -1))

    return torch.einsum("nok,mpk->nmop", jacobian(x1), jacobian(x2))


class Tokens(nn.Module):
    """Attention between the three parts of a row; a parameter without dimensions and one that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.mix = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, X: Tensor) -> Tensor:
        tokens = self.mix(X.unflatten(-1, (3, 4)))
        return self.scale * self.mix(self.attention(tokens, tokens, tokens, need_weights=False)[0]).mean(-2)


class _Cube(torch.autograd.Function):
    """Of the old kind, for which torch.func has no rules."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


class Cube(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        return _Cube.apply(X)


def mlp(p: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, p))


NETWORKS = {
    "mlp": (mlp, (4,)),
    "one output, no dimension": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1), nn.Flatten(0)),
        (4,),
    ),
    "batch norm": (lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Linear(6, 2)), (4,)),
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 2)
        ),
        (2, 4, 4),
    ),
    "attention": (Tokens, (12,)),
    "beyond vmap": (lambda: nn.Sequential(nn.Linear(4, 6), Cube(), nn.Linear(6, 2)), (4,)),
    "several output dimensions": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Unflatten(1, (3, 2))), (4,)),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", [None, "jacobian", "products"])
def test_equals_naive_jacobians(name: str, method: empirical.Method | None) -> None:
    if name == "beyond vmap" and method == "products":
        pytest.skip("products need the rules that it lacks")
    make, features = NETWORKS[name]
    network = initialised(make()).eval()
    if name == "batch norm":
        network[1].running_mean, network[1].running_var = rows(6, seed=3), rows(6, seed=4).square()
    x1, x2 = rows(5, *features), rows(3, *features, seed=2)
    for second in (x2, None):
        exact = naive_ntk(network, x1, x1 if second is None else second)
        mean = exact.diagonal(dim1=-2, dim2=-1).mean(-1)
        for max_bytes in (2**29, 40_000, 1):  # all at once, in blocks of rows, one derivative at a time
            found = empirical_ntk(network, x1, second, trace=False, method=method, max_bytes=max_bytes)
            torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-11)
            found = empirical_ntk(network, x1, second, method=method, max_bytes=max_bytes)
            torch.testing.assert_close(found, mean, rtol=1e-11, atol=1e-11)


def test_blocks_cover_several_sizes() -> None:
    """The budgets above do give other blocks."""
    network, x = initialised(mlp()), rows(5, 4)
    own = dict(network.named_parameters())
    cost = empirical._cost(network, own, x[:1])
    assert cost.num_parameters == sum(value.numel() for value in own.values())
    assert cost.flops == 2 * (4 * 6 + 6 * 5 + 5 * 3)
    sizes = [empirical._block_size(cost, 3, max_bytes // 8) for max_bytes in (2**29, 40_000, 1)]
    assert sizes[0][0] > 1000 and 1 < sizes[1][0] < 5 and sizes[2] == (1, 1)


def test_choice_follows_the_cost() -> None:
    cost = empirical._Cost(flops=2000, num_parameters=1000, kept=0)
    assert empirical._cheaper(cost, 50, 50, 1, True, 1) == "jacobian"
    assert empirical._cheaper(cost, 50, 50, 20, False, 1) == "products"
    convolution = empirical._Cost(flops=200_000, num_parameters=1000, kept=0)
    assert empirical._cheaper(convolution, 50, 50, 20, False, 1) == "jacobian"


def test_some_parameters_only() -> None:
    network = initialised(mlp())
    x = rows(4, 4)
    values = {name: rows(*value.shape, seed=9) for name, value in network.named_parameters() if name.startswith("2.")}
    moved = initialised(mlp())
    moved.load_state_dict(network.state_dict() | values)
    exact = naive_ntk(moved, x, x, list(values))
    torch.testing.assert_close(empirical_ntk(network, x, parameters=values, trace=False), exact, rtol=1e-11, atol=1e-11)
    # The kernel is a sum over parameters; those that don't require gradients are constants.
    network[0].requires_grad_(False)
    exact = naive_ntk(network, x, x)
    torch.testing.assert_close(empirical_ntk(network, x, trace=False), exact, rtol=1e-11, atol=1e-11)
    everything = empirical_ntk(network, x, parameters=dict(network.named_parameters()))
    first = empirical_ntk(network, x, parameters=dict(network[0].named_parameters(prefix="0")))
    torch.testing.assert_close(first + empirical_ntk(network, x), everything, rtol=1e-11, atol=1e-11)


def test_single_precision_and_no_gradients() -> None:
    network, x = initialised(mlp(), torch.float32), rows(6, 4)
    found = empirical_ntk(network, x.float())
    assert found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found.double(), empirical_ntk(network.double(), x), rtol=1e-4, atol=1e-4)


def test_memory_is_bounded() -> None:
    """What is allocated at once stays near the budget, and far below n m p^2 P numbers."""
    network, x = initialised(nn.Sequential(nn.Linear(50, 200), nn.Tanh(), nn.Linear(200, 4))), rows(60, 50)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel() * result.element_size())
            return result

    with Watch():
        found = empirical_ntk(network, x, trace=False, max_bytes=2**22)
    assert largest < 2**22
    assert torch.allclose(found, empirical_ntk(network, x, trace=False), rtol=1e-10)


def test_last_features() -> None:
    network, x1, x2 = initialised(mlp()), rows(5, 4), rows(3, 4, seed=2)
    h1, h2 = network[:4](x1), network[:4](x2)
    torch.testing.assert_close(empirical_nngp(network, x1, x2), h1 @ h2.mT / 5)
    torch.testing.assert_close(empirical_nngp(network, x1), h1 @ h1.mT / 5)
    first = network[:2](x1)
    torch.testing.assert_close(empirical_nngp(network, x1, layer="2"), first @ first.mT / 6)
    with pytest.raises(ValueError, match="layer: found 'readout'"):
        empirical_nngp(network, x1, layer="readout")
    assert not network[4]._forward_pre_hooks


def test_linearised_network() -> None:
    network, x = initialised(mlp()), rows(5, 4)
    linearised = LinearisedNetwork(network)
    torch.testing.assert_close(linearised(x), network(x))
    before = empirical_ntk(network, x, trace=False)
    direction = {name: rows(*value.shape, seed=5) for name, value in network.named_parameters()}
    with torch.no_grad():
        for name, value in linearised.network.named_parameters():
            value += direction[name]
    # Affine in the parameters, with the network's own slope.
    step = 1e-6
    with torch.no_grad():
        for name, value in network.named_parameters():
            value += step * direction[name]
    difference = (network(x) - linearised.centre(x)) / step
    torch.testing.assert_close(linearised(x) - linearised.centre(x), difference, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(empirical_ntk(linearised, x, trace=False), before, rtol=1e-10, atol=1e-10)
    assert {name for name, value in linearised.named_parameters() if value.requires_grad} == {
        f"network.{name}" for name in direction
    }


def test_linearised_attention() -> None:
    """Fused kernels have no rule for tangents."""
    linearised = LinearisedNetwork(initialised(Tokens()))
    with torch.no_grad():
        linearised.network.scale += 1
    before = linearised.centre(rows(5, 12))  # the outputs are linear in the scale
    assert torch.allclose(linearised(rows(5, 12)), before * (1 + 1 / linearised.centre.scale))


@pytest.mark.parametrize(("network", "width"), [(mlp, 4), (Tokens, 12)])
def test_linearised_networks_compile(network: Callable[[], nn.Module], width: int) -> None:
    linearised = LinearisedNetwork(initialised(network()))
    compiled = torch.compile(linearised, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(rows(5, width)), linearised(rows(5, width)))


def test_rows_of_words() -> None:
    network = initialised(nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 2)))
    words = torch.randint(7, (5, 3), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(empirical_ntk(network, words, trace=False), naive_ntk(network, words, words))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"method": "fast"}, ValueError, "method: found 'fast'"),
        ({"max_bytes": 0}, ValueError, "max_bytes: found 0"),
        ({"x2": rows(3, 5)}, ValueError, r"x2: found shape \(3, 5\)"),
        ({"x2": rows(3, 4).float()}, TypeError, "x2: found torch.float32"),
        ({"x1": rows(3, 4).float()}, TypeError, "x1: found torch.float32"),
        ({"x1": rows(3, 4).long()}, TypeError, "x1: found torch.int64, which the network can't take"),
        ({"x1": rows(3, 4) > 0}, TypeError, "x1: found torch.bool, but the parameter"),
        ({"x1": rows(0, 4)}, ValueError, "at least one row"),
        ({"parameters": {"bias": torch.zeros(1)}}, ValueError, "the network has no 'bias'"),
        ({"parameters": {"0.bias": torch.zeros(1).double()}}, ValueError, r"'0.bias' has shape \(1,\)"),
        ({"parameters": {}}, ValueError, "none to differentiate"),
        ({"network": nn.Sequential(nn.Linear(4, 2), nn.Dropout())}, ValueError, "random numbers"),
    ],
)
def test_bad_input(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        empirical_ntk(**{"network": initialised(mlp()), "x1": rows(3, 4)} | change)
