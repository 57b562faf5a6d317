"""Mass matrices, and the step sizes that go with them."""

import warnings

import pytest
import torch
from oracles import effective_sizes, z_score

from bayesnn.data import BayesnnWarning
from bayesnn.inference import HMC, NUTS, FunctionTarget, run
from bayesnn.inference.flat import density_of
from bayesnn.inference.mcmc.adaptation import reasonable_step_size
from bayesnn.inference.mcmc.chain import start
from bayesnn.inference.mcmc.low_rank import Window
from bayesnn.inference.mcmc.mass import Diagonal, LowRank, identity_low_rank


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rotated(eigenvalues, seed=0):
    """A covariance with these eigenvalues and random directions: the matrix, and its factor."""
    noise = torch.randn(len(eigenvalues), len(eigenvalues), generator=generator(seed), dtype=torch.float64)
    directions = torch.linalg.qr(noise)[0]
    return directions * eigenvalues @ directions.T, directions * eigenvalues.sqrt()


def gaussian(covariance, factor):
    precision = torch.linalg.inv(covariance)

    def initial(count, generator):
        noise = torch.randn(count, len(factor), generator=generator, dtype=torch.float64)
        return {"x": noise @ factor.T}

    return FunctionTarget(lambda p: -0.5 * ((p["x"] @ precision) * p["x"]).sum(-1), initial)


def some_low_rank():
    diagonal = torch.tensor([[0.5, 1.0, 2.0, 30.0, 0.01]], dtype=torch.float64)
    directions = torch.linalg.qr(torch.randn(5, 2, generator=generator(), dtype=torch.float64))[0]
    return LowRank(diagonal, directions, torch.tensor([50.0, 0.02], dtype=torch.float64))


