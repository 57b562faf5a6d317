"""Stacking weights against a numerical optimum, and the mixture they make against sums by hand."""

import math

import pytest
import scipy.optimize
import torch
from torch.distributions import Normal

import bayesnn
from bayesnn import BNN, GaussianProcess, Model, Stack, likelihoods, networks
from bayesnn.evidence import log_scores
from bayesnn.inference import DeepEnsemble
from bayesnn.inference.amortized import PFN
from bayesnn.mixtures import mixture
from bayesnn.posteriors import FunctionDraws, Gaussian, Mixture, StudentT, gaussian_view
from bayesnn.predictive import Predictive
from bayesnn.stacking import stacking_weights


class NeverInAStack(Model):
    """Fails at every fit."""

    def _fit(self, data, outcome_scale, **options):
        raise ArithmeticError("not today")


def gp(noise=0.5, high=1.0):
    return GaussianProcess(likelihoods.Gaussian(noise_std=noise), bounds=(0.0, high), optimise=False)


def ensemble():
    network = networks.mlp(2, 1, hidden=(8,))
    return BNN(network, method=DeepEnsemble(num_members=4, num_steps=30))


def data(num_rows=20, num_outputs=1):
    generator = torch.Generator().manual_seed(0)
    X = torch.rand(num_rows, 2, generator=generator, dtype=torch.float64)
    noise = 0.3 * torch.randn(num_rows, num_outputs, generator=generator, dtype=torch.float64)
    return X, 5 + 3 * ((4 * X[:, :1]).sin() + torch.arange(num_outputs) * X[:, 1:] + noise)


NEW = torch.rand(5, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

# Weights ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_models", [2, 3, 5])
def test_weights_are_the_optimum(num_models):
    logs = 1.5 * torch.randn(40, num_models, generator=torch.Generator().manual_seed(num_models), dtype=torch.float64)
    weights = stacking_weights(logs)
    assert float(weights.sum()) == pytest.approx(1.0) and (weights >= 0).all()

    def loss(free):
        return -float(torch.logsumexp(logs + torch.tensor(free).log_softmax(0), 1).mean())

    found = scipy.optimize.minimize(
        loss, [0.0] * num_models, method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-12, "maxiter": 9000}
    )
    assert -float(torch.logsumexp(logs + weights.log(), 1).mean()) <= found.fun + 1e-8
    assert torch.allclose(weights, torch.tensor(found.x).softmax(0), atol=1e-3)


