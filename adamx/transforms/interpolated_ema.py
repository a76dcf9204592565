"""An average that is used with one weight and kept with another: Lion's momentum.

    u'_t = blend * mu_{t-1} + (1 - blend) * u_t
    mu_t = decay * mu_{t-1} + (1 - decay) * u_t,    mu_0 = 0

With blend < decay the output weights today's update more than the slot does. With blend = decay
both are the average of `adamx.transforms.ema`. The output is computed from the new average, so that
a step can overwrite the old one:

    u'_t = ratio * mu_t + (1 - ratio) * u_t,    ratio = blend / decay

So decay must not be 0, nor may a schedule give 0: nothing of the old average would be left.

Source: Chen et al. (2023), Algorithm 2, https://arxiv.org/abs/2302.06675
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import jax
from jax.typing import DTypeLike

from adamx.core.arithmetic import average, zeros
from adamx.core.checks import Decay, Range, ScalarOrSchedule
from adamx.core.concept import Slots
from adamx.core.schedules import scheduled, scheduled_decay
from adamx.core.step import LeafStep, Step
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr, last
from adamx.formula.symbols import Symbols

PositiveDecay = Annotated[
    ScalarOrSchedule, Range(math.ulp(0.0), 1.0, "in (0, 1)", open_above=True, schedule=True)
]


class interpolated_ema(Transformation):
    """Replace the updates by a mixture of themselves and the average of earlier ones.

    Attributes:
        blend: weight of the old average in the output, in [0, 1): a number, array or schedule.
        decay: weight of the past in the slot, in (0, 1): a number, array or schedule. A schedule
            must not be 0 in any step.
        dtype: dtype of the slot, rounded to nearest; None means the parameter's, at least float32.
        name: the slot that keeps the average: shaped like the parameter, in the unit of the
            incoming updates.

    Raises:
        ValueError: if `blend` is a number outside [0, 1) or `decay` one outside (0, 1), or one of
            them is a 16-bit array.

    Example:
        Half of the update is emitted, a quarter of it is kept:

        >>> import jax.numpy as jnp
        >>> tx = interpolated_ema(0.5, 0.75)
        >>> updates, state = tx.update(jnp.array([4.0, -8.0]), tx.init(jnp.zeros(2)))
        >>> updates, state["mu"]
        (Array([ 2., -4.], dtype=float32), Array([ 1., -2.], dtype=float32))
    """

    blend: Decay
    decay: PositiveDecay
    dtype: DTypeLike | None = None
    name: str = "mu"

    def slots(self, param: jax.Array) -> Slots:
        return {self.name: zeros(param, self.dtype)}

    def scalars(self, step: Step) -> Any:
        decay, weight = scheduled_decay(self, step.count)
        ratio = scheduled(self, "blend", step.count) / decay
        return decay, weight, ratio, 1 - ratio

    def accumulate(self, u: jax.Array, slots: Slots, step: LeafStep) -> Slots:
        decay, weight, _, _ = step.scalars
        return {self.name: average(slots[self.name], u, decay, weight)}

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        _, _, ratio, rest = step.scalars
        return ratio * slots[self.name] + rest * u

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        u, m = symbols.named(u), symbols.slot(self.name)
        blend, b = symbols.number("b", self.blend), symbols.number("b", self.decay)
        symbols.define(m, b * last(m) + (1 - b) * u, 0)
        return blend * last(m) + (1 - blend) * u
