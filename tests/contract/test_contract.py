"""What every registered model promises, whatever its family. A new model is tested by being registered.

Here its posterior and what acquisition functions make of it.
"""

import functools
import warnings

import pytest
import torch
from botorch.acquisition import (
    LinearMCObjective,
    ScalarizedPosteriorTransform,
    qLogExpectedImprovement,
    qLogNoisyExpectedImprovement,
    qNoisyExpectedImprovement,
    qUpperConfidenceBound,
)
from botorch.acquisition.multi_objective import qNoisyExpectedHypervolumeImprovement
from botorch.models import ModelList, SingleTaskGP
from botorch.optim import optimize_acqf
from contract.models import (
    SPREAD,
    close,
    data,
    each_model,
    fitted,
    is_exact,
    new_points,
    samples,
    unfitted,
)

from bayesnn import BayesnnWarning
from bayesnn.posteriors import Gaussian, Mixture, StudentT

# The posterior -----------------------------------------------------------------------------------------------------


@each_model
def test_shapes(name):
    model = fitted(name)
    for shape in ((1,), (3,), (4, 1), (4, 3), (2, 4, 3)):
        posterior = model.posterior(new_points(*shape))
        assert posterior.mean.shape == posterior.variance.shape == (*shape, 1)
        assert posterior.rsample(torch.Size([5])).shape == (5, *shape, 1)
        assert (posterior.variance >= 0).all() and torch.isfinite(posterior.mean).all()
        p = model.predict(new_points(*shape))
        assert p.mean.shape == p.variance.shape == p.quantile(0.3).shape == (*shape, 1)
        assert p.log_prob(p.mean).shape == shape
    assert model.num_outputs == 1 and model.batch_shape == torch.Size([])
    close(model.train_inputs[0], data()[0])
    close(model.train_targets, data()[1])


@each_model
def test_draws_do_not_depend_on_place_or_batch(name):
    model, point = fitted(name), new_points(1)
    alone = samples(model, point)
    for batch, place in (
        (torch.cat([point, new_points(5, seed=2)]), 0),
        (torch.cat([new_points(5, seed=2), point]), 5),
    ):
        X = batch.unsqueeze(1)  # (6, 1, d): six t-batch elements
        close(samples(model, X)[:, place], alone)
    several = new_points(4, 3)
    noisy = samples(model, several.repeat(3, 1, 1), observation_noise=True)
    close(noisy[:, :4], noisy[:, 8:])


@each_model
def test_acquisition_does_not_depend_on_place_or_batch(name):
    acquisition = qLogNoisyExpectedImprovement(fitted(name), data()[0], prune_baseline=False)
    X = new_points(6, 2)
    together = acquisition(X)
    close(acquisition(X.flip(0)).flip(0), together, rtol=1e-6)
    close(torch.cat([acquisition(x) for x in X]), together, rtol=1e-6)
    close(acquisition(X.repeat(2, 1, 1))[6:], together, rtol=1e-6)


@each_model
def test_draws_are_functions(name):
    model, X = fitted(name), new_points(3)
    repeated = torch.cat([X, X])
    values = samples(model, repeated)
    jitter = isinstance(model.posterior(X), Gaussian | StudentT | Mixture)  # of a Cholesky factor: the others are exact
    assert (values[:, 3:] - values[:, :3]).abs().max() <= (1e-3 if jitter else 1e-12) * SPREAD
    # The marginals of a joint posterior are the posteriors at single points.
    joint = model.posterior(X)
    close(joint.mean, model.posterior(X.unsqueeze(1)).mean.squeeze(1))
    close(joint.variance, model.posterior(X.unsqueeze(1)).variance.squeeze(1), rtol=1e-6)
    # Samples have those moments.
    values = samples(model, X, 4096)
    error = (joint.variance / len(values)).sqrt()
    assert ((values.mean(0) - joint.mean).abs() <= 4 * error + 1e-9).all()
    ratio = values.var(0, correction=0) / joint.variance
    assert ((ratio > 0.85) & (ratio < 1.15)).all()


