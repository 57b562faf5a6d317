"""Objects that remember how they were built, so that they can be written as JSON and built again.

Saved models hold a description, never code: loading looks a class up by name among the subclasses of
:class:`Configured` and calls it with the recorded arguments. Nothing is pickled.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import numpy as np
import torch


class Configured:
    """Mixin that records the constructor's arguments under the class's name.

    Works for plain classes, (frozen) dataclasses and ``nn.Module`` alike, because it records in ``__new__``. Where two
    classes share a name, ``class StudentT(Prior, saved_as="StudentTPrior")`` tells them apart in files.

    Raises:
        TypeError: when a class is defined under whose name another one is saved already.
    """

    _classes: ClassVar[dict[str, type]] = {}
    _saved_as: ClassVar[str]
    _arguments: dict[str, Any]

    def __init_subclass__(cls, saved_as: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._saved_as = cls.__name__ if saved_as is None else saved_as
        other = Configured._classes.setdefault(cls._saved_as, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(
                f"{other.__module__}.{other.__qualname__} is saved as {cls._saved_as!r} already: give another name, "
                f'class {cls.__name__}(…, saved_as="…")'
            )
        Configured._classes[cls._saved_as] = cls  # the newest, where a class is defined again

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls)
        signature = inspect.signature(cls.__init__)
        try:
            bound = signature.bind_partial(self, *args, **kwargs)
        except TypeError:  # the constructor itself raises the better message
            return self
        arguments = dict(bound.arguments)
        arguments.pop(next(iter(signature.parameters)))
        for parameter in signature.parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(parameter.name, {}))
        object.__setattr__(self, "_arguments", arguments)
        return self


def describe(value: Any) -> Any:
    """Turn a value into JSON: numbers, strings, lists, tuples, dicts and :class:`Configured` objects.

    Raises:
        TypeError: for anything else (a function, a user's own module): it cannot be saved without running code.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return describe(value.item())
    if isinstance(value, Configured):
        arguments = {name: describe(argument) for name, argument in value._arguments.items()}
        return {"class": value._saved_as, "arguments": arguments}
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, list):
        return [describe(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [describe(item) for item in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: describe(item) for key, item in value.items()}}
    raise TypeError(
        f"cannot save {value!r} of type {type(value).__name__}: only numbers, strings, lists, tuples, dicts and bayesnn's "
        "own building blocks are written to a model file"
    )


def build(description: Any) -> Any:
    """Build the value that :func:`describe` described.

    Raises:
        ValueError: if the description names a class this version of bayesnn doesn't have.
    """
    if isinstance(description, list):
        return [build(item) for item in description]
    if not isinstance(description, dict):
        return description
    if "dtype" in description:
        dtype = getattr(torch, str(description["dtype"]), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"the file names {description['dtype']!r}, which is no torch dtype")
        return dtype
    if "tuple" in description:
        return tuple(build(item) for item in description["tuple"])
    if "dict" in description:
        return {key: build(item) for key, item in description["dict"].items()}
    name = description.get("class")
    if name not in Configured._classes:
        raise ValueError(f"the file names {name!r}, which is no class of this version of bayesnn")
    return Configured._classes[name](**{key: build(item) for key, item in description["arguments"].items()})
