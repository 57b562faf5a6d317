import math
import warnings

import pytest
import torch
from oracles import effective_sizes, grid_moments, z_score

from bayesnn.data import BayesnnWarning
from bayesnn.inference import FunctionTarget, run
from bayesnn.inference.flat import density_of
from bayesnn.inference.mcmc import NUTS
from bayesnn.inference.mcmc.chain import start
from bayesnn.inference.mcmc.hmc import leapfrog
from bayesnn.inference.mcmc.mass import Diagonal
from bayesnn.inference.mcmc.nuts import is_turning, nuts_move

PRECISION = torch.tensor([[2.0, 0.9], [0.9, 1.0]], dtype=torch.float64)


def gaussian():
    def initial(count, generator):
        return {"x": torch.randn(count, 2, generator=generator, dtype=torch.float64)}

    return FunctionTarget(lambda p: -0.5 * ((p["x"] @ PRECISION) * p["x"]).sum(-1), initial)


def logistic():
    """Independent logistic variables: exact draws by inverting the distribution function."""

    def log_density(p):
        return (torch.nn.functional.logsigmoid(p["x"]) + torch.nn.functional.logsigmoid(-p["x"])).sum(-1)

    return FunctionTarget(log_density, lambda count, generator: {"x": torch.zeros(count, 3, dtype=torch.float64)})


@pytest.mark.parametrize("max_depth", [1, 2, 3, 6])
@pytest.mark.parametrize("step_size", [0.4, 1.1, 2.2])
def test_a_move_keeps_the_law(max_depth, step_size):
    """Exact draws stay exact draws, however coarse the step: their cdf values stay uniform, and so do those of |x|."""
    generator = torch.Generator().manual_seed(max_depth)
    count = 20000
    u = torch.rand(count, 3, generator=generator, dtype=torch.float64)
    density = density_of(logistic())
    point = start(density, torch.logit(u))
    mass = Diagonal(torch.tensor([[1.0, 2.0, 0.5]], dtype=torch.float64))
    for _ in range(2):
        point, info = nuts_move(density, point, torch.full((count,), step_size).double(), mass, generator, max_depth)
    moved = point.position.sigmoid()
    assert (moved != u).double().mean() > 0.5
    uniform = moved - 0.5
    statistics = torch.cat(
        [uniform, uniform.square() - 1 / 12, uniform.abs() - 0.25, uniform.prod(-1, keepdim=True)], 1
    )
    z = z_score(statistics, 0.0)
    assert z.abs().max() < 4, z
    value, gradient = density(point.position)
    torch.testing.assert_close((point.log_density, point.gradient), (value, gradient))
    assert info.num_gradients.max() <= 2**max_depth - 1


def reference(density, point, momentum, step, mass, directions, max_depth):
    """How many leapfrog steps one chain takes, by the recursive definition on the list of all momenta."""

    left = right = (point, momentum)
    momenta, total = [momentum], 0
    for depth in range(max_depth):
        forwards = directions[depth]
        edge, new = (right if forwards else left), []
        for _ in range(2**depth):
            edge = leapfrog(density, *edge, step if forwards else -step, mass, 1)
            new.append(edge[1])
        # The trajectory ends at the first balanced subtree that turns.
        for length in range(1, 2**depth + 1):
            size, stop = 2, False
            while length % size == 0:
                stop = stop or turns_at(mass, new[length - size : length])
                size *= 2
            if stop:
                return total + length
        total += 2**depth
        momenta = momenta + new if forwards else new[::-1] + momenta
        left, right = (left, edge) if forwards else (edge, right)
        if turns_at(mass, momenta):
            return total
    return total


def turns_at(mass, momenta):
    return bool(is_turning(mass, momenta[0], momenta[-1], torch.stack(momenta).sum(0)))


