import itertools

import pytest
import torch
from oracles import effective_sizes, z_score

from bayesnn.inference import run
from bayesnn.inference.mcmc.learned import (
    Block,
    BlockMetropolis,
    BlockProposal,
    BlockTarget,
    Grid,
    ProposalTarget,
    ProposalTraining,
    SingleSiteGibbs,
    grid_blocks,
)
from bayesnn.inference.mcmc.learned.meta_training import _conditional


def enumerated(grid):
    rows, columns, cardinality = grid.unary.shape
    states = torch.tensor(list(itertools.product(range(cardinality), repeat=rows * columns)))
    return states, grid.log_density(states).softmax(-1)


def untrained(grid, height, width):
    block = grid.blocks(height, width)[0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BlockProposal(len(block.variables), len(block.condition), len(block.parameters), grid.cardinality)


def transition_matrix(grid, block, proposal):
    """Of one visit to a block, from the proposal's probabilities, without any sampling."""
    states, _ = enumerated(grid)
    log_p = grid.log_density(states)
    count = len(states)
    features = proposal.features(states[:, block.condition.clamp_min(0)], block.condition >= 0, block.parameters)
    others = [index for index in range(states.shape[1]) if index not in block.variables.tolist()]
    matrix = torch.zeros(count, count, dtype=torch.float64)
    with torch.no_grad():
        back = proposal.log_prob(states[:, block.variables], features)
        for index in range(count):
            reachable = (states[:, others] == states[index, others]).all(-1)
            forth = proposal.log_prob(states[:, block.variables], features[index].expand(count, -1))
            ratio = log_p - log_p[index] + back[index] - forth
            matrix[index] = torch.where(reachable, (forth + ratio.clamp_max(0)).exp(), 0.0)
            matrix[index, index] += 1 - matrix[index].sum()
    return matrix


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 2), (1, 3)])
def test_the_law_is_stationary_whatever_the_proposal(height, width):
    """pi P = pi and detailed balance, to 1e-12, on all 64 states of a grid of 2 x 3, for an untrained network."""
    grid = Grid.random(2, 3, 2, 1.5, torch.Generator().manual_seed(1))
    _, probabilities = enumerated(grid)
    proposal = untrained(grid, height, width)
    for block in grid.blocks(height, width):
        matrix = transition_matrix(grid, block, proposal)
        assert (matrix >= -1e-15).all()
        flow = probabilities[:, None] * matrix
        torch.testing.assert_close(flow, flow.T, rtol=0, atol=1e-12)
        torch.testing.assert_close(probabilities @ matrix, probabilities, rtol=0, atol=1e-12)


def test_a_visit_samples_that_matrix():
    grid = Grid.random(2, 2, 2, 1.5, torch.Generator().manual_seed(1))
    proposal, states = untrained(grid, 1, 2), enumerated(grid)[0]
    block, start, count = grid.blocks(1, 2)[1], 5, 40000
    target = BlockTarget(grid, [block], proposal)
    values = states[start].expand(count, -1)
    state = (
        BlockMetropolis(num_chains=count)
        .init(target, torch.Generator())
        ._replace(values=values, log_density=grid.log_density(values))
    )
    with torch.no_grad():
        state, _ = BlockMetropolis(num_chains=count).visit(target, block, state, torch.Generator().manual_seed(2))
    weights = torch.tensor([8, 4, 2, 1])
    found = torch.bincount((state.values * weights).sum(-1), minlength=16).double() / count
    expected = transition_matrix(grid, block, proposal)[start]
    assert ((found - expected) / (expected * (1 - expected) / count + 1e-12).sqrt()).abs().max() < 4


@pytest.mark.parametrize("cardinality", [2, 3])
def test_chains_have_the_exact_marginals(cardinality):
    grid = Grid.random(3, 3 if cardinality == 2 else 2, cardinality, 1.0, torch.Generator().manual_seed(2))
    states, probabilities = enumerated(grid)
    exact = torch.stack([(states == value).double().T @ probabilities for value in range(cardinality)]).T
    for method, proposal in (
        (BlockMetropolis(num_chains=64, num_draws=500), untrained(grid, 2, 2)),
        (SingleSiteGibbs(num_chains=64, num_draws=200), None),
    ):
        posterior = run(method, BlockTarget(grid, grid.blocks(2, 2), proposal), seed=3)
        values = posterior.parameters["values"]
        found = torch.stack([(values == value).double() for value in range(cardinality - 1)], -1).flatten(1)
        z = z_score(found, exact[:, :-1].flatten(), effective_sizes(posterior, found))
        assert z.abs().max() < 4, z


