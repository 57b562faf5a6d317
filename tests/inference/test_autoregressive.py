"""Draws point after point, against closed forms and against encoding everything anew."""

from types import SimpleNamespace

import pytest
import torch
from botorch.acquisition.logei import qLogNoisyExpectedImprovement
from torch import nn
from torch.distributions import Normal

import bayesnn
from bayesnn import PFN, ConditionalNeuralProcess
from bayesnn.histogram import Histogram, prior_borders
from bayesnn.inference.amortized.autoregressive import Autoregressive
from bayesnn.inference.amortized.deep_set import DeepSetNetwork
from bayesnn.inference.amortized.transformer import SetTransformer

BORDERS = prior_borders(torch.linspace(-3, 3, 100), 30).tolist()


def random_network(kind, seed=1):
    network = {
        "transformer": lambda: SetTransformer(2, BORDERS, (1.0, 1.0), width=16, num_layers=3, num_heads=2),
        "processes": lambda: SetTransformer(
            2, BORDERS, (1.0, 1.0), width=16, num_layers=3, num_heads=2, num_processes=2
        ),
        "deep set": lambda: DeepSetNetwork(2, width=16),
    }[kind]().double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return network.eval()


def rows(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, k, generator=generator, dtype=torch.float64) for k in (2, 1))


class Constant(nn.Module):
    """The exact answer for f constant, f ~ N(0, 1), and noise of variance 1/4."""

    NOISE_VAR = 0.25

    def encode(self, X, y):
        return Total(y.sum((-1, -2)), X.shape[-2])

    def extend(self, cache, X, y):
        return Total(cache.total + y.sum((-1, -2)), cache.n + X.shape[-2])

    def query(self, cache, X):
        precision = 1 + cache.n / self.NOISE_VAR
        mean = (cache.total / self.NOISE_VAR / precision)[..., None].expand(X.shape[:-1])
        return torch.stack([mean, torch.full_like(mean, 1 / precision)], -1)

    def distributions(self, output):
        mean, variance = output.unbind(-1)
        return Normal(mean, variance.sqrt()), Normal(mean, (variance + self.NOISE_VAR).sqrt())


class Total(SimpleNamespace):
    def __init__(self, total, n):
        super().__init__(total=total, n=n)

    def expand(self, batch):
        return Total(self.total.expand(*batch), self.n)


@pytest.mark.parametrize("kind", ["transformer", "deep set"])
def test_an_empty_context_is_extended_to_the_whole(kind):
    network, (X, y), (at, _) = random_network(kind), rows(3, 5), rows(3, 4, seed=1)
    extended = network.extend(network.encode(X[:, :0], y[:, :0]), X, y)
    torch.testing.assert_close(network.query(extended, at), network.query(network.encode(X, y), at))


def test_a_deep_set_is_extended_exactly():
    network, (X, y), (at, _) = random_network("deep set"), rows(3, 5), rows(3, 4, seed=1)
    extended = network.extend(network.encode(X[:, :2], y[:, :2]), X[:, 2:], y[:, 2:])
    torch.testing.assert_close(network.query(extended, at), network.query(network.encode(X, y), at))


def test_a_transformer_s_context_does_not_see_what_it_is_extended_by():
    network, (X, y) = random_network("transformer"), rows(3, 5)
    before = network.encode(X[:, :2], y[:, :2])
    extended = network.extend(before, X[:, 2:], y[:, 2:])
    for one, two in zip(extended.keys, before.keys, strict=True):
        assert torch.equal(one[..., -3:, :], two)  # two rows and the null key, after three new ones
    whole = network.encode(X, y)
    assert torch.equal(extended.summary, whole.summary)
    torch.testing.assert_close(extended.keys[0][..., :3, :], whole.keys[0][..., 2:5, :])


@pytest.mark.parametrize("kind", ["transformer", "processes", "deep set"])
def test_the_joint_density_is_the_chain_rule(kind):
    network, (X, y), (at, values) = random_network(kind), rows(1, 5), rows(4, seed=1)
    posterior = Autoregressive(network, network.encode(X, y), at, of_observations=True)
    cache, expected = network.encode(X, y), 0.0
    for j in range(4):
        _, law = network.distributions(network.query(cache, at[None, j : j + 1]))
        expected = expected + law.log_prob(values[None, j, 0])
        cache = network.extend(cache, at[None, j : j + 1], values[None, j : j + 1])
    torch.testing.assert_close(posterior.log_prob(values), expected.squeeze())


def test_joint_density_of_a_conjugate_model():
    network, (X, y), (at, values) = Constant(), rows(1, 5), rows(3, seed=1)
    variance = 1 / (1 + 5 / 0.25)
    law = torch.distributions.MultivariateNormal(
        torch.full((3,), float(y.sum() / 0.25 * variance)).double(),
        variance * torch.ones(3, 3).double() + 0.25 * torch.eye(3).double(),
    )
    found = Autoregressive(network, network.encode(X, y), at, True).log_prob(values)
    torch.testing.assert_close(found, law.log_prob(values[:, 0]))


