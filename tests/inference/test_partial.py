import pytest
import torch
from oracles import LinearGaussian, effective_sizes, with_intercept, z_score
from safetensors import safe_open
from torch import nn

import bayesnn
from bayesnn import BNN, likelihoods, networks, priors
from bayesnn.data import Data
from bayesnn.inference import HMC, SGHMC, DeepEnsemble, MeanField, NetworkTarget, WarmStarted, run
from bayesnn.inference.flat import log_density_and_gradient, ravel
from bayesnn.inference.partial import partial_target, stochastic_names


def data(n=40):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return X, torch.sin(2 * X[:, :1]) + 0.3 * torch.randn(n, 1, generator=generator, dtype=torch.float64)


def test_the_last_layer_given_its_features_is_conjugate():
    X, Y = data()
    network = networks.mlp(2, 1, hidden=(5,))
    target = NetworkTarget(
        network,
        likelihoods.Gaussian(noise_std=0.3),
        priors.Normal(scale=2.0, bias_scale=1.5),
        Data(X, Y),
        torch.ones(1, 1).double(),
    )
    learned = run(DeepEnsemble(num_members=1, num_steps=200, held_out=0.0), target).parameters
    learned = {name: value[0] for name, value in learned.items()}
    partial = partial_target(target, stochastic_names(network, "last"), learned)
    assert list(partial.shapes()) == ["network.layers.2.weight", "network.layers.2.bias"]
    posterior = run(HMC(num_chains=8, num_warmup=200, num_draws=400, num_leapfrog=8), partial, seed=1)
    hidden = torch.tanh(X @ learned["network.layers.0.weight"].T + learned["network.layers.0.bias"])
    prior_std = torch.tensor([2.0 / 5**0.5] * 5 + [1.5], dtype=torch.float64)
    oracle = LinearGaussian(with_intercept(hidden), Y[:, 0], 0.3, prior_std)
    draws = torch.cat([values.flatten(1) for values in posterior.parameters.values()], 1)
    assert z_score(draws, oracle.mean, effective_sizes(posterior, draws)).abs().max() < 4
    squares = (draws - oracle.mean).square()
    assert z_score(squares, oracle.covariance.diagonal(), effective_sizes(posterior, squares)).abs().max() < 4
    # In function space, through weights that belong to all layers.
    complete = posterior.completed(partial.frozen)
    assert complete.parameters.keys() == target.shapes().keys()
    f = complete.posterior(network.double(), X).values[..., 0]
    mean, covariance = oracle.predictive(with_intercept(hidden))
    assert z_score(f, mean, effective_sizes(posterior, f)).abs().max() < 4
    squares = (f - mean).square()
    assert z_score(squares, covariance.diagonal(), effective_sizes(posterior, squares)).abs().max() < 4


def layered():
    return nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 1))


@pytest.mark.parametrize("network", [networks.mlp(2, 1, hidden=(4,)), layered()])
@pytest.mark.parametrize("prior", [priors.Normal(), priors.PerLayer({"*weight": priors.Laplace()})])
def test_density_and_gradient_are_those_of_the_whole_without_constants(network, prior):
    X, Y = data(7)
    target = NetworkTarget(network, likelihoods.Gaussian(), prior, Data(X, Y), torch.ones(1, 1).double(), 0.5)
    learned = {name: value[0] for name, value in target.initial(1, torch.Generator().manual_seed(3)).items()}
    names = stochastic_names(network, ["*.bias", "layers.2.*"] if isinstance(network, networks.MLP) else ["*.bias"])
    partial = partial_target(target, names, learned)
    assert partial.fingerprint != target.fingerprint
    assert set(partial.shapes()) == {"network." + name for name in names} | {"likelihood.log_noise_std"}
    parameters = partial.initial(3, torch.Generator().manual_seed(1))
    complete = parameters | {name: value.expand(3, *value.shape) for name, value in partial.frozen.items()}
    complete = {name: complete[name] for name in target.shapes()}
    frozen = {name: value.unsqueeze(0) for name, value in partial.frozen.items()}
    value, gradient = log_density_and_gradient(partial, ravel(parameters, partial.shapes()))
    whole, whole_gradient = log_density_and_gradient(target, ravel(complete, target.shapes()))
    torch.testing.assert_close(value, whole - target.log_prior(frozen) / 0.5)
    columns = torch.cat([torch.full((v[0].numel(),), name in parameters) for name, v in complete.items()])
    torch.testing.assert_close(gradient, whole_gradient[:, columns])
    assert partial.sample_prior(4, torch.Generator()).keys() == partial.shapes().keys()
    with pytest.raises(ValueError, match=r"found \['spare'\]"):
        partial_target(target, ["spare"], learned)


