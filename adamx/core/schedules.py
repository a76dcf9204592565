"""The values of scheduled hyperparameters in a step.

Schedules follow Optax's convention: the first step uses schedule(0). What a schedule gives, and an
array, which is not read at construction, is limited to the range of the argument, which is part of
its type (`adamx.core.checks`).
"""

from __future__ import annotations

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamx.core.arithmetic import compute_dtype, is_inexact, widen
from adamx.core.checks import ranges_of


def scheduled(concept: Any, name: str, count: jax.Array) -> Any:
    """Return a hyperparameter's value in step `count` (1 in the first, where schedules see 0).

    A schedule may return any kind of number: Python numbers become floats, and arrays of integers
    or of 16 bits become float32, in which 1 - b can be computed. Beyond the hyperparameter's range
    it counts as the end of the range, or as the nearest number inside.

    Args:
        concept: the concept that has the hyperparameter.
        name: the field.
        count: the step.

    Raises:
        TypeError: if a schedule returns anything else, such as None.

    Example:
        >>> import adamx, optax
        >>> tx = adamx.scale_by_learning_rate(optax.linear_schedule(1.0, -1.0, 4))
        >>> print([float(scheduled(tx, "learning_rate", jnp.array(t))) for t in (1, 2, 5)])
        [1.0, 0.5, 0.0]
    """
    value = getattr(concept, name)
    if isinstance(value, float):  # checked at construction
        return value
    now = value(count - 1) if callable(value) else value
    if isinstance(now, numbers.Real):
        now = float(now)
    elif not isinstance(now, jax.Array | np.ndarray | np.generic):
        raise TypeError(
            f"{type(concept).__name__}: {name} must be a schedule that returns a number or a "
            f"scalar array for each step, got {now!r} from {value!r}"
        )
    else:
        now = jnp.asarray(now, None if is_inexact(now) else jnp.float32)
        now = widen(now, compute_dtype(now.dtype))
    range_ = ranges_of(type(concept)).get(name)
    return now if range_ is None else range_.limited(now)


def scheduled_decay(concept: Any, count: jax.Array) -> tuple[Any, Any]:
    """Return the weights of the old and the new value in step `count`: the decay, and 1 - decay.

    The second is computed in the precision in which the decay was given.

    Args:
        concept: a concept with the hyperparameter `decay`.
        count: the step.

    Example:
        >>> import adamx
        >>> scheduled_decay(adamx.ema(0.75), jnp.array(1))
        (0.75, 0.25)
        >>> scheduled_decay(adamx.ema(lambda step: 0.5), jnp.array(1))
        (0.5, 0.5)
    """
    now = scheduled(concept, "decay", count)
    return now, 1 - now
