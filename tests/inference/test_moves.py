"""Every Metropolis-corrected move, against its exact law."""

import pytest
import torch
from oracles import effective_sizes, z_score

from bayesnn.inference import FunctionTarget, run
from bayesnn.inference.flat import density_of
from bayesnn.inference.mcmc import HMC, MALA, MCLMC, NUTS, AdjustedMCLMC, RandomWalk
from bayesnn.inference.mcmc.chain import start
from bayesnn.inference.mcmc.mass import Diagonal

SAMPLERS = {
    "hmc": (HMC, {"num_leapfrog": 4}, [0.5, 1.5]),
    "mala": (MALA, {}, [0.7, 1.8]),
    "random walk": (RandomWalk, {}, [0.5, 3.0]),
    "adjusted mclmc": (AdjustedMCLMC, {"num_leapfrog": 4}, [0.5, 1.5]),
}
CASES = [(name, step_size) for name, (_, _, step_sizes) in SAMPLERS.items() for step_size in step_sizes]


def logistic():
    """Independent logistic variables: exact draws by inverting the distribution function."""

    def log_density(p):
        return (torch.nn.functional.logsigmoid(p["x"]) + torch.nn.functional.logsigmoid(-p["x"])).sum(-1)

    return FunctionTarget(log_density, lambda count, generator: {"x": torch.zeros(count, 3, dtype=torch.float64)})


@pytest.mark.parametrize(("name", "step_size"), CASES)
def test_a_move_keeps_the_law(name, step_size):
    """Exact draws stay exact draws, however coarse the step: their cdf values stay uniform, and so do those of |x|."""
    generator = torch.Generator().manual_seed(1)
    count = 40000
    u = torch.rand(count, 3, generator=generator, dtype=torch.float64)
    density = density_of(logistic())
    point = start(density, torch.logit(u))
    mass = Diagonal(torch.tensor([[1.0, 2.0, 0.5]], dtype=torch.float64))
    sampler = SAMPLERS[name][0](**SAMPLERS[name][1])
    acceptance = []
    for _ in range(3):
        point, info = sampler.move(density, point, torch.full((count,), step_size).double(), mass, generator)
        acceptance.append(info.acceptance)
    assert 0.05 < float(torch.stack(acceptance).mean()) < 0.99
    uniform = point.position.sigmoid() - 0.5
    statistics = torch.cat(
        [uniform, uniform.square() - 1 / 12, uniform.abs() - 0.25, uniform.prod(-1, keepdim=True)], 1
    )
    z = z_score(statistics, 0.0)
    assert z.abs().max() < 4, z
    torch.testing.assert_close((point.log_density, point.gradient), density(point.position))


@pytest.mark.parametrize("name", SAMPLERS)
def test_gaussian_posterior(name):
    precision = torch.tensor([[2.0, 0.9], [0.9, 1.0]], dtype=torch.float64)

    def initial(count, generator):
        return {"x": torch.randn(count, 2, generator=generator, dtype=torch.float64)}

    target = FunctionTarget(lambda p: -0.5 * ((p["x"] @ precision) * p["x"]).sum(-1), initial)
    sampler, options, _ = SAMPLERS[name]
    posterior = run(sampler(num_chains=16, num_warmup=200, num_draws=400, **options), target, seed=3)
    draws = posterior.parameters["x"]
    products = (draws[:, :, None] * draws[:, None, :]).flatten(1)
    assert effective_sizes(posterior, draws).min() > 150
    assert z_score(draws, 0.0, effective_sizes(posterior, draws)).abs().max() < 4
    z = z_score(products, torch.linalg.inv(precision).flatten(), effective_sizes(posterior, products))
    assert z.abs().max() < 4, z
    goal = sampler(**options).target_acceptance
    assert abs(float(posterior.statistics["acceptance"].mean()) - goal) < 0.17


@pytest.mark.parametrize("sampler", [HMC, NUTS, MALA, RandomWalk, AdjustedMCLMC, MCLMC])
def test_impossible_parameters_on_the_way_are_rejected(sampler, monkeypatch):
    """torch.distributions refuse a scale that has overflown to 0 or NaN: here that's a move to reject."""
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)  # torch.compile turns it off for good
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, generator=generator)
    y = 2 * x + 0.1 * torch.randn(20, generator=generator)

    def log_density(p):
        likelihood = torch.distributions.Normal(p[:, :1] * x, p[:, 1:].exp()).log_prob(y).sum(-1)
        return likelihood - 0.5 * p.square().sum(-1)

    target = FunctionTarget(log_density, lambda count, generator: torch.randn(count, 2, generator=generator))
    method = sampler(num_chains=2, num_warmup=100, num_draws=50, initial_step_size=1e3)
    slopes = run(method, target).parameters["position"][:, 0]
    assert bool(torch.isfinite(slopes).all())
    with pytest.raises(ValueError, match="scale"):
        torch.distributions.Normal(0.0, -1.0)  # validation is on again
