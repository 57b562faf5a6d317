import shutil

import pytest
import torch
from torch import nn

from bayesnn import likelihoods, networks, priors
from bayesnn.data import Data
from bayesnn.inference import HMC, NetworkTarget, run
from bayesnn.inference.compiled import Compiled
from bayesnn.inference.flat import density_of, log_density_and_gradient, ravel

needs_compiler = pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="no C++ compiler")


def perceptron(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(20, 3, generator=generator, dtype=torch.float64).to(dtype)
    network = networks.mlp(3, 1, hidden=(6, 6))
    return NetworkTarget(
        network, likelihoods.Gaussian(), priors.Normal(), Data(X, X.sum(-1, keepdim=True)), torch.ones(1, 1), 0.7
    )


def convolutional():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(12, 16, generator=generator, dtype=torch.float64)
    network = nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)
    )
    labels = torch.arange(12).unsqueeze(-1) % 3
    return NetworkTarget(network, likelihoods.Categorical(3), priors.Laplace(), Data(X, labels), torch.ones(1, 1))


def attention():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(12, 16, generator=generator, dtype=torch.float64)
    encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    network = nn.Sequential(nn.Unflatten(1, (4, 4)), encoder, nn.Flatten(), nn.Linear(16, 1)).eval()
    return NetworkTarget(network, likelihoods.Gaussian(), priors.Normal(), Data(X, X[:, :1]), torch.ones(1, 1))


@needs_compiler
@pytest.mark.parametrize("make", [perceptron, convolutional, attention])
def test_the_same_density_and_gradient_to_rounding(make):
    target = make()
    compiled = Compiled(target)
    position = ravel(target.initial(4, torch.Generator().manual_seed(1)), target.shapes())
    batch = Data(target.data.X[:5], target.data.Y[:5])
    for part in (None, batch):
        exact = log_density_and_gradient(target, position, part)
        found = log_density_and_gradient(compiled, position, part)
        for ours, wanted in zip(found, exact, strict=True):
            assert not ours.requires_grad
            torch.testing.assert_close(ours, wanted, rtol=1e-11, atol=1e-11)


@needs_compiler
def test_the_same_draws_to_rounding():
    target = perceptron()
    method = HMC(num_chains=2, num_warmup=5, num_draws=5, num_leapfrog=2)
    plain, compiled = run(method, target, seed=3), run(method, Compiled(target), seed=3)
    for name, values in plain.parameters.items():
        torch.testing.assert_close(compiled.parameters[name], values, rtol=1e-8, atol=1e-8)


@needs_compiler
def test_a_compiled_target_is_its_target_otherwise():
    target = perceptron()
    compiled = Compiled(target)
    assert compiled.data is target.data and compiled.shapes() == target.shapes()
    # Its draws differ by rounding, so that a checkpoint of one run isn't one of the other.
    assert compiled.fingerprint != target.fingerprint
    assert density_of(compiled) is not density_of(target)


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler"):
        Compiled(perceptron())
