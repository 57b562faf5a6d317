import itertools
import math
from pathlib import Path

import pytest
import torch

import bayesnn.pretrained
from bayesnn import PFN
from bayesnn.configured import build, describe
from bayesnn.files import read_tensors, write_tensors
from bayesnn.histogram import prior_borders, refined_borders
from bayesnn.inference.amortized import MetaTraining
from bayesnn.inference.amortized.deep_set import DeepSetNetwork
from bayesnn.inference.amortized.recipes import Recipe
from bayesnn.inference.amortized.tasks import GridGPTasks
from bayesnn.inference.amortized.transformer import SetClassifier, SetTransformer
from bayesnn.inference.amortized.weights import load_network, load_pretrained, pretrained_names, save_network

BORDERS = prior_borders(torch.linspace(-3, 3, 100), 12).tolist()
MAKERS = {
    "transformer": lambda: SetTransformer(4, BORDERS, (1.0, 1.0), width=16, num_layers=3, num_heads=2, seed=0),
    "processes": lambda: SetTransformer(
        4, BORDERS, (1.0, 1.0), width=16, num_layers=3, num_heads=2, seed=0, num_processes=2
    ),
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
        assert output(network, *data).shape == (2, 5, 24)
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


@pytest.mark.parametrize("d", [4, 10])
def test_attention_with_distances_written_out(d):
    """Softmax over products less weighted squared distances, the null key at distance 0; of ten features, eight of them."""
    network = SetTransformer(d, BORDERS, (1.0, 1.0), width=16, num_layers=1, num_heads=2).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    layer = network.layers[0]
    context, places, tokens, at = (
        torch.randn(2, rows, width, generator=generator, dtype=torch.float64)
        for rows, width in ((5, 16), (5, d), (3, 16), (3, d))
    )
    key, value = layer.keys_and_values(context, places)
    normed = layer.norm_attention(tokens)
    query = layer.to_query(normed).unflatten(-1, (2, 8)).transpose(1, 2)
    sharpness = layer.to_sharpness(normed).unflatten(-1, (2, min(d, 8))).transpose(1, 2).exp()
    moved = layer.combine(at), layer.combine(places)
    logits = query @ key[..., :8].mT / 8**0.5
    logits[..., :5] -= (sharpness[..., None, :] * (moved[0][:, None, :, None] - moved[1][:, None, None]).square()).sum(
        -1
    )
    merged = tokens + layer.merge((logits.softmax(-1) @ value[..., :8]).transpose(1, 2).flatten(-2))
    torch.testing.assert_close(layer(tokens, layer.basis(at), key, value), merged + layer.mlp(layer.norm_mlp(merged)))


def test_half_precision(network, data):
    """Distances keep their digits, and so do the borders: answers are near those in full precision."""
    f, y = network(*data)
    half = network.to(torch.bfloat16)
    half_f, half_y = half(*(values.to(torch.bfloat16) for values in data))
    assert half_f.mean.dtype == (torch.float32 if isinstance(network, SetTransformer) else torch.bfloat16)
    for exact, found in ((f, half_f), (y, half_y)):
        assert float((found.mean.double() - exact.mean).abs().max()) < 0.1 * float(exact.stddev.max())
        assert float((found.stddev.double() / exact.stddev - 1).abs().max()) < 0.2


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
    assert card == {"name": "net", "sha256": card["sha256"]} and not again.training
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


def test_tampered_weights_and_cards_are_refused(tmp_path):
    path, network = tmp_path / "net.safetensors", MAKERS["deep_set"]()
    save_network(path, network, {"name": "net", "nll": 1.0})
    load_network(path)
    (tmp_path / "net.json").write_text((tmp_path / "net.json").read_text().replace("1.0", "0.5"))
    with pytest.raises(ValueError, match=r"net.json' isn't the card that was written"):
        load_network(path)
    (tmp_path / "net.json").unlink()
    tensors, description = read_tensors(path)
    next(iter(tensors.values())).view(-1)[0] += 1e-3
    write_tensors(path, tensors, description)
    with pytest.raises(ValueError, match="isn't as it was written, by its digest"):
        load_network(path)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("card", "max_context"), 10**6, "isn't as it was written, by its digest"),
        (("network", "arguments", "largest"), [1e9, 1e9], "isn't as it was written, by its digest"),
        (("network", "arguments", "largest"), ["a"], "describes no network of this version"),
        (
            ("network", "arguments", "borders"),
            [-9.0, -2.0, 0.0, 2.0, 9.0],
            "describes another network than its weights",
        ),
    ],
)
def test_tampered_descriptions_are_refused(place, value, message, tmp_path):
    path = tmp_path / "net.safetensors"
    network = SetTransformer(2, [-3.0, -1.0, 0.0, 1.0, 3.0], [1.0, 1.0], 16, 1, 2, largest=[2.0, 2.0])
    save_network(path, network, {"name": "net", "max_context": 10})
    (tmp_path / "net.json").unlink()
    tensors, description = read_tensors(path)
    part = description
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    write_tensors(path, tensors, description)
    with pytest.raises(ValueError, match=message):
        load_network(path)