METHODS = {
    "hmc": HMC(num_chains=2, num_warmup=40, num_draws=30, num_leapfrog=4),
    "warm-started": WarmStarted(HMC(num_chains=2, num_warmup=20, num_draws=10, num_leapfrog=4)),
    "sghmc": SGHMC(num_chains=2, num_burn_in=20, num_draws=10),
    "mean-field": MeanField(num_steps=200, num_draws=20),
    "ensemble": DeepEnsemble(num_members=3, num_steps=100, anchored=True),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_with_every_kind_of_method(method):
    X, Y = data()
    model = BNN(networks.mlp(2, 1, hidden=(6,)), method=method, stochastic="last").fit(X, Y)
    parameters = model.weights.parameters
    assert (parameters["network.layers.0.weight"] == parameters["network.layers.0.weight"][:1]).all()
    assert parameters["network.layers.2.weight"].std(0).min() > 0
    assert parameters["likelihood.log_noise_std"].std() > 0
    assert float((model.predict(X).mean - Y).square().mean().sqrt()) < 0.8


def test_in_a_model(tmp_path):
    X, Y = data()
    model = BNN(
        networks.mlp(2, 1, hidden=(6,)),
        method=HMC(num_chains=2, num_warmup=40, num_draws=30, num_leapfrog=4),
        stochastic=["layers.2.*"],
    )
    model.fit(X, Y, seed=0, checkpoint=tmp_path / "fit")
    first = model.weights.parameters["network.layers.0.weight"]
    assert first.stride(0) == 0 and model._answering.parameters["network.layers.0.weight"].stride(0) == 0  # no copies
    assert list(model.weights.fixed) == ["network.layers.0.weight", "network.layers.0.bias"]
    assert float((model.predict(X).mean - Y).square().mean().sqrt()) < 0.45
    model.save(tmp_path / "model")
    loaded = bayesnn.load(tmp_path / "model")
    assert torch.equal(loaded.predict(X).mean, model.predict(X).mean) and loaded.stochastic == ["layers.2.*"]
    assert loaded.weights.parameters["network.layers.0.weight"].stride(0) == 0
    with safe_open(tmp_path / "model", framework="pt") as file:
        assert file.get_slice("state.fixed.network.layers.0.weight").get_shape() == [6, 2]  # once, not for each draw
        assert "state.draws.network.layers.0.weight" not in file.keys()
    exported = model.weights.to_arviz()
    assert "network.layers.0.weight" in exported.constant_data and "network.layers.2.weight" in exported.posterior
    again = BNN(model.network, method=model.method, stochastic=["layers.2.*"]).fit(
        X, Y, seed=0, checkpoint=tmp_path / "fit"
    )
    assert torch.equal(again.predict(X).mean, model.predict(X).mean)


def test_everything_and_nothing_learned():
    X, Y = data(10)
    method = HMC(num_chains=1, num_warmup=3, num_draws=3, num_leapfrog=2)
    whole = BNN(networks.mlp(2, 1, hidden=(3,)), method=method).fit(X, Y)
    named = BNN(networks.mlp(2, 1, hidden=(3,)), method=method, stochastic=["*"]).fit(X, Y)
    assert not named.weights.fixed  # nothing is left to learn, and nothing is
    for name, values in whole.weights.parameters.items():
        assert torch.equal(named.weights.parameters[name], values)
    seen = []
    BNN(networks.mlp(2, 1, hidden=(3,)), method=method, stochastic="last").fit(
        X, Y, callbacks=[lambda index, state, info: seen.append(float(info.acceptance.mean()))]
    )
    assert len(seen) == 6  # of the method, not of the learning before


def test_frozen_features_stay_as_they_were_given(tmp_path):
    X, Y = data(10)
    network = networks.mlp(2, 1, hidden=(3,))
    network.layers[0].requires_grad_(False)
    given = network.layers[0].weight.double()
    model = BNN(network, method=HMC(num_chains=1, num_warmup=3, num_draws=3, num_leapfrog=2)).fit(X, Y)
    assert torch.equal(model.weights.fixed["network.layers.0.weight"], given)
    model.save(tmp_path / "model")
    assert torch.equal(bayesnn.load(tmp_path / "model").predict(X).mean, model.predict(X).mean)


def test_names():
    network = layered()
    assert stochastic_names(network, "all") == [name for name, _ in network.named_parameters()]
    assert stochastic_names(network, "last") == ["3.weight", "3.bias"]
    assert stochastic_names(network, ["*.bias", "0.*"]) == ["0.weight", "0.bias", "1.bias", "3.bias"]
    assert stochastic_names(nn.Linear(2, 1), "last") == ["weight", "bias"]
    normed = nn.Sequential(nn.Linear(2, 3), nn.utils.parametrizations.weight_norm(nn.Linear(3, 1)))
    assert len(stochastic_names(normed, "last")) == 3 and "1.bias" in stochastic_names(normed, "last")


def test_names_of_tied_and_frozen_parameters():
    network = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3))
    network[2].weight = network[0].weight
    # The last layer's weight is the first one's, under whose name it is sampled, once.
    assert stochastic_names(network, "last") == ["0.weight", "2.bias"]
    assert stochastic_names(network, ["2.weight"]) == ["0.weight"]
    network[2].bias.requires_grad_(False)
    assert stochastic_names(network, "all") == ["0.weight"]
    with pytest.raises(ValueError, match=r"'2\.bias' matches frozen parameters only"):
        stochastic_names(network, ["2.bias"])
    head = layered()
    head[3].requires_grad_(False)
    assert stochastic_names(head, "last") == ["1.weight", "1.bias"]


def test_wrong_names():
    network = layered()
    with pytest.raises(ValueError, match="'conv' matches none"):
        stochastic_names(network, ["3.*", "conv"])
    with pytest.raises(ValueError, match="at least one parameter"):
        stochastic_names(network, [])
    with pytest.raises(ValueError, match="'all', 'last' or a list"):
        stochastic_names(network, "first")
    with pytest.raises(TypeError, match="'all', 'last' or a list"):
        stochastic_names(network, 3)
    with pytest.raises(ValueError, match="'conv' matches none"):
        BNN(networks.mlp(2, 1), stochastic=["conv"]).fit(*data(5))
