import math

import pytest
import torch
from oracles import LinearGaussian, gauss_hermite, with_intercept, z_score
from torch import nn
from torch.distributions import Normal, kl_divergence

from bayesnn import likelihoods, networks, priors
from bayesnn.data import Data
from bayesnn.inference import MeanField, NetworkTarget, run
from bayesnn.inference.vi.mean_field import _divergence, _noisy_outputs, _sample, local_layers
from bayesnn.networks import mlp


def linear_model(temperature=1.0, n=24, d=2, noise_std=0.6, network=None, y_of=None):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(n, d, generator=generator, dtype=torch.float64)
    X[:, 1] = X[:, 1] + 1.2 * X[:, 0]  # correlated, so that the mean field is narrower than the posterior
    y = X.sum(-1) + 0.4 + noise_std * torch.randn(n, generator=generator, dtype=torch.float64)
    prior_std = torch.tensor([1.0 / math.sqrt(d)] * d + [0.8], dtype=torch.float64)
    oracle = LinearGaussian(with_intercept(X), y, noise_std, prior_std, temperature)
    target = NetworkTarget(
        mlp(d, 1, hidden=()) if network is None else network,
        likelihoods.Gaussian(noise_std=noise_std),
        priors.Normal(scale=1.0, bias_scale=0.8),
        Data(X, y[:, None]),
        torch.ones(1, 1, dtype=torch.float64),
        temperature,
    )
    return target, oracle


class WeightsAndBias(nn.Module):
    """The same linear model out of other tensors, none of which is an nn.Linear."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.zeros(1, 1))
        self.second = nn.Parameter(torch.zeros(1, 1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, X):
        return X[..., :1] @ self.first + X[..., 1:] @ self.second + self.bias


def fitted(target, method, seed=0):
    """Flat means and standard deviations of the fitted q."""
    last = {}
    posterior = run(method, target, seed=seed, callbacks=[lambda index, state, info: last.update(state.variational)])
    names = [name.removeprefix("mean.") for name in last if name.startswith("mean.")]
    means = torch.cat([last[f"mean.{name}"].flatten() for name in names])
    stds = torch.cat([last[f"log_std.{name}"].exp().flatten() for name in names])
    return means, stds, posterior


@pytest.mark.parametrize(("batch_size", "temperature"), [(None, 1.0), (8, 1.0), (5, 1.0), (None, 0.2), (8, 0.2)])
def test_optimum_is_the_closed_form_mean_field_posterior(batch_size, temperature):
    target, oracle = linear_model(temperature)
    method = MeanField(num_steps=1500, learning_rate=0.02, batch_size=batch_size, num_samples=16)
    means, stds, posterior = fitted(target, method)
    std = oracle.mean_field_var.sqrt()
    torch.testing.assert_close(stds, std, rtol=0.03 if batch_size is None else 0.06, atol=0)
    assert ((means - oracle.mean) / std).abs().max() < (0.05 if batch_size is None else 0.5)
    draws = torch.cat([v.flatten(1) for v in posterior.parameters.values()], 1)
    assert z_score(draws, means).abs().max() < 4
    assert z_score((draws - means).square(), stds.square()).abs().max() < 4


def test_the_bound_at_the_optimum():
    _, oracle = linear_model()
    best = oracle.elbo(oracle.mean, oracle.mean_field_var.sqrt())
    precision = oracle.precision
    gap = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    torch.testing.assert_close(best, oracle.log_evidence - gap)


def test_optimum_does_not_depend_on_how_parameters_are_split():
    target, oracle = linear_model(network=WeightsAndBias())
    prior = priors.PerLayer({"first": priors.Normal(scale=1 / math.sqrt(2)), "second": priors.Normal(scale=1 / math.sqrt(2))},
                            default=priors.Normal(bias_scale=0.8))  # fmt: skip
    target = NetworkTarget(WeightsAndBias(), target.likelihood, prior, target.data, torch.ones(1, 1).double())
    # Its weights are drawn, once for each step: a noisier gradient.
    means, stds, _ = fitted(target, MeanField(num_steps=1500, learning_rate=0.02))
    std = oracle.mean_field_var.sqrt()
    torch.testing.assert_close(stds, std, rtol=0.1, atol=0)
    assert ((means - oracle.mean) / std).abs().max() < 0.25


@pytest.mark.parametrize("network", ["local", "drawn"])
@pytest.mark.parametrize("batch_size", [None, 6])
@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_elbo_estimate_is_unbiased(network, batch_size, temperature):
    """The first step's estimate at random starting points, against the closed form."""
    network = None if network == "local" else WeightsAndBias()
    target, oracle = linear_model(temperature, network=network)
    if network is not None:
        oracle = LinearGaussian(oracle.X, oracle.y, oracle.noise_std, torch.tensor([1.0, 1.0, 0.8]).double())
    method = MeanField(batch_size=batch_size, num_samples=3, initial_std=0.4)
    differences = []
    for seed in range(400):
        generator = torch.Generator().manual_seed(seed)
        state = method.init(target, generator)
        means, log_stds = (
            {n: v for n, v in state.variational.items() if n.startswith(k)} for k in ("mean.", "log_std.")
        )
        mean = torch.cat([v.flatten() for v in means.values()])
        log_std = torch.cat([v.flatten() for v in log_stds.values()])
        _, info = method.step(target, state, generator)
        # (E log joint) / T + entropy
        entropy = (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()
        exact = (oracle.elbo(mean, log_std.exp()) - entropy) / temperature + entropy
        differences.append((info.elbo - exact).reshape(1))
    assert z_score(torch.stack(differences), 0.0).abs() < 4


def variational(target, std, seed=0):
    generator = torch.Generator().manual_seed(seed)
    means = {name: v[0] for name, v in target.initial(1, generator).items()}
    return means, {name: torch.full_like(v, math.log(std)) + 0.3 * torch.randn(v.shape) for name, v in means.items()}


def test_kl_equals_torch():
    target = NetworkTarget(
        nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 1)),
        likelihoods.Gaussian(),
        priors.Normal(scale=0.7, bias_scale=0.2),
        linear_model()[0].data,
        torch.ones(1, 1),
    )
    means, log_stds = variational(target, 0.1)
    expected = 0.0
    for name, mean in means.items():
        loc, scale = {
            "network.0.weight": (0.0, 0.7 / math.sqrt(2)),
            "network.2.weight": (0.0, 0.7 / 2),
            "network.1.weight": (1.0, 0.2),
            "likelihood.log_noise_std": (math.log(0.3), 1.5),
        }.get(name, (0.0, 0.2))
        expected = expected + kl_divergence(Normal(mean, log_stds[name].exp()), Normal(loc, scale)).sum()
    torch.testing.assert_close(_divergence(target, means, log_stds, {}), expected)