def test_draws_of_a_conjugate_model():
    """Moments of 20,000 joint draws of y, and of f at the first point."""
    network, (X, y), (at, _) = Constant(), rows(1, 2), rows(3, seed=1)
    variance = 1 / (1 + 2 / 0.25)
    mean = float(y.sum() / 0.25 * variance)
    cache, generator = network.encode(X, y), torch.Generator().manual_seed(0)
    draws = Autoregressive(network, cache, at, True).rsample(torch.Size([20_000]), generator)[..., 0]
    covariance = variance * torch.ones(3, 3).double() + 0.25 * torch.eye(3).double()
    z = (draws.mean(0) - mean) / (covariance.diagonal() / 20_000).sqrt()
    assert float(z.abs().max()) < 4
    error = (covariance.diagonal()[:, None] * covariance.diagonal() + covariance.square()) / 20_000
    assert float(((draws.T.cov() - covariance) / error.sqrt()).abs().max()) < 4.5
    functions = Autoregressive(network, cache, at, False).rsample(torch.Size([20_000]), generator)[..., 0]
    z = (functions.mean(0) - mean) / (variance / 20_000) ** 0.5
    assert float(z.abs().max()) < 4
    assert float((functions.var(0) / variance - 1).abs().max()) < 4 * (2 / 20_000) ** 0.5


@pytest.mark.parametrize("of_observations", [False, True])
@pytest.mark.parametrize("kind", ["transformer", "processes", "deep set"])
def test_draws_over_a_batch_are_those_of_its_parts(kind, of_observations):
    network, (X, y), (at, _) = random_network(kind), rows(2, 5), rows(3, 4, seed=1)
    cache = network.encode(X, y)  # two outputs, on inputs of their own
    normals = torch.randn(6, 1, 4, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    whole = Autoregressive(network, cache, at, of_observations).rsample_from_base_samples(torch.Size([6]), normals)
    assert whole.shape == (6, 3, 4, 2)
    for b in range(3):
        part = Autoregressive(network, cache, at[b], of_observations)
        torch.testing.assert_close(part.rsample_from_base_samples(torch.Size([6]), normals[:, 0]), whole[:, b])


def test_units_and_outputs():
    network, (X, y), (at, _) = random_network("transformer"), rows(2, 5), rows(4, seed=1)
    posterior = Autoregressive(network, network.encode(X, y), at, True)
    loc, scale = torch.tensor([[1.0, -2.0]]).double(), torch.tensor([[3.0, 0.5]]).double()
    moved, normals = posterior.affine(loc, scale), torch.randn(6, 4, 2).double()
    draws = posterior.rsample_from_base_samples(torch.Size([6]), normals)
    torch.testing.assert_close(moved.rsample_from_base_samples(torch.Size([6]), normals), loc + scale * draws)
    torch.testing.assert_close(moved.mean, loc + scale * posterior.mean)
    torch.testing.assert_close(moved.variance, scale.square() * posterior.variance)
    closed = moved.marginals
    assert isinstance(closed, Histogram)
    torch.testing.assert_close(closed.mean, moved.mean)
    second = moved.outputs([1])
    torch.testing.assert_close(second.marginals.mean, closed.mean[..., 1:])
    values = torch.randn(4, 2, dtype=torch.float64)
    expected = posterior.log_prob((values - loc) / scale) - 4 * scale.log().sum()
    torch.testing.assert_close(moved.log_prob(values), expected)
    with pytest.raises(ValueError, match="Y must have shape"):
        second.log_prob(values[..., 1:])
    assert second.base_sample_shape == (4, 1)
    found = second.rsample_from_base_samples(torch.Size([6]), normals[..., 1:])
    torch.testing.assert_close(found, (loc + scale * draws)[..., 1:])


@pytest.mark.parametrize(
    "make",
    [
        lambda: PFN(random_network("transformer").float(), joint="autoregressive"),
        lambda: ConditionalNeuralProcess(random_network("deep set").float(), joint="autoregressive"),
    ],
)
def test_models_draw_and_acquire(make, tmp_path):
    X, y = rows(8)
    model = make().fit(X, y)
    at = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert isinstance(model.posterior(at), Autoregressive)
    value = qLogNoisyExpectedImprovement(model, X, prune_baseline=False)(at)
    assert value.shape == (3,)
    (gradient,) = torch.autograd.grad(value.sum(), at)
    assert gradient.dtype == torch.float64 and bool(gradient.isfinite().all()) and float(gradient.abs().max()) > 0
    model.save(tmp_path / "model.safetensors")
    again = type(model).load(tmp_path / "model.safetensors")
    assert isinstance(again.posterior(at), Autoregressive)
    torch.testing.assert_close(again.posterior(at).mean, model.posterior(at).mean)


def test_bad_joint():
    with pytest.raises(ValueError, match="joint must be 'copula' or 'autoregressive', found 'both'"):
        PFN(random_network("transformer"), joint="both")


def test_more_points_than_the_network_was_trained_on_are_warned_of():
    X, y = rows(8)
    model = PFN(random_network("transformer").float(), joint="autoregressive", max_context=10).fit(X, y)
    posterior = model.posterior(torch.randn(4, 2, dtype=torch.float64))
    assert posterior.mean.shape == (4, 1)
    with pytest.warns(bayesnn.BayesnnWarning, match="X has 4 points to draw one after the other, .* trained on 3"):
        posterior.rsample(torch.Size([2]))


def test_how_many_rows_surrogates_see():
    for joint in ("copula", "autoregressive"):
        assert bayesnn.surrogate("pfn", joint=joint).max_context == 2000
    assert bayesnn.surrogate("pfn", network="regression").max_context == 400
    assert bayesnn.surrogate("pfn", neighbours=50).max_context == 100
