import itertools

import pytest
import torch
from oracles import z_score

from bayesnn import likelihoods, networks, priors
from bayesnn.bnn import BNN
from bayesnn.data import Data
from bayesnn.inference import (
    BAOAB,
    HMC,
    SGHMC,
    SGLD,
    DeepEnsemble,
    FunctionTarget,
    NetworkTarget,
    Polynomial,
    WarmStarted,
    run,
)
from bayesnn.inference.parallel import concatenate
from bayesnn.inference.sgmcmc.groups import assign
from bayesnn.inference.sgmcmc.structured import Structured, structured_gradient

PRECISION = torch.tensor([[2.0, 0.6, -0.5], [0.6, 1.5, 0.4], [-0.5, 0.4, 1.0]], dtype=torch.float64)
MEAN = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def gaussian():
    def log_density(p):
        centred = p["x"] - MEAN
        return -0.5 * ((centred @ PRECISION) * centred).sum(-1)

    return FunctionTarget(log_density, lambda count, generator: {"x": MEAN.expand(count, 3).clone()})


def slope(position, batch):
    return -(position - MEAN) @ PRECISION


def network_target():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(30, 2, generator=generator, dtype=torch.float64)
    return NetworkTarget(
        networks.mlp(2, 1, hidden=(4,)),
        likelihoods.Gaussian(),
        priors.Normal(),
        Data(X, X.sum(-1, keepdim=True)),
        torch.ones(1, 1),
    )


def expected_slope(position, past, groups, dropout):
    """By enumeration of all masks and of all ways to take the groups from the past."""
    num_groups = int(groups.max()) + 1
    if dropout is None:
        masks, weights = torch.eye(num_groups, dtype=torch.bool), torch.ones(num_groups).double()
    else:
        masks = torch.tensor(list(itertools.product([False, True], repeat=num_groups)))
        weights = (masks.double() * dropout + (~masks).double() * (1 - dropout)).prod(-1)
    ways = torch.tensor(list(itertools.product(range(len(past)), repeat=num_groups)))
    total = torch.zeros_like(position)
    for mask, weight in zip(masks, weights, strict=True):
        for way in ways:
            one = structured_gradient(
                slope, position, None, mask.expand(1, 1, -1), past, way.expand(1, 1, -1), groups, dropout
            )
            total += weight * one / len(ways)
    return total


@pytest.mark.parametrize("dropout", [None, 1.0, 0.5, 0.2])
@pytest.mark.parametrize("groups", [[0, 1, 2], [0, 1, 0], [0, 0, 0]])
def test_the_mean_gradient_is_that_of_the_stated_law(groups, dropout):
    """With a past whose mean is the posterior's, it is minus the law's precision times the distance: to 1e-10."""
    groups = torch.tensor(groups)
    past = MEAN + torch.tensor([[1.0, -0.5, 0.3], [-1.0, 0.5, -0.3]]).double().unsqueeze(1)
    same = groups[:, None] == groups
    between = 0.0 if dropout is None else dropout
    expected = torch.where(same, PRECISION, between * PRECISION)
    found = torch.cat(
        [expected_slope((MEAN + row).unsqueeze(0), past, groups, dropout) for row in torch.eye(3).double()]
    )
    torch.testing.assert_close(found, -expected, rtol=0, atol=1e-10)


def stationary_sgld(precision, step_size):
    """Of theta <- theta - eps precision theta + sqrt(2 eps) z: precision - eps/2 precision^2, inverted."""
    return torch.linalg.inv(precision - 0.5 * step_size * precision @ precision)


@pytest.mark.parametrize("dropout", [None, 0.5])
def test_chains_follow_the_stated_law(dropout):
    """Many chains whose past is fixed at the mean, so that the law is exact; each mask is one noisy gradient."""
    step_size = 0.02
    method = Structured(
        SGLD(num_chains=4000, num_burn_in=400, num_draws=1, thinning=10, step_size=step_size, batch_size=None),
        groups="parameter",
        dropout=dropout,
        num_masks=4,
        past_size=1,
        independent_groups=False,
    )
    generator = torch.Generator().manual_seed(0)
    state = method.init(gaussian(), generator)
    for _ in range(40):
        state, _ = method.step(gaussian(), state._replace(past=MEAN.expand(1, 4000, 3).clone()), generator)
    draws = state.base.variables["position"] - MEAN
    diagonal = torch.diag(PRECISION.diagonal())
    precision = diagonal if dropout is None else diagonal + dropout * (PRECISION - diagonal)
    covariance = stationary_sgld(precision, step_size)
    if dropout is not None:
        # The masks' noise: its covariance Q adds the solution of  A S A^T - S + eps^2 E[Q] = 0, with Q quadratic in theta.
        covariance = with_mask_noise(precision, step_size, dropout, 4)
    products = (draws[:, :, None] * draws[:, None, :]).flatten(1)
    assert z_score(draws, 0.0).abs().max() < 4
    assert z_score(products, covariance.flatten()).abs().max() < 4


