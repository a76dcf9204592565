"""Average of squares that moves by at most (1 - decay) |u|^2: Yogi's second moment.

    nu_t = nu_{t-1} + (1 - decay) * sign(|u_t|^2 - nu_{t-1}) * |u_t|^2,    nu_0 = initial

Where nu is far above |u|^2, the average of `ema_of_squares` falls by (1 - decay) nu, and this one
only by (1 - decay) |u|^2: when gradients become small, the steps grow slowly. Where nu is far
below, both rise alike. nu is never below decay * nu_{t-1}. A square too large for its dtype counts
as the largest number, and so does a sum.

Source: Zaheer et al. (2018), Algorithm 2,
https://papers.nips.cc/paper/2018/hash/90365351ccc7437a1309dc64e4db32a3-Abstract.html
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from adamx.core.arithmetic import compute_dtype, limited_square, real_dtype
from adamx.core.checks import Decay, NonNegative
from adamx.core.concept import Slots
from adamx.core.schedules import scheduled_decay
from adamx.core.step import LeafStep, Step
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr, call, last
from adamx.formula.symbols import Symbols


class additive_average_of_squares(Transformation):
    """Replace the updates by an average of their squares that moves by small steps.

    Attributes:
        decay: weight of the past, in [0, 1): a number, array or schedule.
        initial: value before the first step, >= 0.
        name: the slot that keeps the average: real, float32 or wider, shaped like the parameter,
            in the squared unit of the incoming updates.

    Raises:
        ValueError: if `decay` is a number outside [0, 1), `initial` is negative, or one of them
            is a 16-bit array.

    Example:
        16 is above 4, so a quarter of it is added; 1 is below, so a quarter of it is subtracted:

        >>> import jax.numpy as jnp
        >>> tx = additive_average_of_squares(0.75, initial=4.0)
        >>> tx.update(jnp.array([-4.0, 1.0]), tx.init(jnp.zeros(2)))[0]
        Array([8.  , 3.75], dtype=float32)
    """

    decay: Decay
    initial: NonNegative = 0.0
    name: str = "nu_additive"

    def slots(self, param: jax.Array) -> Slots:
        dtype = real_dtype(compute_dtype(param.dtype))
        return {self.name: jnp.full_like(param, self.initial, dtype)}

    def scalars(self, step: Step) -> Any:
        return scheduled_decay(self, step.count)

    def accumulate(self, u: jax.Array, slots: Slots, step: LeafStep) -> Slots:
        nu, square = slots[self.name], limited_square(u)
        largest = jnp.finfo(nu.dtype).max
        _, weight = step.scalars
        change = weight * jnp.sign(square - nu) * square
        return {self.name: nu + jnp.minimum(change, largest - nu)}

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        return slots[self.name]

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        b, v = symbols.number("b", self.decay), symbols.slot(self.name)
        change = (1 - b) * call("sign", u**2 - last(v)) * u**2
        return symbols.define(v, last(v) + change, self.initial)
