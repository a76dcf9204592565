"""Weight decay: add a multiple of the weights to the updates.

    u' = u + weight_decay * w

After the scaling and before the learning rate this is AdamW's decoupled decay,
w <- (1 - lr * wd) w - lr u. Before the scaling it is L2 regularisation, the gradient of wd/2 |w|^2.
For SGD the two are the same; for Adam they are not, since the scaling divides the regularisation by
sqrt(v) too.

Source: Loshchilov & Hutter (2019), Algorithms 1 and 2, https://arxiv.org/abs/1711.05101
"""

from __future__ import annotations

from typing import Any

import jax

from adamx.core import masks
from adamx.core.checks import Rate
from adamx.core.concept import Slots
from adamx.core.schedules import scheduled
from adamx.core.step import LeafStep, Step
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr, W
from adamx.formula.symbols import Symbols


class add_decayed_weights(Transformation):
    """Add `weight_decay` times the parameters to the updates; keep nothing.

    With the number 0.0 it does nothing, and needs no parameters.

    Attributes:
        weight_decay: a number, array or schedule, >= 0. A schedule sees 0 in the first step.
        mask: which leaves decay: a tree of bools, a function of the parameters that returns one, or
            patterns of paths, such as "*/kernel"; None means all. The tree may be a prefix of the
            parameters' tree; `all_but("*/bias")` is such a function.

    Raises:
        TypeError: at `init` and `update`, if a mask that is a function takes other arguments.
        ValueError: if `weight_decay` is negative or not finite; at `update`, if it is called
            without params, the mask does not fit them, or a pattern matches none of them.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = add_decayed_weights(0.5, mask="w")
        >>> params = {"w": jnp.array([2.0]), "b": jnp.array([2.0])}
        >>> grads = {"w": jnp.array([1.0]), "b": jnp.array([1.0])}
        >>> tx.update(grads, tx.init(params), params)[0]
        {'b': Array([1.], dtype=float32), 'w': Array([2.], dtype=float32)}
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
        if isinstance(self.weight_decay, float) and not self.weight_decay:
            return u  # without reading the parameter, which may be absent or infinite
        return u + step.scalars * step.needs_param(self)

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        return u + symbols.number("wd", self.weight_decay) * W