@each_model
def test_draws_are_continuous(name):
    """Next to a known point a function is what it is there, or improvement is expected where there is none."""
    model, X = fitted(name), new_points(3)
    for distance, limit in ((1e-6, 1e-3), (1e-3, 0.05)):
        near = X + distance * torch.tensor([1.0, -30.0]).double()
        values = samples(model, torch.cat([X, near]))
        assert (values[:, 3:] - values[:, :3]).abs().max() <= limit * SPREAD
    acquisition = qNoisyExpectedImprovement(model, data()[0], prune_baseline=False)
    assert acquisition((data()[0] + 1e-7).unsqueeze(1)).max() <= 5e-3 * SPREAD


@each_model
def test_drawn_functions_stay_the_same(name):
    model, A, B = fitted(name), new_points(3), new_points(2, 2, seed=2)
    functions = model.draw_functions(7, seed=1)
    first, second = functions(A), functions(B)
    assert first.shape == (7, 3, 1) and second.shape == (7, 2, 2, 1)
    tolerance = 1e-6 if is_exact(name) else 1e-2
    both = functions(torch.cat([A, B.reshape(4, 2)]))
    close(both, torch.cat([first, second.reshape(7, 4, 1)], 1), rtol=0, atol=tolerance * SPREAD)
    close(model.draw_functions(7, seed=1)(A), first)
    assert not torch.equal(model.draw_functions(7, seed=2)(A), first)
    drawn = model.draw_functions(2000)(A)
    posterior = model.posterior(A)
    assert ((drawn.mean(0) - posterior.mean).abs() < 4 * (posterior.variance / 2000).sqrt() + 1e-9).all()


@each_model
def test_observation_noise_widens_the_posterior(name):
    model, X = fitted(name), new_points(4)
    plain, noisy = model.posterior(X), model.posterior(X, observation_noise=True)
    # Of finitely many draws with noise of their own, the variance is a sum up to their correlation.
    slack = 0.75 if is_exact(name) else 1.0 - 1e-9
    assert (noisy.variance > slack * plain.variance).all() and noisy.variance.sum() > plain.variance.sum()
    for given in (torch.tensor(4.0), torch.full((4, 1), 4.0), torch.full((1, 1), 4.0).double()):
        widened = model.posterior(X, observation_noise=given).variance
        expected = plain.variance + 4.0
        assert ((widened > 0.5 * expected) & (widened < 1.6 * expected)).all()


@each_model
def test_prediction_agrees_with_the_posterior(name):
    model, X = fitted(name), new_points(20)
    posterior, p = model.posterior(X), model.predict(X)
    # Exactly for a likelihood with E[y] = f; a network with two heads may see them a little apart.
    assert ((p.mean - posterior.mean).abs() <= 0.1 * p.stddev).all()
    close(p.variance, p.aleatoric + p.epistemic)
    assert (p.aleatoric > 0).all() and (p.epistemic >= 0).all()
    assert (p.variance >= 0.99 * p.epistemic).all()
    ratio = p.epistemic / posterior.variance
    assert ((ratio > 0.9) & (ratio < 1.1)).all()
    low, high = p.interval(0.9)
    assert (low < high).all()
    close(p.cdf(low), torch.full_like(low, 0.05), atol=1e-4)


# Acquisition ------------------------------------------------------------------------------------------------------


@each_model
def test_no_improvement_is_expected_at_known_points(name):
    model, X = fitted(name), data()[0]
    values = qNoisyExpectedImprovement(model, X, prune_baseline=False)(X.unsqueeze(1))
    assert values.max() <= (1e-9 if is_exact(name) else 1e-3 * SPREAD), values.max()
    log_values = qLogNoisyExpectedImprovement(model, X, prune_baseline=False)(X.unsqueeze(1))
    assert log_values.exp().max() <= 2e-3 * SPREAD
    # Elsewhere some is.
    candidates = qNoisyExpectedImprovement(model, X, prune_baseline=False)(new_points(40, 1))
    assert candidates.max() > 10 * values.max() and candidates.max() > 1e-3 * SPREAD


