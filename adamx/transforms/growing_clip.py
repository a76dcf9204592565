"""Limit every element to a bound that grows with the steps: ADOPT's clipping.

    u'_t = clip(u_t, -c_t, c_t),    c_t = (t - 1)^power

After a division by the root of a second moment the updates are near 1, so the bound acts on
outliers of the early steps: it is 0 in the first step, 1 in the second, 5.6 after 1000, 10 after
10000. For complex elements it limits the magnitude.

Source: Taniguchi et al. (2024), section 4.2, https://arxiv.org/abs/2411.02853 (t counts from 1 here
and the paper's first step, which only starts v, is not counted there)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from adamx.core.checks import NonNegative
from adamx.core.concept import Slots
from adamx.core.step import LeafStep, Step
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr, T, call
from adamx.formula.symbols import Symbols


class growing_clip(Transformation):
    """Limit every element of the updates to (t - 1)^power; keep nothing.

    Attributes:
        power: how fast the bound grows, >= 0.

    Raises:
        ValueError: if `power` is negative or not finite, or a 16-bit array.

    Example:
        The bounds of the first two steps are 0 and 1:

        >>> import jax.numpy as jnp
        >>> tx = growing_clip()
        >>> updates, state = tx.update(jnp.array([4.0, -0.5]), tx.init(jnp.zeros(2)))
        >>> updates, tx.update(jnp.array([4.0, -0.5]), state)[0]
        (Array([ 0., -0.], dtype=float32), Array([ 1. , -0.5], dtype=float32))
    """

    power: NonNegative = 0.25

    def scalars(self, step: Step) -> Any:
        return (step.count - 1).astype(float) ** self.power

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        bound = step.scalars
        if jnp.iscomplexobj(u):
            return jnp.where(jnp.abs(u) > bound, bound * jnp.sign(u), u)
        return jnp.clip(u, -bound, bound)

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        bound = symbols.named((T - 1) ** symbols.number("power", self.power), "bound", array=False)
        return call("clip", u, -bound, bound)
