import itertools

import pytest
import torch
from oracles import effective_sizes, z_score

from bayesnn.inference import run
from bayesnn.inference.mcmc.learned import (
    BlockMetropolis,
    BlockProposal,
    BlockTarget,
    Gibbs,
    Grid,
    GridBlocks,
    MixtureBlocks,
    MixtureField,
    ProposalTarget,
    ProposalTraining,
)
from bayesnn.inference.mcmc.learned.target import Group

TRIANGLE = torch.tensor([[0, 1], [1, 2], [0, 2]])


class Exact:
    """The exact conditional as a proposal."""

    fingerprint = "exact"

    def check(self, block_size, num_features, cardinality):
        pass

    def __call__(self, conditional):
        return conditional.exact()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def enumerated(grid):
    rows, columns, cardinality = grid.unary.shape
    states = torch.tensor(list(itertools.product(range(cardinality), repeat=rows * columns)))
    return states, grid.log_density(states).softmax(-1)


def untrained(model, blocks):
    return BlockProposal.for_blocks(model, blocks, hidden=32)


def transition_matrix(grid, group, proposal):
    """Of one visit to a group of one block, from the proposal's probabilities, without any sampling."""
    states, _ = enumerated(grid)
    log_p = grid.log_density(states)
    block = group.variables[0].tolist()
    others = [index for index in range(states.shape[1]) if index not in block]
    matrix = torch.zeros(len(states), len(states), dtype=torch.float64)
    with torch.no_grad():
        proposed = proposal(group.conditionals(states))
        back = proposed.log_prob(states[:, group.variables])[:, 0]
        for index in range(len(states)):
            reachable = (states[:, others] == states[index, others]).all(-1)
            own = proposal(group.conditionals(states[index].expand(len(states), -1)))
            forth = own.log_prob(states[:, group.variables])[:, 0]
            ratio = log_p - log_p[index] + back[index] - forth
            matrix[index] = torch.where(reachable, (forth + ratio.clamp_max(0)).exp(), 0.0)
            matrix[index, index] += 1 - matrix[index].sum()
    return matrix


@pytest.mark.parametrize(("height", "width"), [(2, 2), (1, 3), (2, 3)])
def test_the_law_is_stationary_whatever_the_proposal(height, width):
    """pi P = pi and detailed balance, to 1e-12, on all 64 states of a grid of 2 x 3, for an untrained network."""
    grid = Grid.random(2, 3, 2, 1.5, seeded(1))
    _, probabilities = enumerated(grid)
    blocks = grid.blocks(height, width)
    target = BlockTarget(grid, blocks, untrained(grid, blocks))
    assert len(target.groups) == len(blocks)
    for group in target.groups:
        matrix = transition_matrix(grid, group, target.proposal)
        assert (matrix >= -1e-15).all()
        flow = probabilities[:, None] * matrix
        torch.testing.assert_close(flow, flow.T, rtol=0, atol=1e-12)
        torch.testing.assert_close(probabilities @ matrix, probabilities, rtol=0, atol=1e-12)


def test_a_visit_to_several_blocks_at_once_samples_the_product_of_their_matrices():
    grid = Grid.random(2, 2, 2, 1.5, seeded(1))
    blocks, states = grid.blocks(1, 1), enumerated(grid)[0]
    target = BlockTarget(grid, blocks, untrained(grid, blocks))
    assert sorted(group.variables.flatten().tolist() for group in target.groups) == [[0, 3], [1, 2]]
    start, count = 5, 40000
    values = states[start].repeat(count, 1)
    with torch.no_grad():
        values[:, target.groups[0].variables], _ = BlockMetropolis().visit(target, target.groups[0], values, seeded(2))
    found = torch.bincount((values * torch.tensor([8, 4, 2, 1])).sum(-1), minlength=16).double() / count
    singles = [
        transition_matrix(grid, Group(torch.tensor([[site]]), grid.conditionals([blocks[site]])), target.proposal)
        for site in target.groups[0].variables.flatten().tolist()
    ]
    expected = (singles[0] @ singles[1])[start]
    assert ((found - expected) / (expected * (1 - expected) / count + 1e-12).sqrt()).abs().max() < 4


@pytest.mark.parametrize("cardinality", [2, 3])
def test_chains_have_the_exact_marginals(cardinality):
    grid = Grid.random(3, 3 if cardinality == 2 else 2, cardinality, 1.0, seeded(2))
    states, probabilities = enumerated(grid)
    exact = torch.stack([(states == value).double().T @ probabilities for value in range(cardinality)]).T
    blocks = grid.blocks(2, 2)
    for method, target in (
        (BlockMetropolis(num_chains=64, num_draws=500), BlockTarget(grid, blocks, untrained(grid, blocks))),
        (Gibbs(num_chains=64, num_draws=200), BlockTarget(grid, grid.blocks(1, 1))),
        (Gibbs(num_chains=64, num_draws=100), BlockTarget(grid, blocks)),
    ):
        posterior = run(method, target, seed=3)
        values = posterior.parameters["values"]
        found = torch.stack([(values == value).double() for value in range(cardinality - 1)], -1).flatten(1)
        z = z_score(found, exact[:, :-1].flatten(), effective_sizes(posterior, found))
        assert z.abs().max() < 4, z