@functools.cache
def two_models(name):
    X, Y = data(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BayesnnWarning)
        return ModelList(fitted(name), unfitted(name).fit(X, Y[:, 1:], seed=1))


def hypervolume(model, X, **options):
    reference = data(2)[1].amin(0) - 1.0
    return qNoisyExpectedHypervolumeImprovement(
        model, reference.tolist(), X, prune_baseline=False, sampler=None, **options
    )  # fmt: skip


@each_model
@pytest.mark.parametrize("joined", ["list", "outputs"])
def test_no_hypervolume_improvement_is_expected_at_known_points(name, joined):
    model, X = (two_models(name) if joined == "list" else fitted(name, 2)), data()[0][:6]
    acquisition = hypervolume(model, X)
    with torch.no_grad():
        known, elsewhere = acquisition(X.unsqueeze(1)), acquisition(new_points(20, 1))
    assert known.max() <= (1e-6 if is_exact(name) else 2e-3 * SPREAD**2), known.max()
    assert elsewhere.max() > 10 * known.max() and elsewhere.max() > 1e-3 * SPREAD**2


@each_model
def test_pending_points_have_no_value(name):
    model, X, pending = fitted(name), data()[0], new_points(3, seed=5)
    acquisition = qLogNoisyExpectedImprovement(model, X, prune_baseline=False, X_pending=pending)
    with torch.no_grad():
        known, elsewhere = acquisition(pending.unsqueeze(1)).exp(), acquisition(new_points(20, 1)).exp()
    assert known.max() <= 2e-3 * SPREAD and elsewhere.max() > known.max()
    if is_exact(name):  # others' samples depend on the order of points, which the pending ones end here
        # The joint improvement of a candidate and the pending points: at one of those, no more than anywhere.
        acquisition = qNoisyExpectedImprovement(model, X, prune_baseline=False, X_pending=pending)
        values = acquisition(torch.cat([pending, new_points(20)]).unsqueeze(1))
        assert (values[:3] - values.min()).max() <= 1e-9
    acquisition = hypervolume(two_models(name), X[:6], X_pending=pending)
    with torch.no_grad():
        assert acquisition(pending.unsqueeze(1)).max() <= (1e-6 if is_exact(name) else 2e-3 * SPREAD**2)


@each_model
def test_gradients_equal_finite_differences(name):
    model, X = fitted(name), data()[0]
    best = data()[1].max().item()
    step = 1e-7 * torch.tensor([1.0, 30.0]).double()  # draws of histograms have kinks: few within so short a step
    for acquisition in (
        qLogExpectedImprovement(model, best - 0.5 * SPREAD),
        qLogNoisyExpectedImprovement(model, X, prune_baseline=False),
        qUpperConfidenceBound(model, beta=2.0),
    ):
        point = new_points(2, 2, seed=7).requires_grad_()
        (gradient,) = torch.autograd.grad(acquisition(point).sum(), point)
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 0
        for place in ((0, 0, 0), (0, 1, 1), (1, 0, 1)):
            moved = torch.zeros_like(gradient)
            moved[place] = step[place[-1]]
            with torch.no_grad():
                difference = (acquisition(point + moved) - acquisition(point - moved)).sum() / (2 * step[place[-1]])
            close(gradient[place], difference, rtol=2e-3, atol=1e-4 * float(gradient.abs().max()))


@each_model
def test_optimisation_of_an_acquisition_function_returns_what_it_evaluates(name):
    bounds = torch.tensor([[-5.0, -5.0], [-4.0, 25.0]]).double()
    acquisition = qLogNoisyExpectedImprovement(fitted(name), data()[0], prune_baseline=True)
    candidates, value = optimize_acqf(
        acquisition, bounds, q=1, num_restarts=2, raw_samples=16, options={"maxiter": 10, "seed": 0}
    )
    assert ((candidates >= bounds[0]) & (candidates <= bounds[1])).all()
    close(acquisition(candidates), value.reshape(1), rtol=1e-6)
    raw = acquisition(new_points(16, 1))
    assert value >= raw.max() - 0.5


