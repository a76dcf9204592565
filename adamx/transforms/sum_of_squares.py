"""Sum of the squared updates: AdaGrad's second moment.

    s_t = s_{t-1} + |u_t|^2,    s_0 = initial

The sum stops at the largest finite number: an infinite sum would stop its element for ever.

Source: Duchi, Hazan & Singer (2011), Figure 1, https://jmlr.org/papers/v12/duchi11a.html
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from adamx.core.arithmetic import compute_dtype, limited_square, real_dtype
from adamx.core.checks import NonNegative
from adamx.core.concept import Slots
from adamx.core.step import LeafStep
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr, last
from adamx.formula.symbols import Symbols


class sum_of_squares(Transformation):
    """Replace the updates by the sum of the squares of all updates so far.

    Attributes:
        initial: value before the first step, >= 0.
        name: the slot that keeps the sum: real, float32 or wider, shaped like the parameter, in
            the squared unit of the incoming updates.

    Raises:
        ValueError: if `initial` is a negative number, or a 16-bit array.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = sum_of_squares(1.0)
        >>> updates, state = tx.update(jnp.array([2.0, -3.0]), tx.init(jnp.zeros(2)))
        >>> updates, state["sum_of_squares"]
        (Array([ 5., 10.], dtype=float32), Array([ 5., 10.], dtype=float32))
    """

    initial: NonNegative = 0.0
    name: str = "sum_of_squares"

    def slots(self, param: jax.Array) -> Slots:
        dtype = real_dtype(compute_dtype(param.dtype))
        return {self.name: jnp.full_like(param, self.initial, dtype)}

    def accumulate(self, u: jax.Array, slots: Slots, step: LeafStep) -> Slots:
        total = slots[self.name]
        room = jnp.finfo(total.dtype).max - total
        return {self.name: total + jnp.minimum(limited_square(u), room)}

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        return slots[self.name]

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        s = symbols.slot(self.name)
        return symbols.define(s, last(s) + u**2, self.initial)