def mixture_moments(field):
    """E x and E x x^T of a mixture field: the sum over all K^V Gaussians, by dense matrices."""
    size, components = field.means.shape
    laplacian = torch.zeros(size, size, dtype=torch.float64)
    for (i, j), pull in zip(field.edges.tolist(), field.coupling.tolist(), strict=True):
        laplacian[[i, j], [i, j]] += pull
        laplacian[[i, j], [j, i]] -= pull
    log_masses, means, squares = [], [], []
    for choice in itertools.product(range(components), repeat=size):
        pick = torch.arange(size), torch.tensor(choice)
        m, covariance = field.means[pick], field.stds[pick].square().diag()
        # The normalising constant of N(x; m, S) exp(-x' L x / 2), by the matrix determinant lemma.
        inverse = torch.linalg.inv(torch.eye(size).double() + laplacian @ covariance)
        log_masses.append(
            field.log_weights[pick].sum() + 0.5 * torch.logdet(inverse) - 0.5 * m @ inverse @ laplacian @ m
        )
        mean = inverse.T @ m
        means.append(mean)
        squares.append(covariance @ inverse + mean.outer(mean))
    weights = torch.stack(log_masses).softmax(0)
    return (weights[:, None] * torch.stack(means)).sum(0), (weights[:, None, None] * torch.stack(squares)).sum(0)


@pytest.mark.parametrize("components", [1, 2])
def test_exact_draws_of_real_variables_stay_exact(components):
    """One sweep after another of an untrained network, from draws of the joint law itself: a chain for each draw."""
    field = MixtureField.random(TRIANGLE, components, 2.0, seeded(4))
    blocks = field.blocks([[0, 1], [1, 2]])
    count, generator = 20000, seeded(5)
    joint = field.conditionals(field.blocks([[0, 1, 2]]))(torch.zeros(count, 3).double()).exact()
    values = joint.sample(generator).squeeze(1)
    mean, second = mixture_moments(field)
    target, method = BlockTarget(field, blocks, untrained(field, blocks)), BlockMetropolis(num_chains=count)
    state, accepted = method.init(target, generator)._replace(values=values), 0.0
    for _ in range(10):
        state, info = method.step(target, state, generator)
        accepted = float(info.acceptance.mean())
    assert 0.02 < accepted < 0.95
    assert (state.values != values).any(-1).double().mean() > 0.2
    for draws in (values, state.values):
        assert z_score(draws, mean).abs().max() < 4
        products = (draws[:, :, None] * draws[:, None, :]).flatten(1)
        assert z_score(products, second.flatten()).abs().max() < 4


@pytest.mark.parametrize("model", ["grid", "mixture"])
def test_conditionals_change_as_the_full_density_does(model):
    generator = seeded(7)
    if model == "grid":
        field = Grid.random(4, 5, 3, 1.0, generator)
        blocks = field.blocks(2, 2, 2)
    else:
        edges = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [1, 3], [3, 4]])
        field = MixtureField.random(edges, 2, 3.0, generator)
        blocks = field.blocks([[0, 1], [2, 3], [3, 4]])
    old, new = field.initial(6, generator), field.initial(6, generator)
    conditional = field.conditionals(blocks)(old)
    for index, block in enumerate(blocks):
        values = old.clone()
        values[:, block.variables] = new[:, block.variables]
        wanted = field.log_density(values) - field.log_density(old)
        variables = torch.stack([each.variables for each in blocks])
        before, after = conditional.log_density(old[:, variables]), conditional.log_density(values[:, variables])
        torch.testing.assert_close((after - before)[:, index], wanted, rtol=1e-10, atol=1e-10)


def test_exact_conditionals_are_always_accepted():
    field = MixtureField.random(TRIANGLE, 2, 2.0, seeded(8))
    grid = Grid.random(3, 4, 2, 1.0, seeded(8))
    for target in (
        BlockTarget(field, field.blocks([[0, 1], [1, 2]]), Exact()),
        BlockTarget(grid, grid.blocks(2, 2), Exact()),
    ):
        posterior = run(BlockMetropolis(num_chains=50, num_draws=40, num_warmup=5), target)
        acceptance = posterior.statistics["acceptance"]
        torch.testing.assert_close(acceptance, torch.ones_like(acceptance), rtol=0, atol=1e-9)


def test_exact_laws_of_real_blocks_are_normalised():
    """By quadrature over a square, and proportional to the conditional."""
    field = MixtureField.random(TRIANGLE, 2, 2.0, seeded(9))
    axis = torch.linspace(-9, 9, 301, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis).unsqueeze(1)
    blocks = field.blocks([[0, 1]])
    values = torch.full((len(points), 3), 0.7, dtype=torch.float64)
    conditional = field.conditionals(blocks)(values)
    law = conditional.exact().log_prob(points)[:, 0]
    assert float(law.exp().sum() * (axis[1] - axis[0]) ** 2) == pytest.approx(1, abs=1e-6)
    constant = conditional.log_density(points)[:, 0] - law
    torch.testing.assert_close(constant, constant[:1].expand_as(constant), rtol=0, atol=1e-8)


