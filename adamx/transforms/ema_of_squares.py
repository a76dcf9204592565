"""Exponential moving average of the squared updates: RMSprop's v, Adam's second moment.

    nu_t = decay * nu_{t-1} + (1 - decay) * |u_t|^2,    nu_0 = initial

It is computed like `adamx.transforms.ema`. For complex updates |u|^2 and nu are real. Numbers above
2^60 are squared as 2^60 (`adamx.core.arithmetic.limited_square`), so nu can come down again; an
infinite nu would stop its element for ever.

Source: Tieleman & Hinton (2012), Lecture 6.5; Kingma & Ba (2015), Algorithm 1,
https://arxiv.org/abs/1412.6980
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from adamx.core.arithmetic import average, compute_dtype, limited_square, real_dtype
from adamx.core.checks import Decay, NonNegative
from adamx.core.concept import Slots
from adamx.core.schedules import scheduled_decay
from adamx.core.step import LeafStep, Step
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr, last
from adamx.formula.symbols import Symbols


class ema_of_squares(Transformation):
    """Replace the updates by the exponential moving average of their squares.

    Attributes:
        decay: weight of the past, in [0, 1): a number, array or schedule.
        initial: value before the first step, >= 0.
        dtype: dtype of the slot, rounded to nearest; None means the parameter's, at least float32.
            With a 16-bit dtype and a decay near 1 the average stops changing.
        name: the slot that keeps the average: real, shaped like the parameter, in the squared unit
            of the incoming updates.

    Raises:
        ValueError: if `decay` is a number outside [0, 1), `initial` is negative, or one of them
            is a 16-bit array.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = ema_of_squares(0.75)
        >>> updates, state = tx.update(jnp.array([4.0, -8.0]), tx.init(jnp.zeros(2)))
        >>> updates, state["nu"]
        (Array([ 4., 16.], dtype=float32), Array([ 4., 16.], dtype=float32))
    """

    decay: Decay
    initial: NonNegative = 0.0
    dtype: DTypeLike | None = None
    name: str = "nu"

    def slots(self, param: jax.Array) -> Slots:
        dtype = real_dtype(compute_dtype(param.dtype)) if self.dtype is None else self.dtype
        return {self.name: jnp.full_like(param, self.initial, dtype)}

    def scalars(self, step: Step) -> Any:
        return scheduled_decay(self, step.count)

    def accumulate(self, u: jax.Array, slots: Slots, step: LeafStep) -> Slots:
        decay, weight = step.scalars
        return {self.name: average(slots[self.name], limited_square(u), decay, weight)}

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        return slots[self.name]

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        b, v = symbols.number("b", self.decay), symbols.slot(self.name)
        return symbols.define(v, b * last(v) + (1 - b) * u**2, self.initial)
