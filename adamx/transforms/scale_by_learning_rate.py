"""The step down the hill: multiply by minus the learning rate.

    u' = -lr_t * u

Schedules follow Optax's convention: the first step uses schedule(0).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from adamx.core.checks import Rate
from adamx.core.concept import Slots
from adamx.core.schedules import scheduled
from adamx.core.step import LeafStep, Step
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr
from adamx.formula.symbols import Symbols

RATE = "learning_rate"


class scale_by_learning_rate(Transformation):
    """Multiply the updates by minus the learning rate, and record the rate in the state.

    Attributes:
        learning_rate: a number, array or schedule, >= 0. A schedule is a function of the step's
            number, 0 at the first. The state has the rate last used (before the first step, the
            first) as `state["learning_rate"]`, float32. What you write there is overwritten, unless
            this is `adjustable(...)`.
        flip_sign: False multiplies by plus the learning rate.

    Raises:
        ValueError: if `learning_rate` is None, negative, NaN or infinite.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> tx = scale_by_learning_rate(optax.linear_schedule(0.5, 0.0, 2))
        >>> updates, state = tx.update(jnp.array([4.0, -8.0]), tx.init(jnp.zeros(2)))
        >>> updates, float(state["learning_rate"])
        (Array([-2.,  4.], dtype=float32), 0.5)
    """

    learning_rate: Rate
    _: dataclasses.KW_ONLY
    flip_sign: bool = True

    takes_steps = True

    def scalars(self, step: Step) -> Any:
        return scheduled(self, "learning_rate", step.count)

    def record(self, scalars: Any) -> dict[str, Any]:
        if any(value.name == RATE for value in self.adjustables.values()):
            return {}  # the state has it already
        return {RATE: jnp.asarray(scalars, jnp.float32)}

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        return (-step.scalars if self.flip_sign else step.scalars) * u

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        rate = symbols.number("lr", self.learning_rate)
        return -rate * u if self.flip_sign else rate * u
