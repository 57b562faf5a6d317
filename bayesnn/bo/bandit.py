"""Contextual bandits: ask which arm to pull, tell what it brought."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from bayesnn.bo.arms import Arms
from bayesnn.bo.gradient_policies import NeuralThompson, NeuralUCB
from bayesnn.bo.regression_policies import NeuFastCB, NeuSquareCB
from bayesnn.checks import count, flag, interval
from bayesnn.configured import Configured, build, describe
from bayesnn.files import flatten, read_tensors, unflatten, write_tensors

POLICIES: dict[str, type[NeuSquareCB | NeuralUCB]] = {
    "square-cb": NeuSquareCB,
    "fast-cb": NeuFastCB,
    "thompson": NeuralThompson,
    "ucb": NeuralUCB,
}


class NeuralBandit(Configured):
    r"""A network that learns what each of K arms brings in a context, and a policy that pulls them.

    ::

        bandit = NeuralBandit(num_arms=3, num_features=20)
        arm = bandit.ask(context)
        bandit.tell(context, arm, reward)

    Asks and tells may come in any order and number: nothing waits for a reward, and what was told needn't have been
    asked for (logged data). A batch of tells is as many single tells, one step of learning each. Rounds cost the same
    however many came before.

    Args:
        num_arms: K.
        num_features: d, the features of a context. Scale them to about unit size, as for any network that learns
            online; a constant needn't be one of them.
        policy: "square-cb" (default), "fast-cb", "thompson", "ucb", or one with settings of your own:
            ``NeuSquareCB(gamma_scale=30)``.
        hidden: widths of the hidden layers, the last one even; () for a linear model.
        per_arm: whether a round has a context (K, d) with features of each arm, instead of one (d,) that all share.
        reward_range: the smallest and the largest reward that can come.
        seed: of the initial weights and of every draw after. The same seed and calls give the same trace.
        dtype: of the weights; contexts are turned into it.

    Raises:
        TypeError, ValueError: for settings that aren't as described.

    Source: see :class:`NeuSquareCB`, :class:`NeuFastCB`, :class:`NeuralThompson` and :class:`NeuralUCB`.
    """

    def __init__(
        self,
        num_arms: int,
        num_features: int,
        policy: str | NeuSquareCB | NeuralUCB = "square-cb",
        *,
        hidden: Sequence[int] = (100,),
        per_arm: bool = False,
        reward_range: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.reward_range = interval("reward_range", reward_range)
        self.policy = _policy(policy)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point dtype, found {dtype!r}")
        self.dtype = dtype
        self._arms = Arms(
            count("num_arms", num_arms, 2),
            count("num_features", num_features),
            _widths(hidden),
            flag("per_arm", per_arm),
        )
        self._generator = torch.Generator().manual_seed(count("seed", seed, 0))
        self._state: Any = self.policy.start(self._arms, self._generator, dtype)
        self._propensity: float | Tensor | None = None

    def ask(self, context: Any) -> int | Tensor:
        """The arm to pull, drawn from :meth:`probabilities`.

        Args:
            context: (d,), or (K, d) with ``per_arm``; (B, d) or (B, K, d) for several rounds at once.

        Returns:
            The arm, from 0; for several rounds a tensor (B,). :attr:`propensity` is the probability that it had.

        Raises:
            TypeError, ValueError: for a context that isn't finite numbers of such a shape.
        """
        contexts, single = self._contexts(context)
        probabilities = self._probabilities(contexts)
        uniform = torch.rand(len(contexts), 1, generator=self._generator, dtype=torch.float64)
        # Rounding may leave the sum below the draw; the last arm with any probability is right then.
        last = self._arms.num_arms - 1 - (probabilities > 0).flip(-1).int().argmax(-1, keepdim=True)
        arms = torch.searchsorted(probabilities.cumsum(-1), uniform, right=True).minimum(last)
        found = probabilities.gather(-1, arms)[:, 0]
        self._propensity = found.item() if single else found
        return int(arms) if single else arms[:, 0]

    @property
    def propensity(self) -> float | Tensor:
        """The probability of the arm that the last ask gave, or of each of its arms (B,): keep it with logged data.

        Raises:
            RuntimeError: before the first ask, and between loading and the next.
        """
        if self._propensity is None:
            raise RuntimeError("propensity is of the last ask, and there was none yet: call ask(context) first")
        return self._propensity

    def probabilities(self, context: Any) -> Tensor:
        """With which probability the next ask would give each arm: (K,) or (B, K), float64. Draws nothing.

        Raises:
            TypeError, ValueError: as :meth:`ask` does.
        """
        contexts, single = self._contexts(context)
        found = self._probabilities(contexts)
        return found[0] if single else found

    def predict(self, context: Any) -> Tensor:
        """Each arm's expected reward, in the rewards' own units: (K,) or (B, K).

        Raises:
            TypeError, ValueError: as :meth:`ask` does.
        """
        contexts, single = self._contexts(context)
        low, high = self.reward_range
        rewards = high - (high - low) * self.policy.losses(self._arms, self._state, contexts)
        return rewards[0] if single else rewards

    def tell(self, context: Any, arm: Any, reward: Any) -> None:
        """Learn what an arm brought in a context, whenever it is known, and whether or not it was asked for.

        Args:
            context: as it was given to :meth:`ask`; with ``per_arm``, the features of all arms.
            arm: which was pulled, from 0; (B,) for B contexts.
            reward: within ``reward_range``; (B,) for B contexts.

        Raises:
            TypeError, ValueError: for contexts as in :meth:`ask`, unknown arms, rewards that aren't numbers of the
                range, or numbers of rows that differ. Nothing is learned then.
        """
        contexts, single = self._contexts(context)
        shape = () if single else (len(contexts),)
        arms, rewards = _tensor("arm", arm, shape), _tensor("reward", reward, shape)
        if arms.is_floating_point() or arms.dtype == torch.bool:
            raise TypeError(f"arm must be whole numbers, found {arm!r}")
        if bool((arms < 0).any()) or bool((arms >= self._arms.num_arms).any()):
            raise ValueError(f"arm must lie between 0 and {self._arms.num_arms - 1}, found {arm!r}")
        low, high = self.reward_range
        if not bool(((rewards >= low) & (rewards <= high)).all()):
            raise ValueError(f"reward must lie in reward_range, {low:g} to {high:g}, found {reward!r}")
        losses = ((high - rewards.double()) / (high - low)).to(self.dtype).reshape(-1, 1)
        for row in zip(contexts.unsqueeze(1), arms.long().reshape(-1, 1), losses, strict=True):
            self._state = self.policy.observe(self._arms, self._state, row, self._generator)

    def save(self, path: str | Path) -> None:
        """Write everything, the generator's state too, to one safetensors file with a JSON description, atomically."""
        tensors = {"generator": self._generator.get_state()} | flatten(self._state, "state")
        write_tensors(path, tensors, {"format": 1, "bandit": describe(self)})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote; it goes on as if never interrupted. Runs no code from the file.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it isn't a bandit's file.
        """
        tensors, description = read_tensors(path)
        bandit = build(description["bandit"]) if "bandit" in description else None
        if not isinstance(bandit, cls):
            raise ValueError(f"{str(path)!r} holds no {cls.__name__}")
        bandit._generator.set_state(tensors["generator"])
        bandit._state = unflatten(tensors, bandit._state, "state")
        return bandit

    def _probabilities(self, contexts: Tensor) -> Tensor:
        found = self.policy.probabilities(self._arms, self._state, contexts).double()
        return found / found.sum(-1, keepdim=True)

    def _contexts(self, context: Any) -> tuple[Tensor, bool]:
        """The contexts with a dimension for rounds, and whether there was none."""
        arms = self._arms
        found = _tensor("context", context, None).to(self.dtype)
        expected = (arms.num_arms, arms.num_features) if arms.per_arm else (arms.num_features,)
        single = found.dim() == len(expected)
        if found.dim() - len(expected) not in (0, 1) or found.shape[-len(expected) :] != expected or not found.numel():
            raise ValueError(
                f"context must be of shape {expected} or (rounds, *{expected}), found {tuple(found.shape)}"
            )
        if not bool(found.isfinite().all()):
            raise ValueError(f"context must be finite, found {int((~found.isfinite()).sum())} NaN or infinite values")
        return (found.unsqueeze(0) if single else found), single


def _tensor(name: str, value: Any, shape: tuple[int, ...] | None) -> Tensor:
    try:
        found = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be numbers, found {value!r}") from error
    if shape is not None and found.shape != shape:
        raise ValueError(f"{name} must be of shape {shape}, found {tuple(found.shape)}")
    return found


def _policy(policy: str | NeuSquareCB | NeuralUCB) -> NeuSquareCB | NeuralUCB:
    if isinstance(policy, (NeuSquareCB, NeuralUCB)):
        return policy
    if not isinstance(policy, str) or policy not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, or such an object, found {policy!r}")
    return POLICIES[policy]()


def _widths(hidden: Sequence[int]) -> list[int]:
    if not isinstance(hidden, Sequence) or isinstance(hidden, str):
        raise TypeError(f"hidden must be a list of widths, found {hidden!r}")
    widths = [count("hidden", width) for width in hidden]
    if widths and widths[-1] % 2:
        raise ValueError(f"hidden must end with an even width, whose units come in pairs, found {widths}")
    return widths
