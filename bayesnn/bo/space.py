"""Search spaces: what may be tried, and how a configuration becomes numbers.

A configuration is a dict of values. Its *code* is a row of float64: numbers lie in [0, 1] (on the log scale where the
parameter is), integers, steps and ordinals on the grid of their values, a category is its index. A parameter whose condition
isn't met isn't in the configuration, and its code is that of its middle value. Its *features*, what surrogates are fitted to,
are the code with every category one-hot.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from optuna.distributions import BaseDistribution
from torch import Tensor
from torch.quasirandom import SobolEngine

from bayesnn.bo.parameters import (
    Categorical,
    Numeric,
    Ordinal,
    Parameter,
    When,
    all_codes,
    parameter_from_distribution,
    parameter_from_form,
)

Configuration = dict[str, Any]

# Up to so many values, a number is searched value by value; beyond, as if it were continuous, then rounded.
FEW_VALUES = 20


class Space:
    """A search space.

    Args:
        definition: for each parameter's name ``(low, high)``: a number, a whole one if both ends are ``int``;
            ``(low, high, "log")``: the same on the log scale; a list of at least two strings, numbers, booleans or None:
            a category; ``Ordinal([…])``: one with an order. Both ends are included. ``When(form, other=values)``: any of
            these that exists only where ``other``, which is defined before, has one of some values.

    Raises:
        TypeError, ValueError: for a definition that makes no sense, naming the parameter.

    Example:
        >>> Space({"x": (0.0, 1.0), "n": (1, 10), "rate": (1e-5, 1e-1, "log"), "kind": ["a", "b"]})
        >>> Space({"optimizer": ["adam", "sgd"], "momentum": When((0.0, 0.99), optimizer="sgd")})
    """

    def __init__(self, definition: Mapping[str, Any]) -> None:
        if not isinstance(definition, Mapping):
            raise TypeError(f"a space is a dict of name: (low, high) or [choices], found {type(definition).__name__}")
        if not definition:
            raise ValueError("a space needs at least one parameter, found none")
        self.parameters: dict[str, Parameter] = {}
        self.conditions: dict[str, When] = {}
        for name, form in definition.items():
            if isinstance(form, When):
                self.conditions[name] = self._checked(name, form)
                form = form.form
            self.parameters[name] = parameter_from_form(name, form)

    def _checked(self, name: str, condition: When) -> When:
        if condition.parent not in self.parameters:
            raise ValueError(f"{name} depends on {condition.parent!r}, which must be a parameter defined before it")
        parent = self.parameters[condition.parent]
        if parent.num_values == math.inf:
            raise ValueError(f"{name} must depend on a parameter with separate values; {condition.parent} is {parent}")
        for value in condition.values:
            try:
                parent.code(value)
            except ValueError as error:
                raise ValueError(f"{name} depends on {condition.parent} in a way that can't be: {error}") from None
        return condition

    @classmethod
    def from_distributions(cls, distributions: Mapping[str, BaseDistribution]) -> Space:
        """The space of a study's parameters, which must have more than one value each.

        Raises:
            TypeError: for a kind of distribution that Optuna doesn't have.
        """
        space = cls.__new__(cls)
        space.conditions = {}
        space.parameters = {name: parameter_from_distribution(name, given) for name, given in distributions.items()}
        return space

    # What it consists of ---------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """The parameters' names, in the order of the code's columns."""
        return list(self.parameters)

    @property
    def size(self) -> float:
        """How many configurations there are; infinite if anything is continuous."""
        return math.prod(self._size_below(name) for name in self.parameters if name not in self.conditions)

    def _size_below(self, name: str) -> float:
        """Of a parameter that exists, with those that depend on it."""
        children = {child: when for child, when in self.conditions.items() if when.parent == name}
        special = {value for when in children.values() for value in when.values}
        sizes = (
            math.prod(self._size_below(child) for child, when in children.items() if value in when.values)
            for value in special
        )
        return self.parameters[name].num_values - len(special) + sum(sizes)

    @property
    def num_features(self) -> int:
        """How many columns the features have."""
        return sum(len(p.choices) if isinstance(p, Categorical) else 1 for p in self.parameters.values())

    @property
    def bounds(self) -> Tensor:
        """The lowest and the highest code, (2, d)."""
        high = [p.num_values - 1 if isinstance(p, Categorical) else 1.0 for p in self.parameters.values()]
        return torch.tensor([[0.0] * len(high), high], dtype=torch.float64)

    @property
    def category_codes(self) -> dict[int, list[float]]:
        """For each column that is a category, its codes."""
        columns = enumerate(self.parameters.values())
        return {column: all_codes(p) for column, p in columns if isinstance(p, Categorical)}

    @property
    def step_codes(self) -> dict[int, list[float]]:
        """For each column that is a number with few values, the codes of those values."""
        columns = enumerate(self.parameters.values())
        numbers = {c: p for c, p in columns if isinstance(p, Numeric | Ordinal) and p.num_values <= FEW_VALUES}
        return {column: all_codes(p) for column, p in numbers.items()}

    def distributions(self) -> dict[str, BaseDistribution]:
        """The same as Optuna distributions."""
        return {name: parameter.distribution() for name, parameter in self.parameters.items()}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Space) and (self.parameters, self.conditions) == (other.parameters, other.conditions)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Space({', '.join(f'{name}: {text}' for name, text in self.described().items())})"

    def described(self) -> dict[str, str]:
        """Each parameter in words."""
        words = {name: str(parameter) for name, parameter in self.parameters.items()}
        for name, condition in self.conditions.items():
            values = " or ".join(repr(value) for value in condition.values)
            words[name] += f" when {condition.parent} is {values}"
        return words

    def exists(self, name: str, configuration: Mapping[str, Any]) -> bool:
        """Whether a parameter is in a configuration that has all parameters defined before it."""
        condition = self.conditions.get(name)
        if condition is None:
            return True
        return condition.parent in configuration and configuration[condition.parent] in condition.values

    # Configurations, codes, features -----------------------------------------------------------------------------------

    def codes(self, configurations: Iterable[Mapping[str, Any]]) -> Tensor:
        """Configurations -> codes (n, d).

        Raises:
            ValueError: for a configuration with missing, unknown or out-of-space values.
        """
        if isinstance(configurations, Mapping):
            raise TypeError("configurations must be a list of them, found a single one: write [configuration]")
        rows = [self._code(configuration) for configuration in configurations]
        return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(self.parameters))

    def _code(self, configuration: Mapping[str, Any]) -> list[float]:
        names = [name for name in self.parameters if self.exists(name, configuration)]
        if set(configuration) != set(names):
            given = " with these values" if self.conditions else ""
            raise ValueError(f"a configuration of this space{given} has {names}, found {list(configuration)}")
        row = []
        for name, parameter in self.parameters.items():
            try:
                row.append(parameter.code(configuration[name]) if name in configuration else _middle(parameter))
            except ValueError as error:
                raise ValueError(f"{name} of the configuration is outside the space: {error}") from None
        return row

    def configurations(self, codes: Tensor) -> list[Configuration]:
        """Codes (n, d) -> the nearest configurations."""
        return [self._configuration(row) for row in codes.tolist()]

    def _configuration(self, row: list[float]) -> Configuration:
        configuration: Configuration = {}
        for (name, parameter), code in zip(self.parameters.items(), row, strict=True):
            if self.exists(name, configuration):
                configuration[name] = parameter.value(code)
        return configuration

    def snap(self, codes: Tensor) -> Tensor:
        """The codes of the configurations nearest to any codes (*batch, d)."""
        rows = self.codes(self.configurations(codes.reshape(-1, codes.shape[-1])))
        return rows.reshape(codes.shape).to(codes)

    def encode(self, codes: Tensor) -> Tensor:
        """Codes (*batch, d) -> features (*batch, num_features); differentiable in the numbers."""
        columns = []
        exist = self._exist(codes)
        for column, (name, parameter) in enumerate(self.parameters.items()):
            code = codes[..., column]
            if name in exist:
                code = torch.where(exist[name], code, torch.full_like(code, _middle(parameter)))
            if isinstance(parameter, Categorical):
                choices = torch.arange(len(parameter.choices), device=codes.device)
                columns.append((code.round().unsqueeze(-1) == choices).to(codes))
            else:
                columns.append(code.unsqueeze(-1))
        return torch.cat(columns, -1)

    def _exist(self, codes: Tensor) -> dict[str, Tensor]:
        """For each parameter with a condition, at which codes (*batch, d) it exists: (*batch,)."""
        exist: dict[str, Tensor] = {}
        for name, condition in self.conditions.items():
            parent = self.parameters[condition.parent]
            code = codes[..., self.names.index(condition.parent)]
            nearest = torch.tensor(all_codes(parent)).to(code)
            index = (code.unsqueeze(-1) - nearest).abs().argmin(-1)
            wanted = torch.tensor([all_codes(parent).index(parent.code(value)) for value in condition.values])
            exist[name] = torch.isin(index, wanted.to(index))
            if condition.parent in exist:
                exist[name] = exist[name] & exist[condition.parent]
        return exist

    def decode(self, features: Tensor) -> Tensor:
        """Features (n, num_features) -> codes (n, d) of the nearest configurations, undoing :meth:`encode`."""
        if features.shape[-1] != self.num_features:
            raise ValueError(f"features of this space have {self.num_features} columns, found {features.shape[-1]}")
        columns, start = [], 0
        for parameter in self.parameters.values():
            width = len(parameter.choices) if isinstance(parameter, Categorical) else 1
            block = features[..., start : start + width].detach().double()
            columns.append(block.argmax(-1).double() if isinstance(parameter, Categorical) else block[..., 0])
            start += width
        return self.snap(torch.stack(columns, -1))

    def features(self, configurations: Iterable[Mapping[str, Any]]) -> Tensor:
        """Configurations -> features (n, num_features), what a surrogate is fitted to.

        Raises:
            ValueError: for a configuration with missing, unknown or out-of-space values.
        """
        return self.encode(self.codes(configurations))

    # Where there is a resource (AtResource); here there is none ------------------------------------------------------

    def compared(self, codes: Tensor) -> Tensor:
        """Codes (n, d) as an acquisition function compares them: as they are."""
        return codes

    def begun(self, codes: Tensor) -> Tensor:
        """Codes (n, d) as those of evaluations that have just begun: as they are."""
        return codes

    # Points ------------------------------------------------------------------------------------------------------------

    def sobol(self, num_points: int, seed: int, skip: int = 0) -> Tensor:
        """Codes (n, d) of a scrambled Sobol sequence, spread evenly over the values of every parameter."""
        engine = SobolEngine(len(self.parameters), scramble=True, seed=seed).fast_forward(skip)
        uniforms = engine.draw(num_points, dtype=torch.float64).tolist()
        parameters = self.parameters.values()
        rows = [[p.spread(uniform) for p, uniform in zip(parameters, row, strict=True)] for row in uniforms]
        points = torch.tensor(rows, dtype=torch.float64)
        return self.snap(points) if self.conditions else points

    def grid(self) -> Tensor:
        """The codes of all configurations, (size, d); for finite spaces only."""
        if not self.conditions:
            columns = [torch.tensor(all_codes(p), dtype=torch.float64) for p in self.parameters.values()]
            return torch.cartesian_prod(*columns).reshape(-1, len(columns))
        configurations: list[Configuration] = [{}]
        for name, parameter in self.parameters.items():
            values = [parameter.value(code) for code in all_codes(parameter)]
            configurations = [
                longer
                for each in configurations
                for longer in ([each | {name: value} for value in values] if self.exists(name, each) else [each])
            ]
        return self.codes(configurations)


def _middle(parameter: Parameter) -> float:
    """The code of a parameter that doesn't exist; of the value nearest to the middle, or of the first choice."""
    return 0.0 if isinstance(parameter, Categorical) else parameter.code(parameter.value(0.5))