def test_weights_of_two_models_equal_enumeration():
    logs = torch.randn(30, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grid = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    values = (grid[:, None] * logs[:, 0].exp() + (1 - grid[:, None]) * logs[:, 1].exp()).log().mean(1)
    assert stacking_weights(logs)[0] == pytest.approx(float(grid[values.argmax()]), abs=2e-5 + 1e-4)


def test_weights_at_the_edges():
    logs = torch.tensor([[0.0, -1.0], [1.0, 0.5]])
    assert torch.allclose(stacking_weights(logs), torch.tensor([1.0, 0.0]).double(), atol=1e-7)
    never = torch.tensor([[-math.inf, -900.0], [-math.inf, -800.0], [-math.inf, -math.inf]])
    assert stacking_weights(never).tolist() == [0.0, 1.0]
    assert stacking_weights(torch.zeros(4, 2)).tolist() == [0.5, 0.5]
    for wrong, message in ((torch.zeros(3), "must have shape"), (torch.full((2, 2), -math.inf), "a finite entry")):
        with pytest.raises(ValueError, match=message):
            stacking_weights(wrong)


def test_all_weight_on_the_truth():
    """10,000 rows drawn from the first of three models."""
    y = torch.randn(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logs = torch.stack([Normal(0.0, 1.0).log_prob(y), Normal(0.5, 1.0).log_prob(y), Normal(0.0, 2.0).log_prob(y)], 1)
    assert stacking_weights(logs)[0] > 0.95


def test_a_stacks_weights_come_from_held_out_rows():
    X, Y = data()
    members = [gp(0.3), gp(1.5), gp(0.9, 0.3)]
    stack = Stack(members, num_folds=4).fit(X, Y, seed=2)
    scores = log_scores(
        {str(i): model for i, model in enumerate(members)}, X, (Y - Y.mean()) / Y.std(), num_folds=4, seed=2
    )
    assert scores.by_row["0"].std() > 0
    expected = stacking_weights(torch.stack(list(scores.by_row.values()), -1))
    assert torch.allclose(stack.weights, expected, atol=1e-3)


# The mixture ----------------------------------------------------------------------------------------------------------


def test_one_member_is_the_member():
    X, Y = data()
    stack, alone = Stack([GaussianProcess()], num_folds=2).fit(X, Y), GaussianProcess().fit(X, Y)
    assert stack.weights.tolist() == [1.0]
    for found, expected in ((stack.posterior(NEW), alone.posterior(NEW)), (stack.predict(NEW), alone.predict(NEW))):
        assert torch.allclose(found.mean, expected.mean, atol=1e-6)
        assert torch.allclose(found.variance, expected.variance, atol=1e-6)
    y = torch.full((5, 1), 5.0).double()
    assert torch.allclose(stack.predict(NEW).log_prob(y), alone.predict(NEW).log_prob(y), atol=1e-6)


def test_prediction_by_hand():
    """Two Gaussians, and three members with weights of their own, in other units; two outputs."""
    generator = torch.Generator().manual_seed(0)
    loc, scale = (
        torch.randn(4, 5, 2, generator=generator).double(),
        0.5 + torch.rand(4, 5, 2, generator=generator).double(),
    )
    shift, unit = torch.tensor([[1.0, 2.0]]).double(), torch.tensor([[3.0, 0.5]]).double()
    one = Predictive(Normal(loc[:1], scale[:1]), function_var=0.3 * scale[:1].square())
    inner = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    other = Predictive(Normal(loc[1:], scale[1:]), inner.log()).affine(shift, unit)
    p = mixture([one, other], torch.tensor([0.4, 0.6]).double().log()).affine(shift, unit)
    w = torch.cat([torch.tensor([0.4]).double(), 0.6 * inner])
    means = shift + unit * torch.cat([loc[:1], shift + unit * loc[1:]])
    stds = unit * torch.cat([scale[:1], unit * scale[1:]])
    average = lambda values: (w[:, None, None] * values).sum(0)  # noqa: E731
    assert torch.allclose(p.mean, average(means))
    assert torch.allclose(p.variance, average(stds.square() + means.square()) - p.mean.square())
    own = torch.zeros_like(stds)
    own[0] = 0.3 * stds[0].square()
    assert torch.allclose(p.aleatoric, average(stds.square() - own)) and torch.allclose(
        p.variance, p.aleatoric + p.epistemic
    )
    y = torch.randn(5, 2, generator=generator).double()
    density = (w[:, None] * Normal(means, stds).log_prob(y).sum(-1).exp()).sum(0)
    assert torch.allclose(p.log_prob(y), density.log())
    assert torch.allclose(p.cdf(y), average(Normal(means, stds).cdf(y)))
    assert torch.allclose(p.cdf(p.quantile(0.3)), torch.full((5, 2), 0.3).double(), atol=1e-9)
    second = p.outputs([1])
    assert torch.allclose(second.mean, p.mean[:, 1:]) and torch.allclose(second.variance, p.variance[:, 1:])
    drawn = p.sample(40_000, torch.Generator().manual_seed(0))
    assert ((drawn.mean(0) - p.mean).abs() < 4 * (p.variance / 40_000).sqrt()).all()
    assert torch.allclose(drawn.var(0), p.variance, rtol=0.05)


def test_a_stacks_density_is_that_of_its_members():
    X, Y = data(num_outputs=2)
    members = [gp(0.3), gp(2.5)]
    stack = Stack(members, num_folds=3).fit(X, Y)
    stack.weights = torch.tensor([0.3, 0.7]).double()
    stack._fitted = {i: m.fit(X, (Y - Y.mean(0)) / Y.std(0)) for i, m in enumerate([gp(0.3), gp(2.5)])}
    y = 5 + torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).double()
    own = [m.predict(NEW).log_prob((y - Y.mean(0)) / Y.std(0)).exp() for m in stack._fitted.values()]
    expected = (0.3 * own[0] + 0.7 * own[1]).log() - Y.std(0).log().sum()
    assert torch.allclose(stack.predict(NEW).log_prob(y), expected)


def parts():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(3, 2, 4, 4, generator=generator).double()
    means = torch.randn(3, 4, 2, generator=generator).double()
    covariance = root @ root.mT + torch.eye(4).double()
    draws = FunctionDraws(10 + torch.randn(3, 6, 4, 2, generator=generator).double(), torch.arange(6.0).double() / 6)
    return [Gaussian.from_moments(means, covariance), StudentT(means - 10, covariance, 7.0), draws]


def test_posterior_by_hand():
    members, w = parts(), torch.tensor([0.5, 0.2, 0.3]).double()
    posterior = Mixture(members, w.log() + 3)
    mean = sum(a * part.mean for a, part in zip(w, members, strict=True))
    second = sum(a * (part.variance + part.mean.square()) for a, part in zip(w, members, strict=True))
    assert torch.allclose(posterior.mean, mean) and torch.allclose(posterior.variance, second - mean.square())
    drawn = posterior.rsample(torch.Size([20_000]), generator=torch.Generator().manual_seed(1))
    assert drawn.shape == (20_000, 3, 4, 2)
    assert ((drawn.mean(0) - mean).abs() < 4.5 * (posterior.variance / 20_000).sqrt()).all()
    assert torch.allclose(drawn.var(0), posterior.variance, rtol=0.06)
    view = gaussian_view(posterior)
    assert torch.allclose(view.mean, posterior.mean) and torch.allclose(view.variance, posterior.variance)
    centred = (drawn - mean).movedim(0, -1).movedim(-2, 1)  # (3, 2, 4, S)
    covariance = centred @ centred.mT / 20_000
    assert (covariance - view.output_covariance.to_dense()).abs().max() < 0.06 * covariance.abs().max()


def test_a_draw_is_a_function_of_one_model():
    """The three are so far apart that each value tells whose it is: at all points, outputs and t-batch elements."""
    w = torch.tensor([0.5, 0.2, 0.3]).double()
    draws = Mixture(parts(), w.log()).rsample(torch.Size([4000]), generator=torch.Generator().manual_seed(0))
    place = draws[:, 0].reshape(4000, -1).mean(1)
    whose = (place > 5).long() * 2 + (place < -5).long()
    members = parts()
    values = members[2].values.movedim(1, 0)  # (6, 3, 4, 2)
    which = (draws[whose == 2][:, None] - values).abs().amax((2, 3, 4)).min(1)
    assert which.values.max() < 1e-12  # one and the same of its functions everywhere
    shares = torch.bincount(whose, minlength=3) / 4000
    assert (shares - w).abs().max() < 0.03
    inner = torch.bincount(which.indices, minlength=6) / len(which.indices)
    assert (inner - members[2].log_weights.exp()).abs().max() < 0.05


def test_mixtures_of_mixtures_are_mixtures():
    members = parts()
    nested = Mixture([Mixture(members[:2], torch.tensor([0.5, 0.5]).log()), members[2]], torch.tensor([0.4, 0.6]).log())
    flat = Mixture(members, torch.tensor([0.2, 0.2, 0.6]).log())
    assert len(nested.parts) == 3 and torch.allclose(nested.log_weights, flat.log_weights, atol=1e-6)
    assert torch.allclose(nested.variance, flat.variance, atol=1e-5)
    for wrong in (torch.zeros(2), torch.tensor([0.0, 0.0, -math.inf])):
        with pytest.raises(ValueError, match="log_weights must be 3 finite numbers"):
            Mixture(members, wrong)


# The model --------------------------------------------------------------------------------------------------------------


def test_members_of_several_families(tmp_path):
    X, Y = data()
    members = [gp(0.5), ensemble(), NeverInAStack()]
    stack = Stack(members, num_folds=2)
    stack.fit(X, Y)
    assert stack.weights[2] == 0 and stack.weights.sum() == pytest.approx(1.0)
    functions = stack.draw_functions(50)
    first, again = functions(NEW), functions(NEW[:2])
    assert (again - first[:, :2]).abs().max() < 1e-2
    stack.save(tmp_path / "stack")
    loaded = bayesnn.load(tmp_path / "stack", models=members)
    assert torch.equal(loaded.predict(NEW).log_prob(Y[:5]), stack.predict(NEW).log_prob(Y[:5]))
    assert torch.equal(loaded.weights, stack.weights)


def test_bad_members():
    with pytest.raises(ValueError, match="at least one model"):
        Stack([])
    for wrong in ([3], [BNN(networks.mlp(2, 3), likelihoods.Categorical(3))]):
        with pytest.raises(TypeError, match="models must be bayesnn models of real-valued outcomes"):
            Stack(wrong)
    with pytest.raises(RuntimeError, match=r"no model could predict .*models\[0\]: ArithmeticError: not today"):
        Stack([NeverInAStack()]).fit(*data())


def test_a_stacks_draws_are_functions_if_all_models_draws_are():
    X, Y = data()
    pfns = {joint: PFN("gp-small", joint=joint) for joint in ("copula", "autoregressive")}
    assert Stack([gp(), pfns["copula"]]).fit(X, Y).draws_are_functions
    stack = Stack([gp(), pfns["autoregressive"]])
    stack.fit(X, Y)
    stack._fitted = {index: model.fit(X, Y) for index, model in enumerate(stack._models)}  # whatever the weights
    assert not stack.draws_are_functions


def test_a_single_row_has_equal_weights():
    X, Y = data(1)
    assert Stack([gp(), gp(1.0)]).fit(X, Y).weights.tolist() == [0.5, 0.5]