def test_weights_of_another_shape_are_refused(tmp_path):
    network, other = DeepSetNetwork(4, width=16), DeepSetNetwork(4, width=8)
    write_tensors(tmp_path / "net.safetensors", other.state_dict(), {"network": describe(network), "card": {}})
    with pytest.raises(ValueError, match="other weights"):
        load_network(tmp_path / "net.safetensors")
    write_tensors(tmp_path / "net.safetensors", {}, {"something": 1})
    with pytest.raises(ValueError, match="no network"):
        load_network(tmp_path / "net.safetensors")


SHIPPED = {"pfn-regression": (10, 0.15), "pfn-bo": (8, 0.15), "pfn-gp-small": (2, 0.1), "cnp-gp-small": (10, 0.35)}


def test_what_ships_is_small():
    assert {*SHIPPED, "pfn-tabular-classification"} == set(pretrained_names())
    folder = Path(bayesnn.pretrained.__path__[0])
    assert sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) < 24e6


@pytest.mark.parametrize("name", SHIPPED)
def test_regression_networks_that_ship(name):
    """They answer, better than the prior, and their cards hold finite figures."""
    network, card = load_pretrained(name)
    max_features, largest_error = SHIPPED[name]
    assert card["name"] == name and card["max_features"] == max_features and card["steps_done"] > 0
    for row in card.get("held_out", {"by_context_size": {}})["by_context_size"].values():
        assert all(math.isfinite(value) for value in row.values())
    X = torch.linspace(-1.7, 1.7, 40)[:, None]
    with torch.no_grad():
        f, y = network(X, torch.sin(2 * X) / 0.7, X)
        nothing, _ = network(X[:0], X[:0], X)
    error = (f.mean - torch.sin(2 * X[:, 0]) / 0.7).square().mean().sqrt()
    # A deep set's summary has a fixed size: it doesn't interpolate as a transformer does.
    assert error < largest_error < 0.5 < nothing.stddev.min()
    assert bool((y.variance > 0).all())


@pytest.mark.parametrize("name", ["pfn-gp-small", "pfn-bo"])
def test_without_data_a_network_answers_with_its_prior(name):
    """The distribution function of y at no context, against that of 20,000 draws, at nine quantiles."""
    network, card = load_pretrained(name)
    recipe = build(card["recipe"])
    assert isinstance(recipe, Recipe)
    tasks = recipe.prior(5000, 4, torch.Generator().manual_seed(3))
    levels = torch.linspace(0.1, 0.9, 9)
    quantiles = tasks.y.flatten().float().quantile(levels)
    X = tasks.X[:2000, :1].float()
    with torch.no_grad():
        _, y = network(X[:, :0], X[:, :0, :1], X, tasks.num_features[:2000])
        found = torch.stack([y.cdf(value.expand(2000, 1)).mean() for value in quantiles])
    assert float((found - levels).abs().max()) < 0.02


