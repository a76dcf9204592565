"""Exponential moving average of the squared updates that starts at the first square: ADOPT's v.

    nu_1 = |u_1|^2
    nu_t = decay * nu_{t-1} + (1 - decay) * |u_t|^2

It needs no bias correction. The first square has the weight decay^(t-1), so it counts for long
(with a schedule, decay_2 ... decay_t: the first decay is not used). Otherwise this is
`adamx.transforms.ema_of_squares`.

Source: Taniguchi et al. (2024), Algorithm 2, https://arxiv.org/abs/2411.02853
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from adamx.core.arithmetic import average, compute_dtype, limited_square, real_dtype
from adamx.core.checks import Decay
from adamx.core.concept import Slots
from adamx.core.schedules import scheduled_decay
from adamx.core.step import LeafStep, Step
from adamx.core.transformation import Transformation
from adamx.formula.expressions import ONE, Expr, T, last, where
from adamx.formula.symbols import Symbols


class seeded_ema_of_squares(Transformation):
    """Replace the updates by the average of their squares, which starts at the first of them.

    Attributes:
        decay: weight of the past, in [0, 1): a number, array or schedule.
        name: the slot that keeps the average: real, float32 or wider, shaped like the parameter,
            in the squared unit of the incoming updates.

    Raises:
        ValueError: if `decay` is a number outside [0, 1), or a 16-bit array.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = seeded_ema_of_squares(0.75)
        >>> _, state = tx.update(jnp.array([4.0, -8.0]), tx.init(jnp.zeros(2)))
        >>> state["nu_seeded"], tx.update(jnp.array([0.0, 0.0]), state)[0]
        (Array([16., 64.], dtype=float32), Array([12., 48.], dtype=float32))
    """

    decay: Decay
    name: str = "nu_seeded"

    def slots(self, param: jax.Array) -> Slots:
        return {self.name: jnp.zeros_like(param, real_dtype(compute_dtype(param.dtype)))}

    def scalars(self, step: Step) -> Any:
        decay, weight = scheduled_decay(self, step.count)
        return decay, jnp.where(step.count == 1, 1.0, weight)

    def accumulate(self, u: jax.Array, slots: Slots, step: LeafStep) -> Slots:
        nu = slots[self.name]  # 0 before the first step, so that a weight of 1 sets it
        decay, weight = step.scalars
        return {self.name: average(nu, limited_square(u), decay, weight)}

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        return slots[self.name]

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        b, v = symbols.number("b", self.decay), symbols.slot(self.name)
        later = Expr(">", (T, ONE))
        return symbols.define(v, where(later, b * last(v) + (1 - b) * u**2, u**2), 0)
