"""Gaussian processes beside a transformer's histograms, against closed forms."""

import math

import pytest
import torch
from torch.distributions import Normal

from bayesnn.histogram import prior_borders
from bayesnn.inference.amortized.evidence_ascent import (
    LEAST_LOG_NOISE,
    LEAST_ROWS,
    MOST_ROWS,
    evidence_gradient,
    towards_evidence,
)
from bayesnn.inference.amortized.process_heads import ProcessHeads, bucket_probabilities
from bayesnn.inference.amortized.tasks.covariances import JITTER, centred, conditional, matern32, reference_inputs
from bayesnn.inference.amortized.transformer import SetTransformer
from bayesnn.inference.amortized.warped_processes import WarpedProcesses, powers

BORDERS = prior_borders(torch.linspace(-3, 3, 100), 12).tolist()
SIZES = {"width": 16, "num_layers": 2, "num_heads": 2}


def normals(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_processes():
    """Two for each of three batch elements, of four features of which the last doesn't count."""
    sharpness = (0.5 * normals(3, 2, 4, seed=1)).exp() * torch.tensor([1.0, 1.0, 1.0, 0.0])
    amplitude, noise = (0.3 * normals(3, 2, seed=2)).exp(), 0.1 * (0.3 * normals(3, 2, seed=3)).exp()
    offset = torch.tensor([0.5, 0.0], dtype=torch.float64).expand(3, 2)
    return WarpedProcesses.prior(sharpness, 0.2 * normals(3, 2, 4, 4, seed=4), amplitude, noise, offset)


def by_hand(processes, index, h, X, y, queries):
    """Mean, variance and evidence from the covariance of ``tasks.covariances``, with the warp as a loop over powers."""
    coefficients = processes.warp[index, h]

    def kernel(first, second):
        bent = [
            points + sum(coefficients[:, p - 2] * (points / math.sqrt(3)) ** p for p in range(2, 6))
            for points in (first, second)
        ]
        return matern32(*(points * processes.sharpness[index, h] for points in bent))

    covariance = processes.amplitude[index, h].square() * centred(kernel, torch.cat([X[index], queries[index]]))
    covariance = covariance + processes.offset[index, h].square()
    noise_var = processes.noise[index, h].square() - JITTER  # which ``conditional`` adds
    return conditional(covariance, noise_var, y[index], len(X[index]))


def test_exact_answers():
    """Equal to the closed form, for every process and element of the batch."""
    X, y, queries = (2 * normals(3, 6, 4, seed=5)).clamp(-1.7, 1.7), normals(3, 6, 1, seed=6), normals(3, 5, 4, seed=7)
    queries = queries.clamp(-1.7, 1.7)
    given = some_processes().given(X, y)
    mean, variance = given.at(queries)
    for index in range(3):
        for h in range(2):
            wanted_mean, wanted_variance, evidence = by_hand(given, index, h, X, y, queries)
            torch.testing.assert_close(mean[index, h], wanted_mean, rtol=1e-6, atol=1e-8)
            torch.testing.assert_close(variance[index, h] + JITTER, wanted_variance, rtol=1e-5, atol=1e-8)
            torch.testing.assert_close(given.log_evidence[index, h], evidence, rtol=1e-6, atol=1e-6)


def test_correlations_of_the_mixture():
    """Covariances by the law of total covariance, from each process's own, of groups of points by themselves."""
    heads = ProcessHeads(8, 2, 4)
    heads.start(torch.Generator().manual_seed(0))
    given = some_processes().given(0.5 * normals(3, 6, 4, seed=5), normals(3, 6, 1, seed=6))
    X = normals(3, 6, 4, seed=7)
    with torch.no_grad():
        found = heads.correlations(given, X, 3)
        weights = (heads.trust * given.log_evidence.log_softmax(-1)).softmax(-1)
    for index in range(3):
        for group in range(2):
            rows = X[index, 3 * group : 3 * group + 3]
            # A process given a value without noise moves by its covariance: the other way to come by it.
            one = [given.at(X)[0][index, h, 3 * group : 3 * group + 3] for h in range(2)]
            covariance = [_covariance(given, index, h, rows) for h in range(2)]
            middle = sum(weights[index, h] * one[h] for h in range(2))
            whole = sum(
                weights[index, h] * (covariance[h] + torch.outer(one[h] - middle, one[h] - middle)) for h in range(2)
            )
            std = whole.diagonal().sqrt()
            torch.testing.assert_close(found[index, group], whole / torch.outer(std, std), rtol=1e-5, atol=1e-6)


def _covariance(given, index, h, rows):
    """Of f at rows, by how the mean moves where each of them is observed one higher."""
    columns = []
    for i in range(len(rows)):
        X = rows[i].expand(3, 1, 4)
        shifted = given.given(X, (given.at(X)[0][index, h, 0] + 1).expand(3, 1, 1))
        shift = shifted.at(rows.expand(3, -1, -1))[0][index, h] - given.at(rows.expand(3, -1, -1))[0][index, h]
        variance = given.at(X)[1][index, h, 0] + given.noise[index, h].square()
        columns.append(shift * variance)
    return torch.stack(columns, -1)


def test_rows_may_come_in_parts():
    """The factor that grows is that of all rows, in any order, also from none; one row twice is no obstacle."""
    X, y, queries = normals(3, 7, 4), normals(3, 7, 1, seed=1), normals(3, 5, 4, seed=2)
    X[:, 6] = X[:, 0]
    whole = some_processes().given(X, y)
    parts = some_processes().given(X[:, :0], y[:, :0]).given(X[:, 3:], y[:, 3:]).given(X[:, :3], y[:, :3])
    for one, other in zip(whole.at(queries), parts.at(queries), strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(whole.log_evidence, parts.log_evidence)
    prior_mean, prior_variance = some_processes().at(queries)
    assert not prior_mean.any() and bool((prior_variance > whole.at(queries)[1]).all())
    wider = whole.expand((2, 3))
    for one, other in zip(wider.flat().at(queries.repeat(2, 1, 1)), whole.at(queries), strict=True):
        torch.testing.assert_close(one, other.repeat(2, 1, 1))


def test_gradients_of_answers():
    """In the inputs by finite differences, and finite where a query is a row of the context."""
    X, y, queries = normals(3, 4, 4), normals(3, 4, 1, seed=1), normals(3, 2, 4, seed=2).requires_grad_()
    given = some_processes().given(X, y)
    assert torch.autograd.gradcheck(lambda queries: given.at(queries), (queries,), fast_mode=True)
    at = X.clone().requires_grad_()
    mean, variance = some_processes().given(at, y).at(at)
    (gradient,) = torch.autograd.grad(mean.sum() + variance.sum(), at)
    assert bool(gradient.isfinite().all()) and not gradient[..., 3].any() and bool(gradient[..., 0].any())


def test_far_inputs_have_a_covariance():
    """Where powers would run away, the warp is a shift."""
    X, y = 1000 * normals(3, 6, 4), normals(3, 6, 1, seed=1)
    mean, variance = some_processes().given(X, y).at(-X)
    assert bool(mean.isfinite().all()) and bool((variance > 0).all())


def test_bucket_probabilities():
    """Differences of mixtures' distribution functions, with gradients by finite differences."""
    mean, std = normals(3, 2).requires_grad_(), (0.3 * normals(3, 2, seed=1)).exp().requires_grad_()
    weights = normals(3, 2, seed=2).softmax(-1).requires_grad_()
    inner = torch.linspace(-2, 2, 9, dtype=torch.float64)
    found = bucket_probabilities(weights, mean, std, inner)
    below = (weights[..., None] * Normal(mean[..., None], std[..., None]).cdf(inner)).sum(-2)
    wanted = torch.cat([below, torch.ones(3, 1)], -1).diff(dim=-1, prepend=torch.zeros(3, 1))
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(found.sum(-1), torch.ones(3, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda *values: bucket_probabilities(*values, inner), (weights, mean, std))


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_small_components_keep_their_digits(sign):
    """In single precision, a light component far above or below a heavy one."""
    inner, weights = torch.linspace(-2, 2, 101), torch.tensor([1 - 1e-6, 1e-6])
    mean, std = sign * torch.tensor([-1.0, 1.0]), torch.tensor([0.05, 0.2])
    found = bucket_probabilities(weights, mean, std, inner)[1:-1]
    parts = Normal(mean[:, None].double(), std[:, None].double()).cdf(inner.double()).diff(dim=-1)
    exact = (weights.double()[:, None] * parts).sum(0)
    middles = (inner[1:] + inner[:-1]) / 2
    bulk = (middles - mean[1]).abs() < 0.5
    torch.testing.assert_close(found[bulk].double(), exact[bulk], rtol=1e-4, atol=0)


def test_the_mixture_written_out():
    """Weights of the token and the evidence; of f the processes' normals, of y with their noise."""
    heads = ProcessHeads(8, 2, 4).double()
    heads.start(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.3 * normals(*parameter.shape, seed=parameter.numel()))
    given = some_processes().given(normals(3, 4, 4), normals(3, 4, 1, seed=1))
    mean, variance = given.at(normals(3, 5, 4, seed=2))
    logits, tokens = normals(3, 5, 2, 7, seed=3), normals(3, 5, 8, seed=4)
    inner = torch.linspace(-2, 2, 6, dtype=torch.float64)
    found = heads.mixed(logits, tokens, given, mean, variance, inner)
    torch.testing.assert_close(found.logsumexp(-1), torch.zeros(3, 5, 2, dtype=torch.float64))
    raw, evidence = heads.weigh(tokens), given.log_evidence.log_softmax(-1)
    for part in range(2):
        share = raw[..., 3 * part : 3 * part + 3].clone()
        share[..., 1:] += heads.trust * evidence[:, None]
        share = share.softmax(-1)
        wanted = share[..., :1] * logits[..., part, :].softmax(-1)
        for h in range(2):
            spread = (variance[:, h] + part * given.noise[:, h, None].square()).sqrt()
            below = Normal(mean[:, h, :, None], spread[..., None]).cdf(inner)
            masses = torch.nn.functional.pad(below, (1, 1), value=0.0)
            masses[..., -1] = 1
            wanted = wanted + share[..., h + 1, None] * masses.diff(dim=-1)
        torch.testing.assert_close(found[..., part, :].exp(), wanted)


def test_processes_for_a_trained_network():
    """To begin with, most of the probability is the network's; all that is new is trained."""
    network = SetTransformer(4, BORDERS, (1.0, 1.0), **SIZES).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * normals(*parameter.shape, seed=1))
    twin = network.with_processes(3, seed=5)
    X, y, queries = normals(2, 7, 4), normals(2, 7, 1, seed=1), normals(2, 5, 4, seed=2)
    for old, new in zip(network(X, y, queries), twin(X, y, queries), strict=True):
        assert bool((new.probs > 0.8 * old.probs).all()) and not torch.allclose(new.probs, old.probs, atol=1e-4)
    sum(law.log_prob(normals(2, 5, seed=3)).sum() for law in twin(X, y, queries)).backward()
    # The normalisation before the weights, which begin at 0, is reached once these have moved.
    without = {name for name, value in twin.named_parameters() if not value.grad.any()}
    assert without == {"process_heads.weigh.0.weight", "process_heads.weigh.0.bias"}
    assert twin.deepened(1).process_heads.num_processes == 3
    with pytest.raises(ValueError, match="num_processes must be of a network without any, found 3"):
        twin.with_processes(2)
    with pytest.raises(ValueError, match="num_processes must be"):
        network.with_processes(0)
    with pytest.raises(ValueError, match="num_processes must be"):
        SetTransformer(4, BORDERS, (1.0, 1.0), num_processes=-1)


def waves(num_rows):
    """Rows of a smooth function, which none of ``some_processes`` expects."""
    X = (2 * normals(3, num_rows, 4, seed=8)).clamp(-1.7, 1.7)
    return X, (X[..., :1] + X[..., 1:2]).sin() + 0.01 * normals(3, num_rows, 1, seed=9)


def test_readers_are_queries_at_the_middle():
    """Tokens that attend to the context's rows and to nothing else, whatever their place beside the rows."""
    network = SetTransformer(4, BORDERS, (1.0, 1.0), **SIZES, num_processes=2).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * normals(*parameter.shape, seed=parameter.numel()))
        X, y = normals(3, 6, 4), normals(3, 6, 1, seed=1)
        cache = network.encode(X, y)
        tokens = network.process_heads.tokens + cache.summary
        for layer, key, value in zip(network.layers, cache.keys, cache.values, strict=True):
            tokens = layer(tokens, layer.basis(torch.zeros(3, 2, 4, dtype=torch.float64)), key, value)
        wanted = network.process_heads.read(tokens, cache.num_features)
    torch.testing.assert_close(cache.processes.sharpness, wanted.sharpness)
    torch.testing.assert_close(cache.processes.noise, wanted.noise)


@pytest.mark.parametrize("num_processes", [0, 2])
def test_function_values_alone(num_processes):
    """The answer for f doesn't depend on whether that for observations is asked for."""
    network = SetTransformer(4, BORDERS, (1.0, 1.0), **SIZES, num_processes=num_processes).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * normals(*parameter.shape, seed=parameter.numel()))
        cache, X = network.encode(normals(3, 6, 4), normals(3, 6, 1, seed=1)), normals(3, 5, 4, seed=2)
        f, y = network.distributions(network.query(cache, X))
        (alone,) = network.distributions(network.query(cache, X, latent_only=True))
    torch.testing.assert_close(alone.logits, f.logits)
    assert not torch.allclose(f.logits, y.logits)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("num_rows", [LEAST_ROWS, MOST_ROWS + 50])
