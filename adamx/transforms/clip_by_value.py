"""Clip every element of the updates.

    u' = u min(1, max_delta / |u|)

For real updates this is min(max(u, -max_delta), max_delta), as in Optax (`clip`) and in PyTorch
(`clip_grad_value_`). A complex update keeps its phase, where those two raise. Unlike clipping by a
norm, this changes the direction of the whole update.

Source: Pascanu et al. (2013), section 3.2, on clipping by element and by norm,
https://arxiv.org/abs/1211.5063
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from adamx.core.checks import NonNegative
from adamx.core.concept import Slots
from adamx.core.step import LeafStep
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr, call
from adamx.formula.symbols import Symbols


class clip_by_value(Transformation):
    """Limit every element of the updates to [-max_delta, max_delta]; keep nothing.

    Attributes:
        max_delta: the largest magnitude, >= 0, in the unit of the updates. Infinite elements
            are clipped to it; NaN stays NaN.

    Raises:
        ValueError: if `max_delta` is a number that is negative or not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = clip_by_value(2.0)
        >>> tx.update(jnp.array([4.0, -8.0, 1.0]), tx.init(jnp.zeros(3)))[0]
        Array([ 2., -2.,  1.], dtype=float32)
    """

    max_delta: NonNegative

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        if not jnp.iscomplexobj(u):
            return jnp.clip(u, -self.max_delta, self.max_delta)
        size = jnp.abs(u)
        over = size > self.max_delta
        return jnp.where(over, u * (self.max_delta / jnp.where(over, size, 1)), u)

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        largest = symbols.number("c", self.max_delta)
        return call("clip", u, -largest, largest)