def with_mask_noise(precision, step_size, rho, num_masks):
    """The stationary covariance when slopes are means of L masked ones, by iterating the second moment's linear map."""
    masks = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3))).double()
    weights = (masks * rho + (1 - masks) * (1 - rho)).prod(-1)
    maps = [mask[:, None] * PRECISION * mask / rho for mask in masks]
    covariance = torch.linalg.inv(precision)
    for _ in range(4000):
        second = sum(w * m @ covariance @ m.T for w, m in zip(weights, maps, strict=True))
        first = precision @ covariance @ precision
        slopes = first + (second - first) / num_masks
        cross = precision @ covariance
        covariance = (
            covariance - step_size * (cross + cross.T) + step_size**2 * slopes + 2 * step_size * torch.eye(3).double()
        )
    return covariance


@pytest.mark.parametrize("base", [SGLD, SGHMC, BAOAB])
def test_one_group_is_the_base(base):
    sampler = base(num_chains=2, num_burn_in=6, num_draws=5, thinning=3, step_size=1e-3, batch_size=7)
    plain = run(sampler, network_target(), seed=1)
    for options in ({"groups": "random", "num_groups": 1}, {"groups": "neuron", "dropout": 1.0, "num_masks": 1}):
        one = run(Structured(sampler, independent_groups=False, **options), network_target(), seed=1)
        for name, values in plain.parameters.items():
            # The base's start draws from the same generator; its noise stream comes before the groups'.
            assert torch.equal(values, one.parameters[name]) or options["groups"] == "neuron"
            torch.testing.assert_close(values, one.parameters[name])


def test_the_ring_keeps_the_last_positions():
    method = Structured(
        SGLD(num_chains=2, num_burn_in=0, num_draws=7, thinning=1, step_size=0.01, batch_size=None), past_size=3
    )
    seen = []
    run(method, gaussian(), callbacks=[lambda index, state, info: seen.append(state)])
    positions = [state.base.variables["position"] for state in seen]
    last = {tuple(position.flatten().tolist()) for position in positions[-3:]}
    assert {tuple(position.flatten().tolist()) for position in seen[-1].past} == last
    assert int(seen[-1].num_written) == 8


def grouped(groups=(("x",),), step_size=0.05, **options):
    settings = {"num_chains": 2, "num_burn_in": 0, "num_draws": 40, "thinning": 1, "batch_size": None}
    method = Structured(SGLD(step_size=step_size, **(settings | options)), groups=groups)
    kept = []
    posterior = run(
        method, gaussian(), callbacks=[lambda index, state, info: kept.append(state.base.variables["position"])]
    )
    return posterior, torch.stack(kept, 1)  # (C, D, P)


def test_parameters_and_diagnostics_are_the_chain_s():
    slow = {"groups": "parameter", "step_size": 1e-4, "num_draws": 300}
    posterior, chains = grouped(**slow)
    assert torch.equal(posterior.by_chain(posterior.parameters["x"]), chains)
    apart = torch.tensor([[0.0], [1.0]]).double().expand(2, 300).flatten()[:, None]  # the two chains, set apart
    found = posterior.diagnostics(posterior.parameters["x"] + apart)
    assert found["ess_bulk"] < 20 and found["r_hat"] > 2
    assert torch.equal(torch.from_numpy(posterior.to_arviz().posterior["x"].values), chains)


