"""The step down the hill: multiply by minus the learning rate.

    u' = -lr_t * u

Schedules follow Optax's convention: the first step uses schedule(0).
"""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any

import jax
import jax.numpy as jnp

from adamx.core.arithmetic import compute_dtype, is_inexact, widen
from adamx.core.checks import RATE, ScalarOrSchedule, check
from adamx.core.expressions import Expr
from adamx.core.formula import Symbols
from adamx.core.lifting import Slots
from adamx.core.step import Step
from adamx.core.transformation import Transformation


def scheduled(value: ScalarOrSchedule, count: jax.Array) -> Any:
    """Return a hyperparameter's value in step `count` (1 in the first, where schedules see 0).

    What a schedule gives may be of any kind: numbers become floats, and arrays of integers or 16
    bits float32, in which 1 - b can be computed.

    Example:
        >>> import jax.numpy as jnp, optax
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
    """Return the weights of the past and of today in step `count`: the decay, and 1 - decay.

    The second is computed in the precision in which the decay was given.

    Example:
        >>> scheduled_decay(0.75, jnp.array(1)), scheduled_decay(lambda step: 0.5, jnp.array(1))
        ((0.75, 0.25), (0.5, 0.5))
    """
    today = scheduled(decay, count)
    return today, 1 - today


class scale_by_learning_rate(Transformation):
    """Multiply the updates by minus the learning rate, and keep the rate to be read.

    Attributes:
        learning_rate: >= 0: a number, a scalar array, a tracer, or a schedule: a function of the
            step's number, 0 at the first. The state has the one last used (before the first step,
            the first) as `state["learning_rate"]`, float32.
        flip_sign: False multiplies by plus the learning rate.

    Raises:
        ValueError: if `learning_rate` is None, negative, NaN or infinite.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> tx = scale_by_learning_rate(optax.linear_schedule(0.5, 0.0, 2))
        >>> updates, state = tx.update(jnp.array([4.0, -8.0]), tx.init(jnp.zeros(2)))
        >>> updates, float(state["learning_rate"])
        (Array([-2.,  4.], dtype=float32), 0.5)
    """

    learning_rate: ScalarOrSchedule
    _: dataclasses.KW_ONLY
    flip_sign: bool = True

    takes_steps = True

    def __post_init__(self) -> None:
        check(self, learning_rate=RATE)

    def prepare(self, step: Step) -> Any:
        return scheduled(self.learning_rate, step.count)

    def record(self, scalars: Any) -> Slots:
        return {"learning_rate": jnp.asarray(scalars, jnp.float32)}

    def emit(self, u: jax.Array, slots: Slots, step: Step) -> jax.Array:
        return (-step.scalars if self.flip_sign else step.scalars) * u

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        rate = symbols.number("lr", self.learning_rate)
        return -rate * u if self.flip_sign else rate * u
