"""Clip each array of the updates by its norm.

    u' = u min(1, max_norm / |u|),    |.| the norm over one array

The norm of a typical array grows with the root of the number of its elements: `clip_by_rms` is the
same by the size of one element, and `clip_by_global_norm` by the norm of all arrays together.

Source: Pascanu, Mikolov & Bengio (2013), Algorithm 1, https://arxiv.org/abs/1211.5063; of each
array in MARS, https://arxiv.org/abs/2411.10438
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from adamx.core.checks import NonNegative
from adamx.core.concept import Slots
from adamx.core.norms import norm
from adamx.core.step import LeafStep
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr, call, reduced
from adamx.formula.symbols import Symbols


class clip_by_norm(Transformation):
    """Scale each array down to a norm of at most `max_norm`; keep nothing.

    Attributes:
        max_norm: the largest norm of an array, >= 0, in the unit of the updates.

    Raises:
        ValueError: if `max_norm` is a number that is negative or not finite.

    Example:
        The norm of (3, -4) is 5, and that of (0.5, 0) less than 1:

        >>> import jax.numpy as jnp
        >>> tx = clip_by_norm(1.0)
        >>> grads = {"w": jnp.array([3.0, -4.0]), "b": jnp.array([0.5, 0.0])}
        >>> tx.update(grads, tx.init(grads))[0]
        {'b': Array([0.5, 0. ], dtype=float32), 'w': Array([ 0.6, -0.8], dtype=float32)}
    """

    max_norm: NonNegative

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        size = norm(u, shard=step.shard).reshape(())
        over = size > self.max_norm
        return u * jnp.where(over, self.max_norm / jnp.where(over, size, 1), 1)

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        u, max_norm = symbols.named(u), symbols.number("c", self.max_norm)
        return u * call("min", 1, max_norm / reduced("norm", u, "array"))
