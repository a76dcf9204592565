"""Clear errors for bad arguments, raised at construction.

A hyperparameter may be a Python or NumPy number, an array or a tracer. Numbers are checked against
their range. Arrays and tracers pass, since reading them would stop a trace or wait for the device;
if the argument may be a schedule, they are limited to its range in each step, as schedules are.

A range is part of the type: `b1: Decay = 0.9`. A concept's fields are checked at construction, a
factory's arguments by `checked`.
"""

from __future__ import annotations

import builtins
import dataclasses
import functools
import inspect
import math
import numbers
import sys
import typing
from collections.abc import Callable
from typing import Annotated, Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from adamx.formula.adjustable import adjustable

Scalar = float | int | np.number | np.ndarray | jax.Array
"""A hyperparameter: a number, a scalar array, or a tracer."""

ScalarOrSchedule = Scalar | Callable[[Any], Any]
"""The same, or a function of the step number, which is 0 in the first step, or an adjustable."""

P = ParamSpec("P")
R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class Range:
    """The values a hyperparameter may have: an interval, and whether None or a schedule is allowed.

    If the method makes no sense with a schedule, `constant` says why, for the error. With
    `infinite` an end at infinity belongs to the interval.
    """

    low: float
    high: float
    text: str
    open_above: bool = False
    schedule: bool = False
    optional: bool = False
    constant: str = ""
    infinite: bool = False

    @property
    def is_rate(self) -> bool:
        """Whether it may change from step to step, and has no end from which it is subtracted."""
        return self.schedule and math.isinf(self.high)

    def check(self, function: str, argument: str, value: Any) -> None:
        """Raise ValueError (TypeError for a wrong kind of value) unless value is in the range."""
        if value is None and self.optional:
            return
        several = "a number, a scalar array or a schedule"
        kinds = several if self.schedule else "a number or a scalar array"
        where = f"{function}: {argument} must be"
        if isinstance(value, adjustable) and self.schedule:
            value = value.value
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
            why = f": {self.constant or _CONSTANT}" if callable(value) else ""
            if isinstance(value, str):
                why = ", which is text: YAML reads 1e-3 so, and 1.0e-3 as a number"
            raise TypeError(f"{where} {kinds}, {self.text}, got {value!r}{why}")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        below = number < self.high if self.open_above else number <= self.high
        if not (self.low <= number and below and (self.infinite or math.isfinite(number))):
            raise ValueError(f"{where} {self.text}, got {value!r}")

    def limited(self, value: Any) -> Any:
        """Return a float, or a floating-point array, limited to the range; NaN and infinity stay.

        A compiled schedule may end a hair outside: `optax.linear_schedule(1.0, 0.0, n)` ends at
        -3e-8 for more than half of all n, and a negative decay is a NaN for ever. At an end that
        does not belong to the range the result is the nearest number inside.

        Example:
            >>> DECAY.limited(jnp.array([-3e-8, 0.5, 1.0]))
            Array([0.        , 0.5       , 0.99999994], dtype=float32)
        """
        if not isinstance(value, float) and not jnp.issubdtype(value.dtype, jnp.floating):
            return value
        info = jnp.finfo(jnp.result_type(value))
        low = max(self.low, float(info.tiny)) if self.low > 0 else self.low
        below = np.nextafter(info.dtype.type(self.high), info.dtype.type(0))
        high = float(below) if self.open_above else self.high
        choose = (lambda c, a, b: a if c else b) if isinstance(value, float) else jnp.where
        value = value if math.isinf(low) else choose(value < low, low, value)
        return value if math.isinf(high) else choose(value > high, high, value)


DECAY = Range(0.0, 1.0, "in [0, 1)", open_above=True)

Decay = Annotated[ScalarOrSchedule, dataclasses.replace(DECAY, schedule=True)]
Fraction = Annotated[ScalarOrSchedule, Range(0.0, 1.0, "in [0, 1]", schedule=True)]
Limit = Annotated[ScalarOrSchedule, Range(0.0, math.inf, ">= 0", schedule=True, infinite=True)]
Rate = Annotated[ScalarOrSchedule, Range(0.0, math.inf, "finite and >= 0", schedule=True)]
NonNegative = Annotated[Scalar, Range(0.0, math.inf, "finite and >= 0")]
Positive = Annotated[Scalar, Range(math.ulp(0.0), math.inf, "finite and > 0")]
Finite = Annotated[Scalar, Range(-math.inf, math.inf, "finite")]
FiniteOrSchedule = Annotated[ScalarOrSchedule, Range(-math.inf, math.inf, "finite", schedule=True)]


