"""Maximum of all updates so far: AMSGrad's second moment, which never comes down.

    max_t = max(max_{t-1}, u_t),    max_0 = 0

After a second moment, it keeps the steps from growing when the gradients shrink. An infinite
update counts as the largest number: an infinite maximum would stop its element for ever.

Source: Reddi, Kale & Kumar (2018), Algorithm 2, https://arxiv.org/abs/1904.09237
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from adamx.core.arithmetic import compute_dtype, real_dtype
from adamx.core.concept import Slots
from adamx.core.step import LeafStep
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr, call, last
from adamx.formula.symbols import Symbols


class running_max(Transformation):
    """Replace the updates by the largest so far, element by element.

    Attributes:
        name: the slot that keeps the maximum: real, float32 or wider, shaped like the parameter,
            in the unit of the incoming updates. It starts at 0, so the updates should be >= 0,
            as second moments are.

    Raises:
        TypeError: at `update`, if the incoming updates are complex, which have no order.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = running_max()
        >>> _, state = tx.update(jnp.array([4.0, 1.0]), tx.init(jnp.zeros(2)))
        >>> tx.update(jnp.array([3.0, 2.0]), state)[0]
        Array([4., 2.], dtype=float32)
    """

    name: str = "nu_max"

    def slots(self, param: jax.Array) -> Slots:
        return {self.name: jnp.zeros_like(param, real_dtype(compute_dtype(param.dtype)))}

    def accumulate(self, u: jax.Array, slots: Slots, step: LeafStep) -> Slots:
        if jnp.iscomplexobj(u):
            raise TypeError(
                f"running_max: complex numbers have no maximum, got {u.dtype}: put it after a "
                "second moment, such as ema_of_squares"
            )
        largest = float(jnp.finfo(u.dtype).max)
        return {self.name: jnp.maximum(slots[self.name], jnp.minimum(u, largest))}

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        return slots[self.name]

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        largest = symbols.slot(self.name)
        return symbols.define(largest, call("max", last(largest), u), 0)
