import pytest
import torch
from oracles import LinearGaussian, effective_sizes, with_intercept, z_score
from torch import nn

import bayesnn
from bayesnn import BNN, likelihoods, networks, priors
from bayesnn.data import Data
from bayesnn.inference import HMC, DeepEnsemble, NetworkTarget, run
from bayesnn.inference.partial import PartialTarget, stochastic_names


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
    partial = PartialTarget(target, stochastic_names(network, "last"), learned)
    assert list(partial.shapes()) == ["network.layers.2.weight", "network.layers.2.bias"]
    posterior = run(HMC(num_chains=8, num_warmup=200, num_draws=400, num_leapfrog=8), partial, seed=1)
    hidden = torch.tanh(X @ learned["network.layers.0.weight"].T + learned["network.layers.0.bias"])
    prior_std = torch.tensor([2.0 / 5**0.5] * 5 + [1.5], dtype=torch.float64)
    oracle = LinearGaussian(with_intercept(hidden), Y[:, 0], 0.3, prior_std)
    draws = torch.cat([values.flatten(1) for values in posterior.parameters.values()], 1)
    assert z_score(draws, oracle.mean, effective_sizes(posterior, draws)).abs().max() < 4
    squares = (draws - oracle.mean).square()
    assert z_score(squares, oracle.covariance.diagonal(), effective_sizes(posterior, squares)).abs().max() < 4
    completed = partial.completed(posterior.parameters)
    assert completed.keys() == target.shapes().keys()
    assert completed["network.layers.0.weight"].stride(0) == 0  # not a copy for each draw


def test_in_a_model(tmp_path):
    X, Y = data()
    model = BNN(
        networks.mlp(2, 1, hidden=(6,)),
        method=HMC(num_chains=2, num_warmup=40, num_draws=30, num_leapfrog=4),
        stochastic=["layers.2.*"],
    )
    model.fit(X, Y, seed=0, checkpoint=tmp_path / "fit")
    first = model.weights.parameters["network.layers.0.weight"]
    assert (first == first[:1]).all() and model.weights.parameters["network.layers.2.weight"].std(0).min() > 0
    assert float((model.predict(X).mean - Y).square().mean().sqrt()) < 0.45
    model.save(tmp_path / "model")
    loaded = bayesnn.load(tmp_path / "model")
    assert torch.equal(loaded.predict(X).mean, model.predict(X).mean) and loaded.stochastic == ["layers.2.*"]
    again = BNN(model.network, method=model.method, stochastic=["layers.2.*"]).fit(
        X, Y, seed=0, checkpoint=tmp_path / "fit"
    )
    assert torch.equal(again.predict(X).mean, model.predict(X).mean)


def test_names():
    network = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 1))
    assert stochastic_names(network, "all") == [name for name, _ in network.named_parameters()]
    assert stochastic_names(network, "last") == ["3.weight", "3.bias"]
    assert stochastic_names(network, ["*.bias", "0.*"]) == ["0.weight", "0.bias", "1.bias", "3.bias"]
    with pytest.raises(ValueError, match="'conv' matches none"):
        stochastic_names(network, ["conv"])
    with pytest.raises(ValueError, match="at least one parameter"):
        stochastic_names(network, [])
    with pytest.raises(ValueError, match="'all', 'last' or a list"):
        stochastic_names(network, "first")
