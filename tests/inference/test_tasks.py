"""Priors over tasks: their laws, their units and their exact answers."""

import itertools
import math

import pytest
import torch
from scipy import stats

from bayesnn.configured import build, describe
from bayesnn.inference.amortized.tasks import (
    BNNTasks,
    CausalTasks,
    GPTasks,
    GridGPTasks,
    MixtureTasks,
    Process,
    SearchTasks,
)
from bayesnn.inference.amortized.tasks.base import Draws, draw_inputs
from bayesnn.inference.amortized.tasks.covariances import (
    JITTER,
    KERNELS,
    centred,
    conditional,
    given_hyperparameters,
    reference_inputs,
)
from bayesnn.processes.architectures import mlp
from bayesnn.processes.kernels import NNGPKernel

PRIORS = {
    "gp": GPTasks(max_features=4),
    "grid": GridGPTasks(max_features=3),
    "bnn": BNNTasks(max_features=4),
    "search": SearchTasks(max_features=4),
    "mixture": MixtureTasks([GPTasks(max_features=4), BNNTasks(max_features=2)], [2, 1]),
}


def draw(prior, seed=0, batch=256, points=12):
    return prior(batch, points, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", PRIORS)
def test_shapes_and_unused_features(name):
    prior = PRIORS[name]
    tasks, d = draw(prior), prior.max_features
    assert tasks.X.shape == (256, 12, d) and tasks.y.shape == tasks.f.shape == (256, 12, 1)
    assert sorted(set(tasks.num_features.tolist())) == [*range(1, d + 1)]
    unused = torch.arange(d) >= tasks.num_features[:, None]
    assert bool((tasks.X.abs().amax(1)[unused] == 0).all()) and bool((tasks.X.abs().amax(1)[~unused] > 0).all())
    assert all(bool(values.isfinite().all()) for values in (tasks.X, tasks.y, tasks.f))


@pytest.mark.parametrize("name", PRIORS)
def test_same_seed_same_tasks(name):
    for one, two in zip(draw(PRIORS[name], 3)[:3], draw(PRIORS[name], 3)[:3], strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(draw(PRIORS[name], 3).y, draw(PRIORS[name], 4).y)


@pytest.mark.parametrize("name", PRIORS)
def test_outcomes_are_in_standard_units(name):
    """Over the region where data are: the mean of a task near 0, its mean square near 1."""
    tasks = draw(PRIORS[name], batch=500, points=60)
    mean, square = tasks.f.mean(1).flatten(), tasks.f.square().mean(1).flatten()
    assert abs(float(mean.mean())) < 4 * float(mean.std()) / 500**0.5
    assert 0.6 < float(square.median()) < 1.2 and float(mean.std()) < 0.5


@pytest.mark.parametrize("name", PRIORS)
def test_settings_can_be_written_down(name):
    again = build(describe(PRIORS[name]))
    assert torch.equal(draw(again).y, draw(PRIORS[name]).y)


def test_inputs_are_in_standard_units():
    X = draw_inputs(Draws(200, torch.Generator().manual_seed(0)), 60, 3)
    means, stds = X[..., 0].mean(1), X[..., 0].std(1)
    assert abs(float(means.mean())) < 0.05 and float(means.std()) == pytest.approx(0.15, rel=0.25)
    assert float(stds.log().std()) == pytest.approx(0.15, rel=0.25)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_against_other_implementations(name):
    X = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)).double()
    distance = torch.cdist(X, X)
    if name == "nngp":
        kernel = NNGPKernel(architecture=mlp(2, "relu", weight_var=2.0, bias_var=0.0)).double()
        with torch.no_grad():
            augmented = torch.cat([X, torch.ones(6, 1).double()], -1)
            expected = kernel(augmented).to_dense()
            expected = expected * KERNELS[name](X, X)[0, 0] / expected[0, 0]
    else:
        expected = {
            "rbf": torch.exp(-0.5 * distance**2),
            "matern32": (1 + 3**0.5 * distance) * torch.exp(-(3**0.5) * distance),
            "matern52": (1 + 5**0.5 * distance + 5 / 3 * distance**2) * torch.exp(-(5**0.5) * distance),
            "periodic": torch.exp(-2 * (math.pi * (X[:, None] - X).abs() / 4).sin().square().sum(-1)),
        }[name]
    torch.testing.assert_close(KERNELS[name](X, X), expected, atol=1e-7, rtol=1e-7)