@functools.cache
def ranges_of(annotated: Any) -> dict[str, Range]:
    """Return the ranges in the annotations of a function or of a concept's fields, by name.

    Example:
        >>> import adamx
        >>> {name: range_.text for name, range_ in ranges_of(adamx.sgd).items()}
        {'learning_rate': 'finite and >= 0', 'momentum': 'in [0, 1]'}
    """
    classes = reversed(annotated.__mro__) if isinstance(annotated, type) else [annotated]
    found = {}
    for one in classes:
        if one.__module__.startswith("optax"):
            continue
        names = vars(sys.modules.get(one.__module__, builtins))
        for name, annotation in inspect.get_annotations(one).items():
            if isinstance(annotation, str):
                try:
                    annotation = eval(annotation, dict(names))
                except Exception:  # a name known to type checkers only, or local to a function
                    continue
            if range_ := _range_in(annotation):
                found[name] = range_
    return found


def _range_in(annotation: Any) -> Range | None:
    """Return the range of an annotation such as `Decay` or `Decay | None`."""
    if metadata := getattr(annotation, "__metadata__", None):
        return next((x for x in metadata if isinstance(x, Range)), None)
    ranges = [_range_in(x) for x in typing.get_args(annotation) if x is not type(None)]
    is_optional = type(None) in typing.get_args(annotation)
    if is_optional and len(ranges) == 1 and ranges[0]:
        return dataclasses.replace(ranges[0], optional=True)
    return None


def whole_number(function: str, argument: str, value: Any) -> int:
    """Return an argument as an int >= 1; raise unless it is one that is known, even in a trace.

    Example:
        >>> whole_number("muon", "ns_steps", jnp.array(5))
        5
    """
    what = f"{function}: {argument} must be a whole number >= 1"
    if isinstance(value, Tracer):
        raise TypeError(
            f"{what} that is known when the program is traced, since the program depends on it, "
            "got a traced one: in inject_hyperparams name it in static_args"
        )
    if isinstance(value, jax.Array | np.ndarray) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{what}, got {value!r}")
    if value < 1:
        raise ValueError(f"{what}, got {value}")
    return int(value)


def as_float(value: Any) -> Any:
    """Return a hyperparameter with numbers of all kinds converted to float.

    A float takes the dtype of the array it meets and keeps double precision until then; a NumPy
    number would impose its dtype, an int might overflow int32.
    """
    if isinstance(value, np.ndarray):
        value = jnp.asarray(value) if value.ndim else value.item()
    return float(value) if isinstance(value, numbers.Real) else value


ELSEWHERE = {"lr": "learning_rate", "betas": "b1 and b2", "epsilon": "eps", "wd": "weight_decay"}
ELSEWHERE |= {"beta1": "b1", "beta2": "b2", "beta_1": "b1", "beta_2": "b2"}
"""What arguments of other libraries are called here."""

_CONSTANT = (
    "only rates, decays and bounds change from step to step. An array can be another one in each "
    "call of a compiled step whose argument is adamx.as_pytree(tx)"
)


_signature = functools.cache(inspect.signature)


def checked(factory: Callable[P, R]) -> Callable[P, R]:
    """Check a factory's arguments in its own name against the ranges in its annotations."""

    @functools.wraps(factory)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            bound = _signature(factory).bind(*args, **kwargs)
        except TypeError as error:
            names = _signature(factory).parameters
            unknown = next((name for name in kwargs if name not in names), None)
            said = error if unknown is None else f"there is no argument {unknown!r}"
            instead = f": it is {ELSEWHERE[unknown]} here" if unknown in ELSEWHERE else ""
            raise TypeError(f"{factory.__name__}: {said}{instead}") from None
        bound.apply_defaults()
        for argument, range_ in ranges_of(factory).items():
            value = bound.arguments[argument]
            range_.check(factory.__name__, argument, value)
            if isinstance(value, adjustable):
                bound.arguments[argument] = value.called(argument)
        return factory(*bound.args, **bound.kwargs)

    return wrapper
