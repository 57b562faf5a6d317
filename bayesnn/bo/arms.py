"""Values for every arm, whether a round has one context for all arms or one for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bayesnn.bo.arm_network import ArmNetwork


class Arms:
    """A network of K outputs for shared contexts (B, d); one of a single output for each arm's own contexts (B, K, d).

    Shared contexts go through the hidden layers once for all arms, which learn features together. (The papers repeat
    the context in a block of its own for each arm, d K inputs, most of them 0, and learn K first layers apart.)
    """

    def __init__(self, num_arms: int, num_features: int, hidden: Sequence[int], per_arm: bool) -> None:
        self.num_arms, self.num_features, self.per_arm = num_arms, num_features, per_arm
        self.network = ArmNetwork(num_features, 1 if per_arm else num_arms, hidden)

    def values(self, theta: Tensor, contexts: Tensor) -> Tensor:
        """Every arm's output (B, K)."""
        return self.network.run(theta, contexts.flatten(0, -2)).outputs.view(-1, self.num_arms)

    def values_and_norms(self, theta: Tensor, contexts: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Every arm's output and the sum over weights j of scale_j g_j^2 of its gradient g: (B, K) both."""
        passed = self.network.run(theta, contexts.flatten(0, -2))
        num_rows, num_outputs = passed.outputs.shape
        each = torch.eye(num_outputs, dtype=theta.dtype).expand(num_rows, -1, -1)
        norms = self.network.weighted_norms(theta, passed, each, scales)
        return passed.outputs.view(-1, self.num_arms), norms.view(-1, self.num_arms)

    def chosen(self, contexts: Tensor, arms: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (B, d) of the network's input and weights (B, out) that pick the output of the arms (B,)."""
        if self.per_arm:
            rows = contexts[torch.arange(len(arms)), arms]
            return rows, torch.ones(len(arms), 1, dtype=contexts.dtype)
        return contexts, torch.nn.functional.one_hot(arms, self.num_arms).to(contexts.dtype)