def test_centred_processes():
    """The covariance of (g(x) - mean over R) / scale, with the matrices written out."""
    X = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).double()
    R = reference_inputs(2)
    both = torch.cat([X, R])
    K = KERNELS["rbf"](both, both)
    A = torch.cat([torch.eye(5 + len(R)), torch.zeros(0, 5 + len(R))]).double()
    A = A - torch.cat([torch.zeros(5), torch.full((len(R),), 1 / len(R))]).double()
    centred_K = A @ K @ A.T
    expected = centred_K / centred_K.diagonal()[5:].mean()
    found = centred(lambda a, b: KERNELS["rbf"](a, b), X)
    assert torch.allclose(found, expected[:5, :5], atol=1e-10)


@pytest.mark.parametrize("name", ["gp", "search"])
def test_values_follow_the_covariance(name):
    """Whitened function values and whitened noise are standard normal."""
    tasks = draw(PRIORS[name], seed=1, batch=512)
    _, covariance, noise_std = tasks.process
    factor = torch.linalg.cholesky(covariance + JITTER * torch.eye(12, dtype=torch.float64))
    white = torch.linalg.solve_triangular(factor, tasks.f, upper=False).flatten()
    noise = ((tasks.y - tasks.f) / noise_std[:, None, None]).flatten()
    for sample in (white, noise):
        assert stats.kstest(sample.numpy(), "norm").pvalue > 1e-3


def test_hyperparameters_follow_their_prior():
    tasks = draw(GPTasks(max_features=5, noise_range=(0.1, 0.4)), seed=2, batch=2000, points=2)
    log_noise = tasks.process.noise_std.log()
    assert stats.kstest(log_noise.numpy(), stats.uniform(math.log(0.1), math.log(4.0)).cdf).pvalue > 1e-3
    counts = torch.bincount(tasks.num_features, minlength=6)[1:]
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("n", [0, 5])
def test_conditional_is_the_ratio_of_joint_normals(n):
    tasks = draw(GPTasks(max_features=2), seed=5, batch=3, points=8)
    covariance, noise_var = tasks.process.covariance, tasks.process.noise_std.square()
    mean, variance, evidence = conditional(covariance, noise_var, tasks.y[:, :n], n)
    exact = GPTasks(max_features=2).exact(tasks, n)
    for b, j in itertools.product(range(3), range(8 - n)):
        rows = [*range(n), n + j]
        joint = covariance[b][rows][:, rows] + JITTER * torch.eye(n + 1, dtype=torch.float64)
        noisy = joint + noise_var[b] * torch.eye(n + 1, dtype=torch.float64)
        half_noisy = noisy.clone()
        half_noisy[n, n] -= noise_var[b]
        y = tasks.y[b, rows, 0]
        f = torch.cat([y[:n], tasks.f[b, n + j]])
        context = stats.multivariate_normal(cov=noisy[:n, :n].numpy()).logpdf(y[:n].numpy()) if n else 0.0
        assert float(evidence[b]) == pytest.approx(context, abs=1e-9)
        for found, covariances, values in ((exact.log_y, noisy, y), (exact.log_f, half_noisy, f)):
            log_joint = stats.multivariate_normal(cov=covariances.numpy()).logpdf(values.numpy())
            assert float(found[b, j]) == pytest.approx(log_joint - context, abs=1e-6)
    assert mean.shape == variance.shape == (3, 8 - n)


@pytest.mark.parametrize("n", [0, 4])
def test_the_grid_s_answer_is_a_mixture_over_all_hyperparameters(n):
    prior = GridGPTasks(max_features=2, kernels=("rbf", "matern52"), lengthscales=(0.4, 1.5), noise_stds=(0.1, 0.5))
    tasks = draw(prior, seed=2, batch=6, points=6)
    exact = prior.exact(tasks, n)
    for b in range(6):
        d = int(tasks.num_features[b])
        X, y, f = tasks.X[b, :, :d], tasks.y[b, :, 0], tasks.f[b, :, 0]
        joint_y, joint_f, context = [], [], []
        for kind, noise_std in itertools.product(prior.kernels, prior.noise_stds):
            for lengthscales in itertools.product(prior.lengthscales, repeat=d):
                scaled = torch.tensor(lengthscales).double() * d**0.5

                def kernel(first, second, kind=kind, scaled=scaled):
                    return KERNELS[kind](first / scaled, second / scaled)

                K = centred(kernel, X) + JITTER * torch.eye(6, dtype=torch.float64)
                rows = [*range(n), n]
                noisy = K[rows][:, rows] + noise_std**2 * torch.eye(n + 1, dtype=torch.float64)
                half_noisy = noisy.clone()
                half_noisy[n, n] -= noise_std**2
                normal = stats.multivariate_normal
                joint_y.append(normal(cov=noisy.numpy()).logpdf(y[rows].numpy()))
                joint_f.append(normal(cov=half_noisy.numpy()).logpdf(torch.cat([y[:n], f[n : n + 1]]).numpy()))
                context.append(normal(cov=noisy[:n, :n].numpy()).logpdf(y[:n].numpy()) if n else 0.0)
        log_context = torch.tensor(context).logsumexp(0)
        for found, joint in ((exact.log_y, joint_y), (exact.log_f, joint_f)):
            assert float(found[b, 0]) == pytest.approx(float(torch.tensor(joint).logsumexp(0) - log_context), abs=1e-6)


