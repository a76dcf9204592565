"""Stop the updates.

    u' = 0

The parameters do not change; nothing is kept.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from adamx.core.concept import Slots
from adamx.core.step import LeafStep
from adamx.core.transformation import Transformation
from adamx.formula.expressions import ZERO, Expr
from adamx.formula.symbols import Symbols


class set_to_zero(Transformation):
    """Replace the updates by zeros, also where they are not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> set_to_zero().update(jnp.array([4.0, jnp.nan]), set_to_zero().init(jnp.zeros(2)))[0]
        Array([0., 0.], dtype=float32)
    """

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        return jnp.zeros_like(u)

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        return ZERO
