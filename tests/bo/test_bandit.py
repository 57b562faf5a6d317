"""Neural bandits against autograd, closed forms of ridge regression, and themselves interrupted."""

import math

import pytest
import torch

from bayesnn.bo.arms import Arms
from bayesnn.bo.bandit import POLICIES, NeuralBandit
from bayesnn.bo.gradient_policies import NeuralUCB
from bayesnn.bo.regression_policies import NeuFastCB, NeuSquareCB, projected
from bayesnn.files import write_tensors


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def setting(policy, per_arm=False):
    """Arms, and a state some way from where it began."""
    arms = Arms(3, 4, [7, 6], per_arm)
    state = policy.start(arms, torch.Generator().manual_seed(1), torch.float64)
    theta = state.theta + 0.3 * normal(len(state.theta), seed=2)
    return arms, state._replace(theta=theta)


@pytest.mark.parametrize("per_arm", [False, True])
def test_gradients_without_autograd_are_autograds(per_arm):
    arms, state = setting(NeuSquareCB(), per_arm)
    contexts = normal(5, 3, 4) if per_arm else normal(5, 4)
    scales = normal(arms.network.num_parameters, seed=3).square()
    values, norms = arms.values_and_norms(state.theta, contexts, scales)
    theta = state.theta.clone().requires_grad_()
    jacobian = torch.autograd.functional.jacobian(lambda theta: arms.values(theta, contexts), theta)
    torch.testing.assert_close(values, arms.values(state.theta, contexts))
    torch.testing.assert_close(norms, jacobian.square() @ scales)
    chosen = torch.tensor([0, 2, 1, 1, 0])
    rows, picks = arms.chosen(contexts, chosen)
    passed = arms.network.run(state.theta, rows)
    picked = jacobian[torch.arange(5), chosen]
    torch.testing.assert_close(arms.network.gradient(state.theta, passed, picks), picked.sum(0))
    torch.testing.assert_close(arms.network.squared_gradient(state.theta, passed, picks), picked.square().sum(0))


@pytest.mark.parametrize("hidden", [(), (6,), (5, 6)])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_first_prediction_is_the_largest_reward_or_for_a_sigmoid_the_middle(policy, hidden):
    bandit = NeuralBandit(3, 4, policy, hidden=hidden, reward_range=(-1, 5), dtype=torch.float64)
    expected = torch.full((5, 3), 2.0 if policy == "fast-cb" else 5.0, dtype=torch.float64)
    torch.testing.assert_close(bandit.predict(normal(5, 4)), expected)


def perturbed_outputs(policy, arms, state, theta, context, arm):
    """By hand, one copy after the other."""
    output = arms.values(theta, context)[0, arm]
    strength = policy.perturbation / 6**0.25
    return [output + strength * (signs * (theta - state.anchor)).sum() for signs in state.signs]


@pytest.mark.parametrize("kind", [NeuSquareCB, NeuFastCB])
def test_predictions_and_gradients_are_averages_over_the_perturbed_copies(kind):
    policy = kind(perturbation=0.7, copies=5)
    arms, state = setting(policy)
    context, arm, loss = normal(1, 4), 1, 0.3
    assert set(state.signs.unique().tolist()) == {-1.0, 1.0}
    theta = state.theta.clone().requires_grad_()
    outputs = torch.stack(perturbed_outputs(policy, arms, state, theta, context, arm))
    if kind is NeuSquareCB:
        predictions = outputs
        losses = 0.5 * (predictions - loss).square()
    else:
        predictions = outputs.sigmoid()
        losses = -loss * predictions.log() - (1 - loss) * (1 - predictions).log()
    (expected,) = torch.autograd.grad(losses.mean(), theta)
    found = policy.gradient(arms, state, context, torch.tensor([arm]), torch.tensor([loss], dtype=torch.float64))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(policy.losses(arms, state, context)[0, arm], predictions.mean().detach())