class GaussianField:
    """A Gaussian graphical model, with its exact conditionals as proposals."""

    cardinality = None
    precision = torch.tensor([[2.0, -0.8, 0.3], [-0.8, 1.5, 0.5], [0.3, 0.5, 1.0]], dtype=torch.float64)

    def log_density(self, values):
        return -0.5 * ((values @ self.precision) * values).sum(-1)

    def initial(self, count, generator):
        return torch.randn(count, 3, generator=generator, dtype=torch.float64)

    def check(self, block):
        pass

    def features(self, condition, present, parameters):
        return torch.cat([condition, parameters.expand(len(condition), -1)], 1)

    def _moments(self, features):
        own = features[:, 1:].unflatten(1, (2, 3))[
            0
        ]  # the block's rows of the precision: own 2 x 2, then to the neighbour
        covariance = torch.linalg.inv(own[:, :2])
        return -features[:, :1] @ (covariance @ own[:, 2:]).T, torch.linalg.cholesky(covariance)

    def log_prob(self, values, features):
        loc, root = self._moments(features)
        return torch.distributions.MultivariateNormal(loc, scale_tril=root).log_prob(values)

    def sample(self, features, generator):
        loc, root = self._moments(features)
        return loc + torch.randn(loc.shape, generator=generator, dtype=torch.float64) @ root.T


def test_exact_conditionals_are_always_accepted():
    model = GaussianField()
    blocks = []
    for own, other in (([0, 1], 2), ([1, 2], 0)):
        rows = model.precision[own][:, [*own, other]]
        blocks.append(Block(torch.tensor(own), torch.tensor([other]), rows.flatten()))
    posterior = run(BlockMetropolis(num_chains=50, num_draws=100, num_warmup=20), BlockTarget(model, blocks, model))
    torch.testing.assert_close(posterior.statistics["acceptance"], torch.ones(100, 50).double(), rtol=0, atol=1e-10)
    draws = posterior.parameters["values"]
    products = (draws[:, :, None] * draws[:, None, :]).flatten(1)
    z = z_score(products, torch.linalg.inv(model.precision).flatten(), effective_sizes(posterior, products))
    assert z.abs().max() < 4


def test_a_mixture_density_network_on_real_variables_keeps_the_law():
    model = GaussianField()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        proposal = BlockProposal(2, 1, 6, None, num_components=3, hidden=16)
    blocks = [
        Block(torch.tensor(own), torch.tensor([other]), model.precision[own][:, [*own, other]].flatten())
        for own, other in (([0, 1], 2), ([1, 2], 0))
    ]
    posterior = run(BlockMetropolis(num_chains=200, num_draws=400), BlockTarget(model, blocks, proposal), seed=1)
    draws = posterior.parameters["values"]
    assert 0.1 < float(posterior.statistics["acceptance"].mean()) < 0.9
    products = (draws[:, :, None] * draws[:, None, :]).flatten(1)
    z = z_score(products, torch.linalg.inv(model.precision).flatten(), effective_sizes(posterior, products))
    assert z.abs().max() < 4


@pytest.fixture(scope="module")
def trained():
    grid = Grid.random(5, 5, 2, 1.0, torch.Generator().manual_seed(0))
    training = ProposalTraining(num_steps=2000, batch_size=256, learning_rate=5e-3)
    return run(training, ProposalTarget(untrained(grid, 2, 2), grid_blocks(2, 2, 2, coupling=1.0)), seed=0)


def test_training_comes_close_to_the_exact_conditionals(trained):
    """The divergence from the exact conditional, by enumeration: small, and never negative."""
    generator = torch.Generator().manual_seed(9)
    examples = grid_blocks(2, 2, 2, coupling=1.0)(500, generator)
    outcomes = torch.tensor(list(itertools.product(range(2), repeat=4)))
    unary, pairs = examples.parameters[:, :8].unflatten(1, (4, 2)), examples.parameters[:, 8:].unflatten(1, (-1, 2, 2))
    log_p = _conditional(unary, pairs, examples.condition, examples.present, outcomes, 2, 2).log_softmax(-1)
    divergences = []
    fresh = untrained(Grid.random(5, 5, 2, 1.0, generator), 2, 2)
    for proposal in (trained, fresh):
        features = proposal.features(examples.condition, examples.present, examples.parameters)
        with torch.no_grad():
            log_q = torch.stack([proposal.log_prob(outcome.expand(500, -1), features) for outcome in outcomes], 1)
        torch.testing.assert_close(log_q.exp().sum(-1), torch.ones(500).double())
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
    assert all(bool((divergence > -1e-12).all()) for divergence in divergences)
    assert divergences[0].mean() < 0.2 * divergences[1].mean() and divergences[0].mean() < 0.15