def test_detailed_balance_of_real_blocks():
    """p(x) q(x') a(x, x') is symmetric between all points of a grid over two variables, and q has mass one."""
    field = MixtureField.random(TRIANGLE, 2, 2.0, seeded(9))
    blocks = field.blocks([[0, 1]])
    proposal = untrained(field, blocks)
    axis = torch.linspace(-3, 3, 13, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    values = torch.cat([points, torch.full((len(points), 1), 0.7, dtype=torch.float64)], 1)
    log_p, conditional = field.log_density(values), field.conditionals(blocks)(values)
    with torch.no_grad():
        forth = proposal(conditional).log_prob(points.unsqueeze(1))[:, 0]
    local = conditional.log_density(points.unsqueeze(1))[:, 0]
    acceptance = (local[None] - local[:, None] + forth[:, None] - forth[None]).clamp_max(0)  # from row to column
    flow = log_p[:, None] + forth[None] + acceptance
    torch.testing.assert_close(flow, flow.T, rtol=0, atol=1e-10)
    fine = torch.linspace(-30, 30, 601, dtype=torch.float64)
    square = torch.cartesian_prod(fine, fine)
    conditional = field.conditionals(blocks)(values[:1].expand(len(square), -1))
    with torch.no_grad():
        mass = proposal(conditional).log_prob(square.unsqueeze(1)).exp().sum() * 0.1**2
    assert float(mass) == pytest.approx(1, abs=1e-3)


@pytest.fixture(scope="module")
def trained():
    grid = Grid.random(5, 5, 2, 1.0, seeded())
    training = ProposalTraining(num_steps=1000, batch_size=256, learning_rate=5e-3)
    return run(training, ProposalTarget(untrained(grid, grid.blocks(2, 2)), GridBlocks(2, 2)), seed=0)


@pytest.fixture(scope="module")
def trained_mixture():
    examples = MixtureBlocks(2, ((0, 1),))
    proposal = BlockProposal(2, examples(1, seeded()).conditional.features.shape[-1], None, hidden=64)
    return run(ProposalTraining(num_steps=1500, learning_rate=5e-3), ProposalTarget(proposal, examples), seed=0)


@pytest.mark.parametrize(("kind", "bound"), [("trained", 0.08), ("trained_mixture", 0.3)])
def test_training_comes_close_to_the_exact_conditionals(kind, bound, request):
    """The mean divergence from the exact conditional: small, and much smaller than before."""
    proposal = request.getfixturevalue(kind)
    source = GridBlocks(2, 2) if kind == "trained" else MixtureBlocks(2, ((0, 1),))
    examples = source(4000, seeded(9))
    fresh = BlockProposal(**proposal._arguments)
    with torch.no_grad():
        exact = examples.conditional.exact().log_prob(examples.values)
        learned, before = (exact - q(examples.conditional).log_prob(examples.values) for q in (proposal, fresh))
    assert learned.mean() > -4 * learned.std() / 4000**0.5
    assert learned.mean() < bound and learned.mean() < 0.2 * before.mean(), (learned.mean(), before.mean())


def test_trained_blocks_mix_faster_on_an_unseen_grid(trained):
    """Fewer sweeps for an independent draw than single sites take, on a coupled grid of another size."""
    coupling = 0.4 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    grid = Grid(torch.zeros(8, 8, 2), coupling.expand(8, 7, 2, 2), coupling.expand(7, 8, 2, 2))
    sizes = {}
    for name, method, target in (
        ("blocks", BlockMetropolis(num_draws=300), BlockTarget(grid, grid.blocks(2, 2), trained)),
        ("sites", Gibbs(num_draws=300), BlockTarget(grid, grid.blocks(1, 1))),
    ):
        posterior = run(method, target, seed=0)
        mean = posterior.parameters["values"].double().mean(-1, keepdim=True)
        sizes[name] = float(effective_sizes(posterior, mean))
        assert float(posterior.statistics["acceptance"].mean()) > 0.8
    assert sizes["blocks"] > 1.5 * sizes["sites"], sizes


def test_trained_on_real_variables_is_used_on_an_unseen_graph(trained_mixture):
    """A ring of six multimodal variables: high acceptance, and the exact moments."""
    ring = torch.tensor([[i, (i + 1) % 6] for i in range(6)])
    field = MixtureField.random(ring, 2, 4.0, seeded(10))
    target = BlockTarget(field, field.blocks(ring.tolist()), trained_mixture)
    posterior = run(BlockMetropolis(num_chains=64, num_draws=300), target)
    assert float(posterior.statistics["acceptance"].mean()) > 0.6
    draws, (mean, second) = posterior.parameters["values"], mixture_moments(field)
    assert z_score(draws, mean, effective_sizes(posterior, draws)).abs().max() < 4
    products = (draws[:, :, None] * draws[:, None, :]).flatten(1)
    assert z_score(products, second.flatten(), effective_sizes(posterior, products)).abs().max() < 4
