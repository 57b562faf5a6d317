r"""The prediction of a new observation, p(y | x, D): a mixture over functions of what the likelihood says of y.

.. math:: p(y \mid x, D) = \sum_s w_s\, p(y \mid f_s(x))

Uncertainty splits by the law of total variance into an aleatoric part (noise: the mean of the components' variances)
and an epistemic part (ignorance of the function: the variance of the components' means); for class labels into the
expected entropy and the mutual information between label and function. Higher always means more uncertain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, NegativeBinomial, Normal, Poisson

from bayesnn.distributions import cdf, outputs, sample

COUNTS = (Poisson, NegativeBinomial)


class Predictive:
    """A mixture, over S functions, of distributions of y, in the user's units.

    Args:
        components: batch shape (*batch, S, q, m), in the model's own units.
        log_weights: (*batch, S) or (S,), unnormalised; None means equal weights.
        function_var: (*batch, S, q, m), the share of a component's variance that is ignorance of the function, where a
            component already integrates over functions in closed form; 0 by default.
        loc, scale: (1, m), the user's units: ``y = loc + scale * (model's own)``.
    """

    def __init__(
        self,
        components: Distribution,
        log_weights: Tensor | None = None,
        function_var: Tensor | None = None,
        loc: Tensor | float = 0.0,
        scale: Tensor | float = 1.0,
    ) -> None:
        self.components: Any = components
        draws = components.batch_shape[-3]
        reference = components.mean if not isinstance(components, Categorical) else components.logits
        equal = reference.new_zeros(draws)
        self.log_weights = torch.log_softmax(equal if log_weights is None else log_weights, -1)
        self._function_var = reference.new_zeros(()) if function_var is None else function_var
        self._loc, self._scale = (torch.as_tensor(value, dtype=reference.dtype) for value in (loc, scale))

    def affine(self, loc: Tensor, scale: Tensor) -> Predictive:
        """The same prediction in other units, ``loc + scale * y``."""
        new_loc, new_scale = loc.to(self._loc) + scale.to(self._loc) * self._loc, scale.to(self._scale) * self._scale
        return type(self)(self.components, self.log_weights, self._function_var, new_loc, new_scale)

    def outputs(self, indices: list[int]) -> Predictive:
        """The prediction of some of the m outputs alone.

        Raises:
            TypeError: for class labels, whose classes only have probabilities together.
        """
        m = self.shape[-1]

        def chosen(values: Tensor) -> Tensor:
            return values.expand(*values.shape[:-1], m)[..., indices] if values.dim() else values

        units = chosen(self._loc), chosen(self._scale)
        components = outputs(self.components, indices)
        return type(self)(components, self.log_weights, chosen(self._function_var), *units)

    @property
    def shape(self) -> torch.Size:
        """(*batch, q, m)."""
        shape = self.components.batch_shape
        return shape[:-3] + shape[-2:]

    def _average(self, values: Tensor) -> Tensor:
        """Weighted mean over functions, (*batch, S, q, …) -> (*batch, q, …)."""
        return (self.log_weights.exp()[..., None, None] * values).sum(-3)

    @property
    def mean(self) -> Tensor:
        """E[y], (*batch, q, m)."""
        return self._loc + self._scale * self._average(self.components.mean)

    @property
    def component_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of y under each function, (*batch, S, q, m) both."""
        return self._loc + self._scale * self.components.mean, self._scale * self.components.stddev

    @property
    def aleatoric(self) -> Tensor:
        """The variance that would remain if the function were known, (*batch, q, m)."""
        return self._scale.square() * self._average(self.components.variance - self._function_var)

    @property
    def epistemic(self) -> Tensor:
        """The variance that comes from not knowing the function, (*batch, q, m)."""
        means = self.components.mean
        spread = (means - self._average(means).unsqueeze(-3)).square()
        return self._scale.square() * self._average(spread + self._function_var)

    @property
    def variance(self) -> Tensor:
        """Var[y] = aleatoric + epistemic, (*batch, q, m)."""
        return self.aleatoric + self.epistemic

    @property
    def stddev(self) -> Tensor:
        """Square root of the variance, (*batch, q, m)."""
        return self.variance.sqrt()

    def log_prob(self, y: Tensor) -> Tensor:
        """log p(y), joint over the m outputs of a point: y (*batch, q, m), or (q,) for one output -> (*batch, q)."""
        standardised = (self._observations(y) - self._loc) / self._scale
        per_function = self.components.log_prob(standardised.unsqueeze(-3)).sum(-1)
        jacobian = self._scale.log().expand(1, self.shape[-1]).sum(-1)
        return torch.logsumexp(self.log_weights.unsqueeze(-1) + per_function, -2) - jacobian

    def cdf(self, y: Tensor) -> Tensor:
        """P(Y <= y) of each output, (*batch, q, m)."""
        standardised = (self._observations(y) - self._loc) / self._scale
        return self._average(cdf(self.components, standardised.unsqueeze(-3)))

    def quantile(self, p: float | Tensor) -> Tensor:
        """The p-quantile of each output, (*batch, q, m); p is a number, or one that broadcasts against that shape.

        Raises:
            ValueError: if p isn't strictly between 0 and 1.
        """
        level = torch.as_tensor(p, dtype=self._loc.dtype)
        if not bool(((level > 0) & (level < 1)).all()):
            raise ValueError(f"p must lie strictly between 0 and 1, found {p}")
        if isinstance(self.components, Normal) and self.components.batch_shape[-3] == 1:
            return self._loc + self._scale * self.components.icdf(level.expand(self.shape).unsqueeze(-3)).squeeze(-3)
        # The median of a component is within its mean +- sd, so a mixture's quantile is in a bracket that grows from there.
        centre, width = self.mean.detach(), self.stddev.detach() + 1e-12 * self._scale
        centre = torch.where(
            torch.isfinite(centre), centre, self._loc
        )  # heavy tails have no mean, or an infinite width
        width = torch.where(torch.isfinite(width), width, self._scale.expand_as(width))
        low = _expand_bracket(lambda y: self.cdf(y) > level, centre, -width)
        high = _expand_bracket(lambda y: self.cdf(y) < level, centre, width)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.cdf(middle) < level
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return high.floor().clamp_min(0) if isinstance(self.components, COUNTS) else (low + high) / 2

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """The central interval that holds y with probability ``level``: lower and upper ends, (*batch, q, m) each.

        Raises:
            ValueError: if the level isn't strictly between 0 and 1.
        """
        if not 0 < level < 1:
            raise ValueError(f"level must lie strictly between 0 and 1, found {level}")
        return self.quantile((1 - level) / 2), self.quantile((1 + level) / 2)

    @property
    def entropy(self) -> Tensor:
        """Entropy in nats of each output, (*batch, q, m): differential for real y.

        Closed form for one Gaussian; else the mean of -log p over the 64 mid-quantiles (a deterministic quadrature,
        good to a few hundredths of a nat).
        """
        if isinstance(self.components, Normal) and self.components.batch_shape[-3] == 1:
            return (self.components.entropy() + self._scale.log()).squeeze(-3)
        levels = (torch.arange(64, dtype=self._loc.dtype) + 0.5) / 64
        surprise = [-self._log_density(self.quantile(float(level))) for level in levels]
        return torch.stack(surprise).mean(0)

    def _log_density(self, y: Tensor) -> Tensor:
        """log p(y) of each output by itself, (*batch, q, m)."""
        per_function = self.components.log_prob(((y - self._loc) / self._scale).unsqueeze(-3))
        return torch.logsumexp(self.log_weights[..., None, None] + per_function, -3) - self._scale.log()

    def sample(self, num_samples: int, generator: torch.Generator) -> Tensor:
        """Observations: a function is drawn for all points together, then noise for each: (num_samples, *batch, q, m)."""
        weights = self.log_weights.exp()
        flat = weights.reshape(-1, weights.shape[-1])
        index = torch.multinomial(flat, num_samples, replacement=True, generator=generator)
        observations = sample(self.components, torch.Size([num_samples]), generator)
        index = index.T.reshape(num_samples, *weights.shape[:-1])
        shape = (num_samples, *self.shape)
        index = index.reshape(*index.shape, *(1 for _ in range(len(shape) - index.dim()))).expand(shape)
        return self._loc + self._scale * observations.gather(-3, index.unsqueeze(-3)).squeeze(-3)

    def _observations(self, y: Tensor) -> Tensor:
        y = torch.as_tensor(y, dtype=self._loc.dtype)
        if y.dim() == 0:
            y = y.reshape(1, 1)
        if y.dim() == 1 and self.shape[-1] == 1:
            y = y.unsqueeze(-1)
        if y.shape[-2:] != self.shape[-2:] and y.shape[-2:] != torch.Size([1, 1]):
            raise ValueError(f"y must have shape {tuple(self.shape)} (or (q,) for one output), found {tuple(y.shape)}")
        return y