def test_refined_processes(num_rows, ties):
    """They have more evidence, whatever the order of the rows and also where no gradients are wanted."""
    X, y = waves(num_rows)
    y = (5 * y).round() / 5 if ties else y
    before, after = some_processes(), towards_evidence(some_processes(), X, y)
    gain = after.given(X, y).log_evidence - before.given(X, y).log_evidence
    assert float(gain.min()) > 0.5 and float(gain.mean()) > 5
    assert torch.equal(after.sharpness > 0, before.sharpness > 0) and after.root.shape[-1] == 0
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        again = towards_evidence(some_processes(), X[:, order], y[:, order])
    for one, other in zip(after, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("log_noise", [-3.0, -8.0])
def test_gradient_of_the_evidence(log_noise):
    """As autograd finds it; noise below the least one counts as that, and features that don't count move nothing."""
    X, y = waves(40)
    processes, d = some_processes(), 4
    log_noise = torch.full((3, 2, 1), log_noise, dtype=torch.float64)
    parts = (
        0.3 * normals(3, 2, d, seed=1),
        processes.warp.flatten(-2),
        processes.amplitude.log()[..., None],
        log_noise,
    )
    theta, counts = torch.cat(parts, -1).requires_grad_(), processes.sharpness > 0
    log_sharpness, warp, log_amplitude, log_noise = theta.split([d, 4 * d, 1, 1], -1)
    noise = log_noise[..., 0].clamp_min(LEAST_LOG_NOISE).exp()
    prior = WarpedProcesses.prior(
        log_sharpness.exp() * counts, warp.unflatten(-1, (d, 4)), log_amplitude[..., 0].exp(), noise, processes.offset
    )
    (wanted,) = torch.autograd.grad(prior.given(X, y).log_evidence.sum(), theta)
    places = torch.cat([reference_inputs(d).expand(3, -1, -1), X], -2)
    found = evidence_gradient(theta.detach(), (places, powers(places)), y, counts, processes.offset)
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-7)