@pytest.mark.parametrize("num_draws", [80, 500, 20])
def test_predictions_take_each_group_from_a_draw_of_its_own(num_draws):
    posterior, chains = grouped(groups="parameter")
    count = min(num_draws, 80)
    mixed = posterior.draws(num_draws)
    assert len(mixed) == count and mixed.log_weights is None
    assert torch.equal(mixed.parameters["x"], posterior.draws(num_draws).parameters["x"])
    values = mixed.parameters["x"].unflatten(0, (2, -1))
    for own, chain in zip(values, chains, strict=True):
        taken = chain[(torch.arange(count // 2) + 0.5).mul(80 / count).long()]  # evenly spaced
        for column in range(3):
            assert own[:, column].sort().values.equal(taken[:, column].sort().values)
    assert sum(bool((row == chains).all(-1).any()) for row in mixed.parameters["x"]) <= 3


def test_groups_stay_together_if_they_are_one():
    one, chains = grouped()
    assert torch.equal(one.draws(80).parameters["x"].unflatten(0, (2, -1)).sort(1).values, chains.sort(1).values)
    rows = {tuple(row) for row in chains.flatten(0, 1).tolist()}
    assert {tuple(row) for row in one.draws(80).parameters["x"].tolist()} == rows


def test_weighted_draws_are_mixed_by_weight():
    posterior, chains = grouped(groups="parameter", step_size=Polynomial(0.5, gamma=1.0), num_draws=100)
    weights = torch.softmax(posterior.log_weights, 0).unflatten(0, (2, -1))
    torch.testing.assert_close(weights[0], 0.5 / torch.arange(1, 101).double() / (1 / torch.arange(1, 101)).sum())
    mixed = posterior.draws(200)
    assert mixed.log_weights is None
    for own, chain, weight in zip(mixed.parameters["x"].unflatten(0, (2, -1)), chains, weights, strict=True):
        for column in range(3):
            counts = (own[:, column, None] == chain[:, column]).sum(0)
            assert (counts - 200 * weight).abs().max() <= 1


def test_a_saved_model_predicts_the_same(tmp_path):
    generator = torch.Generator().manual_seed(0)
    X = torch.rand(30, 1, generator=generator, dtype=torch.float64)
    base = SGHMC(num_chains=2, num_burn_in=20, num_draws=10, thinning=2, step_size=1e-3, batch_size=8)
    model = BNN(networks.mlp(1, 1, hidden=(4,)), method=Structured(base)).fit(X, X.sin())
    model.save(tmp_path / "model")
    assert torch.equal(BNN.load(tmp_path / "model").predict(X).mean, model.predict(X).mean)
    together = BNN(networks.mlp(1, 1, hidden=(4,)), method=Structured(base, independent_groups=False)).fit(X, X.sin())
    assert torch.equal(
        together.weights.parameters["network.layers.0.weight"], model.weights.parameters["network.layers.0.weight"]
    )
    assert not torch.equal(together.predict(X).mean, model.predict(X).mean)


def test_separate_chains_keep_their_own_groups():
    posteriors = [grouped(groups="parameter", num_chains=2)[0] for _ in range(2)]
    posteriors[1].groups = {"x": torch.zeros(2, 3, dtype=torch.long)}
    both = concatenate(posteriors)
    assert both.groups["x"].tolist() == [[0, 1, 2]] * 2 + [[0] * 3] * 2
    whole = {tuple(row) for row in both.parameters["x"].tolist()}
    kept = [tuple(row) in whole for row in both.draws(160).parameters["x"].tolist()]
    assert sum(kept[:80]) < 10 and all(kept[80:])


class Stop(Exception):
    pass


def test_resumed_equals_uninterrupted(tmp_path):
    base = SGHMC(num_chains=2, num_burn_in=20, num_draws=10, thinning=2, step_size=1e-3, batch_size=8)
    method = WarmStarted(
        Structured(base, groups="neuron", dropout=0.5, past_size=4), DeepEnsemble(num_steps=20, held_out=0.0)
    )
    whole = run(method, network_target(), seed=1)

    def stop(index, state, info):
        if index == 33:
            raise Stop

    options = {"seed": 1, "checkpoint": tmp_path / "run", "checkpoint_every": 3}
    with pytest.raises(Stop):
        run(method, network_target(), callbacks=[stop], **options)
    resumed = run(method, network_target(), **options)
    for name, value in whole.parameters.items():
        assert torch.equal(value, resumed.parameters[name]), name


def test_groups():
    shapes = network_target().shapes()  # weights (4, 2), (4,), (1, 4), (1,), noise (1, 1)
    generator = torch.Generator().manual_seed(0)
    layers = assign("layer", shapes, None, generator)
    assert layers.tolist() == [0] * 12 + [1] * 5 + [2]
    neurons = assign("neuron", shapes, None, generator)
    assert neurons.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 0, 1, 2, 3] + [4] * 5 + [5]
    assert assign("parameter", shapes, None, generator).tolist() == list(range(18))
    assert assign("random", shapes, 4, generator).bincount().tolist() == [5, 5, 4, 4]
    assert assign("permuted", shapes, 4, generator).tolist() == [index % 4 for index in range(18)]
    custom = assign((("*.0.*",), ("*.2.*", "likelihood.*")), shapes, None, generator)
    assert custom.tolist() == [0] * 12 + [1] * 6
    with pytest.raises(ValueError, match="matches no pattern"):
        assign((("*.0.*",),), shapes, None, generator)
    with pytest.raises(ValueError, match="match no parameter"):
        assign((("*",), ("convolution",)), shapes, None, generator)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": "weights"}, "groups must be one of"),
        ({"groups": "random"}, "num_groups goes with"),
        ({"groups": "layer", "num_groups": 2}, "num_groups goes with"),
        ({"groups": (("*",),), "num_groups": 2}, "not with patterns"),
        ({"dropout": 0.0}, "dropout must lie"),
        ({"num_masks": 0}, "num_masks"),
        ({"past_size": 0}, "past_size"),
    ],
)
def test_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message):
        Structured(SGLD(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": "random", "num_groups": 2.5}, "num_groups must be an integer, found 2.5"),
        ({"groups": ("weight", "bias")}, "groups must be one of"),  # each letter would be a pattern
        ({"groups": ()}, "groups must be one of"),
        ({"groups": 3}, "groups must be one of"),
        ({"dropout": "0.5"}, "dropout must be a number"),
        ({"num_masks": 2.5}, "num_masks must be an integer"),
        ({"past_size": 2.5}, "past_size must be an integer"),
        ({"independent_groups": "no"}, "independent_groups must be True or False"),
    ],
)
def test_settings_of_the_wrong_type(options, message):
    with pytest.raises(TypeError, match=message):
        Structured(SGLD(), **options)


def test_wrong_base():
    with pytest.raises(TypeError, match="stochastic-gradient sampler"):
        Structured(HMC())
    with pytest.raises(ValueError, match="control_variates"):
        Structured(SGLD(control_variates=True))
