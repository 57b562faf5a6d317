import math

import pytest
import torch

from bayesnn import BNN, likelihoods, networks, priors
from bayesnn.data import Data
from bayesnn.inference import DeepEnsemble, NetworkTarget, run
from bayesnn.inference.ensembles.deep import DeepEnsembleState
from bayesnn.inference.optimizer import warmup_cosine


def target(n=30, dtype=torch.float64, likelihood=None, temperature=1.0):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    Y = (2 * X[:, :1]).sin() + 0.3 * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    likelihood = likelihoods.Gaussian() if likelihood is None else likelihood
    data = Data(X.to(dtype), Y.to(dtype))
    return NetworkTarget(
        networks.mlp(2, 1, hidden=(6,)), likelihood, priors.Normal(), data, torch.ones(1, 1), temperature
    )


def member(state, index):
    def one(tree):
        return {name: value[index : index + 1] for name, value in tree.items()}

    adam = state.adam._replace(first=one(state.adam.first), second=one(state.adam.second))
    return DeepEnsembleState(
        one(state.parameters),
        adam,
        state.held_out[[index]],
        one(state.anchors),
        one(state.best),
        state.best_score[[index]],
    )


@pytest.mark.parametrize("batch_size", [None, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_member_is_trained_as_it_would_be_alone(batch_size, dtype):
    own, method = target(dtype=dtype), DeepEnsemble(num_members=4, num_steps=60, batch_size=batch_size)
    state = method.init(own, torch.Generator().manual_seed(1))
    alone = [member(state, index) for index in range(4)]
    generators = [torch.Generator().manual_seed(2) for _ in range(5)]
    single = DeepEnsemble(num_members=1, num_steps=60, batch_size=batch_size)
    for _ in range(60):
        state, _ = method.step(own, state, generators[4])
        alone = [single.step(own, one, generator)[0] for one, generator in zip(alone, generators[:4], strict=True)]
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-8, "atol": 1e-9}
    for index, one in enumerate(alone):
        together = member(state, index)
        for name, value in one.parameters.items():
            torch.testing.assert_close(value, together.parameters[name], **tolerance)
            torch.testing.assert_close(one.best[name], together.best[name], **tolerance)
        torch.testing.assert_close(one.best_score, together.best_score, **tolerance)


def test_a_member_is_a_plain_network_trained_with_adam():
    """Against torch's own optimiser and module, on the rows that are not held out."""
    own, method = target(), DeepEnsemble(num_members=2, num_steps=40, check_every=1000)
    state = method.init(own, torch.Generator().manual_seed(1))
    network = networks.mlp(2, 1, hidden=(6,)).double()
    log_std = torch.nn.Parameter(state.parameters["likelihood.log_noise_std"][1].clone())
    network.load_state_dict({k.removeprefix("network."): v[1] for k, v in state.parameters.items() if "network" in k})
    rows = ~state.held_out[1]
    optimiser = torch.optim.Adam([*network.parameters(), log_std], lr=1.0)
    generator = torch.Generator()
    for step in range(40):
        state, _ = method.step(own, state, generator)
        optimiser.param_groups[0]["lr"] = 0.01 * warmup_cosine(step, 40, 4)
        log_likelihood = (
            torch.distributions.Normal(network(own.data.X[rows]), log_std.exp()).log_prob(own.data.Y[rows]).sum()
        )
        log_prior = torch.distributions.Normal(math.log(0.3), 1.5).log_prob(log_std).sum()
        for value in network.parameters():
            scale = math.sqrt(2 / value.shape[1]) if value.dim() == 2 else 1.0
            log_prior = log_prior + torch.distributions.Normal(0, scale).log_prob(value).sum()
        optimiser.zero_grad()
        (-(log_likelihood + log_prior) / int(rows.sum())).backward()
        optimiser.step()
    for name, value in network.named_parameters():
        torch.testing.assert_close(state.parameters["network." + name][1], value.detach(), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(state.parameters["likelihood.log_noise_std"][1], log_std.detach(), rtol=1e-7, atol=1e-8)


def test_held_out_rows_never_influence_training():
    method = DeepEnsemble(num_members=3, num_steps=30, batch_size=9)
    first = target()
    state = method.init(first, torch.Generator().manual_seed(1))
    # Member 1's held-out rows get absurd targets; of the members, those that train on such a row alone may notice.
    changed = target()
    rows = state.held_out[1]
    changed.data.Y[rows] += 1000.0
    other = method.init(changed, torch.Generator().manual_seed(1))
    generators = torch.Generator().manual_seed(2), torch.Generator().manual_seed(2)
    for _ in range(30):
        state, _ = method.step(first, state, generators[0])
        other, _ = method.step(changed, other, generators[1])
    for name, value in state.parameters.items():
        assert torch.equal(value[1], other.parameters[name][1])
        assert not torch.equal(value[0], other.parameters[name][0])
    assert state.best_score[1] > other.best_score[1]


def test_members_hold_out_their_own_share():
    state = DeepEnsemble(num_members=50, held_out=0.2).init(target(n=30), torch.Generator().manual_seed(0))
    assert (state.held_out.sum(-1) == 6).all()
    assert state.held_out.unique(dim=0).shape[0] > 45
    # Every row alike: 50 members, each with probability 0.2.
    assert ((state.held_out.sum(0) - 10) / math.sqrt(50 * 0.16)).abs().max() < 4


def test_the_best_parameters_are_kept():
    own, method = target(), DeepEnsemble(num_members=3, num_steps=200, learning_rate=0.05, check_every=7)
    scores, parameters = [], []

    def follow(index, state, info):
        if (index + 1) % 7 == 0 or index == 199:
            log_likelihood = own.pointwise_log_likelihood(state.parameters)
            scores.append(torch.stack([log_likelihood[m, state.held_out[m]].mean() for m in range(3)]))
            parameters.append(state.parameters)

    posterior = run(method, own, seed=3, callbacks=[follow])
    best = torch.stack(scores).argmax(0)
    assert (best < len(scores) - 1).any()  # some member did overfit afterwards
    for m in range(3):
        for name, value in posterior.parameters.items():
            assert torch.equal(value[m], parameters[best[m]][name][m])
    torch.testing.assert_close(posterior.statistics["held_out_log_likelihood"], torch.stack(scores).amax(0))


@pytest.mark.parametrize(("n", "held_out"), [(30, 0.0), (1, 0.2), (3, 0.5), (9, 0.2)])
def test_with_nothing_to_hold_out_the_last_parameters_are_kept(n, held_out):
    own, method = target(n=n), DeepEnsemble(num_members=2, num_steps=20, held_out=held_out)
    last = {}
    posterior = run(method, own, callbacks=[lambda index, state, info: last.update(state.parameters)])
    for name, value in posterior.parameters.items():
        assert torch.equal(value, last[name]) and torch.isfinite(value).all()


def test_a_minibatch_may_hold_no_row_of_a_members_own():
    posterior = run(DeepEnsemble(num_members=8, num_steps=50, batch_size=1, held_out=0.5), target(n=6))
    assert all(torch.isfinite(value).all() for value in posterior.parameters.values())


def test_seeds_and_members_differ():
    method = DeepEnsemble(num_members=3, num_steps=10)
    first, same, other = (run(method, target(), seed=seed).parameters for seed in (0, 0, 1))
    for name, value in first.items():
        assert torch.equal(value, same[name]) and not torch.equal(value, other[name])
    weights = first["network.layers.0.weight"]
    assert not torch.equal(weights[0], weights[1])


@pytest.mark.parametrize(
    "options",
    [
        {"num_members": 0},
        {"num_steps": 0},
        {"learning_rate": -1.0},
        {"check_every": 0},
        {"held_out": 1.0},
        {"batch_size": 0},
    ],
)
def test_wrong_settings(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        DeepEnsemble(**options)


def test_anchored_members_fit_few_data_and_keep_their_spread():
    """Without anchors the prior's mode beats a fit to eight points: every member becomes the same constant."""
    x = torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None]
    y = torch.sin(3 * x)
    far = torch.tensor([[-4.0], [4.0]], dtype=torch.float64)
    for anchored, fits in ((True, True), (False, False)):
        model = BNN(method=DeepEnsemble(num_members=6, anchored=anchored)).fit(x, y)
        error = (model.posterior(x).mean - y).square().mean().sqrt()
        spread = model.posterior(far).variance.sqrt().min()
        assert bool(error < 0.1) is fits and bool(spread > 0.1) is fits