def test_few_rows_refine_nothing():
    X, y = waves(LEAST_ROWS - 1)
    processes = some_processes()
    assert towards_evidence(processes, X, y) is processes


def test_refinement_lets_gradients_through():
    """As if nothing had been moved: those of logarithms are those of the reading."""
    noise = some_processes().noise.requires_grad_()
    processes = some_processes()._replace(noise=noise)
    after = towards_evidence(processes, *waves(LEAST_ROWS))
    assert not torch.allclose(after.noise, noise)
    (gradient,) = torch.autograd.grad(after.noise.log().sum(), noise)
    torch.testing.assert_close(gradient, 1 / noise.detach())


def test_processes_that_were_read_are_kept():
    """More rows with the hyperparameters of the first ones; in training nothing is refined."""
    network = SetTransformer(4, BORDERS, (1.0, 1.0), **SIZES, num_processes=2).double().eval()
    X, y = waves(LEAST_ROWS + 5)
    first = network.encode(X[:, :LEAST_ROWS], y[:, :LEAST_ROWS])
    whole = network.encode(X, y, processes=first.processes)
    assert torch.equal(whole.processes.sharpness, first.processes.sharpness)
    torch.testing.assert_close(whole.processes.root, first.processes.given(X[:, LEAST_ROWS:], y[:, LEAST_ROWS:]).root)
    anew = network.encode(X, y)
    assert not torch.allclose(anew.processes.noise, first.processes.noise)
    assert torch.equal(anew.keys[0], whole.keys[0])
    trained = network.train().encode(X, y)
    assert not torch.allclose(trained.processes.noise, anew.processes.noise)
