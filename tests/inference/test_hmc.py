import math
import warnings

import pytest
import torch
from oracles import LinearGaussian, effective_sizes, grid_moments, with_intercept, z_score

from bayesnn import likelihoods, networks, priors
from bayesnn.data import BayesnnWarning, Data
from bayesnn.inference import HMC, FunctionTarget, NetworkTarget, run
from bayesnn.inference.flat import density_of
from bayesnn.inference.mcmc.adaptation import DualAveraging, Welford, window_ends
from bayesnn.inference.mcmc.chain import Point, start
from bayesnn.inference.mcmc.hmc import hmc_move, leapfrog
from bayesnn.inference.mcmc.mass import Diagonal


def linear_model(temperature=1.0, d=3, n=30, noise_std=0.5):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(n, d, generator=generator, dtype=torch.float64) @ torch.tensor(
        [[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 3.0]], dtype=torch.float64
    )
    y = X @ torch.tensor([1.0, -2.0, 0.3], dtype=torch.float64) + 0.7
    y = y + noise_std * torch.randn(n, generator=generator, dtype=torch.float64)
    prior_std = torch.tensor([2.0 / math.sqrt(d)] * d + [1.5], dtype=torch.float64)
    oracle = LinearGaussian(with_intercept(X), y, noise_std, prior_std, temperature)
    target = NetworkTarget(
        networks.mlp(d, 1, hidden=()),
        likelihoods.Gaussian(noise_std=noise_std),
        priors.Normal(scale=2.0, bias_scale=1.5),
        Data(X, y[:, None]),
        torch.ones(1, 1, dtype=torch.float64),
        temperature,
    )
    return target, oracle


def flat_draws(posterior):
    """(S, p): weights, then the bias."""
    return torch.cat([posterior.parameters[f"network.layers.0.{name}"].flatten(1) for name in ("weight", "bias")], 1)


def assert_moments(posterior, draws, mean, covariance):
    z = z_score(draws, mean, effective_sizes(posterior, draws))
    assert z.abs().max() < 4, z
    centred = draws - mean
    products = (centred[:, :, None] * centred[:, None, :]).flatten(1)
    z = z_score(products, covariance.flatten(), effective_sizes(posterior, products))
    assert z.abs().max() < 4, z


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_linear_gaussian_posterior(temperature):
    target, oracle = linear_model(temperature)
    posterior = run(HMC(num_chains=8, num_warmup=200, num_draws=500, num_leapfrog=8), target, seed=1)
    draws = flat_draws(posterior)
    assert effective_sizes(posterior, draws).min() > 1000
    assert_moments(posterior, draws, oracle.mean, oracle.covariance)
    X = torch.linspace(-2, 2, 15, dtype=torch.float64).reshape(5, 3)
    values = posterior.posterior(target.network, X).values.squeeze(-1)
    assert_moments(posterior, values, *oracle.predictive(with_intercept(X)))


def test_float32_agrees():
    target, oracle = linear_model()
    data = Data(target.data.X.float(), target.data.Y.float())
    single = NetworkTarget(target.network.float(), target.likelihood, target.prior, data, torch.ones(1, 1))
    posterior = run(HMC(num_chains=8, num_warmup=200, num_draws=300, num_leapfrog=8), single, seed=2)
    draws = flat_draws(posterior)
    assert draws.dtype == torch.float32
    assert_moments(posterior, draws.double(), oracle.mean, oracle.covariance)


def test_a_fixed_step_size_without_warm_up_is_exact_too():
    """The law doesn't rest on adaptation: a coarse step size is corrected by the acceptance step."""
    precision = torch.tensor([[2.0, 0.9], [0.9, 1.0]], dtype=torch.float64)

    def initial(count, generator):
        return {"x": torch.randn(count, 2, generator=generator, dtype=torch.float64)}

    target = FunctionTarget(lambda p: -0.5 * ((p["x"] @ precision) * p["x"]).sum(-1), initial)
    posterior = run(HMC(num_chains=16, num_warmup=0, num_draws=1000, num_leapfrog=2, initial_step_size=0.9), target)
    acceptance = posterior.statistics["acceptance"].mean()
    assert 0.3 < acceptance < 0.95
    assert torch.all(posterior.statistics["step_size"] == 0.9)
    assert_moments(posterior, posterior.parameters["x"], torch.zeros(2).double(), torch.linalg.inv(precision))


