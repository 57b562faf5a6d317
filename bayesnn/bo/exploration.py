r"""How predictions for the arms become probabilities of pulling them.

Every function takes (\*batch, K) and gives (\*batch, K): rows that sum to 1. An arm drawn from such a row has a known
propensity, which is what logged data need to be of use later.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bayesnn.checks import count, nonnegative, positive

NUM_NODES = 128  # of the trapezoidal rule below: exact to rounding where the stds are alike


def square_cb(losses: Tensor, gamma: float) -> Tensor:
    r"""Inverse gap weighting: with b the arm of the smallest predicted loss,

    .. math:: p_a = \frac{1}{K + \gamma (\hat y_a - \hat y_b)} \quad (a \ne b), \qquad p_b = 1 - \sum_{a \ne b} p_a.

    At :math:`\gamma = 0` all arms are alike; towards infinity only b is left (with its ties, 1/K each).

    Args:
        losses: predicted losses (\*batch, K).
        gamma: how much a gap counts; :func:`square_cb_gamma` is the theory's.

    Raises:
        TypeError, ValueError: for losses that aren't finite numbers of at least one arm, or a negative gamma.

    Source: Foster and Rakhlin, Beyond UCB (ICML 2020), algorithm 1 with :math:`\mu = K`.
    """
    losses, gamma = _checked(losses), nonnegative("gamma", gamma)
    return _rest_on_best(losses, 1 / (losses.shape[-1] + gamma * (losses - losses.amin(-1, keepdim=True))))


def fast_cb(losses: Tensor, gamma: float) -> Tensor:
    r"""Inverse gap weighting that counts a gap relative to the smallest loss: with b its arm,

    .. math:: p_a = \frac{\hat y_b}{K \hat y_b + \gamma (\hat y_a - \hat y_b)} \quad (a \ne b), \qquad
        p_b = 1 - \sum_{a \ne b} p_a.

    Where an arm without loss is known, no other is tried. At :math:`\hat y_b = 0` these are the limits from above.

    Args:
        losses: predicted losses (\*batch, K) in [0, 1].
        gamma: how much a gap counts; :func:`fast_cb_gamma` is the theory's.

    Raises:
        TypeError, ValueError: for losses outside [0, 1] or of no arm, or a negative gamma.

    Source: Foster and Krishnamurthy, Efficient first-order contextual bandits (NeurIPS 2021), algorithm 1.
    """
    losses, gamma = _checked(losses), nonnegative("gamma", gamma)
    if bool((losses < 0).any()) or bool((losses > 1).any()):
        raise ValueError(f"losses must lie in [0, 1], found {losses.min().item():g} to {losses.max().item():g}")
    best, num_arms = losses.amin(-1, keepdim=True), losses.shape[-1]
    weights = num_arms * best + gamma * (losses - best)
    return _rest_on_best(losses, torch.where(weights > 0, best / weights, 1 / num_arms))


def thompson(means: Tensor, stds: Tensor) -> Tensor:
    r"""The probability that an arm's draw is the largest, where values are independent normals:

    .. math:: p_a = \int \phi(z) \prod_{b \ne a} \Phi\!\left(\frac{\mu_a + \sigma_a z - \mu_b}{\sigma_b}\right) dz.

    To draw from it is Thompson sampling, and the propensity comes with it. The trapezoidal rule over 12 standard
    deviations errs by up to 0.02 where one arm is known far better than another, and by nothing to speak of elsewhere.

    Args:
        means, stds: of the arms' values (\*batch, K), larger being better; stds above 0.

    Raises:
        TypeError, ValueError: for means that aren't finite, stds that aren't positive, or shapes that differ.
    """
    means, stds = _checked(means, "means"), _checked(stds, "stds")
    if means.shape != stds.shape or not bool((stds > 0).all()):
        raise ValueError(f"stds must be positive and of shape {tuple(means.shape)}, found {tuple(stds.shape)}")
    z = torch.linspace(-6, 6, NUM_NODES, dtype=means.dtype, device=means.device)
    drawn = means.unsqueeze(-1) + stds.unsqueeze(-1) * z  # (*batch, a, node)
    below = (drawn.unsqueeze(-2) - means[..., None, :, None]) / stds[..., None, :, None]  # (*batch, a, b, node)
    own = torch.eye(means.shape[-1], dtype=torch.bool, device=means.device).unsqueeze(-1)
    others = torch.special.ndtr(below).masked_fill(own, 1.0).prod(-2)
    weights = (others * (-0.5 * z.square()).exp()).sum(-1)
    return weights / weights.sum(-1, keepdim=True)


def greedy(values: Tensor) -> Tensor:
    r"""All on the largest of the values (\*batch, K), the first of ties."""
    values = _checked(values, "values")
    return torch.nn.functional.one_hot(values.argmax(-1), values.shape[-1]).to(values.dtype)


def square_cb_gamma(num_arms: int, rounds: int, regret: float) -> float:
    r""":math:`\gamma = \sqrt{K T / R}`, where R bounds the regret of the regression with square loss over the T rounds.

    It balances the two terms of the bandit's regret, :math:`\gamma R` and :math:`K T / \gamma`, up to constants.

    Source: Foster and Rakhlin (2020), theorem 1, without the :math:`\log(1/\delta)` beside R.
    """
    return math.sqrt(count("num_arms", num_arms) * count("rounds", rounds) / positive("regret", regret))


def fast_cb_gamma(num_arms: int, best_loss: float, regret: float) -> float:
    r""":math:`\gamma = \max(\sqrt{K L^* / (3 R)}, 10 K)`, where :math:`L^*` is the best policy's loss over all rounds.

    R bounds the regret of the regression with the logarithmic loss.

    Source: Foster and Krishnamurthy (2021), theorem 1; the constants are from memory.
    """
    num_arms = count("num_arms", num_arms)
    return max(
        math.sqrt(num_arms * nonnegative("best_loss", best_loss) / (3 * positive("regret", regret))), 10.0 * num_arms
    )


def _checked(values: Tensor, name: str = "losses") -> Tensor:
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise TypeError(f"{name} must be a tensor of floating-point numbers, found {values!r}")
    if not values.dim() or not values.shape[-1]:
        raise ValueError(f"{name} must be of shape (*batch, arms), found {tuple(values.shape)}")
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name} must be finite, found {values}")
    return values


def _rest_on_best(losses: Tensor, probabilities: Tensor) -> Tensor:
    """Replace the best arm's probability by what the others leave."""
    best = losses.argmin(-1, keepdim=True)
    others = probabilities.scatter(-1, best, 0.0)
    return others.scatter(-1, best, 1 - others.sum(-1, keepdim=True))
