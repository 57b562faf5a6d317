"""Networks of every kind as targets: values and gradients equal those of one module after the other."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

from bayesnn import BNN, BayesnnWarning, likelihoods, networks, priors
from bayesnn.data import Data
from bayesnn.inference import HMC, NetworkTarget, run
from bayesnn.inference.flat import log_density_and_gradient, ravel
from bayesnn.inference.members import ONE_BY_ONE, apply_network


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(2, 2, dropout=0.1, batch_first=True)
        self.last = nn.Linear(6, 1)

    def forward(self, X):
        tokens = X.unflatten(1, (3, 2))
        return self.last(self.attention(tokens, tokens, tokens, need_weights=False)[0].flatten(1))


class FunctionalAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 6)
        self.last = nn.Linear(6, 1)

    def forward(self, X):
        parts = self.first(X.unflatten(1, (3, 2))).chunk(3, -1)
        return self.last(nn.functional.scaled_dot_product_attention(*parts).flatten(1))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer = kind(2, 3, batch_first=True)
        self.last = nn.Linear(3, 1)

    def forward(self, X):
        return self.last(self.layer(X.unflatten(1, (3, 2)))[0][:, -1])


class Embedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3, padding_idx=0)
        self.last = nn.Linear(18, 1)

    def forward(self, X):
        return self.last(self.embedding(X.abs().long().clamp_max(4)).flatten(1))


class Tied(nn.Module):
    """The same matrix going in and coming out."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(6, 6, bias=False)
        self.middle = nn.Linear(6, 6)
        self.decoder = nn.Linear(6, 6)
        self.last = nn.Linear(6, 1)
        self.decoder.weight = self.encoder.weight

    def forward(self, X):
        return self.last(torch.tanh(self.decoder(torch.tanh(self.middle(self.encoder(X))))))


class WithBuffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 1)
        self.register_buffer("scale", torch.tensor(3.0))
        self.register_buffer("order", torch.arange(5, -1, -1))

    def forward(self, X):
        return self.scale * self.layer(X[:, self.order])


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.spare = nn.Linear(6, 1), nn.Parameter(torch.zeros(3))

    def forward(self, X):
        return self.layer(X)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 1)

    def forward(self, X):
        f = self.layer(X)
        return f if float(self.layer.bias.detach()) > 0 else -f


def encoder(num_layers):
    layer = nn.TransformerEncoderLayer(2, 2, 4, batch_first=True)
    layers = layer if num_layers == 1 else nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
    return nn.Sequential(nn.Unflatten(1, (3, 2)), layers, nn.Flatten(), nn.Linear(6, 1)).eval()


def convolutional():
    layers = [nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
    layers += [nn.Conv2d(4, 2, 2, groups=2), nn.GroupNorm(1, 2), nn.MaxPool2d((1, 2)), nn.Flatten(), nn.Linear(4, 1)]
    network = nn.Sequential(*layers)
    network(torch.randn(20, 6, generator=torch.Generator().manual_seed(0)))  # running statistics
    return network.eval()


VECTORISED = {
    "layer norm": lambda: nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.SiLU(), nn.Linear(4, 1)),
    "convolutions": convolutional,
    "instance norm": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, affine=True), nn.Tanh(), nn.Flatten(), nn.Linear(6, 1)
    ),
    "attention": lambda: Attention().eval(),
    "functional attention": FunctionalAttention,
    "encoder layer": lambda: encoder(1),
    "encoder": lambda: encoder(2),
    "embedding": Embedding,
    "tied": Tied,
    "buffers": WithBuffers,
    "unused": Unused,
    "weight norm": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), nn.Linear(4, 1)),
    "spectral norm": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4)), nn.Linear(4, 1)
    ).eval(),
}
ONE_AFTER_ANOTHER = {
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "rnn": lambda: Recurrent(nn.RNN),
    "branching": Branching,
}


def built(make):
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        return make()


def target(network, dtype=torch.float64, **options):
    generator = torch.Generator().manual_seed(0)
    X = 2 * torch.randn(8, 6, generator=generator, dtype=torch.float64).to(dtype)
    return NetworkTarget(
        network, likelihoods.Gaussian(), priors.Normal(), Data(X, X[:, :1]), torch.ones(1, 1).to(dtype), **options
    )


def normal(loc, scale, values):
    return (-0.5 * ((values - loc) / scale).square() - math.log(scale) - 0.5 * math.log(2 * math.pi)).sum()


