"""Scale each array's update by the size of its weights: Adafactor's relative step size.

    u' = u max(rms(w), min_scale),    rms(w) = sqrt(mean(|w|^2)) over one array
    u' = u                            where rms(w) overflows

A learning rate is then the fraction of its size by which an array changes, as with `trust_ratio`;
but small updates stay small. Weights that start at zero move by `min_scale`.

Source: Shazeer & Stern (2018), Algorithm 4 and section 8, https://arxiv.org/abs/1804.04235; the
name is Optax's
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from adamx.core.checks import NonNegative
from adamx.core.concept import Slots
from adamx.core.norms import rms
from adamx.core.step import LeafStep
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr, W, call, reduced, sqrt
from adamx.formula.symbols import Symbols


class scale_by_param_block_rms(Transformation):
    """Multiply each array's update by the root mean square of its weights; keep nothing.

    Attributes:
        min_scale: the least factor, >= 0, in the unit of the weights.

    Raises:
        ValueError: if `min_scale` is a number that is negative or not finite; at `update`, if it is
            called without params.

    Example:
        The root mean square of (1, -7) is 5:

        >>> import jax.numpy as jnp
        >>> tx = scale_by_param_block_rms(0.5)
        >>> params = {"w": jnp.array([1.0, -7.0]), "b": jnp.zeros(1)}
        >>> grads = {"w": jnp.array([1.0, 2.0]), "b": jnp.array([4.0])}
        >>> tx.update(grads, tx.init(params), params)[0]
        {'b': Array([2.], dtype=float32), 'w': Array([ 5., 10.], dtype=float32)}
    """

    min_scale: NonNegative = 1e-3

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        size = rms(step.needs_param(self), shard=step.shard).reshape(())
        return u * jnp.where(jnp.isinf(size), 1, jnp.maximum(size, self.min_scale))

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        size = sqrt(reduced("mean", W**2, "array"))
        return call("max", size, symbols.number("w_min", self.min_scale)) * u
