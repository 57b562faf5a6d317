import json
import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal

from bayesnn.histogram import prior_borders
from bayesnn.inference.amortized.deep_set import DeepSetNetwork
from bayesnn.inference.amortized.meta_training import MetaTarget, MetaTraining, gap_to_exact, meta_loss
from bayesnn.inference.amortized.recipes import RECIPES, Recipe, export, from_checkpoint, set_transformer, train
from bayesnn.inference.amortized.tasks import GPTasks, TaskBatch, standardise_context
from bayesnn.inference.amortized.transformer import SetTransformer
from bayesnn.inference.amortized.weights import load_network
from bayesnn.inference.run import run

PRIOR = GPTasks(max_features=2)
BORDERS = prior_borders(torch.linspace(-3, 3, 100), 10).tolist()
SMALL = {"max_context": 10, "num_queries": 8, "rows_per_step": 128, "num_warmup": 5}


def make(kind):
    if kind == "deep_set":
        return DeepSetNetwork(2, width=16)
    return SetTransformer(2, BORDERS, (1.0, 1.0), width=16, num_layers=2, num_heads=2)


@pytest.mark.parametrize("kind", ["deep_set", "transformer"])
def test_resumed_equals_uninterrupted(kind, tmp_path):
    method = MetaTraining(num_steps=12, **SMALL)
    whole = run(method, MetaTarget(make(kind), PRIOR), seed=3)

    def interrupt(index, state, info):
        if index == 6:
            raise KeyboardInterrupt

    path = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(method, MetaTarget(make(kind), PRIOR), seed=3, checkpoint=path, callbacks=[interrupt])
    network = make(kind)
    resumed = run(method, MetaTarget(network, PRIOR), seed=3, checkpoint=path)
    for name, value in whole.params.items():
        assert torch.equal(resumed.params[name], value)
        assert torch.equal(dict(network.named_parameters())[name], value)
        assert not torch.equal(value, dict(make(kind).named_parameters())[name])


def test_checkpoint_of_another_prior_is_refused(tmp_path):
    method, path = MetaTraining(num_steps=2, **SMALL), tmp_path / "state.safetensors"
    run(method, MetaTarget(make("deep_set"), PRIOR), checkpoint=path)
    with pytest.raises(ValueError, match="belongs to another run"):
        run(method, MetaTarget(make("deep_set"), GPTasks(max_features=2, ard_spread=0.1)), checkpoint=path)


