"""The deviation of the updates from a slot, such as their average: AdaBelief's surprise.

    u'_t = u_t - slot_t

An earlier concept keeps the slot, such as the average of `ema`; this step's update is already in
it. After this concept, `ema_of_squares` averages squared surprises: it is small where gradients are
large and steady, so steps are long there.

Source: Zhuang et al. (2020), Algorithm 2, https://arxiv.org/abs/2010.07468
"""

from __future__ import annotations

import jax

from adamx.core.concept import Slots
from adamx.core.step import LeafStep
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr
from adamx.formula.symbols import Symbols


class deviation(Transformation):
    """Subtract a slot that an earlier concept keeps; keep nothing.

    Attributes:
        slot: the slot to read. It is shaped like the parameter, in the unit of the updates, and its
            concept comes before this one, in an earlier stage or branch.

    Raises:
        ValueError: at `update`, if there is no such slot.

    Example:
        The average after one step is 0.75 * 0 + 0.25 * 8 = 2:

        >>> import adamx, jax.numpy as jnp
        >>> tx = adamx.combine(lambda average, rest: rest, adamx.ema(0.75), deviation())
        >>> tx.update(jnp.array([8.0]), tx.init(jnp.zeros(1)))[0]
        Array([6.], dtype=float32)
    """

    slot: str = "mu"

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        if self.slot not in slots:
            raise ValueError(f"deviation: there is no slot {self.slot!r}, only {sorted(slots)}")
        return u - slots[self.slot]

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        return u - symbols.slot(self.slot)
