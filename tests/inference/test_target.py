import math

import pytest
import torch
from torch import nn

from bayesnn import likelihoods, networks, priors
from bayesnn.data import Data
from bayesnn.inference import FunctionTarget, NetworkTarget
from bayesnn.inference.flat import log_density_and_gradient, ravel, unravel
from bayesnn.inference.members import apply_network, check_network
from bayesnn.inference.target import log_density


def data(n=12, d=3, m=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return Data(X.to(dtype), torch.randn(n, m, generator=generator, dtype=torch.float64).to(dtype))


def target(network=None, likelihood=None, prior=None, temperature=1.0, dtype=torch.float64, m=1):
    network = networks.mlp(3, m, hidden=(4,)) if network is None else network
    return NetworkTarget(
        network,
        likelihoods.Gaussian() if likelihood is None else likelihood,
        priors.Normal() if prior is None else prior,
        data(dtype=dtype, m=m),
        torch.full((1, m), 2.0, dtype=dtype),
        temperature,
    )


@pytest.mark.parametrize("m", [1, 2])
def test_densities_equal_member_by_member_sums(m):
    own = target(m=m)
    parameters = own.initial(5, torch.Generator().manual_seed(1))
    for c in range(5):
        network = networks.mlp(3, m, hidden=(4,)).double()
        network.load_state_dict({k.removeprefix("network."): v[c] for k, v in parameters.items() if "network" in k})
        std = parameters["likelihood.log_noise_std"][c].exp()
        expected = torch.distributions.Normal(network(own.data.X), std).log_prob(own.data.Y).sum()
        torch.testing.assert_close(own.log_likelihood(parameters)[c], expected)
        log_prior = torch.distributions.Normal(math.log(0.3), 1.5).log_prob(std.log()).sum()
        for value in network.parameters():
            scale = math.sqrt(2 / value.shape[1]) if value.dim() == 2 else 1.0
            log_prior = log_prior + torch.distributions.Normal(0, scale).log_prob(value).sum()
        torch.testing.assert_close(own.log_prior(parameters)[c], log_prior)


def test_minibatches_of_all_rows_average_to_the_whole():
    own = target()
    parameters = own.initial(2, torch.Generator().manual_seed(1))
    whole = log_density(own, parameters)
    for size in (1, 3, 4):
        parts = [Data(own.data.X[i : i + size], own.data.Y[i : i + size]) for i in range(0, 12, size)]
        torch.testing.assert_close(torch.stack([log_density(own, parameters, part) for part in parts]).mean(0), whole)


def test_temperature_divides_prior_and_likelihood():
    parameters = target().initial(2, torch.Generator().manual_seed(1))
    torch.testing.assert_close(log_density(target(temperature=0.25), parameters), 4 * log_density(target(), parameters))


def test_fixed_noise_is_in_the_units_of_y():
    own = target(likelihood=likelihoods.Gaussian(noise_std=0.5))
    assert "likelihood.log_noise_std" not in own.shapes()
    assert float(own.likelihood_parameters({})["log_noise_std"].exp()) == pytest.approx(0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_equal_finite_differences_and_flat_vectors_invert(dtype):
    own = target(dtype=dtype)
    position = ravel(own.initial(3, torch.Generator().manual_seed(2)), own.shapes())
    assert position.shape == (3, 22) and position.dtype == dtype
    assert torch.equal(ravel(unravel(position, own.shapes()), own.shapes()), position)
    value, gradient = log_density_and_gradient(own, position)
    assert value.dtype == gradient.dtype == dtype
    if dtype == torch.float64:
        for j in range(position.shape[1]):
            step = torch.zeros_like(position)
            step[:, j] = 1e-5
            high, _ = log_density_and_gradient(own, position + step)
            low, _ = log_density_and_gradient(own, position - step)
            torch.testing.assert_close(gradient[:, j], (high - low) / 2e-5, rtol=1e-6, atol=1e-6)


def test_apply_network_runs_each_member():
    network = networks.mlp(3, 2, hidden=(4,)).double()
    stacked = {name: torch.stack([p.detach(), 2 * p.detach()]) for name, p in network.named_parameters()}
    X = data().X
    torch.testing.assert_close(apply_network(network, stacked, X)[0], network(X).detach())


def test_the_users_network_is_left_alone():
    network = networks.mlp(3, 1, hidden=(4,))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    own = target(network)
    own.log_prior(own.initial(2, torch.Generator()))
    assert all(p.requires_grad and p.dtype == torch.float32 for p in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False).eval(), nn.Dropout(0.1)]
)
def test_batch_statistics_and_random_numbers_are_refused(layer):
    network = nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 1))
    with pytest.raises(ValueError, match=r"layer '1' \(\w+\) .*network.eval\(\)"):
        check_network(network)
    with pytest.raises(ValueError, match="layer '1'"):
        target(network)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4).eval(), nn.Dropout(0.1).eval(), nn.Dropout(0.0), nn.LayerNorm(4)])
