"""How a transformation prints: the composition with its values, at a glance."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax

from adamx.core.static import Static

_WIDTH = 88


class Verbatim(str):
    """What is printed as it stands, without quotes."""


def describe(tx: Any) -> str:
    """Return the constructor call of a concept: on one line where it fits, else one line a part.

    Example:
        >>> import adamx
        >>> adamx.ema(0.9)
        ema(0.9)
        >>> adamx.adam(1e-3)
        chain(
            rms_scaling(
                chain(ema(0.9), bias_correction(0.9)),
                second_moment=chain(ema_of_squares(0.999), bias_correction(0.999)),
            ),
            scale_by_learning_rate(0.001),
        )
    """
    if tx.is_foreign and tx.name == factory_name(tx.tx):
        return f"{tx.name}(...)"
    arguments = getattr(tx, "arguments", functools.partial(_arguments, tx))()
    parts = [f"{name}={value_text(v)}" if name else value_text(v) for name, v in arguments]
    name = type(tx).__name__
    line = f"{name}({', '.join(parts)})"
    if len(line) <= _WIDTH and "\n" not in line:
        return line
    body = "".join(f"    {part},\n" for part in (p.replace("\n", "\n    ") for p in parts))
    return f"{name}(\n{body})"


def _arguments(tx: Any) -> Iterator[tuple[str, Any]]:
    fields = dataclasses.fields(tx)
    for number, field in enumerate(fields):
        value = getattr(tx, field.name)
        if field.name == getattr(tx, "variadic", None):
            yield from (("", v) for v in value)
        elif not _is_default(value, field):
            yield ("" if number == 0 else field.name), value


def _is_default(value: Any, field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING and Static(value) == Static(field.default)


def value_text(value: Any) -> str:
    """Return a hyperparameter as it was given, an array as its dtype and shape."""
    if isinstance(value, Verbatim):
        return value
    if isinstance(value, jax.Array | np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, optax.GradientTransformation):
        return repr(value) if dataclasses.is_dataclass(value) else factory_name(value)
    if isinstance(value, np.generic):
        return repr(value.item())
    if isinstance(value, type) or not callable(value) or dataclasses.is_dataclass(value):
        name = getattr(value, "__name__", None)
        return name or re.sub(r" at 0x[0-9a-f]+", "", repr(value))
    return function_name(value)


def function_name(function: Any) -> str:
    """Return a function's name; for a schedule of Optax the name of what made it.

    Example:
        >>> function_name(optax.cosine_decay_schedule(0.1, 10)), function_name(lambda step: 0.1)
        ('cosine_decay_schedule', '<lambda>')
    """
    if isinstance(function, functools.partial):
        return f"partial({function_name(function.func)})"
    kind = type(function).__qualname__
    name = getattr(function, "__qualname__", getattr(function, "__name__", kind))
    from_optax = getattr(function, "__module__", "").startswith("optax.")
    return _maker(function) if from_optax else name.split(".")[-1]


def factory_name(tx: optax.GradientTransformation) -> str:
    """Return the name of the function that made a foreign transformation.

    Example:
        >>> factory_name(optax.scale_by_adam()), factory_name(optax.clip(1.0))
        ('scale_by_adam', 'clip')
    """
    name = _maker(tx.init)
    return _maker(tx.update) if name == "init_empty_state" else name


def _maker(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__).split(".<locals>")[0]
