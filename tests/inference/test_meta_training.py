import math
from dataclasses import dataclass

import pytest
import torch
from scipy.stats import chisquare
from torch import nn
from torch.distributions import Normal, kl_divergence

from bayesnn.histogram import prior_borders
from bayesnn.inference.amortized.deep_set import DeepSetNetwork
from bayesnn.inference.amortized.gaps import gap_to_exact
from bayesnn.inference.amortized.meta_training import MetaTarget, MetaTraining, meta_loss
from bayesnn.inference.amortized.tasks import GPTasks, MixtureTasks, Process, TaskBatch
from bayesnn.inference.amortized.tasks.covariances import conditional, given_hyperparameters, normal_log_densities
from bayesnn.inference.amortized.transformer import SetClassifier, SetTransformer
from bayesnn.inference.optimizer import muon_init, muon_step
from bayesnn.inference.run import run

PRIOR = GPTasks(max_features=2)
BORDERS = prior_borders(torch.linspace(-3, 3, 100), 10).tolist()
SMALL = {"max_context": 10, "num_queries": 8, "rows_per_batch": 128, "num_warmup": 5}


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
        assert torch.equal(dict(network.named_parameters())[name], whole.average[name])
        assert not torch.equal(value, dict(make(kind).named_parameters())[name])


def test_checkpoint_of_another_prior_is_refused(tmp_path):
    method, path = MetaTraining(num_steps=2, **SMALL), tmp_path / "state.safetensors"
    run(method, MetaTarget(make("deep_set"), PRIOR), checkpoint=path)
    with pytest.raises(ValueError, match="belongs to another run"):
        run(method, MetaTarget(make("deep_set"), GPTasks(max_features=2, ard_spread=0.1)), checkpoint=path)


def test_checkpoints_of_priors_made_of_functions(tmp_path):
    """A function can't be described: its name stands for it."""

    def straight(batch_size, num_points, generator):
        X = torch.randn(batch_size, num_points, 2, generator=generator, dtype=torch.float64)
        return TaskBatch(X, X[..., :1], X[..., :1])

    straight.max_features = 2
    network = make("deep_set")
    alone, mixed = (MetaTarget(network, prior) for prior in (straight, MixtureTasks([straight, PRIOR])))
    assert len({alone.fingerprint, mixed.fingerprint, MetaTarget(network, PRIOR).fingerprint}) == 3
    run(MetaTraining(num_steps=2, **SMALL), mixed, seed=0, checkpoint=tmp_path)