@pytest.mark.parametrize("prior", [priors.Laplace(scale=0.7), priors.StudentT(scale=0.7), priors.Horseshoe(scale=0.7)])
def test_kl_to_other_priors_is_unbiased(prior):
    """One weight: E_q log p by quadrature."""
    data = Data(torch.ones(3, 1).double(), torch.ones(3, 1).double())
    likelihood = likelihoods.Gaussian(noise_std=1.0)
    target = NetworkTarget(nn.Linear(1, 1, bias=False), likelihood, prior, data, torch.ones(1, 1))
    means = {"network.weight": torch.tensor([[0.9]]).double()}
    log_stds = {"network.weight": torch.tensor([[-1.5]]).double()}
    estimates = []
    for seed in range(300):
        sampled = _sample(means, log_stds, 8, torch.Generator().manual_seed(seed))
        estimates.append(_divergence(target, means, log_stds, sampled).reshape(1))
    std = math.exp(-1.5)
    expected = gauss_hermite(lambda z: -prior.log_prob("weight", (0.9 + std * z).reshape(-1, 1, 1)))
    expected = expected - math.log(std) - 0.5 * math.log(2 * math.pi * math.e)
    assert z_score(torch.stack(estimates), expected).abs() < 4


@pytest.mark.parametrize("bias", [True, False])
def test_local_reparameterisation_has_the_outputs_exact_mean_and_variance(bias):
    generator = torch.Generator().manual_seed(0)
    network = nn.Linear(3, 2, bias=bias).double()
    X = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    log_stds = {
        "network." + name: torch.randn(p.shape, generator=generator).double() for name, p in network.named_parameters()
    }
    (layer,) = local_layers(network, X[:1])
    with _noisy_outputs(network, [layer], log_stds, generator), torch.no_grad():
        outputs = network(X.repeat(20_000, 1)).unflatten(0, (-1, 4))
    variances = {name: (2 * v).exp() for name, v in log_stds.items()}
    var = X.square() @ variances["network.weight"].mT + (variances["network.bias"] if bias else 0.0)
    mean = network(X).detach()
    assert z_score(outputs, mean).abs().max() < 4
    assert z_score((outputs - mean).square(), var).abs().max() < 4
    # A draw of its own for every row: no correlation between rows or outputs.
    first, second = (outputs[:, i, j] - mean[i, j] for i, j in ((0, 0), (1, 0)))
    assert z_score((first * second)[:, None], 0.0).abs() < 4
    with torch.no_grad():
        assert torch.equal(network(X), mean)  # the hooks are gone


