"""A target whose density and gradient are compiled: one fused program where plain PyTorch runs some fifty small kernels.

Compiling takes seconds and needs a C++ compiler (on a GPU, Triton), so that it's for long runs. The values are those of the
plain target to rounding.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from bayesnn.data import Data
from bayesnn.inference.flat import unravel, with_gaussian_prior, without_gaussian_prior
from bayesnn.inference.members import backends
from bayesnn.inference.target import Target


class Compiled:
    """A target, compiled.

    Everything is the target's own; only its log density and gradient at flat positions, and what samplers make of them
    with :meth:`compile`, run as compiled programs. The first call with new shapes compiles, for seconds.

    Args:
        target: any target whose density is made of torch operations.

    Raises:
        RuntimeError: if no C++ compiler is found.
    """

    def __init__(self, target: Target) -> None:
        _require_compiler()
        self.target = target
        self.fingerprint = getattr(target, "fingerprint", "") + ", compiled"
        self._programs: dict[Any, Callable[..., Any]] = {}

    def __getattr__(self, name: str) -> Any:
        if name == "target":  # while being unpickled in another process
            raise AttributeError(name)
        return getattr(self.target, name)

    def __getstate__(self) -> dict[str, Any]:
        return {"target": self.target}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["target"])  # type: ignore[misc]

    def compile(self, function: Callable[..., Any], *first: Any) -> Callable[..., Any]:
        """The function with its first arguments given, compiled once."""
        key = (function, *first)
        if key not in self._programs:
            self._programs[key] = self._with_backends(torch.compile(_own_program(function, *first)))
        return self._programs[key]

    def _with_backends(self, program: Callable[..., Any]) -> Callable[..., Any]:
        context = backends(getattr(self.target, "network", None))
        if isinstance(context, nullcontext):
            return program

        def within(*arguments: Any) -> Any:
            with context:
                return program(*arguments)

        return within

    def log_density_and_gradient(self, position: Tensor, batch: Data | None = None) -> tuple[Tensor, Tensor]:
        """As :func:`bayesnn.inference.flat.log_density_and_gradient`."""
        if batch is None:
            return self.density(position)
        with torch.no_grad():
            return self.compile(self._of_batch)(position, batch.X, batch.Y)

    @property
    def minibatch_gradient(self) -> CompiledGradient:
        """The gradient's estimate from a minibatch as a function of flat positions and the batch."""
        return CompiledGradient(self)

    @property
    def density(self) -> CompiledDensity:
        """The full-data log density as a function of flat positions."""
        return CompiledDensity(self)

    def _of_batch(self, position: Tensor, X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
        return self.traceable(position, Data(X, Y))

    def traceable(self, position: Tensor, batch: Data | None = None) -> tuple[Tensor, Tensor]:
        """The log density and its gradient as plain operations, to be traced as a part of a larger program."""

        def summed(position: Tensor) -> tuple[Tensor, Tensor]:
            values = without_gaussian_prior(self.target, unravel(position, self.target.shapes()), batch)
            return values.sum(), values

        gradient, (_, value) = torch.func.grad_and_value(summed, has_aux=True)(position)
        return with_gaussian_prior(self.target, position, value, gradient)

    def traceable_gradient(self, position: Tensor, batch: Data | None) -> Tensor:
        """The gradient alone, as plain operations."""
        return self.traceable(position, batch)[1]


class CompiledDensity:
    """A compiled density, which can be fused with what is done around it."""

    def __init__(self, target: Compiled) -> None:
        self._target = target

    def __call__(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """The log density (C,) and its gradient (C, P)."""
        with torch.no_grad():
            return self._target.compile(self._target.traceable)(position)

    def fuse(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function(density, ...)`` as one compiled program of its other arguments."""
        program = self._target.compile(function, self._target.traceable)

        def fused(*arguments: Any) -> Any:
            with torch.no_grad():
                return program(*arguments)

        return fused


class CompiledGradient:
    """A compiled estimate of the gradient, which can be fused with what is done around it."""

    def __init__(self, target: Compiled) -> None:
        self._target = target

    def __call__(self, position: Tensor, batch: Data | None) -> Tensor:
        """The gradient's estimate, (C, P)."""
        return self._target.log_density_and_gradient(position, batch)[1]

    def fuse(self, function: Callable[..., Any], *first: Any) -> Callable[..., Any]:
        """``function(gradient, *first, ...)`` as one compiled program of its other arguments."""
        program = self._target.compile(function, self._target.traceable_gradient, *first)

        def fused(*arguments: Any) -> Any:
            with torch.no_grad():
                return program(*arguments)

        return fused


def _own_program(function: Callable[..., Any], *first: Any) -> Callable[..., Any]:
    def program(*arguments: Any) -> Any:
        return function(*first, *arguments)

    # The compiler keeps a limited number of programs for each code object, and runs what is beyond it uncompiled.
    program.__code__ = program.__code__.replace()
    return program


def _require_compiler() -> None:
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        raise RuntimeError("compiling needs a C++ compiler (g++ or clang++) on the path: install one, or leave it out")
