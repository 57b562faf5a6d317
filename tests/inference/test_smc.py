import math

import pytest
import torch
from oracles import LinearGaussian, with_intercept, z_score

from bayesnn import likelihoods, networks, priors
from bayesnn.data import Data
from bayesnn.inference import HMC, MALA, MCLMC, SMC, AdjustedMCLMC, FunctionTarget, NetworkTarget, RandomWalk, run
from bayesnn.inference.warm_start import StartingAt


def linear_model(n=30, d=3, noise_std=0.5):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = X @ torch.tensor([1.0, -2.0, 0.3], dtype=torch.float64) + 0.7
    y = y + noise_std * torch.randn(n, generator=generator, dtype=torch.float64)
    prior_std = torch.tensor([2.0 / math.sqrt(d)] * d + [1.5], dtype=torch.float64)

    def target(count=n):
        return NetworkTarget(
            networks.mlp(d, 1, hidden=()),
            likelihoods.Gaussian(noise_std=noise_std),
            priors.Normal(scale=2.0, bias_scale=1.5),
            Data(X[:count], y[:count, None]),
            torch.ones(1, 1, dtype=torch.float64),
        )

    def oracle(count=n):
        return LinearGaussian(with_intercept(X[:count]), y[:count], noise_std, prior_std)

    return target, oracle


def flat_draws(posterior):
    return torch.cat([posterior.parameters[f"network.layers.0.{name}"].flatten(1) for name in ("weight", "bias")], 1)