def test_local_outputs_equal_drawn_weights_in_law():
    """Through a hidden layer: the moments of one row's output, drawn either way."""
    network = mlp(2, 1, hidden=(3,)).double()
    target, _ = linear_model(network=network)
    means, log_stds = variational(target, 0.4)
    row = target.data.X[:1]
    sampled = _sample(means, log_stds, 20_000, torch.Generator().manual_seed(1))
    drawn = torch.func.vmap(
        lambda own: torch.func.functional_call(network, {k.removeprefix("network."): v for k, v in own.items()}, (row,))
    )(sampled).flatten()
    own = {name.removeprefix("network."): value for name, value in means.items()}
    with (
        _noisy_outputs(network, local_layers(network, row), log_stds, torch.Generator().manual_seed(2)),
        torch.no_grad(),
    ):
        local = torch.func.functional_call(network, own, (row.expand(20_000, 2),)).flatten()
    for power in (1, 2):
        difference = local.pow(power).mean() - drawn.pow(power).mean()
        error = (local.pow(power).var() / 20_000 + drawn.pow(power).var() / 20_000).sqrt()
        assert abs(difference / error) < 4


def test_all_zero_inputs_without_bias_have_a_gradient():
    network = nn.Linear(3, 1, bias=False)
    log_stds = {"network.weight": torch.zeros(1, 3, requires_grad=True)}
    with _noisy_outputs(network, [network], log_stds, torch.Generator()):
        (gradient,) = torch.autograd.grad(network(torch.zeros(2, 3)).sum(), list(log_stds.values()))
    assert torch.isfinite(gradient).all()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain, self.twice, self.deep = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(2, 2)
        self.tied, self.too, self.rows, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(2, 2), nn.Linear(4, 4)
        self.too.weight = self.tied.weight

    def forward(self, X):
        h = self.twice(self.twice(self.plain(X))).unflatten(-1, (2, 2))
        h = self.deep(h).flatten(-2)
        h = self.too(self.tied(h))
        return self.rows(h.reshape(-1, 2)).reshape(X.shape[0], 4)  # (rows * 2, features)


def test_only_layers_whose_rows_are_points_and_whose_weights_are_used_once_are_local():
    network = Net()
    assert local_layers(network, torch.ones(1, 4)) == [network.plain]


def test_shared_layers_still_reach_the_optimum():
    """f(x) = w (x_1 + x_2) + b, with the layer called once for each: equal to the model with the summed input."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(1, 1, bias=False)

        def forward(self, X):
            return self.linear(X[..., :1]) + self.linear(X[..., 1:])

    generator = torch.Generator().manual_seed(0)
    X = torch.randn(20, 2, generator=generator, dtype=torch.float64)
    y = X.sum(-1) + 0.5 * torch.randn(20, generator=generator, dtype=torch.float64)
    oracle = LinearGaussian(X.sum(-1, keepdim=True), y, 0.5, 1.0)
    likelihood = likelihoods.Gaussian(noise_std=0.5)
    target = NetworkTarget(Sum(), likelihood, priors.Normal(scale=1.0), Data(X, y[:, None]), torch.ones(1, 1))
    means, stds, _ = fitted(target, MeanField(num_steps=1200, learning_rate=0.02))
    torch.testing.assert_close(stds, oracle.covariance.diagonal().sqrt(), rtol=0.1, atol=0)
    assert abs(means - oracle.mean) / stds < 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_seeds_and_dtypes(dtype):
    target, _ = linear_model()
    target = NetworkTarget(
        networks.mlp(2, 1, hidden=(4,)),
        likelihoods.Gaussian(),
        priors.Normal(),
        Data(target.data.X.to(dtype), target.data.Y.to(dtype)),
        torch.ones(1, 1),
    )
    method = MeanField(num_steps=20, num_draws=5, batch_size=6)
    first, same, other = (run(method, target, seed=seed).parameters for seed in (0, 0, 1))
    for name, value in first.items():
        assert value.dtype == dtype and value.shape[0] == 5
        assert torch.equal(value, same[name]) and not torch.equal(value, other[name])


@pytest.mark.parametrize(
    "options",
    [
        {"num_steps": 0},
        {"learning_rate": 0.0},
        {"num_samples": 0},
        {"num_draws": 0},
        {"initial_std": 0.0},
        {"batch_size": 0},
    ],
)
def test_wrong_settings(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        MeanField(**options)
