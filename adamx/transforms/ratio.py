"""Divide one filter of the gradient by another: AdaMax's scaling.

    u' = numerator(u) / denominator(u)

Both branches read the same incoming update. 0 / 0 is 0. To divide by the root of a second moment,
use `rms_scaling`: it takes the root, with eps inside or outside it.

Source: Kingma & Ba (2015), Algorithm 2, https://arxiv.org/abs/1412.6980
"""

from __future__ import annotations

import dataclasses

import jax

from adamx.core.arithmetic import divide
from adamx.core.concept import Slots
from adamx.core.identity import identity
from adamx.core.step import LeafStep
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr
from adamx.formula.symbols import Symbols


class ratio(Transformation):
    """Divide a filter of the updates by another filter of the same updates.

    Attributes:
        numerator: the transformation to scale, such as `chain(ema(b1), bias_correction(b1))`; by
            default the update itself.
        denominator: the transformation to divide by, such as `decaying_max(decay)`. It emits real
            numbers >= 0; where one is 0, so is the ratio.

    Raises:
        TypeError: if a branch is not an adamx transformation.
        ValueError: if the branches keep the same slot, or one of them reads the whole tree.

    Example:
        >>> import adamx, jax.numpy as jnp
        >>> tx = ratio(denominator=adamx.decaying_max(0.5))
        >>> _, state = tx.update(jnp.array([4.0, -8.0, 0.0]), tx.init(jnp.zeros(3)))
        >>> tx.update(jnp.array([1.0, -5.0, 0.0]), state)[0]
        Array([ 0.5, -1. ,  0. ], dtype=float32)
    """

    numerator: Transformation = identity()
    _: dataclasses.KW_ONLY
    denominator: Transformation

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        numerator = self.numerator.emit(u, slots, step.child(0))
        return divide(numerator, self.denominator.emit(u, slots, step.child(1)))

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        u = symbols.named(u)
        return self.numerator.formula(u, symbols) / self.denominator.formula(u, symbols)