def test_more_context_helps():
    tasks = draw(GPTasks(), seed=7, batch=300, points=40)
    last = []
    for n in (0, 4, 39):
        rows = [*range(n), 39]
        mean, covariance, noise_std = tasks.process
        process = Process(mean[:, rows], covariance[:, rows][:, :, rows], noise_std)
        kept = tasks._replace(y=tasks.y[:, rows], f=tasks.f[:, rows], process=process)
        last.append(GPTasks().exact(kept, n).log_y.mean())
    assert last[0] < last[1] < last[2]


def test_knowing_the_hyperparameters_helps():
    """A mixture over all of them can't be better in the mean than the one that the task was drawn with."""
    prior = GridGPTasks(max_features=1, kernels=("rbf",), lengthscales=(0.5,), noise_stds=(0.1, 0.6))
    known = [GridGPTasks(1, ("rbf",), (0.5,), (std,)) for std in prior.noise_stds]
    for index, alone in enumerate(known):
        tasks = draw(alone, seed=index, batch=200, points=20)
        gain = (alone.exact(tasks, 15).log_y - prior.exact(tasks, 15).log_y).mean(-1)
        assert 0 < float(gain.mean()) < 0.1


def test_networks_of_each_kind_are_computed_as_written():
    """One layer, by hand: the same draws in the same order."""
    prior = BNNTasks(max_features=2, max_depth=1, max_width=3)
    X = torch.randn(4, 5, 2, generator=torch.Generator().manual_seed(1)).double()
    found = prior._network(Draws(4, torch.Generator().manual_seed(0)), X, torch.full((4,), 2.0).double())
    again = Draws(4, torch.Generator().manual_seed(0))
    width, _, kind = 2 + again.integers(2), 1 + again.integers(1), again.integers(4, 1, 1)
    gain = torch.exp(math.log(0.8) + (math.log(3.0) - math.log(0.8)) * again.uniform(1, 1))
    sparse = again.uniform(1, 1) < 0.5
    absent = torch.where(sparse, 0.8 * again.uniform(1, 1), torch.zeros(1).double())
    weights = again.normal(2, 3) * (again.uniform(2, 3) >= absent) * gain / (2 * (1 - absent)).sqrt()
    bias, readout = again.normal(1, 3), again.normal(3, 1)
    for b in range(4):
        k = int(width[b])
        activation = (torch.tanh, torch.relu, torch.sin, torch.sign)[int(kind[b])]
        hidden = activation(X[b] @ weights[b] + bias[b])[:, :k]
        assert torch.allclose(found[b], hidden @ readout[b, :k] / k**0.5, atol=1e-12)


def test_a_network_with_known_weights_is_its_own_process():
    tasks = draw(BNNTasks(max_features=2), batch=20)
    mean, variance, noise_var = given_hyperparameters(tasks, 5)
    assert torch.allclose(mean, tasks.f[:, 5:, 0], atol=1e-9) and float(variance.max()) == JITTER
    z = (tasks.y - tasks.f)[..., 0] / noise_var.sqrt()[:, None]
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3


def test_a_mixture_s_processes_are_those_of_its_tasks():
    """Each task of a mixture has the predictive law that its own prior gives it."""
    mixture = MixtureTasks([GPTasks(max_features=1), BNNTasks(max_features=3)])
    tasks = draw(mixture, batch=40)
    mean, variance, _ = given_hyperparameters(tasks, 6)
    is_network = tasks.process.covariance.abs().amax((1, 2)) == 0
    assert 5 < int(is_network.sum()) < 35
    assert torch.allclose(mean[is_network], tasks.f[is_network, 6:, 0], atol=1e-9)
    z = (tasks.f[:, 6:, 0] - mean)[~is_network] / variance[~is_network].sqrt()
    assert 0.5 < float(z.square().mean()) < 1.5
    without = MixtureTasks(
        [GPTasks(max_features=1), lambda *arguments: GPTasks(max_features=1)(*arguments)._replace(process=None)]
    )
    assert draw(without, batch=40).process is None