def test_without_perturbation_the_copies_make_no_difference():
    arms, state = setting(NeuSquareCB(perturbation=0.0))
    context = normal(2, 4)
    torch.testing.assert_close(
        NeuSquareCB(perturbation=0.0).losses(arms, state, context), arms.values(state.theta, context)
    )


def test_projection_goes_to_the_nearest_point_of_the_ball():
    anchor = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(projected(torch.tensor([4.0, 6.0]), anchor, 1.0), torch.tensor([1.6, 2.8]))
    inside = torch.tensor([1.5, 2.0])
    torch.testing.assert_close(projected(inside, anchor, 1.0), inside)


@pytest.mark.parametrize("policy", [NeuSquareCB(radius=0.05), NeuFastCB(radius=0.05)])
def test_weights_never_leave_the_ball(policy):
    bandit = NeuralBandit(2, 4, policy, hidden=(8,), dtype=torch.float64)
    for context in normal(20, 4):
        bandit.tell(context, 0, 0.0)
    state = bandit._state
    torch.testing.assert_close((state.theta - state.anchor).norm().item(), 0.05)


def test_one_linear_step_in_closed_form():
    bandit = NeuralBandit(2, 3, NeuSquareCB(perturbation=0.0, step_size=0.2), hidden=(), dtype=torch.float64)
    context = normal(3)
    bandit.tell(context, 1, 0.5)  # loss 1/2, predicted 0
    inputs = torch.cat([context, torch.ones(1, dtype=torch.float64)]) / 2
    expected = 1 - torch.stack([torch.zeros(()).double(), 0.2 * 0.5 * inputs @ inputs])
    torch.testing.assert_close(bandit.predict(context), expected)


def test_widths_of_a_linear_network_are_those_of_ridge_regression():
    """With an orthogonal design, where the design matrix is its diagonal."""
    policy = NeuralUCB(exploration=2.0, regularization=0.7)
    bandit = NeuralBandit(2, 2, policy, hidden=(), dtype=torch.float64)
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    for _ in range(3):
        bandit.tell(corners, [0, 0, 0, 0], [0.1, 0.9, 0.4, 0.2])
    features = torch.cat([corners, torch.ones(4, 1)], 1) / math.sqrt(3)
    gram = 0.7 * torch.eye(3) + 3 * features.T @ features
    query = torch.tensor([0.3, -1.2], dtype=torch.float64)
    x = torch.cat([query, torch.ones(1)]) / math.sqrt(3)
    stds = policy.rewards_and_stds(bandit._arms, bandit._state, query.unsqueeze(0))[1][0]
    expected = 2 * torch.stack([(0.7 * x @ torch.linalg.solve(gram, x)).sqrt(), x.norm()])
    torch.testing.assert_close(stds, expected)


def test_ucb_pulls_the_arm_with_the_largest_bound_and_thompson_by_its_probability():
    context = normal(6, 4)
    for kind in ("ucb", "thompson"):
        bandit = NeuralBandit(3, 4, kind, hidden=(8,), dtype=torch.float64)
        bandit.tell(context, [0, 1, 0, 1, 0, 1], [0.2, 0.9, 0.1, 0.8, 0.3, 0.7])
        rewards, stds = bandit.policy.rewards_and_stds(bandit._arms, bandit._state, context)
        found = bandit.probabilities(context)
        if kind == "ucb":
            assert bandit.ask(context).tolist() == (rewards + stds).argmax(-1).tolist()
            assert found.max(-1).values.tolist() == [1.0] * 6
        else:
            draws = rewards + stds * torch.randn(20_000, 6, 3, generator=torch.Generator().manual_seed(0)).double()
            frequency = torch.nn.functional.one_hot(draws.argmax(-1), 3).double().mean(0)
            assert (frequency - found).abs().max() < 4 * 0.5 / math.sqrt(20_000)


