"""Let a step turn each array, and not lengthen or shorten it.

    u' = |w| (w + u) / |w + u| - w,    |.| the norm over one array
    u' = u                             where |w + u| = 0, or a norm overflows

The new weights are those that u leads to, pulled back to the sphere through the old ones. Weights
that are all zero stay so. The norm is kept to the rounding of a float32 sum; that errors add up
over a long run is not prevented, since nothing is kept of the first norm.

After https://arxiv.org/abs/2606.16899, of which this file has the formula above.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from adamx.core.concept import Slots
from adamx.core.norms import norm
from adamx.core.step import LeafStep
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr, W, reduced
from adamx.formula.symbols import Symbols


class keep_norm(Transformation):
    """Change the updates, as they are added to the weights, to ones that keep each array's norm.

    It stands after the learning rate and keeps nothing.

    Raises:
        ValueError: at `update`, if it is called without params.

    Example:
        (3, 4) would become (6, 8), whose norm is 10, or (-12, 16), whose norm is 20:

        >>> import jax.numpy as jnp
        >>> tx, w = keep_norm(), jnp.array([3.0, 4.0])
        >>> w + tx.update(w, tx.init(w), w)[0]
        Array([3., 4.], dtype=float32)
        >>> w + tx.update(jnp.array([-15.0, 12.0]), tx.init(w), w)[0]
        Array([-3.,  4.], dtype=float32)
    """

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        param = step.needs_param(self)
        before, after = (norm(x, shard=step.shard).reshape(()) for x in (param, param + u))
        fine = (after > 0) & jnp.isfinite(before) & jnp.isfinite(after)
        factor = jnp.where(fine, before / jnp.where(fine, after, 1), 1)
        return (factor - 1) * param + factor * u

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        u = symbols.named(u)
        before, after = (reduced("norm", x, "array") for x in (W, W + u))
        factor = symbols.named(before / after, "r", array=False)
        return factor * W + factor * u - W
