"""Clip each array of the updates by its root mean square.

    u' = u min(1, threshold / rms(u)),    rms(u) = sqrt(mean(|u|^2)) over one array

The threshold is the size of a typical element, so it does not depend on their number. After a
scaling by the second moment this is Adafactor's update clipping, with threshold d = 1; before it,
it is Optax's `clip_by_block_rms`.

Source: Shazeer & Stern (2018), Algorithm 4 and section 6, https://arxiv.org/abs/1804.04235
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from adamx.core.checks import NonNegative
from adamx.core.concept import Slots
from adamx.core.norms import rms
from adamx.core.step import LeafStep
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr, call, reduced, sqrt
from adamx.formula.symbols import Symbols


class clip_by_rms(Transformation):
    """Scale each array down to a root mean square of at most `threshold`; keep nothing.

    Attributes:
        threshold: the largest root mean square of an array, >= 0, in the unit of the updates.

    Raises:
        ValueError: if `threshold` is a number that is negative or not finite.

    Example:
        The root mean square of (1, -7) is 5, and of (3, 1) less than 2.5:

        >>> import jax.numpy as jnp
        >>> tx = clip_by_rms(2.5)
        >>> grads = {"w": jnp.array([1.0, -7.0]), "b": jnp.array([3.0, 1.0])}
        >>> tx.update(grads, tx.init(grads))[0]
        {'b': Array([3., 1.], dtype=float32), 'w': Array([ 0.5, -3.5], dtype=float32)}
    """

    threshold: NonNegative

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        size = rms(u, shard=step.shard).reshape(())
        over = size > self.threshold
        return u * jnp.where(over, self.threshold / jnp.where(over, size, 1), 1)

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        u, threshold = symbols.named(u), symbols.number("c", self.threshold)
        return u * call("min", 1, threshold / sqrt(reduced("mean", u**2, "array")))