class ClassPredictive(Predictive):
    """A prediction of class labels: probabilities, and entropies instead of variances.

    ``components`` is Categorical with batch shape (*batch, S, q, 1), or Bernoulli (*batch, S, q, m).
    """

    @property
    def probabilities(self) -> Tensor:
        """Categorical: P(y = k), (*batch, q, K); Bernoulli: P(y = 1), (*batch, q, m)."""
        return self._average(self._component_probabilities)

    @property
    def _component_probabilities(self) -> Tensor:
        probabilities = self.components.probs
        return probabilities.squeeze(-2) if isinstance(self.components, Categorical) else probabilities

    @property
    def mean(self) -> Tensor:
        """The probabilities: E of the label's one-hot code (Categorical) or of the label (Bernoulli)."""
        return self.probabilities

    @property
    def labels(self) -> Tensor:
        """The most probable label, (*batch, q) for Categorical, (*batch, q, m) for Bernoulli."""
        if isinstance(self.components, Categorical):
            return self.probabilities.argmax(-1)
        return (self.probabilities > 0.5).long()

    @property
    def variance(self) -> Tensor:
        """p (1 - p) of each class or label."""
        return self.probabilities * (1 - self.probabilities)

    @property
    def entropy(self) -> Tensor:
        """Entropy of the label in nats, (*batch, q, 1) or (*batch, q, m)."""
        return self._entropy(self.probabilities)

    def _entropy(self, probabilities: Tensor) -> Tensor:
        if isinstance(self.components, Categorical):
            return torch.special.entr(probabilities).sum(-1, keepdim=True)
        return torch.special.entr(probabilities) + torch.special.entr(1 - probabilities)

    @property
    def aleatoric(self) -> Tensor:
        """Expected entropy of the label given the function, in nats."""
        return self._average(self._entropy(self._component_probabilities))

    @property
    def epistemic(self) -> Tensor:
        """Mutual information between the label and the function, in nats."""
        return (self.entropy - self.aleatoric).clamp_min(0)

    def log_prob(self, y: Tensor) -> Tensor:
        """log p(y): labels (*batch, q) for one output, or (*batch, q, m) -> (*batch, q).

        Raises:
            ValueError: for labels out of range, or of another shape.
        """
        is_binary = isinstance(self.components, Bernoulli)
        labels = torch.as_tensor(y)
        if labels.shape[-2:] != self.shape[-2:] and self.shape[-1] == 1:
            labels = labels.unsqueeze(-1)
        if labels.shape[-2:] != self.shape[-2:]:
            raise ValueError(
                f"y must have shape {tuple(self.shape)} (or (*batch, q) for one output), found {tuple(y.shape)}"
            )
        top = 1 if is_binary else self.components.logits.shape[-1] - 1
        wrong = (labels < 0) | (labels > top) | (labels != labels.to(self._loc).round())
        if bool(wrong.any()):
            raise ValueError(f"y must hold labels 0 … {top}, found {labels[wrong][0].item()}")
        labels = labels.to(self._loc) if is_binary else labels.long()
        per_function = self.components.log_prob(labels.unsqueeze(-3)).sum(-1)
        return torch.logsumexp(self.log_weights.unsqueeze(-1) + per_function, -2)

    def quantile(self, p: float | Tensor) -> Tensor:
        """Raises TypeError: labels have no order."""
        raise TypeError("class labels have no quantiles; use .probabilities")

    def cdf(self, y: Tensor) -> Tensor:
        """Raises TypeError: labels have no order."""
        raise TypeError("class labels have no cdf; use .probabilities")


def _expand_bracket(outside: Callable[[Tensor], Tensor], start: Tensor, step: Tensor) -> Tensor:
    """Double the step from ``start`` until the quantile is not outside any more, elementwise."""
    end = start + step
    for _ in range(200):
        still = outside(end)
        if not bool(still.any()):
            break
        step = 2 * step
        end = torch.where(still, start + step, end)
    return end
