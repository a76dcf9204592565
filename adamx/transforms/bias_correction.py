"""Bias correction: undo the lean towards zero of an average that started at zero.

    u'_t = u_t / (1 - decay^t),                          t = 1 in the first step
    u'_t = u_t / (1 - decay_1 decay_2 ... decay_t)       where the decay is scheduled

1 - decay^t is computed as -expm1(t * log(decay)), with log(decay) in double precision on the host
where decay is a number: the plain form is 1.4e-3 off in float32 at decay = 0.99999, this one at
most 4e-7 for t up to 1e7. decay = 0 is a separate case: the correction is 1.

With a schedule the divisor is the same average of ones, a scalar in the state:
c_t = decay_t c_{t-1} + (1 - decay_t).

Source: Kingma & Ba (2015), Algorithm 1 and section 3, https://arxiv.org/abs/1412.6980
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamx.core import errors
from adamx.core.checks import Decay, ScalarOrSchedule
from adamx.core.concept import Slots
from adamx.core.schedules import scheduled
from adamx.core.step import LeafStep, Step
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr, T, last
from adamx.formula.symbols import Symbols

CORRECTION = "bias_correction"


def one_minus_power(decay: Any, count: jax.Array) -> jax.Array:
    """Return 1 - decay^count, to 4e-7 relative in float32.

    Args:
        decay: in [0, 1): a number, whose logarithm is taken in double precision, or an array.
        count: array of whole numbers >= 1, integer or floating.

    Returns:
        An array of the default floating dtype (float64 where x64 is enabled), or of decay's.

    Example:
        >>> print(one_minus_power(0.5, jnp.array(2)), one_minus_power(0.0, jnp.array(1)))
        0.75 1.0
    """
    if isinstance(decay, jax.Array | np.ndarray):
        positive = jnp.where(decay > 0, decay, 0.5)
        # decay - 1 is exact for decay in [0.5, 1]; log(decay) loses digits near 1
        power = jnp.expm1(count.astype(decay.dtype) * jnp.log1p(positive - 1))
        return jnp.where(decay > 0, -power, 1)
    if decay == 0:
        return jnp.ones_like(count, dtype=float)
    return -jnp.expm1(count.astype(float) * math.log(float(decay)))


def weight_of_past(concept: Any, step: Step, name: str) -> jax.Array:
    """Return the sum of an average's weights so far: 1 - decay^t, or 1 - decay_1 ... decay_t.

    Args:
        concept: a concept with the hyperparameter `decay`: a number, an array, or a schedule.
        step: the step.
        name: the state's entry with the last result, where decay is a schedule. An entry of 0,
            before the first step or from `adapt_state`, means that the decay was always today's.

    Example:
        >>> now = Step(jnp.array(2), state={"c": jnp.array(0.5)})
        >>> for decay in (0.5, lambda step: 0.25):
        ...     print(weight_of_past(bias_correction(decay), now, "c"))
        0.75
        0.875
    """
    today = scheduled(concept, "decay", step.count)
    if not callable(concept.decay):
        return one_minus_power(today, step.count)
    today = jnp.asarray(today, float)
    if name not in step.state:  # before the first step
        return jnp.zeros_like(today)
    past = errors.scalar(step.state, name)
    mixed = past + (1 - today) * (1 - past)
    return jnp.where(past > 0, mixed, one_minus_power(today, step.count))


def weight_in_formula(decay: ScalarOrSchedule, symbols: Symbols, name: str) -> Expr:
    """Return the result of `weight_of_past` as an expression."""
    b = symbols.number("b", decay)
    if not callable(decay):
        return 1 - b**T
    weight = symbols.slot(name, array=False)
    return symbols.define(weight, b * last(weight) + (1 - b), 0)


class bias_correction(Transformation):
    """Divide the updates by 1 - decay^t; keep nothing.

    Attributes:
        decay: weight of the past, in [0, 1): a number, array or schedule. It is the decay of the
            average to correct; 0 makes this the identity.
        name: the state's entry with the divisor of a scheduled decay, a float32 scalar (float64
            where x64 is enabled). With a number the state has no such entry.

    Raises:
        ValueError: if `decay` is a number outside [0, 1), or a 16-bit array.

    Example:
        In the first step the corrected average is the update itself:

        >>> import adamx, jax.numpy as jnp
        >>> tx = adamx.chain(adamx.ema(0.5), bias_correction(0.5))
        >>> tx.update(jnp.array([4.0, -8.0]), tx.init(jnp.zeros(2)))[0]
        Array([ 4., -8.], dtype=float32)
    """

    decay: Decay
    name: str = CORRECTION

    def __post_init__(self) -> None:
        if not callable(self.decay):  # the state has no entry to name
            self._set(name=CORRECTION)

    def scalars(self, step: Step) -> jax.Array:
        return weight_of_past(self, step, self.name)

    def record(self, scalars: Any) -> dict[str, Any]:
        return {self.name: scalars} if callable(self.decay) else {}

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        return u / step.scalars

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        return symbols.hat(u, u / weight_in_formula(self.decay, symbols, self.name))