def test_learned_noise_is_sampled_with_the_weights():
    """y = w x + noise: the joint posterior of w and log noise by quadrature on a grid."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(8, 1, generator=generator, dtype=torch.float64)
    y = 0.8 * x + 0.5 * torch.randn(8, 1, generator=generator, dtype=torch.float64)
    network = torch.nn.Linear(1, 1, bias=False)
    target = NetworkTarget(
        network, likelihoods.Gaussian(), priors.Normal(scale=1.0), Data(x, y), torch.ones(1, 1).double()
    )
    posterior = run(HMC(num_chains=8, num_warmup=300, num_draws=700, num_leapfrog=6), target, seed=4)
    draws = torch.cat([values.flatten(1) for values in posterior.parameters.values()], 1)

    def log_density(w, log_std):
        residual = (y - x * w.flatten()).square().sum(0).reshape(w.shape)
        log_likelihood = -0.5 * residual / (2 * log_std).exp() - 8 * log_std
        return log_likelihood - 0.5 * w.square() - 0.5 * ((log_std - math.log(0.3)) / 1.5).square()

    exact = grid_moments(log_density, torch.linspace(-3, 5, 801).double(), torch.linspace(-3, 3, 801).double())
    mean = torch.tensor([exact["mean_a"], exact["mean_b"]], dtype=torch.float64)
    covariance = torch.tensor([[exact["var_a"], exact["cov"]], [exact["cov"], exact["var_b"]]], dtype=torch.float64)
    assert_moments(posterior, draws, mean, covariance)


def started(num_chains=3):
    target, _ = linear_model()
    density = density_of(target)
    position = torch.randn(num_chains, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return density, start(density, position)


def test_leapfrog_is_reversible_and_keeps_volume():
    density, point = started()
    mass = Diagonal(torch.tensor([[0.5, 1.0, 2.0, 3.0]]).double())
    momentum = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = torch.tensor([0.005, 0.01, 0.03]).double()
    there, momentum_there = leapfrog(density, point, momentum, step, mass, 7)
    back, momentum_back = leapfrog(density, there, -momentum_there, step, mass, 7)
    torch.testing.assert_close(back.position, point.position, rtol=0, atol=1e-10)
    torch.testing.assert_close(-momentum_back, momentum, rtol=0, atol=1e-10)
    torch.testing.assert_close(back.log_density, point.log_density)

    # The map is linear on a Gaussian target: its Jacobian's columns are differences.
    def end(z):
        here = Point(z[:, :4], *density(z[:, :4]))
        there, momentum = leapfrog(density, here, z[:, 4:], step[:1].expand(len(z)), mass, 7)
        return torch.cat([there.position, momentum], 1)

    origin = torch.zeros(1, 8, dtype=torch.float64)
    jacobian = end(torch.eye(8, dtype=torch.float64)) - end(origin)
    assert float(torch.linalg.det(jacobian)) == pytest.approx(1, abs=1e-9)


def test_energy_error_shrinks_with_the_square_of_the_step_size():
    density, point = started()
    mass = Diagonal(torch.ones(1, 4).double())
    momentum = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before = mass.kinetic(momentum) - point.log_density
    errors = []
    for halvings in range(4):  # the same time each
        step = torch.full((3,), 0.004 / 2**halvings).double()
        there, end = leapfrog(density, point, momentum, step, mass, 8 * 2**halvings)
        errors.append((mass.kinetic(end) - there.log_density - before).abs().max())
    ratios = torch.stack(errors[:-1]) / torch.stack(errors[1:])
    assert ((ratios > 3.6) & (ratios < 4.4)).all(), ratios


def test_momentum_matches_the_mass():
    """With next to no step, the energy after the draw of a momentum is chi-squared with P degrees of freedom."""
    density, point = started(num_chains=2000)
    mass = Diagonal(torch.tensor([[1e-4, 1.0, 2.0, 300.0]]).double())
    step_size = torch.full((2000,), 1e-8).double()
    point, info = hmc_move(density, point, step_size, mass, torch.Generator().manual_seed(1), 1)
    kinetic = info.energy + point.log_density
    assert abs(z_score(2 * kinetic[:, None], 4.0)) < 4 and abs(kinetic.mul(2).var() - 8) < 4 * math.sqrt(2000) / 50


def pathological(kind):
    def log_density(parameters):
        x = parameters["x"].squeeze(-1)
        wall = {"nan": torch.nan, "inf": -torch.inf, "plus inf": torch.inf}[kind]
        return torch.where(x.abs() < 1, -0.5 * x.square(), wall * torch.ones_like(x))

    return FunctionTarget(log_density, lambda count, generator: {"x": torch.zeros(count, 1, dtype=torch.float64)})


@pytest.mark.parametrize("kind", ["nan", "inf", "plus inf"])
def test_energies_that_are_not_finite_are_rejected_and_reported(kind):
    with pytest.warns(BayesnnWarning, match=r"% of the trajectories after warm-up diverged"):
        posterior = run(
            HMC(num_chains=4, num_warmup=0, num_draws=300, num_leapfrog=3, initial_step_size=0.5), pathological(kind)
        )
    x = posterior.parameters["x"]
    assert torch.isfinite(x).all() and x.abs().max() < 1 and x.std() > 0.3
    assert torch.isfinite(posterior.statistics["energy"]).all()


def test_divergences_on_a_funnel_are_reported():
    def log_density(parameters):
        v, x = parameters["v"], parameters["x"]
        return -v.square().sum(-1) / 18 - 0.5 * (x.square() * (-v).exp()).sum(-1) - 4.5 * v.sum(-1)

    def initial(count, generator):
        return {
            name: torch.randn(count, k, generator=generator, dtype=torch.float64) for name, k in (("v", 1), ("x", 9))
        }

    method = HMC(num_chains=4, num_warmup=0, num_draws=200, num_leapfrog=4, initial_step_size=0.7)
    with pytest.warns(BayesnnWarning, match="diverged"):
        posterior = run(method, FunctionTarget(log_density, initial))
    assert posterior.statistics["diverging"].mean() > 0.01


def test_well_behaved_targets_are_not_reported():
    target, _ = linear_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(HMC(num_chains=2, num_warmup=100, num_draws=50), target)


def test_starting_points_must_be_finite():
    target = FunctionTarget(lambda p: p["x"].log().sum(-1), lambda count, generator: {"x": torch.zeros(count, 1)})
    with pytest.raises(ValueError, match="isn't finite at the initial points"):
        run(HMC(), target)


def test_warm_up_freezes_and_reaches_its_goal():
    target, oracle = linear_model()
    states = []
    method = HMC(num_chains=4, num_warmup=300, num_draws=200, num_leapfrog=8, target_acceptance=0.8)
    posterior = run(method, target, callbacks=[lambda index, state, info: states.append((state, info))])
    frozen, _ = states[299]
    for state, info in states[300:]:
        assert torch.equal(info.step_size, frozen.step_size.log_average.exp())
        assert torch.equal(state.mass.inverse, frozen.mass.inverse)
    assert not torch.equal(states[250][1].step_size, states[251][1].step_size)
    assert 0.7 < posterior.statistics["acceptance"].mean() < 0.95
    ratio = frozen.mass.inverse[0] / oracle.covariance.diagonal()
    assert ((ratio > 0.7) & (ratio < 1.4)).all(), ratio


@pytest.mark.parametrize("num_warmup", [1, 3, 5, 9, 10, 20, 50, 300, 1000])
def test_any_length_of_warm_up_leaves_a_sane_step_size(num_warmup):
    target, _ = linear_model()
    method = HMC(num_chains=2, num_warmup=num_warmup, num_draws=1, num_leapfrog=2)
    generator = torch.Generator().manual_seed(0)
    state = method.init(target, generator)
    proposed = [state.step_size.log_step_size]
    for _ in range(num_warmup):
        state, info = method.step(target, state, generator)
        proposed.append(state.step_size.log_step_size)
    state, info = method.step(target, state, generator)
    # What is used is an average of what dual averaging has proposed, never a number from nowhere.
    log_step_size, proposed = info.step_size.log(), torch.stack(proposed)
    assert (log_step_size >= proposed.amin(0) - 1e-9).all() and (log_step_size <= proposed.amax(0) + 1e-9).all()
    if num_warmup < 20:  # too few to learn a mass from
        assert torch.equal(state.mass.inverse, torch.ones_like(state.mass.inverse))
    ends = window_ends(num_warmup)
    assert ends == sorted(set(ends)) and all(0 < end <= num_warmup for end in ends)


def test_dual_averaging_finds_the_step_size_of_a_known_acceptance_curve():
    state = DualAveraging.start(torch.tensor([0.01, 3.0]).double())
    for _ in range(2000):
        state = state.update((-state.log_step_size.exp()).exp(), 0.8)  # acceptance exp(-step): 0.8 at -log 0.8
    torch.testing.assert_close(state.log_average.exp(), torch.full((2,), -math.log(0.8)).double(), rtol=0.02, atol=0)


def test_running_variance_equals_the_batch_s():
    positions = torch.randn(40, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 100
    state = Welford.start(positions[0])
    for position in positions:
        state = state.update(position)
    expected = positions.var(0).mean(0, keepdim=True) * 40 / 45 + 1e-3 * 5 / 45
    torch.testing.assert_close(state.variance(), expected)


def test_draws_are_chain_by_chain():
    target, _ = linear_model()
    kept = []
    method = HMC(num_chains=3, num_warmup=20, num_draws=5, num_leapfrog=2)
    posterior = run(method, target, callbacks=[lambda index, state, info: kept.append(state.point.position)])
    chains = torch.stack(kept[20:], 1)  # (chains, draws, P)
    weights = posterior.by_chain(posterior.parameters["network.layers.0.weight"]).flatten(2)
    assert torch.equal(weights, chains[..., :3]) and len(posterior) == 15


@pytest.mark.parametrize(
    "options",
    [
        {"num_chains": 0},
        {"num_draws": 0},
        {"num_leapfrog": 0},
        {"num_warmup": -1},
        {"target_acceptance": 1.0},
        {"initial_step_size": 0.0},
    ],
)
def test_wrong_settings(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        HMC(**options)
