"""Weight decay only where the update also moves the weight towards 0.

    u'_i = u_i + weight_decay * w_i    where u_i * w_i >= 0
    u'_i = u_i                         elsewhere

Weights that the update moves away from 0 do not decay. So, unlike
`adamx.transforms.add_decayed_weights`, this does not pull the minimum of the loss towards 0. Its
place is the same: after the scaling and before the learning rate. A complex weight decays if its
angle to the update is at most a right angle.

Source: Chen et al. (2025), Algorithm 1, https://arxiv.org/abs/2510.12402
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from adamx.core import masks
from adamx.core.checks import Rate
from adamx.core.concept import Slots
from adamx.core.schedules import scheduled
from adamx.core.step import LeafStep, Step
from adamx.core.transformation import Transformation
from adamx.formula.expressions import ZERO, Expr, W
from adamx.formula.symbols import Symbols
from adamx.transforms.cautious import agreement


class add_cautious_decayed_weights(Transformation):
    """Add `weight_decay` times the parameters to the updates where both have the same sign.

    Attributes:
        weight_decay: a number, array or schedule, >= 0.
        mask: which leaves decay: a tree of bools, a function of the parameters that returns one, or
            patterns of paths, such as "*/kernel"; None means all.

    Raises:
        ValueError: if `weight_decay` is negative or not finite; at `update`, if it is called
            without params or the mask does not fit them.

    Example:
        >>> import jax.numpy as jnp
        >>> tx, w = add_cautious_decayed_weights(0.5), jnp.array([2.0, -2.0, 2.0])
        >>> tx.update(jnp.array([1.0, 1.0, 0.0]), tx.init(w), w)[0]
        Array([2., 1., 1.], dtype=float32)
    """

    weight_decay: Rate = 0.0
    mask: Any = None

    def __post_init__(self) -> None:
        self._set(mask=masks.copied(self.mask))

    def for_tree(self, tree: Any) -> Transformation:
        return masks.settle(self, tree)

    def scalars(self, step: Step) -> Any:
        return scheduled(self, "weight_decay", step.count)

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        param = step.needs_param(self)
        return u + step.scalars * jnp.where(agreement(u, param) >= 0, param, 0)

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        u, decay = symbols.named(u), symbols.number("wd", self.weight_decay)
        return u + decay * Expr(">=", (u * W, ZERO)) * W
