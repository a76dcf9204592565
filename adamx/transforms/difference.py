"""The change of the updates since the last step.

    u'_t = u_t - u_{t-1},    u'_1 = 0
    previous_t = u_t

Source: Xie et al. (2022), Algorithm 1, https://arxiv.org/abs/2208.06677
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from adamx.core.arithmetic import zeros
from adamx.core.concept import Slots
from adamx.core.step import LeafStep
from adamx.core.transformation import Transformation
from adamx.formula.expressions import ONE, Expr, T, last, where
from adamx.formula.symbols import Symbols


class difference(Transformation):
    """Replace the updates by their change since the last step, which is 0 in the first.

    Attributes:
        name: the slot that keeps the update: float32 or wider, shaped like the parameter, in the
            unit of the updates.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = difference()
        >>> updates, state = tx.update(jnp.array([4.0, -8.0]), tx.init(jnp.zeros(2)))
        >>> updates, tx.update(jnp.array([5.0, -5.0]), state)[0]
        (Array([0., 0.], dtype=float32), Array([1., 3.], dtype=float32))
    """

    name: str = "previous"

    def slots(self, param: jax.Array) -> Slots:
        return {self.name: zeros(param)}

    def accumulate(self, u: jax.Array, slots: Slots, step: LeafStep) -> Slots:
        # Always u. On GPU and TPU XLA copies a result that is an argument, in a kernel of its own,
        # but the kernel that reads the old slot can write the new one.
        return {
            self.name: jax.lax.platform_dependent(
                u,
                slots[self.name],
                cpu=lambda u, _: u,
                default=lambda u, old: jnp.where(step.count > 0, u, old),
            )
        }

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        return jnp.where(step.count == 1, 0, u - step.old[self.name])

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        u = symbols.named(u)
        return where(Expr(">", (T, ONE)), u - last(u), 0)