def test_what_does_not_depend_on_chance_or_batch_is_accepted(layer):
    own = target(nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 1)))
    assert torch.isfinite(log_density(own, own.initial(2, torch.Generator()))).all()


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, X):
        return self.linear(nn.functional.dropout(X, 0.5))


def test_random_numbers_in_the_forward_are_refused_before_work_starts():
    with pytest.raises(ValueError, match="draws random numbers in its forward"):
        target(Noisy())


def test_wrong_number_of_outputs():
    with pytest.raises(ValueError, match=r"\(n, 2\) for HeteroscedasticGaussian with 1 output.*found \(1, 1\)"):
        target(likelihood=likelihoods.HeteroscedasticGaussian())


X, Y = data(n=60)
WRONG_DATA = {
    "one row of Y": (X, Y[:1], r"data.Y must have one row for each row of X: X has 60, Y has 1"),
    "too few rows": (X, Y[:10], r"data.Y .* Y has 10"),
    "types": (X, Y.float(), r"data.Y must have the type of data.X, torch.float64, found torch.float32"),
    "no rows": (X[:0], Y[:0], r"data.X must have at least one row"),
    "no columns": (X[:, :0], Y, r"data.X must have at least one row and one column"),
    "flat X": (X[:, 0], Y, r"data.X must have shape \(n, d\), found \(60,\)"),
    "flat Y": (X, Y[:, 0], r"data.Y must have shape \(n, m\), found \(60,\)"),
    "integers": (X.long(), Y, r"data.X must be floating-point numbers, found torch.int64"),
    "NaN in X": (X.where(X < 2, torch.nan), Y, r"data.X must be finite"),
    "infinite Y": (X, Y.where(Y < 2, torch.inf), r"data.Y must be finite"),
}


@pytest.mark.parametrize("name", WRONG_DATA)
def test_wrong_data(name):
    X, Y, message = WRONG_DATA[name]
    with pytest.raises(ValueError, match=message):
        NetworkTarget(
            networks.mlp(3, 1, hidden=(4,)), likelihoods.Gaussian(), priors.Normal(), Data(X, Y), torch.ones(1, 1)
        )


def test_wrong_labels():
    network, labels = networks.mlp(3, 2, hidden=(4,)), torch.arange(60).unsqueeze(-1) % 3
    with pytest.raises(ValueError, match=r"data.Y must hold labels 0 … 1, found labels from 0 to 2"):
        NetworkTarget(network, likelihoods.Categorical(2), priors.Normal(), Data(X, labels), torch.ones(1, 1))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_wrong_temperature(temperature):
    with pytest.raises(ValueError, match="temperature must be positive"):
        target(temperature=temperature)


def test_fingerprints_tell_targets_apart():
    variants = [
        target(),
        target(temperature=0.5),
        target(likelihood=likelihoods.StudentT()),
        target(prior=priors.Laplace()),
        target(prior=priors.PerLayer({"*": priors.Laplace()})),
        target(networks.mlp(3, 1, hidden=(4,), activation="relu")),
        target(likelihood=likelihoods.Gaussian(noise_std=1.0)),
        target(m=2),
    ]
    assert len({own.fingerprint for own in variants}) == len(variants)
    # What a method never reads, the network's initial weights, doesn't count.
    assert target().fingerprint == target().fingerprint


def test_function_target():
    own = FunctionTarget(lambda p: -p["x"].square().sum(-1), lambda count, generator: {"x": torch.zeros(count, 2)})
    assert own.shapes() == {"x": torch.Size([2])}
    assert log_density(own, {"x": torch.ones(3, 2)}).tolist() == [-2, -2, -2]