@pytest.mark.parametrize("policy", ["square-cb", "fast-cb", "thompson"])
def test_asks_follow_the_probabilities_and_report_them(policy):
    bandit = NeuralBandit(3, 4, policy, hidden=(8,), dtype=torch.float64)
    bandit.tell(normal(4, 4), [0, 1, 2, 2], [0.0, 1.0, 0.6, 0.5])
    context = normal(4, seed=5)
    expected = bandit.probabilities(context)
    arms = bandit.ask(context.expand(20_000, 4))
    torch.testing.assert_close(bandit.propensity, expected[arms])
    frequency = torch.bincount(arms, minlength=3) / 20_000
    z = (frequency - expected) / (expected * (1 - expected) / 20_000).sqrt()
    assert z.abs().max() < 3.5
    arm = bandit.ask(context)
    assert isinstance(arm, int)
    assert bandit.propensity == pytest.approx(expected[arm].item())


@pytest.mark.parametrize("per_arm", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_batches_are_single_rounds_one_after_the_other(policy, per_arm):
    together, alone = (NeuralBandit(3, 4, policy, hidden=(8,), per_arm=per_arm, dtype=torch.float64) for _ in "ab")
    contexts = normal(20, 3, 4) if per_arm else normal(20, 4)
    rewards = torch.rand(20, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    arms = together.ask(contexts)
    assert arms.tolist() == [alone.ask(context) for context in contexts]
    together.tell(contexts, arms, rewards)
    for context, arm, reward in zip(contexts, arms, rewards, strict=True):
        alone.tell(context, arm, reward)
    torch.testing.assert_close(together.predict(contexts), alone.predict(contexts), atol=0, rtol=0)


def play(bandit, rounds):
    """Rewards come two rounds late. Returns arms and propensities."""
    contexts, trace = normal(100, 4, seed=7), []
    for index in rounds:
        trace.append((bandit.ask(contexts[index]), bandit.propensity))
        if index >= 2:
            bandit.tell(contexts[index - 2], index % 3, 0.5 + 0.5 * math.sin(index))
    return trace


@pytest.mark.parametrize("policy", [*POLICIES, NeuSquareCB(gamma_scale=3.0, copies=2)])
def test_saved_and_loaded_goes_on_as_if_never_interrupted(policy, tmp_path):
    make = lambda: NeuralBandit(3, 4, policy, hidden=(8,), seed=3)  # noqa: E731
    whole = make()
    expected = play(whole, range(100))
    part = make()
    found = play(part, range(70))  # the history has outgrown its first room
    part.save(tmp_path / "bandit.safetensors")
    del part
    loaded = NeuralBandit.load(tmp_path / "bandit.safetensors")
    found += play(loaded, range(70, 100))
    assert found == expected
    torch.testing.assert_close(loaded._state.theta, whole._state.theta, atol=0, rtol=0)


def test_seeds_make_traces():
    make = lambda seed: play(NeuralBandit(3, 4, hidden=(8,), seed=seed), range(20))  # noqa: E731
    assert make(0) == make(0)
    assert make(0) != make(1)


@pytest.mark.parametrize("per_arm", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_regret_is_sublinear_where_the_truth_can_be_learned(policy, per_arm):
    """The last half's regret is clearly smaller than the first's, and chance's."""
    rounds = 400
    bandit = NeuralBandit(3, 4, policy, hidden=(32,), per_arm=per_arm)
    contexts = normal(rounds, 3, 4, seed=1) if per_arm else normal(rounds, 4, seed=1)
    truth = normal(4, seed=2) if per_arm else normal(3, 4, seed=2)
    means = (1.5 * (contexts @ truth.T if not per_arm else contexts @ truth)).sigmoid()
    uniform = torch.rand(rounds, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    regret = torch.zeros(rounds, dtype=torch.float64)
    for index in range(rounds):
        arm = bandit.ask(contexts[index])
        regret[index] = means[index].max() - means[index, arm]
        bandit.tell(contexts[index], arm, float(uniform[index] < means[index, arm]))
    chance = (means.amax(-1) - means.mean(-1))[rounds // 2 :].sum()
    first, last = regret[: rounds // 2].sum(), regret[rounds // 2 :].sum()
    assert last < 0.75 * first
    assert last < 0.5 * chance


def test_bad_settings_are_named():
    for arguments, message in [
        ({"num_arms": 1}, "num_arms must be at least 2, found 1"),
        ({"num_features": 0}, "num_features must be at least 1"),
        ({"policy": "greedy"}, "policy must be one of square-cb, fast-cb, thompson, ucb"),
        ({"hidden": (8, 7)}, "hidden must end with an even width"),
        ({"reward_range": (1, 0)}, "reward_range must be two increasing numbers"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"dtype": torch.int64}, "dtype must be a floating-point dtype"),
    ]:
        with pytest.raises(ValueError, match=message):
            NeuralBandit(**{"num_arms": 3, "num_features": 4} | arguments)
    with pytest.raises(TypeError, match="hidden must be a list of widths, found 50"):
        NeuralBandit(3, 4, hidden=50)
    with pytest.raises(ValueError, match="policy must be one of square-cb"):
        NeuralBandit(3, 4, policy=["ucb"])
    with pytest.raises(TypeError, match="per_arm must be True or False"):
        NeuralBandit(3, 4, per_arm=1)
    with pytest.raises(ValueError, match="step_size must be positive"):
        NeuSquareCB(step_size=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        NeuralUCB(batch_size=0)


def test_bad_rounds_are_named_and_nothing_is_learned():
    bandit = NeuralBandit(3, 4, hidden=(8,), reward_range=(-1, 1))
    before = bandit.predict([0.1, 0.2, 0.3, 0.4])
    with pytest.raises(RuntimeError, match="propensity is of the last ask"):
        _ = bandit.propensity
    with pytest.raises(ValueError, match=r"context must be of shape \(4,\) or \(rounds, \*\(4,\)\), found \(5,\)"):
        bandit.ask([0.0] * 5)
    with pytest.raises(ValueError, match="context must be finite, found 1 NaN"):
        bandit.ask([0.0, math.nan, 0.0, 0.0])
    with pytest.raises(TypeError, match="context must be numbers"):
        bandit.ask(["a", "b", "c", "d"])
    good = [0.0] * 4
    for arm, reward, error, message in [
        (3, 0.0, ValueError, "arm must lie between 0 and 2, found 3"),
        (-1, 0.0, ValueError, "arm must lie between 0 and 2, found -1"),
        (1.0, 0.0, TypeError, "arm must be whole numbers, found 1.0"),
        (1, 1.5, ValueError, "reward must lie in reward_range, -1 to 1, found 1.5"),
        (1, math.nan, ValueError, "reward must lie in reward_range"),
        ([0, 1], 0.0, ValueError, r"arm must be of shape \(\), found \(2,\)"),
        (1, None, TypeError, "reward must be numbers, found None"),
    ]:
        with pytest.raises(error, match=message):
            bandit.tell(good, arm, reward)
    with pytest.raises(ValueError, match=r"reward must be of shape \(2,\)"):
        bandit.tell([good, good], [0, 1], [0.1])
    torch.testing.assert_close(bandit.predict([0.1, 0.2, 0.3, 0.4]), before, atol=0, rtol=0)
    with pytest.raises(ValueError, match=r"context must be of shape \(3, 4\)"):
        NeuralBandit(3, 4, per_arm=True).ask(good)


def test_a_file_of_something_else_is_refused(tmp_path):
    write_tensors(tmp_path / "other", {"x": torch.zeros(1)}, {"format": 1})
    with pytest.raises(ValueError, match="holds no NeuralBandit"):
        NeuralBandit.load(tmp_path / "other")
