"""Divide one filter of the gradient by the root of another, by way of the angle: Adam-atan2.

    u' = a atan2(numerator(u), b sqrt(second_moment(u)))

Where the root is large this is a / b times the quotient; the angle never exceeds a pi / 2, whatever
the quotient. So there is nothing to add to the divisor, and gradients that are multiplied by a
number give the same updates. 0 / 0 is 0. A complex numerator keeps its direction, and its magnitude
is what the angle is of. At u = 0 the derivative is finite, where that of atan2 is NaN.

Source: Everett et al. (2024), https://arxiv.org/abs/2407.05872
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from adamx.core.arithmetic import limit_for_squares, root
from adamx.core.checks import NonNegative
from adamx.core.concept import Slots
from adamx.core.identity import identity
from adamx.core.step import LeafStep
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr, call, sqrt
from adamx.formula.symbols import Symbols


class atan2_scaling(Transformation):
    """Replace a filter of the updates by its angle to the root of a second moment of the same.

    Attributes:
        numerator: the transformation to scale, such as `chain(ema(b1), bias_correction(b1))`; by
            default the update itself.
        second_moment: the transformation that emits the second moment, >= 0, such as
            `ema_of_squares(decay)`.
        a: factor of the angle, >= 0: a number or array. No update is larger than a pi / 2.
        b: factor of the root, >= 0: a number or array.

    Raises:
        TypeError: if a branch is not an adamx transformation.
        ValueError: if a or b is a negative number, or the branches keep the same slot.

    Example:
        Each gradient and its own root have an angle of pi / 4:

        >>> import adamx, jax.numpy as jnp
        >>> tx = atan2_scaling(second_moment=adamx.ema_of_squares(0.0), a=4 / jnp.pi)
        >>> tx.update(jnp.array([4.0, -8.0, 0.0]), tx.init(jnp.zeros(3)))[0]
        Array([ 1., -1.,  0.], dtype=float32)
    """

    numerator: Transformation = identity()
    _: dataclasses.KW_ONLY
    second_moment: Transformation
    a: NonNegative = 1.0
    b: NonNegative = 1.0

    def accumulate(self, u: jax.Array, slots: Slots, step: LeafStep) -> Slots:
        return super().accumulate(limit_for_squares(u, step.grad_dtype), slots, step)

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        u = limit_for_squares(u, step.grad_dtype)
        y = self.numerator.emit(u, slots, step.child(0))
        x = root(self.second_moment.emit(u, slots, step.child(1))) * self.b
        x = jnp.where((x == 0) & (y == 0), 1, x)
        if jnp.iscomplexobj(y):
            return jnp.sign(y) * jnp.arctan2(jnp.abs(y), x) * self.a
        return jnp.arctan2(y, x) * self.a

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        u = symbols.named(u)
        numerator, second = (branch.formula(u, symbols) for branch in self.children)
        a, b = symbols.number("a", self.a), symbols.number("k", self.b)
        return a * call("atan2", numerator, b * sqrt(second))
