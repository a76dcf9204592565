"""Multiply the updates by a number.

    u'_t = step_size_t * u_t

It keeps nothing, and may be any stage of a chain.
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
from adamx.formula.expressions import Expr
from adamx.formula.symbols import Symbols


class scale(Transformation):
    """Multiply the updates by a number; keep nothing.

    Attributes:
        step_size: a number, array or schedule, finite. A schedule sees 0 in the first step.

    Raises:
        ValueError: if `step_size` is a number that is NaN or infinite.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = scale(-0.5)
        >>> tx.update(jnp.array([4.0, -8.0]), tx.init(jnp.zeros(2)))[0]
        Array([-2.,  4.], dtype=float32)
    """

    step_size: FiniteOrSchedule

    def scalars(self, step: Step) -> Any:
        return scheduled(self, "step_size", step.count)

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        return jnp.multiply(step.shard.own(step.scalars, u), u)

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        return symbols.number("c", self.step_size) * u
