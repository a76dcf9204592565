"""Clear errors for bad arguments, raised at construction.

A hyperparameter may be a Python or NumPy number, an array or a tracer. Numbers are checked against
their range; arrays and tracers pass, since looking at them would stop a trace or the device.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Scalar = float | np.ndarray | jax.Array
"""A hyperparameter: a number, a scalar array, or a tracer."""

ScalarOrSchedule = Scalar | Callable[[Any], Any]
"""The same, or a function of the step's number, which is 0 in the first step."""

P = ParamSpec("P")
R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class Range:
    """The values a hyperparameter may have: an interval, and whether None or a schedule may be.

    Where the method has no meaning with a schedule, `constant` says why, for the error.
    """

    low: float
    high: float
    text: str
    open_above: bool = False
    schedule: bool = False
    optional: bool = False
    constant: str = ""

    def check(self, function: str, argument: str, value: Any) -> None:
        """Raise ValueError (TypeError for a wrong kind of value) unless value is in the range."""
        if value is None and self.optional:
            return
        kinds = "a number or a scalar array" + (" or a schedule" if self.schedule else "")
        where = f"{function}: {argument} must be"
        if callable(value) and self.schedule:
            return
        if isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.itemsize > 2:
            value = value.item()  # as good as a number
        if isinstance(value, jax.Array | np.ndarray):
            if not jnp.issubdtype(value.dtype, jnp.number):
                raise TypeError(f"{where} {kinds}, got an array of {value.dtype}")
            if jnp.issubdtype(value.dtype, jnp.floating) and jnp.finfo(value.dtype).bits < 32:
                raise ValueError(
                    f"{where} {self.text} in float32 or wider, got an array of {value.dtype}, in "
                    "which 0.999 is 1: optax.inject_hyperparams takes the parameters' dtype "
                    "unless it is given hyperparam_dtype=jnp.float32"
                )
            return
        if value is None:
            raise ValueError(f"{where} {self.text}, got None")
        if not isinstance(value, numbers.Real):
            why = f": {self.constant}" if callable(value) and self.constant else ""
            raise TypeError(f"{where} {kinds} {self.text}, got {value!r}{why}")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        inside = (
            self.low <= number < self.high if self.open_above else (self.low <= number <= self.high)
        )
        if not (inside and math.isfinite(number)):
            raise ValueError(f"{where} {self.text}, got {value!r}")


DECAY = Range(0.0, 1.0, "in [0, 1)", open_above=True)
DECAY_OR_SCHEDULE = dataclasses.replace(DECAY, schedule=True)
FRACTION_OR_SCHEDULE = Range(0.0, 1.0, "in [0, 1]", schedule=True)
NON_NEGATIVE = Range(0.0, math.inf, "finite and >= 0")
FINITE = Range(-math.inf, math.inf, "finite")
FINITE_OR_SCHEDULE = dataclasses.replace(FINITE, schedule=True)
RATE = Range(0.0, math.inf, "finite and >= 0", schedule=True)


def optional(range_: Range) -> Range:
    """Return the range that also takes None."""
    return dataclasses.replace(range_, optional=True)


def check(concept: Any, **ranges: Range) -> None:
    """Check the named fields of a concept, and make all kinds of numbers floats.

    For a concept's `__post_init__`. A float takes the dtype of the array it meets and keeps double
    precision until then; a NumPy number would impose its dtype, an int might overflow int32.
    """
    for argument, range_ in ranges.items():
        value = getattr(concept, argument)
        range_.check(type(concept).__name__, argument, value)
        if isinstance(value, np.ndarray):
            value = jnp.asarray(value) if value.ndim else value.item()
        if isinstance(value, numbers.Real):
            value = float(value)
        object.__setattr__(concept, argument, value)


def checked(**ranges: Range) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Check the named arguments of a factory, so that its errors name what its caller wrote."""

    def decorate(factory: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(factory)

        @functools.wraps(factory)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{factory.__name__}: {error}") from None
            bound.apply_defaults()
            for argument, range_ in ranges.items():
                range_.check(factory.__name__, argument, bound.arguments[argument])
            return factory(*args, **kwargs)

        return wrapper

    return decorate