def test_first_step_is_adam_on_the_loss():
    """At the first step Adam moves every weight by the learning rate against its gradient's sign; Muon moves the matrices."""
    method = MetaTraining(num_steps=10, lr=0.01, **SMALL)
    network = make("deep_set").double()
    target = MetaTarget(network, PRIOR)
    before = method.init(target, torch.Generator())
    after, info = method.step(target, before, torch.Generator().manual_seed(5))

    generator = torch.Generator().manual_seed(5)
    n = method._context_size(generator, 0)
    assert int(info.num_context) == n
    own = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
    batch = PRIOR(min(32, 128 // (n + 8)), n + 8, own)
    f, y = network(batch.X[:, :n], batch.y[:, :n], batch.X[:, n:], batch.num_features)
    mean, f_var, noise_var = given_hyperparameters(batch, n)
    truths = (Normal(mean, f_var.sqrt()), Normal(mean, (f_var + noise_var[:, None]).sqrt()))
    loss = sum(kl_divergence(p, law) + p.entropy() for p, law in zip(truths, (f, y), strict=True)).mean()
    assert float(info.loss) == pytest.approx(loss.item())
    params = dict(network.named_parameters())
    grads = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
    assert len(network.hidden_matrices) == 5 and network.hidden_matrices < set(params)
    for name in params.keys() - network.hidden_matrices:
        big, moved = grads[name].abs() > 1e-4, after.params[name] - before.params[name]
        torch.testing.assert_close(moved[big], -0.01 / 6 * grads[name].sign()[big], rtol=1e-2, atol=0)
    norm = float(torch.stack([grad.square().sum() for grad in grads.values()]).sum().sqrt())
    hidden = {name: params[name].detach() for name in network.hidden_matrices}
    clipped = {name: grads[name] / max(1.0, norm) for name in hidden}
    moved, _ = muon_step(hidden, clipped, muon_init(hidden), 0.02 / 6, 0.01)
    for name, value in moved.items():
        torch.testing.assert_close(after.params[name], value)


def test_context_sizes():
    method = MetaTraining(max_context=50)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([method._context_size(generator, 0) for _ in range(4000)])
    assert sizes.min() == 0 and sizes.max() == 50
    large = torch.arange(2, 51).double()
    log_uniform = ((large + 1) / large).log() / math.log(51 / 2)
    shares = torch.cat([torch.tensor([0.025, 0.025]), log_uniform / 3 + (1 - 0.05 - 1 / 3) / 49])
    counts = torch.bincount(sizes, minlength=51)
    assert chisquare(counts.numpy(), 4000 * shares.numpy()).pvalue > 1e-3
    for largest in (0, 1):
        sizes = {MetaTraining(max_context=largest)._context_size(generator, 0) for _ in range(200)}
        assert sizes == set(range(largest + 1))


def test_contexts_grow_over_the_curriculum():
    method = MetaTraining(max_context=100, num_curriculum=1000)
    generator = torch.Generator().manual_seed(0)
    largest = [max(method._context_size(generator, index) for _ in range(2000)) for index in (0, 500, 999, 5000)]
    assert largest == [8, 28, 99, 100]


@pytest.mark.parametrize("kind", ["deep_set", "transformer"])
def test_integrating_values_out_keeps_the_loss_in_the_mean(kind):
    network, n = make(kind).double(), 4
    params = dict(network.named_parameters())
    batch = PRIOR(400, n + 30, torch.Generator().manual_seed(3))
    difference = [
        float(meta_loss(network, params, one, n) - meta_loss(network, params, one._replace(process=None), n))
        for one in (
            TaskBatch(*(each[i : i + 1] for each in batch[:4]), Process(*(each[i : i + 1] for each in batch.process)))
            for i in range(400)
        )
    ]
    z = torch.tensor(difference).mean() / torch.tensor(difference).std() * 400**0.5
    assert abs(float(z)) < 4


def test_several_batches_make_one_step():
    """Two batches a step: the mean of the gradients of both, written out."""
    network = make("deep_set").double()
    method = MetaTraining(num_steps=10, num_batches=2, max_norm=1e9, **SMALL)
    target = MetaTarget(network, PRIOR)
    _, info = method.step(target, method.init(target, torch.Generator()), torch.Generator().manual_seed(5))
    generator, losses, grads = torch.Generator().manual_seed(5), [], []
    for _ in range(2):
        n = method._context_size(generator, 0)
        own = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
        batch = PRIOR(min(32, 128 // (n + 8)), n + 8, own)
        losses.append(meta_loss(network, dict(network.named_parameters()), batch, n))
        grads.append(
            torch.cat([grad.flatten() for grad in torch.autograd.grad(losses[-1], list(network.parameters()))])
        )
    assert float(info.loss) == pytest.approx(float(sum(losses)) / 2)
    assert float(info.grad_norm) == pytest.approx(float((sum(grads) / 2).norm()))


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9])
def test_the_result_is_the_parameters_running_mean(decay):
    seen, network = [], make("deep_set").double()
    expected = {name: value.detach().clone() for name, value in network.named_parameters()}
    method = MetaTraining(num_steps=6, average_decay=decay, **SMALL)
    run(method, MetaTarget(network, PRIOR), callbacks=[lambda index, state, info: seen.append(state.params)])
    for index, params in enumerate(seen):
        own = min(decay, (1 + index) / (10 + index))
        expected = {name: own * value + (1 - own) * params[name] for name, value in expected.items()}
    for name, value in network.named_parameters():
        torch.testing.assert_close(value.detach(), expected[name])


def test_bad_settings():
    for name in (
        "num_steps",
        "num_queries",
        "rows_per_batch",
        "max_tasks",
        "num_batches",
        "lr",
        "matrix_lr",
        "max_norm",
    ):
        with pytest.raises(ValueError, match=name):
            MetaTraining(**{name: 0})
    with pytest.raises(ValueError, match="average_decay"):
        MetaTraining(average_decay=1.0)


class ConjugateMean(nn.Module):
    """The exact answer for tasks with f constant, f ~ N(0, 1), and known noise: an oracle in place of a network."""

    def __init__(self, noise_std):
        super().__init__()
        self.noise_std = nn.Parameter(torch.tensor(noise_std, dtype=torch.float64))

    def forward(self, context_X, context_y, X, num_features=None):
        n, shape = context_y.shape[-2], X.shape[:-1]
        precision = 1 + n / self.noise_std**2
        mean = (context_y.sum((-2, -1)) / self.noise_std**2 / precision).unsqueeze(-1).expand(shape)
        f = Normal(mean, precision.rsqrt().expand(shape))
        return f, Normal(mean, (f.variance + self.noise_std**2).sqrt())


@dataclass(frozen=True)
class Constants:
    noise_std: float

    def __call__(self, batch_size, num_points, generator):
        X = torch.randn(batch_size, num_points, 1, generator=generator, dtype=torch.float64)
        f = torch.randn(batch_size, 1, 1, generator=generator, dtype=torch.float64).expand(-1, num_points, 1)
        y = f + self.noise_std * torch.randn(batch_size, num_points, 1, generator=generator, dtype=torch.float64)
        return TaskBatch(X, y, f)

    def exact(self, batch, n):
        covariance = torch.ones(len(batch.X), *[batch.X.shape[1]] * 2, dtype=torch.float64)
        noise_var = torch.full((len(batch.X),), self.noise_std**2, dtype=torch.float64)
        moments = conditional(covariance, noise_var, batch.y[:, :n], n)[:2]
        return normal_log_densities(batch.f[:, n:, 0], batch.y[:, n:, 0], *moments, noise_var)


@pytest.mark.parametrize("n", [0, 1, 7])
def test_gap_of_the_exact_answer_is_zero(n):
    generator = torch.Generator().manual_seed(0)
    row = gap_to_exact(ConjugateMean(0.5), Constants(0.5), generator, 512, (n,), num_queries=4)[str(n)]
    assert abs(row["gap_f"]) < 1e-4 and abs(row["gap_y"]) < 1e-4
    assert row["coverage_y"] == pytest.approx(0.9, abs=0.05)


def test_loss_of_the_exact_answer():
    row = gap_to_exact(ConjugateMean(0.5), Constants(0.5), torch.Generator().manual_seed(0), 512, (0,), 4)["0"]
    assert row["nll_y"] == pytest.approx(0.5 * math.log(2 * math.pi * 1.25) + 0.5, abs=0.1)


def test_gap_of_a_wrong_answer_is_its_divergence():
    """Noise believed to be 2 instead of 0.5: the gap is the divergence between the two normals."""
    table = gap_to_exact(
        ConjugateMean(2.0), Constants(0.5), torch.Generator().manual_seed(0), 4000, (0,), num_queries=1
    )
    divergence = 0.5 * (1.25 / 5 - 1 - math.log(1.25 / 5))
    row = table["0"]
    assert abs(row["gap_y"] - divergence) < 4 * row["stderr_y"] < 0.1
    assert abs(row["gap_f"]) < 1e-5


def test_gap_needs_exact_answers():
    with pytest.raises(TypeError, match="prior must have a method exact"):
        gap_to_exact(make("deep_set"), lambda *arguments: None, torch.Generator())


def test_training_on_constants_approaches_the_exact_answer():
    """A prior written in a few lines; after some hundred steps the network is near the exact posterior predictive."""
    method = MetaTraining(num_steps=600, max_context=8, num_queries=8, rows_per_batch=512, num_warmup=20)
    network, prior = DeepSetNetwork(1, width=32), Constants(0.5)
    batch = TaskBatch(*(value.float() for value in prior(64, 16, torch.Generator().manual_seed(9))[:3]))
    before = meta_loss(network, dict(network.named_parameters()), batch, 0)
    run(method, MetaTarget(network, prior), seed=0)
    assert meta_loss(network, dict(network.named_parameters()), batch, 0) < before
    table = gap_to_exact(network, prior, torch.Generator().manual_seed(1), 200, (0, 4), num_queries=8)
    assert all(abs(row["gap_f"]) < 0.05 and abs(row["gap_y"]) < 0.05 for row in table.values())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda batch: tuple(batch), TypeError, "prior must give a TaskBatch, found tuple"),
        (lambda batch: batch._replace(y=None), TypeError, "prior must give y as a tensor, found NoneType"),
        (lambda batch: batch._replace(X=batch.X.numpy()), TypeError, "prior must give X as a tensor, found ndarray"),
        (
            lambda batch: batch._replace(X=batch.X[..., [0, 0, 0, 1]]),
            ValueError,
            "prior must give X of at most 2 columns",
        ),
        (lambda batch: batch._replace(X=batch.X[:, 1:]), ValueError, "prior must give X of shape"),
        (lambda batch: TaskBatch(*(part[:1] for part in batch[:4])), ValueError, "prior must give X of shape"),
        (lambda batch: batch._replace(X=batch.X.long()), ValueError, "in floating point, found .*int64"),
        (lambda batch: batch._replace(y=batch.y[..., 0]), ValueError, "prior must give y of shape"),
        (lambda batch: batch._replace(f=batch.f[:, :, [0, 0]]), ValueError, "prior must give f of shape"),
        (lambda batch: batch._replace(num_features=7 * batch.num_features), ValueError, "each from 1 to 2"),
        (
            lambda batch: batch._replace(f=None, process=None),
            ValueError,
            "prior gives classes, which isn't what the network",
        ),
    ],
)
def test_what_a_prior_must_not_give(change, error, message):
    target = MetaTarget(make("transformer"), lambda *arguments: change(PRIOR(*arguments)))
    with pytest.raises(error, match=message):
        run(MetaTraining(num_steps=2, **SMALL), target)


@pytest.mark.parametrize("labels", [torch.tensor(3.0), torch.tensor(0.5), torch.tensor(-1.0)])
def test_labels_that_are_no_classes(labels):
    def prior(batch_size, num_points, generator):
        return TaskBatch(torch.zeros(batch_size, num_points, 2), labels.expand(batch_size, num_points, 1))

    network = SetClassifier(2, 3, width=16, num_layers=2, num_heads=2)
    with pytest.raises(ValueError, match="prior must give labels y from 0 to 2, whole numbers"):
        run(MetaTraining(num_steps=1, **SMALL), MetaTarget(network, prior), seed=0)
