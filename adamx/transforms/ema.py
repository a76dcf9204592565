"""Exponential moving average of the updates: Momentum's m, Adam's first moment.

    mu_t = decay * mu_{t-1} + (1 - decay) * u_t,    mu_0 = initial

It is computed in a form whose gain is one (`adamx.core.arithmetic.average`): with rounded factors
the average of squares with decay 0.999 would be 1.3e-5 too large for ever. (In any form, a float32
average of a constant stops when its steps fall below half a ULP, 3e-5 short at 0.999. This does not
happen with gradients that vary.)

For the first 1 / (1 - decay) steps the average leans towards its start. If the start is zero,
`bias_correction` undoes this.

Source: Kingma & Ba (2015), Algorithm 1, https://arxiv.org/abs/1412.6980
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from adamx.core.arithmetic import average, zeros
from adamx.core.checks import Decay, Finite
from adamx.core.concept import Slots
from adamx.core.schedules import scheduled_decay
from adamx.core.step import LeafStep, Step
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr, last
from adamx.formula.symbols import Symbols


class ema(Transformation):
    """Replace the updates by their exponential moving average.

    Attributes:
        decay: weight of the past, in [0, 1): a number, array or schedule. 0 makes this the
            identity. A schedule sees 0 in the first step.
        dtype: dtype of the slot, rounded to nearest; None means the parameter's, at least float32.
        name: the slot that keeps the average: shaped like the parameter, in the unit of the
            incoming updates.
        initial: value before the first step, finite.

    Raises:
        ValueError: if `decay` is a number outside [0, 1), `initial` is not finite, or one of them
            is a 16-bit array.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = ema(0.75)
        >>> updates, state = tx.update(jnp.array([4.0, -8.0]), tx.init(jnp.zeros(2)))
        >>> updates, state["mu"]
        (Array([ 1., -2.], dtype=float32), Array([ 1., -2.], dtype=float32))
    """

    decay: Decay
    dtype: DTypeLike | None = None
    name: str = "mu"
    initial: Finite = 0.0

    def slots(self, param: jax.Array) -> Slots:
        return {self.name: jnp.full_like(zeros(param, self.dtype), self.initial)}

    def scalars(self, step: Step) -> Any:
        return scheduled_decay(self, step.count)

    def accumulate(self, u: jax.Array, slots: Slots, step: LeafStep) -> Slots:
        decay, weight = step.scalars
        return {self.name: average(slots[self.name], u, decay, weight)}

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        return slots[self.name]

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        b, m = symbols.number("b", self.decay), symbols.slot(self.name)
        return symbols.define(m, b * last(m) + (1 - b) * u, self.initial)
