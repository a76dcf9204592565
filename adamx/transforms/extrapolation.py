"""Extrapolate the updates along their last change: Adan's look-ahead gradient.

    u'_t = u_t + factor * (u_t - u_{t-1}),    u'_1 = u_1

u_{t-1} is the slot of a `difference` earlier in the composition; this concept keeps nothing.

Source: Xie et al. (2022), Algorithm 1, https://arxiv.org/abs/2208.06677
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from adamx.core.checks import FiniteOrSchedule
from adamx.core.concept import Slots
from adamx.core.schedules import scheduled
from adamx.core.step import LeafStep, Step
from adamx.core.transformation import Transformation
from adamx.formula.expressions import ONE, Expr, T, last, where
from adamx.formula.symbols import Symbols


class extrapolation(Transformation):
    """Add to the updates a multiple of their change since the last step.

    Attributes:
        factor: a number, array or schedule, finite: 0 gives today's update, 1 the next one on a
            straight line.
        slot: the slot to read. Its `difference` reads the same updates in an earlier branch.

    Raises:
        ValueError: if `factor` is NaN or infinite; at `update`, if there is no such slot.

    Example:
        >>> import adamx, jax.numpy as jnp
        >>> tx = adamx.combine(lambda change, ahead: ahead, adamx.difference(), extrapolation(0.5))
        >>> _, state = tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))
        >>> tx.update(jnp.array([6.0]), state)[0]
        Array([7.], dtype=float32)
    """

    factor: FiniteOrSchedule
    slot: str = "previous"

    def scalars(self, step: Step) -> Any:
        return scheduled(self, "factor", step.count)

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        if self.slot not in step.old:
            raise ValueError(
                f"extrapolation: no piece keeps {self.slot!r}, only {sorted(step.old)}: put a "
                "difference() that reads the same updates into an earlier branch"
            )
        return u + step.scalars * jnp.where(step.count == 1, 0, u - step.old[self.slot])

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        u, factor = symbols.named(u), symbols.number("c", self.factor)
        return where(Expr(">", (T, ONE)), u + factor * (u - last(u)), u)