def test_a_mixture_draws_each_prior_as_often_as_it_is_told():
    mixture = MixtureTasks([GPTasks(max_features=1), BNNTasks(max_features=3)], [3, 1])
    tasks = draw(mixture, batch=2000, points=2)
    share = float((tasks.num_features == 1).double().mean())  # all of the first prior's, a third of the second's
    assert abs(share - (0.75 + 0.25 / 3)) < 4 * (0.14 / 2000) ** 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GPTasks(max_features=0), "max_features must be at least 1"),
        (lambda: GPTasks(noise_range=(0.0, 1.0)), "noise_range must be positive and finite, found 0.0"),
        (lambda: GPTasks(noise_range=(1.0, 0.5)), "noise_range must be two increasing positive numbers"),
        (lambda: GPTasks(noise_range=(0.1,)), "noise_range must be two numbers"),
        (lambda: GPTasks(max_features=2.5), "max_features must be an integer"),
        (lambda: GPTasks(lengthscale_median=-1.0), "lengthscale_median must be positive"),
        (lambda: GPTasks(ard_spread=math.nan), "ard_spread must be finite"),
        (lambda: GridGPTasks(lengthscales=1.0), "lengthscales must be a sequence of numbers"),
        (lambda: CausalTasks(max_classes=1), "max_classes must be at least 2"),
        (lambda: MixtureTasks([3]), "all of them callable"),
        (lambda: MixtureTasks([GPTasks()], ["a"]), "weights must be a positive number"),
        (lambda: GridGPTasks(lengthscales=()), "lengthscales must have at least one value"),
        (lambda: GridGPTasks(noise_stds=(0.1, -1.0)), "noise_stds must be positive and finite"),
        (
            lambda: GridGPTasks(kernels=("rbf", "cubic")),
            "kernels must be among rbf, matern32, matern52, periodic, nngp, got cubic",
        ),
        (lambda: BNNTasks(max_width=1), "max_width must be at least 2"),
        (lambda: BNNTasks(gain_range=(2.0, 1.0)), "gain_range must be two increasing positive numbers"),
        (lambda: SearchTasks(warp_spread=-1.0), "warp_spread must be a number from 0 on"),
        (lambda: SearchTasks(noise=(0.1,)), "noise must be a mean and a spread of logarithms"),
        (lambda: SearchTasks(noise_range=(0.5, 0.1)), "noise_range must be two increasing positive numbers"),
        (lambda: MixtureTasks([]), "priors must have at least one prior"),
        (lambda: MixtureTasks([GPTasks()], [1, 2]), "weights must be 1 positive numbers"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_causal_tables():
    prior = CausalTasks(max_features=6, max_classes=4)
    tasks = draw(prior, batch=200, points=80)
    assert tasks.f is None and tasks.process is None and tasks.X.shape == (200, 80, 6)
    used = torch.arange(6) < tasks.num_features[:, None]
    assert bool((tasks.X.abs().amax(1)[~used] == 0).all())
    torch.testing.assert_close(tasks.X.mean(1)[used], torch.zeros(int(used.sum())).double(), atol=1e-9, rtol=0)
    assert bool((tasks.X.std(1, correction=0)[used] < 1 + 1e-9).all())  # 0 of a constant column, otherwise 1
    assert set(tasks.y.unique().tolist()) == {0.0, 1.0, 2.0, 3.0}
    num_classes = torch.tensor([len(labels.unique()) for labels in tasks.y])
    assert {2, 3, 4} <= set(num_classes.tolist()) and int((num_classes == 1).sum()) < 5
    again = draw(prior, batch=200, points=80)
    assert torch.equal(tasks.X, again.X) and torch.equal(tasks.y, again.y)


def test_causal_tables_can_be_learned():
    """The nearest row's class is right more often than that of a row at random, by many standard errors."""
    tasks = draw(CausalTasks(max_features=6, max_classes=4), batch=100, points=100)
    distance = torch.cdist(tasks.X, tasks.X) + 1e9 * torch.eye(100)
    labels = tasks.y[..., 0]
    nearest = (labels.gather(1, distance.argmin(-1)) == labels).double().mean(1)
    other = (labels.roll(1, 1) == labels).double().mean(1)
    gain = nearest - other
    assert float(gain.mean()) > 0.1 and float(gain.mean() / gain.std() * 10) > 6


def test_mixtures_of_classes():
    batch = MixtureTasks([CausalTasks(4, 3), CausalTasks(2, 3)])(6, 20, torch.Generator().manual_seed(0))
    assert batch.f is None and batch.X.shape == (6, 20, 4) and set(batch.y.unique().tolist()) <= {0.0, 1.0, 2.0}
