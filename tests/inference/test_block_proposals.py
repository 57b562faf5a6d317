import itertools

import pytest
import torch

from bayesnn.inference import run
from bayesnn.inference.mcmc.learned import (
    Block,
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

TRIANGLE = torch.tensor([[0, 1], [1, 2], [0, 2]])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def untrained(model, blocks):
    return BlockProposal.for_blocks(model, blocks, hidden=32)


def test_features_of_a_model_s_blocks_are_those_of_the_examples():
    """A grid's conditional, made by hand from its potentials and enumerated, is the one that its features say."""
    grid = Grid.random(3, 4, 3, 1.0, seeded(3))
    values = grid.initial(5, seeded(4))
    for block in grid.blocks(2, 1):
        conditional = grid.conditionals([block])(values)
        field, coupling = conditional.features[:, 0, :4].view(5, 2, 2), conditional.features[:, 0, 4:].view(5, 2, 2)
        field = torch.cat([field, -field.sum(-1, keepdim=True)], -1)
        coupling = torch.cat([coupling, -coupling.sum(-1, keepdim=True)], -1)
        coupling = torch.cat([coupling, -coupling.sum(-2, keepdim=True)], -2)
        for chain in range(5):
            states = values[chain].repeat(9, 1)
            states[:, block.variables] = torch.tensor(list(itertools.product(range(3), repeat=2)))
            found = field[chain, 0, :, None] + field[chain, 1] + coupling[chain]
            torch.testing.assert_close(found.flatten().log_softmax(-1), grid.log_density(states).log_softmax(-1))


def test_saved_and_loaded(tmp_path):
    trained = BlockProposal(4, 8, 2, hidden=16, seed=3)
    trained.save(tmp_path / "proposal.safetensors")
    loaded = BlockProposal.load(tmp_path / "proposal.safetensors")
    examples = GridBlocks(2, 2)(10, seeded())
    assert torch.equal(
        loaded(examples.conditional).log_prob(examples.values), trained(examples.conditional).log_prob(examples.values)
    )
    assert loaded.fingerprint == trained.fingerprint


def test_first_weights_come_from_the_seed_alone():
    first = BlockProposal(2, 5, 2, seed=1)
    torch.manual_seed(3)
    again, other = BlockProposal(2, 5, 2, seed=1), BlockProposal(2, 5, 2, seed=2)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_degenerate_networks_keep_every_value_within_reach():
    examples = GridBlocks(1, 2)(50, seeded())
    discrete = BlockProposal(2, examples.conditional.features.shape[-1], 2)
    mixtures = MixtureBlocks(2, ((0, 1),))(50, seeded())
    real = BlockProposal(2, mixtures.conditional.features.shape[-1], None)
    with torch.no_grad():
        for proposal in (discrete, real):
            for parameter in proposal.parameters():
                parameter.mul_(1e6)
        for values in itertools.product(range(2), repeat=2):
            found = discrete(examples.conditional).log_prob(torch.tensor([values]).expand(50, -1))
            assert (found > 2 * torch.tensor(4e-4).log()).all()
        scales = real(mixtures.conditional).moments[..., 1].exp()
    assert scales.min() > 0.9e-3 and scales.max() < 1.1e3


def test_a_checkpoint_of_another_model_or_proposal_is_refused(tmp_path):
    grid, other = Grid.random(2, 3, 2, 1.0, seeded(1)), Grid.random(2, 3, 2, 1.0, seeded(2))
    blocks, method = grid.blocks(2, 2), BlockMetropolis(2, 2, 4)
    proposal = untrained(grid, blocks)
    run(method, BlockTarget(grid, blocks, proposal), checkpoint=tmp_path / "chain")
    for target in (
        BlockTarget(other, blocks, proposal),
        BlockTarget(grid, blocks, BlockProposal.for_blocks(grid, blocks, hidden=32, seed=1)),
        BlockTarget(grid, blocks[::-1], proposal),
    ):
        with pytest.raises(ValueError, match="target"):
            run(method, target, checkpoint=tmp_path / "chain")
    training = ProposalTraining(num_steps=4, batch_size=8)
    run(training, ProposalTarget(proposal, GridBlocks(2, 2)), checkpoint=tmp_path / "training")
    with pytest.raises(ValueError, match="target"):
        run(training, ProposalTarget(proposal, GridBlocks(2, 2, max_coupling=1.0)), checkpoint=tmp_path / "training")
    first, second = (MixtureField.random(TRIANGLE, 2, 1.0, seeded(seed)) for seed in (1, 2))
    assert first.fingerprint != second.fingerprint


def test_training_leaves_the_proposal_as_it_was():
    proposal = BlockProposal(4, 8, 2, hidden=8)
    before = proposal.fingerprint
    trained = run(ProposalTraining(num_steps=5), ProposalTarget(proposal, GridBlocks(2, 2)))
    assert proposal.fingerprint == before != trained.fingerprint


class Impossible(MixtureField):
    """Half of the starting values have no density."""

    def log_density(self, values):
        return torch.where(values[:, 0] > 0, super().log_density(values), -torch.inf)


class Forgetful(Grid):
    """Its conditionals forget the values around."""

    def conditionals(self, blocks):
        at = super().conditionals(blocks)
        return lambda values: at(torch.zeros_like(values))


def test_wrong_blocks():
    grid = Grid.random(3, 3, 2, 1.0, seeded())
    blocks = grid.blocks(2, 2)
    none, edges = torch.tensor([], dtype=torch.long), torch.zeros(0, 2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"for blocks with .* \(4, 8, 2\), found \(2, 3, 2\)"):
        BlockTarget(grid, grid.blocks(1, 2), untrained(grid, blocks))
    with pytest.raises(ValueError, match=r"\(4, 20, 3\), found \(4, 8, 2\)"):
        BlockTarget(grid, blocks, BlockProposal(4, 20, 3))
    for wrong, message in (
        ([Block(torch.tensor([9]), torch.tensor([0]), edges)], r"variables \[9\], but the model has 0 … 8"),
        ([Block(torch.tensor([0]), torch.tensor([-2]), edges)], r"variables \[-2\]"),
        ([Block(torch.tensor([0]), torch.tensor([0, 1]), edges)], "none of its own variables"),
        ([Block(torch.tensor([1, 1]), none, edges)], "each once"),
        ([Block(none, none, edges)], "at least one variable"),
        (blocks[:3], r"no block holds the variables \[8\]"),
        ([], "no block holds"),
        ([*blocks, *grid.blocks(1, 4 - 1)], "one motif"),
    ):
        with pytest.raises(ValueError, match=message):
            BlockTarget(grid, wrong)
    with pytest.raises(ValueError, match="an edge within the block"):
        BlockTarget(grid, [block._replace(edges=edges) for block in blocks])
    with pytest.raises(ValueError, match="features must depend only on the values around"):
        BlockTarget(grid, [block._replace(condition=none) for block in grid.blocks(1, 1)])
    with pytest.raises(ValueError, match=r"the conditionals of .* blocks say"):
        BlockTarget(Forgetful(grid.unary, grid.right, grid.down), blocks)


def test_wrong_use():
    grid = Grid.random(3, 3, 2, 1.0, seeded())
    with pytest.raises(ValueError, match="doesn't fit into a grid"):
        grid.blocks(4, 1)
    with pytest.raises(ValueError, match="right must have shape"):
        Grid(torch.zeros(2, 2, 2), torch.zeros(2, 2, 2, 2), torch.zeros(1, 2, 2, 2))
    with pytest.raises(ValueError, match="num_chains"):
        BlockMetropolis(num_chains=0)
    with pytest.raises(ValueError, match="num_steps"):
        ProposalTraining(num_steps=0)
    with pytest.raises(ValueError, match="needs a proposal"):
        run(BlockMetropolis(), BlockTarget(grid, grid.blocks(2, 2)))
    with pytest.raises(ValueError, match="must be at least 1"):
        BlockProposal(0, 3, 2)
    with pytest.raises(ValueError, match=r"found \(4, 8, 2\)"):
        ProposalTarget(BlockProposal(2, 3, 2), GridBlocks(2, 2))
    with pytest.raises(ValueError, match="has examples of value 2"):
        ProposalTarget(BlockProposal(1, 2, 2), GridBlocks(1, 1, cardinality=3))
    with pytest.raises(ValueError, match=r"examples of torch\.int64"):
        ProposalTarget(BlockProposal(4, 8, None), GridBlocks(2, 2))
    big = Grid.random(5, 5, 2, 1.0, seeded())
    with pytest.raises(ValueError, match="too large to enumerate"):
        run(Gibbs(num_draws=1), BlockTarget(big, big.blocks(5, 5)))


def test_wrong_mixture_fields():
    one, edges = torch.ones(3, 1), torch.tensor([[0, 1], [1, 2]])
    field = Impossible(edges, torch.ones(2), 0 * one, 0 * one, one)
    target = BlockTarget(field, field.blocks([[0], [1], [2]]))
    with pytest.raises(ValueError, match="finite log density; chains"):
        run(Gibbs(), target)
    for arguments, message in (
        ((edges, torch.ones(3), one, one, one), r"edges must be \(E, 2\)"),
        ((edges + 1, torch.ones(2), one, one, one), "between variables 0 … 2"),
        ((edges[[0, 0]], torch.ones(2), one, one, one), "be there once"),
        ((edges * 0, torch.ones(2), one, one, one), "two different variables"),
        ((edges, -torch.ones(2), one, one, one), "must not be negative"),
        ((edges, torch.ones(2), one, one, 0 * one), "stds must be positive"),
        ((edges, torch.ones(2), one, one / 0, one), "must be finite"),
        ((edges, torch.ones(2), one, one[:2], one), r"must be \(V, K\)"),
    ):
        with pytest.raises(ValueError, match=message):
            MixtureField(*arguments)
