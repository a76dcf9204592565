"""The sign of the updates: every element moves equally far, whatever its gradient.

    u'_i = u_i / |u_i|,    0 where u_i = 0

Real updates become -1, 0 or 1; complex ones get magnitude 1. Its derivative with respect to the
updates is 0 where they are real.

Source: Bernstein et al. (2018), Algorithm 1, https://arxiv.org/abs/1802.04434
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from adamx.core.concept import Slots
from adamx.core.step import LeafStep
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr, call
from adamx.formula.symbols import Symbols


class sign(Transformation):
    """Replace the updates by their sign; keep nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> sign().update(jnp.array([4.0, -0.5, 0.0]), sign().init(jnp.zeros(3)))[0]
        Array([ 1., -1.,  0.], dtype=float32)
    """

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        return jnp.sign(u)

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        return call("sign", u)