def test_first_step_is_adam_on_the_loss():
    """At the first step Adam moves every weight by the learning rate against its gradient's sign."""
    method = MetaTraining(num_steps=10, lr=0.01, **SMALL)
    network = make("deep_set").double()
    target = MetaTarget(network, PRIOR)
    before = method.init(target, torch.Generator())
    after, info = method.step(target, before, torch.Generator().manual_seed(5))

    generator = torch.Generator().manual_seed(5)
    n = method._context_size(generator)
    assert int(info.num_context) == n
    batch = PRIOR(min(32, 128 // (n + 8)), n + 8, generator)
    loc, scale = standardise_context(batch.y[:, :n])
    f, y = network(batch.X[:, :n], (batch.y[:, :n] - loc) / scale, batch.X[:, n:], batch.num_features)
    log_f, log_y = (d.log_prob(((v[:, n:] - loc) / scale)[..., 0]) for d, v in ((f, batch.f), (y, batch.y)))
    loss = -(log_f + log_y).mean()
    assert float(info.loss) == pytest.approx(loss.item())
    grads = torch.autograd.grad(loss, list(network.parameters()))
    for grad, old, new in zip(grads, before.params.values(), after.params.values(), strict=True):
        big = grad.abs() > 1e-4
        torch.testing.assert_close((new - old)[big], -0.01 / 6 * grad.sign()[big], rtol=1e-2, atol=0)


def test_context_sizes():
    method = MetaTraining(max_context=50)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([method._context_size(generator) for _ in range(4000)])
    assert sizes.min() == 0 and sizes.max() == 50
    assert 0.03 < (sizes == 0).double().mean() < 0.07 and 0.03 < (sizes == 1).double().mean() < 0.07
    # Log-uniform: as many in 3..9 as in 10..30, about.
    assert 0.8 < ((sizes > 2) & (sizes < 10)).sum() / ((sizes > 9) & (sizes < 34)).sum() < 1.25
    for largest in (0, 1):
        sizes = {MetaTraining(max_context=largest)._context_size(generator) for _ in range(200)}
        assert sizes == set(range(largest + 1))


class ConjugateMean(nn.Module):
    """The exact answer for tasks with f constant, f ~ N(0, 1), and known noise: an oracle in place of a network."""

    def __init__(self, noise_std):
        super().__init__()
        self.noise_std = nn.Parameter(torch.tensor(noise_std, dtype=torch.float64))

    def forward(self, context_X, context_y, X, num_features=None):
        shape = X.shape[:-1]
        # Only the empty context is in the task's own units, where the conjugate formula holds.
        assert context_y.shape[-2] == 0
        f = Normal(torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64))
        return f, Normal(f.mean, (1 + self.noise_std**2).sqrt())


def constants(noise_std):
    def prior(batch_size, num_points, generator):
        X = torch.randn(batch_size, num_points, 1, generator=generator, dtype=torch.float64)
        f = torch.randn(batch_size, 1, 1, generator=generator, dtype=torch.float64).expand(-1, num_points, 1)
        y = f + noise_std * torch.randn(batch_size, num_points, 1, generator=generator, dtype=torch.float64)
        ones = torch.ones(batch_size, num_points, num_points, dtype=torch.float64)
        return TaskBatch(X, y, f, None, torch.full((batch_size,), noise_std, dtype=torch.float64), ones)

    return prior


def test_gap_of_the_exact_answer_is_zero():
    table = gap_to_exact(ConjugateMean(0.5), constants(0.5), torch.Generator().manual_seed(0), 512, (0,), num_queries=4)
    row = table["0"]
    assert abs(row["gap_f"]) < 1e-5 and abs(row["gap_y"]) < 1e-5
    assert row["nll_y"] == pytest.approx(0.5 * math.log(2 * math.pi * 1.25) + 0.5, abs=0.1)
    assert row["coverage_y"] == pytest.approx(0.9, abs=0.05)


def test_gap_of_a_wrong_answer_is_its_divergence():
    """Noise believed to be 2 instead of 0.5: the gap is the divergence between the two normals."""
    table = gap_to_exact(
        ConjugateMean(2.0), constants(0.5), torch.Generator().manual_seed(0), 4000, (0,), num_queries=1
    )
    divergence = 0.5 * (1.25 / 5 - 1 - math.log(1.25 / 5))
    row = table["0"]
    assert abs(row["gap_y"] - divergence) < 4 * row["stderr_y"] < 0.1
    assert abs(row["gap_f"]) < 1e-5


def test_gap_is_in_the_tasks_units():
    """Outcomes a thousand times larger cost log(1000) nats more, network and exact answer alike."""

    def scaled(batch_size, num_points, generator):
        batch = PRIOR(batch_size, num_points, generator)
        factor = 1000.0
        return batch._replace(
            y=factor * batch.y,
            f=factor * batch.f,
            noise_std=factor * batch.noise_std,
            covariance=factor**2 * batch.covariance,
        )

    network = make("deep_set").double()
    one, two = (
        gap_to_exact(network, prior, torch.Generator().manual_seed(0), 8, (5,), num_queries=4)["5"]
        for prior in (PRIOR, scaled)
    )
    assert two["nll_y"] - one["nll_y"] == pytest.approx(math.log(1000), abs=1e-6)
    assert two["exact_nll_y"] - one["exact_nll_y"] == pytest.approx(math.log(1000), abs=0.02)


def test_training_on_constants_approaches_the_exact_answer():
    """A prior written in a few lines; after a few hundred steps the network is near the exact posterior predictive."""
    method = MetaTraining(num_steps=300, max_context=8, num_queries=8, rows_per_step=512, num_warmup=20, lr=5e-3)
    network, prior = DeepSetNetwork(1, width=32), constants(0.5)
    batch = prior(64, 16, torch.Generator().manual_seed(9))._replace(covariance=None)
    batch = TaskBatch(*(None if value is None else value.float() for value in batch))
    before = meta_loss(network, dict(network.named_parameters()), batch, 0)
    run(method, MetaTarget(network, prior), seed=0)
    assert meta_loss(network, dict(network.named_parameters()), batch, 0) < before
    row = gap_to_exact(network, prior, torch.Generator().manual_seed(1), 200, (0,), num_queries=8)["0"]
    assert abs(row["gap_f"]) < 0.05 and abs(row["gap_y"]) < 0.05


def test_recipe_trains_resumes_and_exports(tmp_path):
    def network(prior):
        return SetTransformer(2, BORDERS, (1.0, 1.0), width=16, num_layers=2, num_heads=2)

    recipe = Recipe("tiny", network, PRIOR, MetaTraining(num_steps=4, **SMALL))
    lines = []
    trained = train(recipe, tmp_path / "state.safetensors", lines.append, log_every=2)
    assert [line.split()[1] for line in lines] == ["2", "4"]
    again, num_steps = from_checkpoint(recipe, tmp_path / "state.safetensors")
    assert num_steps == 4
    card = export(recipe, again, num_steps, tmp_path, num_tasks=4)
    shipped, read = load_network(tmp_path / "tiny.safetensors")
    assert read == json.loads(json.dumps(card)) and set(card["held_out"]["by_context_size"]) >= {"0", "1", "400"}
    for one, two in zip(trained.state_dict().values(), shipped.state_dict().values(), strict=True):
        assert torch.equal(one, two)


def test_transformer_of_the_recipe_covers_the_prior():
    network = set_transformer(RECIPES["pfn"].prior, num_buckets=40)
    assert network.num_buckets == 40 and network.max_features == 10
    assert network.borders[0] < -4 and network.borders[-1] > 4
    assert bool((network.borders.diff() > 0).all()) and bool((network.tail_scales > 0).all())
