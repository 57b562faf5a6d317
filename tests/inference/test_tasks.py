import math

import pytest
import torch
from scipy import stats

from bayesnn.configured import build, describe
from bayesnn.inference.amortized.tasks import GPTasks, TaskBatch, exact_log_prob, standardise_context


def draw(seed=0, batch=256, points=12, **settings):
    return GPTasks(**settings)(batch, points, torch.Generator().manual_seed(seed))


def test_shapes_and_unused_features():
    tasks = draw(max_features=4)
    assert tasks.X.shape == (256, 12, 4) and tasks.y.shape == tasks.f.shape == (256, 12, 1)
    assert tasks.covariance.shape == (256, 12, 12) and tasks.noise_std.shape == (256,)
    assert sorted(set(tasks.num_features.tolist())) == [1, 2, 3, 4]
    unused = torch.arange(4) >= tasks.num_features[:, None]
    assert bool((tasks.X.abs().amax(1)[unused] == 0).all()) and bool((tasks.X.abs().amax(1)[~unused] > 0).all())


def test_same_seed_same_tasks():
    for one, two in zip(draw(3), draw(3), strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(draw(3).y, draw(4).y)


def test_inputs_are_in_standard_units():
    tasks = draw(batch=200, points=60, max_features=3)
    means, stds = tasks.X[..., 0].mean(1), tasks.X[..., 0].std(1)
    assert abs(float(means.mean())) < 0.05 and float(means.std()) == pytest.approx(0.15, rel=0.25)
    assert float(stds.log().std()) == pytest.approx(0.15, rel=0.25)


def test_values_follow_the_covariance():
    """Whitened function values and whitened noise are standard normal."""
    tasks = draw(seed=1, batch=512)
    identity = torch.eye(12, dtype=torch.float64)
    factor = torch.linalg.cholesky(tasks.covariance + 1e-6 * identity)
    white = torch.linalg.solve_triangular(factor, tasks.f, upper=False).flatten()
    noise = ((tasks.y - tasks.f) / tasks.noise_std[:, None, None]).flatten()
    for sample in (white, noise):
        assert stats.kstest(sample.numpy(), "norm").pvalue > 1e-3


def test_hyperparameters_follow_their_prior():
    tasks = draw(seed=2, batch=2000, points=2, max_features=5, noise_range=(0.1, 0.4))
    log_noise = tasks.noise_std.log()
    bounds = math.log(0.1), math.log(4.0)
    assert stats.kstest(log_noise.numpy(), stats.uniform(*bounds).cdf).pvalue > 1e-3
    counts = torch.bincount(tasks.num_features, minlength=6)[1:]
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_exact_density_is_the_ratio_of_joint_normals():
    n = 5
    tasks = draw(seed=5, batch=6, points=8)
    log_f, log_y = exact_log_prob(tasks, n)
    assert log_f.shape == log_y.shape == (6, 3)
    for b in range(6):
        kernel = tasks.covariance[b] + 1e-6 * torch.eye(8, dtype=torch.float64)
        noise_var = float(tasks.noise_std[b]) ** 2
        for j in range(3):
            rows = [*range(n), n + j]
            joint = kernel[rows][:, rows]
            noisy = joint + noise_var * torch.eye(n + 1, dtype=torch.float64)
            half_noisy = noisy.clone()
            half_noisy[n, n] -= noise_var
            y = tasks.y[b, rows, 0]
            f = torch.cat([y[:n], tasks.f[b, n + j]])
            context = stats.multivariate_normal(cov=noisy[:n, :n].numpy()).logpdf(y[:n].numpy())
            assert float(log_y[b, j]) == pytest.approx(
                stats.multivariate_normal(cov=noisy.numpy()).logpdf(y.numpy()) - context
            )
            of_f = stats.multivariate_normal(cov=half_noisy.numpy()).logpdf(f.numpy()) - context
            assert float(log_f[b, j]) == pytest.approx(of_f, abs=1e-6)


def test_exact_density_of_an_empty_context_is_the_prior_marginal():
    tasks = draw(seed=6, batch=4, points=3)
    log_f, _ = exact_log_prob(tasks, 0)
    std = (tasks.covariance.diagonal(dim1=-2, dim2=-1) + 1e-6).sqrt()
    torch.testing.assert_close(log_f, torch.distributions.Normal(0.0, std).log_prob(tasks.f[..., 0]))


def test_more_context_helps():
    tasks = draw(seed=7, batch=300, points=40)
    last = [exact_log_prob(tasks._replace(**keep(tasks, n)), n)[1].mean() for n in (0, 4, 39)]
    assert last[0] < last[1] < last[2]


def keep(tasks, n):
    rows = [*range(n), 39]
    return {"y": tasks.y[:, rows], "f": tasks.f[:, rows], "covariance": tasks.covariance[:, rows][:, :, rows]}


def test_exact_density_needs_a_gaussian_prior():
    with pytest.raises(ValueError, match="covariance"):
        exact_log_prob(TaskBatch(torch.zeros(1, 2, 1), torch.zeros(1, 2, 1), torch.zeros(1, 2, 1)), 1)


def test_standardise_context():
    generator = torch.Generator().manual_seed(0)
    y = 5 + 3 * torch.randn(2, 7, 1, generator=generator)
    loc, scale = standardise_context(y)
    z = (y - loc) / scale
    torch.testing.assert_close(z.mean(1), torch.zeros(2, 1), atol=1e-6, rtol=0)
    torch.testing.assert_close(z.square().mean(1), torch.ones(2, 1))


@pytest.mark.parametrize(
    "y, loc, scale", [([], 0.0, 1.0), ([4.0], 4.0, 1.0), ([4.0, 4.0], 4.0, 1.0), ([3.0, 5.0], 4.0, 1.0)]
)
def test_standardise_small_contexts(y, loc, scale):
    found = standardise_context(torch.tensor(y).reshape(-1, 1))
    assert found[0].shape == found[1].shape == (1, 1)
    assert found[0].item() == loc and found[1].item() == scale


def test_constant_but_for_rounding_has_scale_one():
    _, scale = standardise_context(torch.tensor([[1e8], [1e8 + 8]]))
    assert scale.item() == 1.0


def test_settings_are_written_and_read():
    prior = GPTasks(max_features=3, noise_range=(0.1, 0.2))
    assert build(describe(prior)) == prior


@pytest.mark.parametrize("settings", [{"max_features": 0}, {"noise_range": (0.0, 1.0)}, {"noise_range": (0.2, 0.1)}])
def test_bad_settings(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        GPTasks(**settings)