def one_by_one(network, own, parameters):
    """The log joint density and its gradient of each member, by a module of its own and plain autograd."""
    values, gradients = [], []
    for s in range(len(parameters["likelihood.log_noise_std"])):
        module = copy.deepcopy(network).to(own.data.X).requires_grad_(True)
        with torch.no_grad():
            for name, value in module.named_parameters():
                value.copy_(parameters["network." + name][s])
        log_std = parameters["likelihood.log_noise_std"][s].clone().requires_grad_()
        value = torch.distributions.Normal(module(own.data.X), log_std.exp()).log_prob(own.data.Y).sum()
        value = value + normal(math.log(0.3), 1.5, log_std)
        for name, weight in module.named_parameters():
            loc = 1.0 if weight.dim() == 1 and name.endswith("weight") else 0.0
            scale = math.sqrt(2 / weight[0].numel()) if weight.dim() > 1 else 1.0
            value = value + normal(loc, scale, weight)
        gradient = torch.autograd.grad(value, [*module.parameters(), log_std])
        values.append(value.detach())
        gradients.append(torch.cat([part.flatten() for part in gradient]))
    return torch.stack(values), torch.stack(gradients)


def check(network, own, rtol=1e-9):
    parameters = own.initial(3, torch.Generator().manual_seed(1))
    value, gradient = log_density_and_gradient(own, ravel(parameters, own.shapes()))
    expected, expected_gradient = one_by_one(network, own, parameters)
    torch.testing.assert_close(value, expected, rtol=rtol, atol=rtol)
    torch.testing.assert_close(gradient, expected_gradient, rtol=rtol, atol=rtol * float(expected_gradient.abs().max()))


@pytest.mark.parametrize("name", VECTORISED)
def test_all_members_at_once_are_the_members(name):
    network = built(VECTORISED[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of operations that vmap does one by one behind our back, too
        warnings.filterwarnings("ignore", ".*batching rule for aten::_weight_norm")
        own = target(network)
        check(network, own)
    assert not hasattr(own.network, ONE_BY_ONE)
    check(network, target(network, torch.float32), rtol=1e-3)


@pytest.mark.parametrize("name", ONE_AFTER_ANOTHER)
def test_what_vmap_cannot_do_is_done_one_by_one(name):
    network = built(ONE_AFTER_ANOTHER[name])
    with pytest.warns(BayesnnWarning, match="one set of weights after another"):
        own = target(network)
    check(network, own)
    assert not hasattr(network, ONE_BY_ONE)  # the user's module stays as it was


def test_predictions_and_draws_of_a_recurrent_network(tmp_path):
    generator = torch.Generator().manual_seed(0)
    X, network = torch.randn(8, 6, generator=generator), built(ONE_AFTER_ANOTHER["gru"])
    method = HMC(num_chains=2, num_warmup=4, num_draws=3, num_leapfrog=2)
    with pytest.warns(BayesnnWarning, match="vmap can't do it"):
        model = BNN(network, method=method, scale_inputs=False).fit(X, X[:, :1])
    draws = model.posterior(X).values
    for s in range(6):
        own = {name.removeprefix("network."): v[s] for name, v in model.weights.parameters.items() if "network" in name}
        f = torch.func.functional_call(network, own, (X,))
        torch.testing.assert_close(draws[s], model._outcomes.loc + model._outcomes.scale * f, rtol=1e-5, atol=1e-5)


def test_attention_is_differentiable_in_draws_whatever_the_mode():
    own = target(built(VECTORISED["encoder layer"]))
    assert torch.backends.mha.get_fastpath_enabled()
    posterior = run(HMC(num_chains=2, num_warmup=3, num_draws=2, num_leapfrog=2), own)
    X = own.data.X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(posterior.posterior(own.network, X).values.sum(), X)
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0
    assert torch.backends.mha.get_fastpath_enabled()  # a global setting, put back


def test_tied_weights_are_one_parameter():
    """Exactly: one sample in both places, one prior, the sum of the gradients of both uses."""
    own = target(built(Tied))
    assert "network.encoder.weight" in own.shapes() and "network.decoder.weight" not in own.shapes()
    parameters = own.initial(2, torch.Generator().manual_seed(1))
    p = {name.removeprefix("network."): value for name, value in parameters.items()}
    W, E, X = p["encoder.weight"], p["encoder.weight"].clone(), own.data.X
    W, E = W.requires_grad_(), E.requires_grad_()  # the two uses, apart
    hidden = torch.tanh(X @ E.mT @ p["middle.weight"].mT + p["middle.bias"].unsqueeze(1))
    hidden = torch.tanh(hidden @ W.mT + p["decoder.bias"].unsqueeze(1))
    f = hidden @ p["last.weight"].mT + p["last.bias"].unsqueeze(1)
    log_likelihood = torch.distributions.Normal(f, p["likelihood.log_noise_std"].exp()).log_prob(own.data.Y).sum((1, 2))
    through_w, through_e = torch.autograd.grad(log_likelihood.sum(), [W, E])
    leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    ours = own.log_likelihood(leaves)
    (gradient,) = torch.autograd.grad(ours.sum(), [leaves["network.encoder.weight"]])
    torch.testing.assert_close(ours, log_likelihood)
    torch.testing.assert_close(gradient, through_w + through_e)


def test_networks_whose_rows_are_not_alone_are_refused():
    for layer in (nn.MultiheadAttention(6, 2), nn.LSTM(6, 1)):  # they take (n, d) for one sequence

        class Sequence(nn.Module):
            def __init__(self, layer=layer):
                super().__init__()
                self.layer, self.last = layer, nn.Linear(6, 1)

            def forward(self, X):
                if isinstance(self.layer, nn.LSTM):
                    return self.layer(X)[0]
                return self.last(self.layer(X, X, X)[0])

        with pytest.raises(ValueError, match="other rows than alone"):
            target(Sequence())


def test_chance_and_memory_are_refused():
    with pytest.raises(ValueError, match=r"layer 'attention' \(MultiheadAttention\) draws random numbers"):
        target(Attention())
    with pytest.raises(ValueError, match=r"layer 'layer' \(LSTM\) draws random numbers"):
        target(Recurrent(lambda *sizes, **options: nn.LSTM(*sizes, num_layers=2, dropout=0.2, **options)))
    with pytest.raises(ValueError, match="draws random numbers in its forward"):
        target(nn.Sequential(nn.Linear(6, 4), nn.RReLU(), nn.Linear(4, 1)))
    with pytest.raises(ValueError, match="changes its buffers"):
        target(nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4)), nn.Linear(4, 1)))