def test_networks_that_ship_are_shared_and_never_changed():
    """Models of one name share a network; training goes on with a copy, and what a caller loads is the caller's own."""
    X, y = torch.linspace(-1, 1, 8)[:, None], torch.linspace(-1, 1, 8)[:, None].sin()
    first, second = PFN("gp-small").fit(X, y), PFN("gp-small").fit(X.double(), y.double())
    assert first._own is not second._own and PFN("gp-small").fit(X, y)._own is first._own
    first.to(torch.float64).requires_grad_(True)  # reaches nobody else
    with torch.no_grad():
        for parameter in PFN("gp-small").network.parameters():
            assert parameter.requires_grad
            parameter.zero_()
    first = PFN("gp-small").fit(X, y)
    assert not any(each.requires_grad for each in first._own.parameters())
    before = {name: value.clone() for name, value in first.network.state_dict().items()}
    expected = first.predict(X).mean
    second.meta_fit(GridGPTasks(max_features=2), MetaTraining(num_steps=1, max_context=4, num_queries=4))
    assert second.network is not first.network
    own, _ = load_pretrained("pfn-gp-small")
    assert all(each.requires_grad for each in own.parameters())
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.zero_()
    again = PFN("gp-small").fit(X, y)
    assert all(torch.equal(value, before[name]) for name, value in again.network.state_dict().items())
    assert torch.equal(again.predict(X).mean, expected) and again.predict(X).mean.dtype == torch.float32
    assert any(not torch.equal(value, before[name]) for name, value in second.network.state_dict().items())


def test_the_classifier_that_ships():
    """Three clusters in a plane: it knows the class of nearly all."""
    network, card = load_pretrained("pfn-tabular-classification")
    assert card["max_features"] == 20 and network.num_outputs == 5
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (120,), generator=generator)
    X = torch.tensor([[0.0, 1.5], [1.3, -0.7], [-1.3, -0.7]])[labels] + 0.4 * torch.randn(120, 2, generator=generator)
    with torch.no_grad():
        (classes,) = network(X[:60], labels[:60, None].float(), X[60:])
    assert float((classes.logits.argmax(-1) == labels[60:]).double().mean()) > 0.9
    assert float(classes.probs[:, 3:].sum(-1).mean()) < 0.1


def test_refined_histograms_keep_their_probabilities(data):
    """Splitting buckets changes neither density nor distribution function between the old tails, nor the tails' masses."""
    network = MAKERS["transformer"]().double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double())
    borders = refined_borders(network.borders, torch.linspace(-4, 4, 1000), 0.1)
    twin = network.refined(borders.tolist(), (0.5, 0.5))
    assert twin.num_buckets == len(borders) - 1 > 5 * network.num_buckets
    values = torch.linspace(float(network.borders[1]), float(network.borders[-2]), 301, dtype=torch.float64)[1:-1]
    for old, new in zip(network(*data), twin(*data), strict=True):
        at = values[:, None, None].expand(-1, 2, 5)
        torch.testing.assert_close(new.cdf(at), old.cdf(at), atol=1e-6, rtol=0)
        torch.testing.assert_close(new.log_prob(at + 1e-4), old.log_prob(at + 1e-4), atol=1e-5, rtol=0)
        beyond = torch.full((2, 5), float(network.borders[-2]) + 0.7).double()
        assert not torch.allclose(new.cdf(beyond), torch.ones(2, 5).double(), atol=1e-6)
    with pytest.raises(ValueError, match="borders must have the network's inner ones among them"):
        network.refined(torch.linspace(-3, 3, 40).tolist(), (0.5, 0.5))


@pytest.mark.parametrize("kind", ["transformer", "classifier"])
def test_more_layers_keep_the_answers(kind, data):
    """They are the identity at the start, and are trained with the others."""
    sizes = {"width": 16, "num_layers": 2, "num_heads": 2}
    network = SetClassifier(4, 2, **sizes) if kind == "classifier" else SetTransformer(4, BORDERS, (1.0, 1.0), **sizes)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    twin = network.deepened(2, seed=3)
    assert type(twin) is type(network) and len(twin.layers) == 4
    X, y, queries = (part.float() for part in data)
    y = (y > 0).float() if kind == "classifier" else y
    for old, new in zip(network(X, y, queries), twin(X, y, queries), strict=True):
        torch.testing.assert_close(new.logits, old.logits, atol=1e-6, rtol=0)
    twin(X, y, queries)[0].logits.square().sum().backward()
    assert all(bool((layer.merge.weight.grad != 0).any()) for layer in twin.layers)
    with pytest.raises(ValueError, match="num_layers must be"):
        network.deepened(0)