def test_low_rank_equals_the_dense_matrix():
    mass = some_low_rank()
    root = mass.diagonal[0].sqrt().diag()
    U, stretches = mass.directions, mass.stretches
    inverse = root @ (torch.eye(5) + U @ (stretches - 1).diag() @ U.T) @ root
    S = root @ (torch.eye(5) + U @ (stretches.sqrt() - 1).diag() @ U.T)
    torch.testing.assert_close(S @ S.T, inverse, rtol=1e-12, atol=1e-12)
    z = torch.randn(7, 5, generator=generator(1), dtype=torch.float64)
    for found, expected in (
        (mass.scale(z), z @ S.T),
        (mass.scale_transposed(z), z @ S),
        (mass.momentum(z), z @ torch.linalg.inv(S)),
        (mass.velocity(z), z @ inverse),
        (mass.kinetic(z), 0.5 * ((z @ inverse) * z).sum(-1)),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert some_low_rank().kinetic(z.float()).dtype == torch.float64


def test_the_unit_matrix_in_low_rank_form():
    position = torch.randn(3, 5, generator=generator())
    mass = identity_low_rank(position, 2)
    for function in (mass.momentum, mass.velocity, mass.scale, mass.scale_transposed):
        assert torch.equal(function(position), position)
    assert mass.directions.shape == (5, 2)


def window(draws, gradients):
    seen = Window.start(draws[0])
    for draw, gradient in zip(draws, gradients, strict=True):
        seen = seen.update(draw, gradient)
    return seen


def test_of_a_gaussian_it_is_the_covariance_whatever_the_draws():
    """Draws from anywhere, even another law: their gradients tell the curvature."""
    covariance, _ = rotated(torch.logspace(-2, 2, 6).double())
    draws = 3 + torch.randn(12, 2, 6, generator=generator(), dtype=torch.float64).cumsum(0)
    mass = window(draws, -draws @ torch.linalg.inv(covariance)).mass()
    unit = torch.eye(6).double()
    found = mass.scale(unit).T @ mass.scale(unit)
    whitened = torch.linalg.eigvals(found @ torch.linalg.inv(covariance)).real
    # To the regulariser's 1e-5, and the factor of 2 within which nothing is stretched.
    assert ((whitened > 0.45) & (whitened < 2.2)).all(), whitened


def test_more_parameters_than_draws():
    """Five wide and five narrow directions among 200 parameters, from 80 draws."""
    eigenvalues = torch.ones(200).double()
    eigenvalues[:5], eigenvalues[-5:] = 1e3, 1e-3
    covariance, factor = rotated(eigenvalues)
    draws = torch.randn(40, 2, 200, generator=generator(), dtype=torch.float64) @ factor.T
    precision = torch.linalg.inv(covariance)
    mass = window(draws, -draws @ precision).mass()
    assert mass.directions.shape == (200, 64)
    torch.testing.assert_close(mass.directions.T @ mass.directions, torch.eye(64).double())
    unit = torch.eye(200).double()
    condition = {}
    for name, S in (("low-rank", mass.scale(unit)), ("diagonal", draws.flatten(0, 1).std(0).diag())):
        values = torch.linalg.eigvalsh(S @ precision @ S.T)
        condition[name] = float(values[-1] / values[0])
    assert condition["low-rank"] < condition["diagonal"] / 100, condition


@pytest.mark.parametrize("num_chains", [1, 4, 100])
def test_a_window_remembers_evenly_spaced_points_and_no_more_than_its_bound(num_chains):
    bound = {1: 256, 4: 64, 100: 8}[num_chains]
    seen = Window.start(torch.zeros(num_chains, 1))
    for index in range(700):
        seen = seen.update(torch.full((num_chains, 1), float(index)), torch.full((num_chains, 1), -float(index)))
        assert len(seen.positions) <= bound
    steps = seen.positions[:, 0, 0]
    assert len(steps) >= bound // 2 and torch.equal(steps, torch.arange(len(steps)) * float(seen.stride))
    assert steps[-1] + float(seen.stride) >= 700
    assert torch.equal(seen.gradients, -seen.positions)


@pytest.mark.parametrize("sampler", [HMC, NUTS])
def test_correlated_gaussian(sampler):
    eigenvalues = torch.ones(20).double()
    eigenvalues[:3] = torch.tensor([1e4, 1e3, 100.0])
    covariance, factor = rotated(eigenvalues)
    options = {"num_chains": 8, "num_warmup": 150, "num_draws": 150 if sampler is NUTS else 300}
    options |= {"num_leapfrog": 6} if sampler is HMC else {"max_depth": 4}
    efficiency = {}
    for mass in ("diagonal", "low-rank"):
        posterior = run(sampler(mass=mass, **options), gaussian(covariance, factor), seed=2)
        along = posterior.parameters["x"] @ torch.linalg.inv(factor).T  # standard normal
        sizes = effective_sizes(posterior, along)
        efficiency[mass] = float(sizes.min() / posterior.statistics["num_gradients"].sum())
    assert efficiency["low-rank"] > 5 * efficiency["diagonal"], efficiency
    assert z_score(along, 0.0, sizes).abs().max() < 4
    squares = along.square()
    assert z_score(squares, 1.0, effective_sizes(posterior, squares)).abs().max() < 4


def test_the_identity_stays():
    covariance, factor = rotated(torch.logspace(0, 1, 3).double())
    states = []
    method = HMC(num_warmup=50, num_draws=2, mass="identity", num_leapfrog=3)
    run(method, gaussian(covariance, factor), callbacks=[lambda index, state, info: states.append(state)])
    assert torch.equal(states[-1].mass.inverse, torch.ones(1, 3).double())


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop_at", [4, 17, 39, 50])
def test_resumed_equals_uninterrupted_with_a_low_rank_mass(stop_at, tmp_path):
    covariance, factor = rotated(torch.logspace(0, 3, 8).double())
    target, method = gaussian(covariance, factor), HMC(num_warmup=40, num_draws=20, mass="low-rank", num_leapfrog=3)

    def stop(index, state, info):
        if index + 1 == stop_at:
            raise Stop

    options = {"seed": 5, "checkpoint": tmp_path / "run", "checkpoint_every": 2}
    with pytest.raises(Stop):
        run(method, target, callbacks=[stop], **options)
    resumed, whole = run(method, target, **options), run(method, target, seed=5)
    assert torch.equal(resumed.parameters["x"], whole.parameters["x"])


@pytest.mark.parametrize("first", [1e-4, 1.0, 1e4])
def test_the_search_finds_each_chain_s_step_size(first):
    """One leapfrog step of size e on N(0, s^2) is half accepted where e is of the order of 2 s."""
    scales = torch.tensor([1e-3, 1.0, 1e3]).double().repeat(200)

    def log_density(p):
        return -0.5 * (p["x"].squeeze(-1) / scales[: len(p["x"])]).square()

    def initial(count, generator):
        return {"x": torch.randn(count, 1, generator=generator, dtype=torch.float64) * scales[:count, None]}

    target = FunctionTarget(log_density, initial)
    density, mass = density_of(target), Diagonal(torch.ones(1, 1).double())
    point = start(density, initial(600, generator())["x"])
    found = reasonable_step_size(density, point, torch.full((600,), first).double(), mass, generator(1))
    ratio = (found / scales).view(200, 3).log().mean(0).exp()
    assert ((ratio > 0.5) & (ratio < 8)).all(), ratio


def walled_in(walls, dtype):
    """Standard normal chains; those with walls can't leave their first point, 1."""

    def log_density(p):
        x = p["x"].squeeze(-1)
        left = (x.detach() != 1.0) & torch.tensor(walls)[: len(x)]
        return torch.where(left, torch.nan, -0.5 * x.square())

    def initial(count, generator):
        return {"x": torch.ones(count, 1, dtype=dtype)}

    return FunctionTarget(log_density, initial)


def flat(walls, dtype):
    return FunctionTarget(
        lambda p: 0.0 * p["x"].sum(-1), lambda count, generator: {"x": torch.ones(count, 2, dtype=dtype)}
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("target", "message"), [(flat, "flat, or improper"), (walled_in, "isn't smooth")])
def test_step_sizes_that_cannot_be_adapted_are_errors(target, message, dtype):
    with pytest.raises(ValueError, match=message):
        run(HMC(num_chains=2, num_warmup=30, num_draws=5), target([True, True], dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_collapse_in_warm_up(monkeypatch, dtype):
    """Chains that can't leave, without the search: a warning if it's some of them, an error if it's all."""
    monkeypatch.setattr(
        "bayesnn.inference.mcmc.chain.reasonable_step_size", lambda density, point, step_size, *rest: step_size
    )
    method = HMC(num_chains=2, num_warmup=100, num_draws=5, num_leapfrog=2, initial_step_size=0.3, mass="identity")
    with pytest.raises(ValueError, match="2 of 2 chains have rejected"):
        run(method, walled_in([True, True], dtype))
    with pytest.warns(BayesnnWarning) as caught:
        run(method, walled_in([False, True], dtype))
    assert any("1 of 2 chains have rejected" in str(one.message) for one in caught)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(method, walled_in([False, False], dtype))


def test_wrong_mass():
    with pytest.raises(ValueError, match=r"mass must be one of 'diagonal', 'low-rank', 'identity', found 'dense'"):
        HMC(mass="dense")
