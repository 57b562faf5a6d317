import itertools
import math

import pytest
import torch

from bayesnn.configured import build, describe
from bayesnn.files import write_tensors
from bayesnn.histogram import prior_borders
from bayesnn.inference.amortized.deep_set import DeepSetNetwork
from bayesnn.inference.amortized.transformer import SetTransformer
from bayesnn.inference.amortized.weights import load_network, load_pretrained, pretrained_names, save_network

BORDERS = prior_borders(torch.linspace(-3, 3, 100), 12).tolist()
MAKERS = {
    "transformer": lambda: SetTransformer(4, BORDERS, (1.0, 1.0), width=16, num_layers=3, num_heads=2, seed=0),
    "deep_set": lambda: DeepSetNetwork(4, width=16, seed=0),
}


@pytest.fixture(params=MAKERS)
def network(request):
    """With all weights random: at the start the residual branches are zero and would hide faults."""
    network = MAKERS[request.param]().double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return network.eval()


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(2)
    return tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 7, 3), (2, 7, 1), (2, 5, 3))
    )


def output(network, context_X, context_y, X, num_features=None):
    return network.query(network.encode(context_X, context_y, num_features), X)


def test_shapes(network, data):
    f, y = network(*data)
    assert f.batch_shape == y.batch_shape == (2, 5)
    assert f.mean.shape == (2, 5) and f.mean.dtype == torch.float64
    if isinstance(network, SetTransformer):
        assert output(network, *data).shape == (2, 5, 2, 12)
    else:
        assert output(network, *data).shape == (2, 5, 3)
        assert bool((y.variance > f.variance).all())


def test_context_order_does_not_matter(network, data):
    context_X, context_y, X = data
    order = torch.randperm(7, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(output(network, context_X[:, order], context_y[:, order], X), output(network, *data))


def test_context_matters(network, data):
    context_X, context_y, X = data
    plain = output(network, *data)
    assert not torch.allclose(output(network, context_X, context_y + 0.5, X), plain, atol=1e-3)
    assert not torch.allclose(output(network, context_X[:, :-1], context_y[:, :-1], X), plain, atol=1e-4)


def test_queries_do_not_see_each_other(network, data):
    context_X, context_y, X = data
    moved = X.clone()
    moved[:, 0] += 3.0
    plain, changed = output(network, *data), output(network, context_X, context_y, moved)
    assert torch.equal(plain[:, 1:], changed[:, 1:])
    assert not torch.allclose(plain[:, 0], changed[:, 0], atol=1e-3)
    torch.testing.assert_close(output(network, context_X, context_y, X[:, 2:3]), plain[:, 2:3])


@pytest.mark.parametrize("n", [0, 1])
def test_small_contexts(network, data, n):
    context_X, context_y, X = data
    f, y = network(context_X[:, :n], context_y[:, :n], X)
    assert bool(f.mean.isfinite().all()) and bool(y.log_prob(torch.zeros(2, 5, dtype=torch.float64)).isfinite().all())
    alone, _ = network(context_X[0, :n], context_y[0, :n], X[0])
    torch.testing.assert_close(alone.mean, f.mean[0])


def test_padding_with_unused_features_changes_nothing(network, data):
    context_X, context_y, X = data
    padded = [torch.nn.functional.pad(inputs, (0, 1)) for inputs in (context_X, X)]
    found = output(network, padded[0], context_y, padded[1], torch.tensor([3, 3]))
    torch.testing.assert_close(found, output(network, *data))
    mixed = output(network, padded[0], context_y, padded[1], torch.tensor([3, 4]))
    torch.testing.assert_close(mixed[0], found[0])
    assert not torch.allclose(mixed[1], found[1], atol=1e-3)


def test_extra_query_dimensions(network, data):
    """One encoded context answers any batch of queries as if each were asked by itself."""
    context_X, context_y, _ = data
    generator = torch.Generator().manual_seed(4)
    X = torch.randn(3, 2, 5, 3, generator=generator, dtype=torch.float64)
    cache = network.encode(context_X, context_y)
    found = network.query(cache, X)
    for i in range(3):
        torch.testing.assert_close(found[i], network.query(cache, X[i]))
    torch.testing.assert_close(
        network.query(cache, X[:, :1])[:, 1], network.query(cache, X[:, :1].expand(3, 2, 5, 3))[:, 1]
    )
    single = network.encode(context_X[0], context_y[0])
    found = network.query(single, X)
    for i, j in itertools.product(range(3), range(2)):
        torch.testing.assert_close(found[i, j], output(network, context_X[0], context_y[0], X[i, j]))


def test_gradient_in_the_query_by_finite_differences(network, data):
    context_X, context_y, X = data
    cache = network.encode(context_X, context_y)
    X = X[:, :1].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda X: network.distributions(network.query(cache, X))[0].mean, (X,), fast_mode=True
    )