SETTINGS = {
    "hmc": {"sampler": HMC(num_leapfrog=6, initial_step_size=0.1)},
    "mala": {"sampler": MALA(initial_step_size=0.1), "num_moves": 8},
    "random walk": {"sampler": RandomWalk(), "num_moves": 20, "resampling": "stratified"},
    "mclmc": {"sampler": AdjustedMCLMC(num_leapfrog=6, initial_step_size=0.1), "resampling": "multinomial"},
    "waste-free": {"waste_free": True, "num_moves": 7},
    "data": {"batch_size": 8},
    "data, waste-free": {"batch_size": 13, "waste_free": True, "num_moves": 7},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_conjugate_posterior_and_evidence(name):
    target, oracle = linear_model()
    seeds, estimates, means, squares = range(6), [], [], []
    for seed in seeds:
        posterior = run(SMC(num_particles=512, **SETTINGS[name]), target(), seed=seed)
        draws = flat_draws(posterior)
        estimates.append(float(posterior.statistics["log_evidence"]))
        means.append(draws.mean(0))
        squares.append((draws - oracle().mean).square().mean(0))
        assert float(posterior.statistics["inverse_temperature"][-1]) == 1
        assert len(posterior) == 512 and posterior.log_weights is None
    # Runs are independent, particles of one run aren't: t statistics over the runs, with 5 degrees of freedom.
    for values, truth in ((means, oracle().mean), (squares, oracle().covariance.diagonal())):
        assert z_score(torch.stack(values), truth).abs().max() < 7
    error = torch.tensor(estimates).double() - oracle().log_evidence
    assert error.abs().max() < 0.5, error
    spread = torch.stack(means).std(0) / oracle().covariance.diagonal().sqrt()
    assert spread.max() < 0.3


def tilted(prior_std=1.0):
    """A scalar pair with a Gaussian prior and a non-Gaussian likelihood; the evidence by quadrature."""

    def log_likelihood(p):
        x = p["x"]
        return -(x[:, 0] - 1.5).abs() - 0.5 * ((x[:, 1] - x[:, 0].square()) / 0.8).square()

    def log_prior(p):
        return -0.5 * (p["x"] / prior_std).square().sum(-1)

    def sample(count, generator):
        return {"x": prior_std * torch.randn(count, 2, generator=generator, dtype=torch.float64)}

    grid = torch.linspace(-7, 7, 1401).double()
    a, b = torch.meshgrid(grid, grid, indexing="ij")
    points = torch.stack([a.flatten(), b.flatten()], -1)
    weight = (log_prior({"x": points}).exp() / (2 * math.pi * prior_std**2)) * 0.01**2
    evidence = float((weight * log_likelihood({"x": points}).exp()).sum())
    return FunctionTarget(log_likelihood, sample, log_prior, sample), evidence


@pytest.mark.parametrize("waste_free", [False, True])
@pytest.mark.parametrize("resampling", ["systematic", "multinomial"])
def test_the_evidence_is_unbiased(waste_free, resampling):
    """With few particles and a poor kernel the estimate is rough, but its mean over 200 runs is the evidence."""
    target, evidence = tilted()
    method = SMC(
        num_particles=24,
        sampler=RandomWalk(initial_step_size=0.5),
        num_moves=2,
        waste_free=waste_free,
        resampling=resampling,
        inverse_temperatures=(0.1, 0.3, 0.6, 1.0),
        adapt=False,
    )
    estimates = torch.stack([run(method, target, seed=seed).statistics["log_evidence"] for seed in range(200)]).exp()
    assert estimates.std() / evidence > 0.05
    assert abs(float(z_score(estimates.unsqueeze(-1), evidence))) < 4


def test_the_evidence_of_a_stream_is_unbiased():
    target, oracle = linear_model(n=6)
    method = SMC(
        num_particles=32,
        sampler=RandomWalk(initial_step_size=0.4),
        num_moves=2,
        batch_size=3,
        inverse_temperatures=(0.1, 0.4, 1.0),
        adapt=False,
    )
    evidence = float(oracle().log_evidence)
    ratios = torch.stack(
        [(run(method, target(), seed=seed).statistics["log_evidence"] - evidence).exp() for seed in range(200)]
    )
    assert ratios.std() > 0.05
    assert abs(float(z_score(ratios.unsqueeze(-1), 1.0))) < 4


def test_parameters_go_by_their_names_whatever_their_order():
    """A prior that lists the parameters in another order than the initial points do."""

    def sample(names):
        def draw(count, generator):
            noise = torch.randn(2, count, generator=generator, dtype=torch.float64)
            values = {"a": noise[0], "b": 5 * noise[1]}
            return {name: values[name] for name in names}

        return draw

    def log_prior(p):
        return -0.5 * p["a"].square() - 0.5 * (p["b"] / 5).square()

    def log_likelihood(p):
        return -0.5 * ((p["a"] - 1) / 0.5).square() - 0.5 * ((p["b"] - 1) / 0.5).square()

    in_order, swapped = (
        run(SMC(num_particles=64), FunctionTarget(log_likelihood, sample(["a", "b"]), log_prior, sample(names)))
        for names in (["a", "b"], ["b", "a"])
    )
    assert torch.equal(in_order.statistics["log_evidence"], swapped.statistics["log_evidence"])
    assert torch.equal(in_order.parameters["a"], swapped.parameters["a"])
    wrong = FunctionTarget(log_likelihood, sample(["a", "b"]), log_prior, sample(["a"]))
    with pytest.raises(ValueError, match="parameters a, b: b missing"):
        run(SMC(num_particles=64), wrong)


def test_separate_modes_keep_their_masses():
    def log_likelihood(p):
        x = p["x"]
        one = math.log(0.3) - 0.5 * ((x - 4) / 0.3).square().sum(-1)
        two = math.log(0.7) - 0.5 * ((x + 4) / 0.3).square().sum(-1)
        return torch.logaddexp(one, two)

    def sample(count, generator):
        return {"x": 5 * torch.randn(count, 2, generator=generator, dtype=torch.float64)}

    target = FunctionTarget(log_likelihood, sample, lambda p: -0.5 * (p["x"] / 5).square().sum(-1), sample)
    shares = []
    for seed in range(10):
        posterior = run(SMC(num_particles=1000), target, seed=seed)
        shares.append((posterior.parameters["x"][:, 0] > 0).double().mean())
    assert abs(float(z_score(torch.stack(shares).unsqueeze(-1), 0.3))) < 4
    assert 0 < float(torch.stack(shares).std()) < 0.06


def test_a_stream_goes_on_where_it_stood():
    target, oracle = linear_model()
    estimates = []
    for seed in range(5):
        first = run(SMC(num_particles=512), target(12), seed=seed)
        both = run(SMC(num_particles=512, num_seen=12), StartingAt(target(), first.parameters), seed=seed + 100)
        estimates.append(float(both.statistics["log_evidence"]))
    draws = flat_draws(both)
    # The evidence of the new rows given the old ones.
    assert abs(sum(estimates) / 5 - float(oracle().log_evidence - oracle(12).log_evidence)) < 0.2
    assert ((draws.mean(0) - oracle().mean) / oracle().covariance.diagonal().sqrt()).abs().max() < 0.3


def test_the_evidence_is_that_of_the_last_step_however_many_are_allowed(tmp_path):
    target, _ = linear_model()
    few, many = (run(SMC(num_particles=64, max_steps=count), target()) for count in (1000, 4000))
    assert torch.equal(few.statistics["log_evidence"], many.statistics["log_evidence"])


def test_a_finished_run_takes_in_nothing_twice(tmp_path):
    target, _ = linear_model()
    first, again = (run(SMC(num_particles=64), target(), checkpoint=tmp_path / "smc") for _ in range(2))
    assert torch.equal(first.statistics["log_evidence"], again.statistics["log_evidence"])
    for name, values in first.parameters.items():
        assert torch.equal(values, again.parameters[name])


def test_impossible_particles_die():
    """Half of the prior has likelihood zero; where the data are possible, they say nothing."""

    def sample(count, generator):
        return {"x": torch.randn(count, 1, generator=generator, dtype=torch.float64)}

    def half(p):
        return torch.where(p["x"][:, 0] > 0, 0.0, -torch.inf) + 0 * p["x"][:, 0]

    target = FunctionTarget(half, sample, lambda p: -0.5 * p["x"].square().sum(-1), sample)
    posterior = run(SMC(num_particles=4000, ess_fraction=0.3), target)
    assert (posterior.parameters["x"] > 0).all()
    assert float(posterior.statistics["log_evidence"]) == pytest.approx(math.log(0.5), abs=0.05)


class Stop(Exception):
    pass


def test_resumed_equals_uninterrupted(tmp_path):
    target, _ = linear_model()
    method = SMC(num_particles=64, batch_size=8)
    whole = run(method, target(), seed=1)

    def stop(index, state, info):
        if index == 3:
            raise Stop

    options = {"seed": 1, "checkpoint": tmp_path / "smc", "checkpoint_every": 2}
    with pytest.raises(Stop):
        run(method, target(), callbacks=[stop], **options)
    resumed = run(method, target(), **options)
    for part in ("parameters", "statistics"):
        for name, value in getattr(whole, part).items():
            assert torch.equal(value, getattr(resumed, part)[name]), name


def test_collapsing_weights_are_an_error():
    def sample(count, generator):
        return {"x": torch.randn(count, 2, generator=generator, dtype=torch.float64)}

    def wall(p):
        return torch.where(p["x"][:, 0] > 3.5, 0.0, -torch.inf)

    target = FunctionTarget(wall, sample, lambda p: -0.5 * p["x"].square().sum(-1), sample)
    with pytest.raises(ValueError, match=r"collapse at inverse temperature 0|no particle has a weight"):
        run(SMC(num_particles=64), target)


def test_too_few_steps_are_an_error():
    target, _ = linear_model()
    with pytest.raises(ValueError, match="reached max_steps = 2 with 0 of 30 rows"):
        run(SMC(num_particles=64, max_steps=2), target())


@pytest.mark.parametrize("mass", ["diagonal", "identity"])
def test_the_sampler_s_mass_is_taken(mass):
    target, _ = linear_model()
    seen = []

    class Watched(HMC):
        def move(self, density, point, step_size, mass, generator):
            seen.append(mass.inverse)
            return super().move(density, point, step_size, mass, generator)

    run(SMC(num_particles=64, sampler=Watched(mass=mass)), target())
    ones = [torch.equal(inverse, torch.ones_like(inverse)) for inverse in seen]
    assert all(ones) if mass == "identity" else not any(ones)


def test_diagnostics_of_particles(caplog):
    posterior = run(SMC(num_particles=64), linear_model()[0]())
    found = posterior.diagnostics(flat_draws(posterior))
    assert found["inverse_temperature"] == 1 and found["num_seen"] == 30 and math.isnan(found["r_hat"])
    assert found["log_evidence"] == float(posterior.statistics["log_evidence"])
    assert found["ess_bulk"] > 10 and not caplog.records


@pytest.mark.parametrize("sampler", [MCLMC(), HMC, "hmc", None])
def test_what_is_no_sampler(sampler):
    with pytest.raises(TypeError, match=r"sampler must be a sampler with an acceptance step .*found"):
        SMC(sampler=sampler)


def test_wrong_use():
    with pytest.raises(ValueError, match="mass must be 'diagonal' or 'identity'"):
        SMC(sampler=HMC(mass="low-rank"))
    target, _ = linear_model()
    plain = FunctionTarget(lambda p: -p["x"].square().sum(-1), lambda count, generator: {"x": torch.zeros(count, 2)})
    with pytest.raises(ValueError, match="draw from its prior"):
        run(SMC(), plain)
    with pytest.raises(ValueError, match="num_seen must be below the target's 30 rows"):
        run(SMC(num_seen=30), target())
    for options in (
        {"num_particles": 1},
        {"num_moves": 0},
        {"ess_fraction": 1.0},
        {"resampling": "none"},
        {"batch_size": 0},
        {"num_particles": 10, "waste_free": True},
        {"inverse_temperatures": (0.5,)},
        {"inverse_temperatures": (0.5, 0.2, 1.0)},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            SMC(**options)
