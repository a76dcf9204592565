"""Divide one filter of the gradient by the root of another: RMSprop's and Adam's scaling.

    u' = numerator(u) / (sqrt(second_moment(u) + eps_root) + eps)

Both branches read the same incoming update. eps is added outside the square root, as in the papers
and PyTorch, and `eps_root` inside it. 0 / 0, possible with eps = 0, is 0. At u = 0 the derivative
is the true 1 / eps, where the plain square root gives NaN (`adamx.core.arithmetic.root`).

Source: Kingma & Ba (2015), Algorithm 1, https://arxiv.org/abs/1412.6980
"""

from __future__ import annotations

import dataclasses

import jax

from adamx.core.arithmetic import divide, limit_for_squares, root
from adamx.core.checks import NonNegative
from adamx.core.concept import Slots, accumulated
from adamx.core.identity import identity
from adamx.core.step import LeafStep
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr, sqrt
from adamx.formula.symbols import Symbols


class rms_scaling(Transformation):
    """Divide a filter of the updates by the root of a second moment of the same updates.

    Attributes:
        numerator: the transformation to scale, such as `chain(ema(b1), bias_correction(b1))`; by
            default the update itself.
        second_moment: the transformation that emits the second moment, >= 0, such as
            `ema_of_squares(decay)`.
        eps: added to the root, >= 0, in the unit of the gradients. It decides how far an element
            with small gradients may still move.
        eps_root: added under the root, >= 0, in the squared unit of the gradients.

    Raises:
        TypeError: if a branch is not an adamx transformation.
        ValueError: if eps or eps_root is a negative number, or the branches keep the same slot.

    Example:
        >>> import adamx, jax.numpy as jnp
        >>> tx = rms_scaling(second_moment=adamx.ema_of_squares(0.75), eps=0.0)
        >>> tx.update(jnp.array([4.0, -8.0, 0.0]), tx.init(jnp.zeros(3)))[0]
        Array([ 2., -2.,  0.], dtype=float32)
    """

    numerator: Transformation = identity()
    _: dataclasses.KW_ONLY
    second_moment: Transformation
    eps: NonNegative = 1e-8
    eps_root: NonNegative = 0.0

    def accumulate(self, u: jax.Array, slots: Slots, step: LeafStep) -> Slots:
        limited = limit_for_squares(u, step.grad_dtype)
        new = accumulated(self.numerator, limited, slots, step.child(0))
        # the averages of squares limit what they square (`limited_square`)
        return new | accumulated(self.second_moment, u, slots | new, step.child(1))

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        u = limit_for_squares(u, step.grad_dtype)
        numerator = self.numerator.emit(u, slots, step.child(0))
        second_moment = self.second_moment.emit(u, slots, step.child(1))
        return divide(numerator, root(second_moment + self.eps_root) + self.eps, least=self.eps)

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        u = symbols.named(u)
        numerator, second = (branch.formula(u, symbols) for branch in self.children)
        inside, outside = symbols.number("eps_root", self.eps_root), symbols.number("eps", self.eps)
        return numerator / (sqrt(second + inside) + outside)
