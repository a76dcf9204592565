"""The values of scheduled hyperparameters in a step.

Schedules follow Optax's convention: the first step uses schedule(0).
"""

from __future__ import annotations

import numbers
from typing import Any

import jax
import jax.numpy as jnp

from adamx.core.arithmetic import compute_dtype, is_inexact, widen
from adamx.core.checks import ScalarOrSchedule


def scheduled(value: ScalarOrSchedule, count: jax.Array) -> Any:
    """Return a hyperparameter's value in step `count` (1 in the first, where schedules see 0).

    A schedule may return any kind of number: Python numbers become floats, and arrays of integers
    or of 16 bits become float32, in which 1 - b can be computed.

    Example:
        >>> import optax
        >>> print(scheduled(optax.linear_schedule(1.0, 0.0, 4), jnp.array(3)), scheduled(0.1, 3))
        0.5 0.1
    """
    if not callable(value):
        return value
    now = value(count - 1)
    if isinstance(now, numbers.Real):
        return float(now)
    now = jnp.asarray(now, None if is_inexact(now) else jnp.float32)
    return widen(now, compute_dtype(now.dtype))


def scheduled_decay(decay: ScalarOrSchedule, count: jax.Array) -> tuple[Any, Any]:
    """Return the weights of the old and the new value in step `count`: the decay, and 1 - decay.

    The second is computed in the precision in which the decay was given.

    Example:
        >>> scheduled_decay(0.75, jnp.array(1)), scheduled_decay(lambda step: 0.5, jnp.array(1))
        ((0.75, 0.25), (0.5, 0.5))
    """
    now = scheduled(decay, count)
    return now, 1 - now