@each_model
def test_posterior_transforms(name):
    X, weights = new_points(4, 3), torch.tensor([0.3, -0.8]).double()
    model = fitted(name, 2)
    transform = ScalarizedPosteriorTransform(weights, offset=2.0)
    transformed, plain = model.posterior(X, posterior_transform=transform), model.posterior(X)
    assert transformed.mean.shape == transformed.variance.shape == (4, 3, 1)
    tolerance = 1e-8 if is_exact(name) else 0.05
    close(transformed.mean[..., 0], plain.mean @ weights + 2.0, rtol=0, atol=tolerance * SPREAD)
    # As an objective of the samples or as a transform of the posterior: the same acquisition.
    best = float((plain.mean @ weights).amax(-1).min())  # so that many draws of every candidate improve
    scalarised = qLogExpectedImprovement(model, best_f=best + 2.0, posterior_transform=transform)(X)
    linear = qLogExpectedImprovement(model, best_f=best, objective=LinearMCObjective(weights))(X)
    close(scalarised, linear, rtol=1e-8 if is_exact(name) else 0.05, atol=0.05 if not is_exact(name) else 1e-6)


# Outputs -----------------------------------------------------------------------------------------------------------


@each_model
def test_several_outputs(name):
    model, X = fitted(name, 2), new_points(4, 3)
    posterior, p = model.posterior(X), model.predict(X)
    assert model.num_outputs == 2 and posterior.mean.shape == p.mean.shape == (4, 3, 2)
    assert p.log_prob(p.mean).shape == (4, 3)
    assert posterior.rsample(torch.Size([5])).shape == (5, 4, 3, 2)
    assert model.draw_functions(5)(X).shape == (5, 4, 3, 2)


@each_model
def test_some_outputs(name):
    model, X = fitted(name, 2), new_points(4, 3)
    whole = model.posterior(X)
    for indices in ([0], [1], [1, 0]):
        part = model.posterior(X, output_indices=indices)
        subset = model.subset_output(indices)
        assert subset.num_outputs == len(indices)
        for posterior in (part, subset.posterior(X)):
            close(posterior.mean, whole.mean[..., indices])
            close(posterior.variance, whole.variance[..., indices], rtol=1e-6)
        predicted, everything = subset.predict(X), model.predict(X)
        for moment in ("mean", "variance", "epistemic"):
            close(getattr(predicted, moment), getattr(everything, moment)[..., indices], rtol=1e-6)
    assert model.num_outputs == 2
    close(model.subset_output([1, 0]).subset_output([0]).posterior(X).mean, whole.mean[..., [1]])
    for wrong in ([2], [-1]):
        with pytest.raises(ValueError, match=r"must lie in 0 … 1"):
            model.subset_output(wrong)
        with pytest.raises(ValueError, match=r"must lie in 0 … 1"):
            model.posterior(X, output_indices=wrong)


@each_model
def test_beside_a_gaussian_process(name):
    X, Y = data(2)
    gp = SingleTaskGP(X, Y[:, 1:])
    models = ModelList(fitted(name), gp.eval())
    points = new_points(4, 3)
    posterior = models.posterior(points)
    assert posterior.mean.shape == (4, 3, 2) and posterior.rsample(torch.Size([5])).shape == (5, 4, 3, 2)
    close(posterior.mean[..., :1], fitted(name).posterior(points).mean)
    acquisition = hypervolume(models, X[:6])
    with torch.no_grad():
        known, elsewhere = acquisition(X[:6].unsqueeze(1)), acquisition(new_points(20, 1))
    assert known.max() <= 5e-3 * SPREAD**2 and elsewhere.max() > 10 * known.max()
