import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import effective_sizes, z_score
from pyro.infer.mcmc.util import initialize_model

from bayesnn import likelihoods, networks, priors
from bayesnn.data import Data
from bayesnn.inference import HMC, NetworkTarget, run
from bayesnn.inference.flat import log_density_and_gradient, ravel
from bayesnn.inference.pyro_models import PyroTarget, pyro_model
from bayesnn.inference.target import log_density


def coins(flips):
    p = pyro.sample("p", dist.Beta(torch.tensor(2.0).double(), torch.tensor(3.0).double()))
    with pyro.plate("flips", len(flips)):
        pyro.sample("y", dist.Bernoulli(p), obs=flips)


def test_beta_bernoulli():
    flips = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0]).double()
    target = PyroTarget(coins, flips)
    posterior = run(HMC(num_chains=4, num_warmup=100, num_draws=250, num_leapfrog=3), target, seed=1)
    draws = target.constrain(posterior.parameters)["p"].unsqueeze(-1)
    exact = torch.distributions.Beta(2 + 5.0, 3 + 2.0)
    assert abs(float(z_score(draws, exact.mean, effective_sizes(posterior, draws)))) < 4
    squares = (draws - exact.mean).square()
    assert abs(float(z_score(squares, exact.variance, effective_sizes(posterior, squares)))) < 4


def scales():
    scale = pyro.sample("scale", dist.HalfNormal(torch.ones(2).double()).to_event(1))
    pyro.sample("x", dist.Normal(0.0, scale).to_event(1))


def test_the_density_is_pyro_s():
    target = PyroTarget(scales)
    parameters = target.initial(3, torch.Generator().manual_seed(0))
    _, potential, _, _ = initialize_model(scales)
    expected = torch.stack([-potential({name: v[i] for name, v in parameters.items()}) for i in range(3)])
    value, gradient = log_density_and_gradient(target, ravel(parameters, target.shapes()))
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
    assert gradient.shape == (3, 4) and target.constrain(parameters)["scale"].min() > 0


def eight_schools(branching=False):
    mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0).double(), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(torch.tensor(5.0).double()))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3).double()))
    if branching and tau > 1:
        mu = mu + weights[0]
    with pyro.plate("schools", 3), pyro.poutine.scale(scale=2.0):
        theta = pyro.sample("theta", dist.Normal(mu, tau * weights.sum()))
        pyro.sample("y", dist.Normal(theta, weights), obs=torch.tensor([28.0, 8.0, -3.0]).double())


@pytest.mark.parametrize("branching", [False, True])
def test_all_chains_at_once_are_pyro_s_one_by_one(branching):
    target = PyroTarget(eight_schools, branching=branching)
    assert target._vmapped is not branching
    parameters = target.initial(5, torch.Generator().manual_seed(2))
    _, potential, _, _ = initialize_model(eight_schools, model_kwargs={"branching": branching})
    expected = torch.stack([-potential({name: v[i] for name, v in parameters.items()}) for i in range(5)])
    torch.testing.assert_close(target.log_prior(parameters), expected, rtol=1e-12, atol=1e-12)


def test_impossible_places_have_no_density():
    """Far out a scale overflows or vanishes, and a Poisson's rate too: a move to reject."""

    def model(branching):
        scale = pyro.sample("scale", dist.LogNormal(torch.tensor(0.0).double(), 1.0))
        x = pyro.sample("x", dist.Normal(torch.tensor(0.0).double(), scale))
        if branching and x > 100:
            scale = scale * 2
        pyro.sample("y", dist.Poisson(x.exp()), obs=torch.tensor(3.0).double())

    for branching in (False, True):
        target = PyroTarget(model, branching)
        assert target._vmapped is not branching
        far = {"scale": torch.tensor([-2000.0, 2000.0, 0.0, 0.0]), "x": torch.tensor([1.0, 1.0, 2000.0, 1.0])}
        found = target.log_prior({name: values.double() for name, values in far.items()})
        assert found[3].isfinite() and not found[:3].isfinite().any()


def test_what_cannot_be_sampled():
    with pytest.raises(ValueError, match="k are discrete"):
        PyroTarget(lambda: pyro.sample("k", dist.Bernoulli(0.5)))
    with pytest.raises(ValueError, match="no latent variables"):
        PyroTarget(lambda: pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.zeros(())))


@pytest.mark.parametrize("prior", [priors.Normal(), priors.Laplace()])
def test_a_network_as_a_pyro_model(prior):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(12, 2, generator=generator, dtype=torch.float64)
    data = Data(X, X.sum(-1, keepdim=True))
    target = NetworkTarget(
        networks.mlp(2, 1, hidden=(3,)), likelihoods.Gaussian(), prior, data, torch.ones(1, 1).double()
    )
    model = pyro_model(target)
    parameters = target.initial(1, generator)
    conditioned = pyro.poutine.condition(model, {name: value[0] for name, value in parameters.items()})
    trace = pyro.poutine.trace(conditioned).get_trace()
    torch.testing.assert_close(trace.log_prob_sum(), log_density(target, parameters)[0], rtol=1e-12, atol=1e-10)
    pyro.set_rng_seed(0)
    kernel = pyro.infer.NUTS(model, max_tree_depth=3)
    mcmc = pyro.infer.MCMC(kernel, num_samples=5, warmup_steps=5, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples()["network.layers.0.weight"].shape == (5, 3, 2)
