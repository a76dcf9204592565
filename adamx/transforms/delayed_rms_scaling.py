"""Divide the updates by the root of the last step's second moment: ADOPT's scaling.

    u'_t = u_t / max(sqrt(second_moment_{t-1}), eps),    u'_1 = 0

The gradient and its divisor are then independent; in Adam's scaling the gradient appears in both.
This lets ADOPT converge for any decay of the second moment. The first step has no second moment to
divide by: it only starts one.

eps is the smallest divisor; `adamx.transforms.rms_scaling` adds it instead.

Source: Taniguchi et al. (2024), Algorithm 2, https://arxiv.org/abs/2411.02853
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from adamx.core.arithmetic import divide, limit_for_squares, root
from adamx.core.checks import NonNegative
from adamx.core.concept import Slots
from adamx.core.step import LeafStep
from adamx.core.transformation import Transformation
from adamx.formula.expressions import ONE, Expr, T, call, sqrt, where
from adamx.formula.symbols import Symbols


class delayed_rms_scaling(Transformation):
    """Divide the updates by the root of the last step's second moment.

    Attributes:
        second_moment: the transformation that emits the second moment, >= 0, such as
            `ema_of_squares(decay)`. Its output must depend on its slots only.
        eps: the smallest divisor, >= 0, in the unit of the gradients. 0 / 0, possible with eps = 0,
            is 0.

    Raises:
        TypeError: if `second_moment` is not an adamx transformation.
        ValueError: if `eps` is a negative number.

    Example:
        The second update is divided by the first:

        >>> import adamx, jax.numpy as jnp
        >>> tx = delayed_rms_scaling(adamx.seeded_ema_of_squares(0.75))
        >>> updates, state = tx.update(jnp.array([4.0, -8.0]), tx.init(jnp.zeros(2)))
        >>> updates, tx.update(jnp.array([2.0, 8.0]), state)[0]
        (Array([0., 0.], dtype=float32), Array([0.5, 1. ], dtype=float32))
    """

    second_moment: Transformation
    _: dataclasses.KW_ONLY
    eps: NonNegative = 1e-6

    def accumulate(self, u: jax.Array, slots: Slots, step: LeafStep) -> Slots:
        return super().accumulate(limit_for_squares(u, step.grad_dtype), slots, step)

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        u = limit_for_squares(u, step.grad_dtype)
        second_moment = self.second_moment.emit(u, slots | step.old, step.child(0))
        scaled = divide(u, jnp.maximum(root(second_moment), self.eps), least=self.eps)
        return jnp.where(step.count == 1, 0, scaled)

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        u, own = symbols.named(u), self.second_moment.slot_names()
        second = symbols.before(self.second_moment.formula(u, symbols), own)
        least = call("max", sqrt(second), symbols.number("eps", self.eps))
        return where(Expr(">", (T, ONE)), u / least, 0)
