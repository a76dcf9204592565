"""Heavy-ball momentum, and Nesterov's: a decaying sum of the updates.

    trace_t = u_t + decay * trace_{t-1},    trace_0 = 0
    heavy ball: u'_t = trace_t              Nesterov: u'_t = u_t + decay * trace_t

With a scheduled decay, decay_t multiplies trace_{t-1}, and Nesterov's look-ahead has decay_{t+1},
the decay of the next step. (PyTorch, where the momentum can be set between steps, has decay_t.)

The sum is 1 / (1 - decay) times as large as the average of `ema`, which is the notes' Momentum.

Source: Polyak (1964); Sutskever et al. (2013), https://proceedings.mlr.press/v28/sutskever13.html
"""

from __future__ import annotations

from typing import Any

import jax
from jax.typing import DTypeLike

from adamx.core.arithmetic import limit_sum, zeros
from adamx.core.checks import Fraction
from adamx.core.concept import Slots
from adamx.core.schedules import scheduled
from adamx.core.step import LeafStep, Step
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr, following, last
from adamx.formula.symbols import Symbols


class trace(Transformation):
    """Replace the updates by their decaying sum.

    Attributes:
        decay: weight of the past, in [0, 1]: a number, array or schedule.
        nesterov: whether to look one step ahead, as Nesterov's method does.
        accumulator_dtype: dtype of the slot, rounded to nearest; None means the parameter's, at
            least float32.
        name: the slot that keeps the sum: shaped like the parameter, in the unit of the updates.

    Raises:
        ValueError: if `decay` is a number outside [0, 1], or a 16-bit array.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = trace(0.5)
        >>> _, state = tx.update(jnp.array([4.0, -8.0]), tx.init(jnp.zeros(2)))
        >>> tx.update(jnp.array([1.0, 1.0]), state)[0]
        Array([ 3., -3.], dtype=float32)
    """

    decay: Fraction
    nesterov: bool = False
    accumulator_dtype: DTypeLike | None = None
    name: str = "trace"

    def slots(self, param: jax.Array) -> Slots:
        return {self.name: zeros(param, self.accumulator_dtype)}

    def scalars(self, step: Step) -> Any:
        return scheduled(self, "decay", step.count), scheduled(self, "decay", step.count + 1)

    def accumulate(self, u: jax.Array, slots: Slots, step: LeafStep) -> Slots:
        today, _ = step.scalars
        return {self.name: limit_sum(u + today * slots[self.name], u, step.grad_dtype)}

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        if not self.nesterov:
            return slots[self.name]
        _, tomorrow = step.scalars
        return limit_sum(u + tomorrow * slots[self.name], u, step.grad_dtype)

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        b, total = symbols.number("b", self.decay), symbols.slot(self.name)
        u = symbols.named(u) if self.nesterov else u
        symbols.define(total, u + b * last(total), 0)
        return u + following(b) * total if self.nesterov else total