def test_trees_end_where_the_definition_says():
    density, mass = density_of(gaussian()), Diagonal(torch.tensor([[1.0, 0.7]], dtype=torch.float64))
    count, seed, max_depth = 40, 3, 6
    generator = torch.Generator().manual_seed(seed)
    point = start(density, torch.randn(count, 2, generator=generator, dtype=torch.float64))
    step = torch.linspace(0.02, 0.9, count, dtype=torch.float64)
    state = generator.get_state()
    _, info = nuts_move(density, point, step, mass, generator, max_depth)
    # The same momenta and directions, drawn in the same order.
    generator.set_state(state)
    momentum = mass.momentum(torch.randn(count, 2, generator=generator, dtype=torch.float64))
    alive = torch.ones(count, dtype=torch.bool)
    directions = torch.zeros(max_depth, count, dtype=torch.bool)
    steps = {}
    for depth in range(max_depth):
        directions[depth] = torch.rand(count, generator=generator, dtype=torch.float64) < 0.5
        rows = [int(row) for row in alive.nonzero()]
        lengths = []
        for row in rows:
            own = type(point)(*(values[row : row + 1] for values in point))
            one = step[row : row + 1]
            found = reference(density, own, momentum[row : row + 1], one, mass, directions[: depth + 1, row], depth + 1)
            goes_on = reference(
                density, own, momentum[row : row + 1], one, mass, [*directions[: depth + 1, row], True], depth + 2
            )
            lengths.append(found - (2**depth - 1))
            if found < 2 ** (depth + 1) - 1 or goes_on == found:
                alive[row], steps[row] = False, found
            else:
                steps[row] = found
        for _ in range(max(lengths)):  # one number for each leaf, until all have stopped
            torch.rand(count, generator=generator, dtype=torch.float64)
        torch.rand(count, generator=generator, dtype=torch.float64)
        if not alive.any():
            break
    assert torch.equal(info.num_gradients, torch.tensor([float(steps[row]) for row in range(count)]).double())
    assert len(info.num_gradients.unique()) > 6


def test_gaussian_posterior():
    posterior = run(NUTS(num_chains=8, num_warmup=150, num_draws=400), gaussian(), seed=1)
    draws, covariance = posterior.parameters["x"], torch.linalg.inv(PRECISION)
    products = (draws[:, :, None] * draws[:, None, :]).flatten(1)
    # NUTS' draws are close to independent, or better, here: half their number is a safe effective size.
    assert z_score(draws, 0.0, len(draws) / 2).abs().max() < 4
    assert z_score(products, covariance.flatten(), len(draws) / 2).abs().max() < 4
    assert 0.6 < posterior.statistics["acceptance"].mean() < 0.95


def test_banana():
    def log_density(p):
        a, b = p["x"].unbind(-1)
        return -0.5 * a.square() - 0.5 * (b - a.square()).square()

    target = FunctionTarget(log_density, lambda count, generator: {"x": torch.zeros(count, 2, dtype=torch.float64)})
    posterior = run(NUTS(num_chains=8, num_warmup=150, num_draws=250), target, seed=2)
    draws = posterior.parameters["x"]
    exact = grid_moments(
        lambda a, b: -0.5 * a.square() - 0.5 * (b - a.square()).square(),
        torch.linspace(-6, 6, 601).double(),
        torch.linspace(-4, 36, 4001).double(),
    )
    mean = torch.tensor([exact["mean_a"], exact["mean_b"]]).double()
    assert z_score(draws, mean, effective_sizes(posterior, draws)).abs().max() < 4
    var = torch.tensor([exact["var_a"], exact["var_b"]]).double()
    squares = (draws - mean).square()
    assert z_score(squares, var, effective_sizes(posterior, squares)).abs().max() < 4


@pytest.mark.parametrize("wall", [torch.nan, -torch.inf, torch.inf])
def test_energies_that_are_not_finite_end_the_tree(wall):
    def log_density(p):
        x = p["x"].squeeze(-1)
        return torch.where(x.abs() < 1, -0.5 * x.square(), wall * torch.ones_like(x))

    target = FunctionTarget(log_density, lambda count, generator: {"x": torch.zeros(count, 1, dtype=torch.float64)})
    with pytest.warns(BayesnnWarning, match="diverged"):
        posterior = run(NUTS(num_chains=4, num_warmup=0, num_draws=200, initial_step_size=0.5), target)
    x = posterior.parameters["x"]
    assert torch.isfinite(x).all() and x.abs().max() < 1 and x.std() > 0.3
    assert torch.isfinite(posterior.statistics["energy"]).all()


def test_float32_and_quiet_where_all_is_well():
    def initial(count, generator):
        return {"x": torch.randn(count, 2, generator=generator)}

    target = FunctionTarget(lambda p: -0.5 * p["x"].square().sum(-1), initial)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior = run(NUTS(num_chains=4, num_warmup=100, num_draws=200), target)
    assert posterior.parameters["x"].dtype == torch.float32
    assert abs(float(posterior.parameters["x"].var()) - 1) < 4 * math.sqrt(2 / 800)


def test_wrong_depth():
    with pytest.raises(ValueError, match="max_depth"):
        NUTS(max_depth=0)