class Detached(nn.Linear):
    def forward(self, X):
        return super().forward(X).detach()


class WrongMembers(networks.MLP, saved_as="WrongMembers"):
    def forward_members(self, parameters, X):
        return 2 * super().forward_members(parameters, X)


class Refusing(nn.Linear):
    def forward(self, X):
        raise KeyError("no such thing")


def test_what_else_can_be_wrong_with_a_network():
    with pytest.raises(ValueError, match="no gradient"):
        target(Detached(6, 1))
    with pytest.raises(ValueError, match="forward_members must give what forward gives"):
        target(WrongMembers(6, 1, (3,)))
    with pytest.raises(ValueError, match=r"can't take X of shape \(1, 6\): 'no such thing'"):
        target(Refusing(6, 1))
    with pytest.raises(ValueError, match="no parameters: nothing to learn"):
        target(nn.Flatten())
    with pytest.raises(ValueError, match="no parameters that aren't frozen"):
        target(nn.Linear(6, 1).requires_grad_(False))


@pytest.mark.parametrize("network", [networks.mlp(6, 1, hidden=(4,)), nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 1))])
def test_frozen_parameters_are_constants(network):
    network = copy.deepcopy(network)
    first, second = [name for name, _ in network.named_parameters()][:2]
    dict(network.named_parameters())[first].requires_grad_(False)
    own = target(network)
    assert f"network.{first}" not in own.shapes() and f"network.{second}" in own.shapes()
    parameters = own.initial(3, torch.Generator().manual_seed(1))
    assert own.log_prior(parameters).isfinite().all()
    assert own.flat_gaussian_prior.loc.numel() == ravel(parameters, own.shapes()).shape[1]
    module = copy.deepcopy(network).double()
    with torch.no_grad():
        for name, value in module.named_parameters():
            if "network." + name in parameters:
                value.copy_(parameters["network." + name][2])
    torch.testing.assert_close(own.functions(parameters, own.data.X)[2], module(own.data.X).detach())
    draws = run(HMC(num_chains=2, num_warmup=2, num_draws=2, num_leapfrog=2), own)
    assert draws.posterior(own.network, own.data.X).values.shape == (4, 8, 1)
    other = copy.deepcopy(network)
    dict(other.named_parameters())[first].data.add_(1.0)
    assert target(other).fingerprint != own.fingerprint == target(network).fingerprint


def test_shared_parameters_are_as_good_as_copies():
    network = networks.mlp(3, 2, hidden=(4,)).double()
    generator = torch.Generator().manual_seed(0)
    stacked = {
        name: torch.randn(5, *p.shape, generator=generator, dtype=torch.float64)
        for name, p in network.named_parameters()
    }
    X = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    shared = {"layers.0.weight": stacked["layers.0.weight"][0]}
    copies = stacked | {"layers.0.weight": shared["layers.0.weight"].expand(5, -1, -1)}
    own = {name: value for name, value in stacked.items() if name not in shared}
    torch.testing.assert_close(apply_network(network, own, X, shared), apply_network(network, copies, X))