def test_float32_agrees(network, data):
    double = output(network, *data)
    single = output(network.float(), *(values.float() for values in data))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("maker", MAKERS)
def test_description_and_seed_build_the_same_network(maker):
    network = MAKERS[maker]()
    again = build(describe(network))
    for one, two in zip(network.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, two)


def test_transformer_starts_with_identity_blocks(data):
    network = MAKERS["transformer"]().double()
    context_X, context_y, X = data
    torch.testing.assert_close(output(network, context_X, context_y, X), output(network, context_X, -context_y, X))


def test_heads_must_divide_width():
    with pytest.raises(ValueError, match="num_heads"):
        SetTransformer(4, BORDERS, (1.0, 1.0), width=10, num_heads=4)


def test_save_and_load(network, data, tmp_path):
    network = network.float()
    data = [values.float() for values in data]
    save_network(tmp_path / "net.safetensors", network, {"name": "net"})
    again, card = load_network(tmp_path / "net.safetensors")
    assert card == {"name": "net"} and not again.training
    assert torch.equal(output(again, *data), output(network, *data))
    assert (tmp_path / "net.json").read_text().startswith("{")


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        load_network(tmp_path / "nothing.safetensors")
    save_network(tmp_path / "net.safetensors", MAKERS["deep_set"](), {})
    whole = (tmp_path / "net.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a complete"):
        load_network(tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="name must be one of"):
        load_pretrained("no-such-network")


def test_weights_of_another_shape_are_refused(tmp_path):
    network, other = DeepSetNetwork(4, width=16), DeepSetNetwork(4, width=8)
    write_tensors(tmp_path / "net.safetensors", other.state_dict(), {"network": describe(network), "card": {}})
    with pytest.raises(ValueError, match="other weights"):
        load_network(tmp_path / "net.safetensors")
    write_tensors(tmp_path / "net.safetensors", {}, {"something": 1})
    with pytest.raises(ValueError, match="no network"):
        load_network(tmp_path / "net.safetensors")


@pytest.mark.parametrize("name, largest_error", [("pfn-gp-small", 0.1), ("cnp-gp-small", 0.35)])
def test_networks_that_ship(name, largest_error):
    """They answer, better than the prior, at every trained size, and their cards hold finite figures."""
    assert name in pretrained_names()
    network, card = load_pretrained(name)
    assert card["name"] == name and card["max_features"] == 10
    for row in card["held_out"]["by_context_size"].values():
        assert all(math.isfinite(value) for value in row.values())
    X = torch.linspace(-1.7, 1.7, 40)[:, None]
    with torch.no_grad():
        f, y = network(X, torch.sin(2 * X) / 0.7, X)
        nothing, _ = network(X[:0], X[:0], X)
    error = (f.mean - torch.sin(2 * X[:, 0]) / 0.7).square().mean().sqrt()
    # A deep set's summary has a fixed size: it doesn't interpolate as a transformer does.
    assert error < largest_error < 0.7 < nothing.stddev.min()
    assert bool((y.variance > 0).all())
