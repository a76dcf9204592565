"""Values of hyperparameters: comparison, as a part of a jit key, and text."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import re
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import PartitionSpec

from adamx.formula.adjustable import adjustable


@dataclasses.dataclass(frozen=True, eq=False)
class Static:
    """A box that compares by type and the value's ==, or by identity where == gives no plain bool.

    0.0 and -0.0 differ, and so do 1 and 1.0, since they make different programs. A function object
    that has no hash may be changed after it was used, so it is equal to itself alone.

    Example:
        >>> Static(0.5) == Static(0.5), Static({"w": True}) == Static({"w": True})
        (True, True)
        >>> Static(0.0) == Static(-0.0), hash(Static([1])) == hash(Static([2]))
        (False, True)
    """

    value: Any

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Static):
            return NotImplemented
        a, b = self.value, other.value
        if a is b:
            return True
        if type(a) is not type(b) or (callable(a) and type(a).__hash__ is None):
            return False
        try:
            if isinstance(a, numbers.Real) and a == b:
                return math.copysign(1, a) == math.copysign(1, b)
            return bool(a == b)
        except Exception:  # a foreign value's __eq__ may raise anything; then identity decides
            return False

    def __hash__(self) -> int:
        try:
            return hash(self.value)
        except Exception:  # a list has no hash, and a foreign value's may raise anything
            return hash(type(self.value))


def value_text(value: Any) -> str:
    """Return a hyperparameter as text: as it was given, an array as its dtype and shape."""
    if isinstance(value, jax.Array | np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, adjustable) or hasattr(value, "hyperparameters"):
        return repr(value)
    if isinstance(value, optax.GradientTransformation):
        return factory_name(value)
    if isinstance(value, PartitionSpec):  # JAX's own repr has two forms
        return f"PartitionSpec({', '.join(map(repr, value))})"
    if isinstance(value, dict):
        items = [f"{_key_text(key)}: {value_text(x)}" for key, x in value.items()]
        if any(isinstance(x, optax.GradientTransformation) for x in value.values()):
            lines = "".join(f"{item},\n" for item in items)
            return "{\n    " + lines.rstrip().replace("\n", "\n    ") + "\n}"
        return "{" + ", ".join(items) + "}"
    if isinstance(value, np.generic):
        return repr(value.item())
    if isinstance(value, type) or not callable(value) or dataclasses.is_dataclass(value):
        name = getattr(value, "__name__", None)
        return name or re.sub(r" at 0x[0-9a-f]+", "", repr(value))
    return function_name(value)


def _key_text(key: Any) -> str:
    """Return a pattern as it was written: a function as its name."""
    if isinstance(key, re.Pattern):
        return repr(key.pattern)
    return function_name(key) if callable(key) else repr(key)


def function_name(function: Any) -> str:
    """Return a function's name; for a schedule of Optax the name of the function that made it.

    Example:
        >>> function_name(optax.cosine_decay_schedule(0.1, 10)), function_name(lambda step: 0.1)
        ('cosine_decay_schedule', '<lambda>')
    """
    if isinstance(function, functools.partial):
        return f"partial({function_name(function.func)})"
    kind = type(function).__qualname__
    name = getattr(function, "__qualname__", getattr(function, "__name__", kind))
    from_optax = (getattr(function, "__module__", None) or "").startswith("optax.")
    return _maker(function) if from_optax else name.split(".")[-1]


def factory_name(tx: optax.GradientTransformation) -> str:
    """Return the name of the function that made an Optax transformation.

    Example:
        >>> factory_name(optax.scale_by_adam()), factory_name(optax.clip(1.0))
        ('scale_by_adam', 'clip')
    """
    name = _maker(tx.init)
    return _maker(tx.update) if name == "init_empty_state" else name


def _maker(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__).split(".<locals>")[0]