def test_examples_have_the_parameters_of_a_grid_s_blocks():
    """The enumerated conditional from a block's parameters is the grid's own."""
    grid = Grid.random(3, 4, 2, 1.0, torch.Generator().manual_seed(3))
    states, _ = enumerated(grid)
    outcomes = torch.tensor(list(itertools.product(range(2), repeat=4)))
    for block in grid.blocks(2, 2):
        around = states[77][block.condition.clamp_min(0)].unsqueeze(0)
        present = (block.condition >= 0).unsqueeze(0)
        unary, pairs = block.parameters[:8].view(1, 4, 2), block.parameters[8:].view(1, -1, 2, 2)
        found = _conditional(unary, pairs, around, present, outcomes, 2, 2).log_softmax(-1)[0]
        values = states[77].repeat(16, 1)
        values[:, block.variables] = outcomes
        torch.testing.assert_close(found, grid.log_density(values).log_softmax(-1))


def test_trained_blocks_mix_faster_on_an_unseen_grid(trained):
    """Fewer sweeps for an independent draw than single sites take, on a coupled grid of another size."""
    couplings = 2.2 * torch.eye(2, dtype=torch.float64)
    grid = Grid(torch.zeros(6, 6, 2).double(), couplings.expand(6, 5, 2, 2) * 0.5, couplings.expand(5, 6, 2, 2) * 0.5)
    sizes, acceptance = {}, 0.0
    for name, method in (("blocks", BlockMetropolis), ("sites", SingleSiteGibbs)):
        posterior = run(method(num_chains=16, num_draws=200), BlockTarget(grid, grid.blocks(2, 2), trained), seed=0)
        mean = posterior.parameters["values"].double().mean(-1, keepdim=True)
        sizes[name] = float(effective_sizes(posterior, mean))
        acceptance = acceptance or float(posterior.statistics["acceptance"].mean())
    assert acceptance > 0.5
    assert sizes["blocks"] > 1.5 * sizes["sites"], sizes


def test_saved_and_loaded(trained, tmp_path):
    trained.save(tmp_path / "proposal.safetensors")
    loaded = BlockProposal.load(tmp_path / "proposal.safetensors")
    grid = Grid.random(4, 4, 2, 1.0, torch.Generator().manual_seed(0))
    block = grid.blocks(2, 2)[0]
    features = trained.features(torch.zeros(3, 8, dtype=torch.long), block.condition >= 0, block.parameters)
    values = torch.tensor([[0, 1, 1, 0]]).expand(3, -1)
    assert torch.equal(loaded.log_prob(values, features), trained.log_prob(values, features))


def test_every_value_stays_within_reach():
    grid = Grid.random(2, 2, 2, 1.0, torch.Generator().manual_seed(0))
    proposal, block = untrained(grid, 1, 2), grid.blocks(1, 2)[0]
    features = 1e6 * proposal.features(torch.zeros(1, 6, dtype=torch.long), block.condition >= 0, block.parameters)
    for values in itertools.product(range(2), repeat=2):
        assert float(proposal.log_prob(torch.tensor([values]), features)) > 2 * torch.tensor(4e-4).log()


def test_wrong_use():
    grid = Grid.random(3, 3, 2, 1.0, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"this proposal is for blocks with .* \(4, 8, 56\), found \(2, 6"):
        BlockTarget(grid, grid.blocks(1, 2), untrained(grid, 2, 2))
    outside = Block(torch.tensor([9]), torch.tensor([0]), torch.zeros(1))
    with pytest.raises(ValueError, match=r"variables 9 … 9, but the model has 0 … 8"):
        BlockTarget(grid, [outside])
    with pytest.raises(ValueError, match="doesn't fit into a grid"):
        grid.blocks(4, 1)
    with pytest.raises(ValueError, match="right must have shape"):
        Grid(torch.zeros(2, 2, 2), torch.zeros(2, 2, 2, 2), torch.zeros(1, 2, 2, 2))
    with pytest.raises(ValueError, match="num_chains"):
        BlockMetropolis(num_chains=0)
    with pytest.raises(ValueError, match="num_steps"):
        ProposalTraining(num_steps=0)
    with pytest.raises(ValueError, match="discrete variables"):
        run(SingleSiteGibbs(num_draws=1), BlockTarget(GaussianField(), []))
