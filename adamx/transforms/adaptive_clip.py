"""Clip the updates of each unit relative to the unit's weights: adaptive gradient clipping.

    u'_i = u_i min(1, clipping * max(|w_i|, eps) / |u_i|),    |.| the norm over one unit i

A unit is the weights of one output: a column of a matrix (in, out), or one last index of a
convolution's kernel. A step of -lr * u'_i changes a unit by at most lr * clipping of its norm.

The paper's matrices are (out, in), and their rows are the units. Here, as in Optax's
`adaptive_grad_clip`, the units suit the layouts of JAX. Optax divides by max(|u_i|, 1e-6), which
clips more than the formula where clipping * eps < 1e-6.

Source: Brock et al. (2021), equation 3, https://arxiv.org/abs/2102.06171
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from adamx.core.checks import NonNegative
from adamx.core.concept import Slots
from adamx.core.norms import Axes, norm
from adamx.core.step import LeafStep
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr, W, call, reduced
from adamx.formula.symbols import Symbols


class adaptive_clip(Transformation):
    """Limit the norm of each unit's update to a fraction of the norm of its weights; keep nothing.

    Attributes:
        clipping: the largest |u_i| / |w_i|, >= 0; 0.01 in the paper's networks.
        eps: the least value of |w_i|, >= 0, in the unit of the weights. It lets weights that start
            at zero move.
        axis: the axes of a unit, over which its norm is taken, in every array. None chooses by
            shape: all axes if at most one is longer than 1, else the first of two or three, or all
            but the last of four or five.

    Raises:
        ValueError: if `clipping` or `eps` is a negative number; at `update`, if it is called
            without params, or an array has six axes or more and `axis` is None.

    Example:
        The columns of w have norms 5 and 1, those of the gradient 5 and 0.5:

        >>> import jax.numpy as jnp
        >>> tx = adaptive_clip(0.5)
        >>> w, grads = jnp.array([[3.0, 1.0], [4.0, 0.0]]), jnp.array([[4.0, 0.5], [3.0, 0.0]])
        >>> tx.update(grads, tx.init(w), w)[0]
        Array([[2. , 0.5],
               [1.5, 0. ]], dtype=float32)
    """

    clipping: NonNegative
    eps: NonNegative = 1e-3
    _: dataclasses.KW_ONLY
    axis: Axes = None

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        axes, shard = self._axes(step.shard.whole(u)), step.shard
        largest = self.clipping * jnp.maximum(norm(step.needs_param(self), axes, shard), self.eps)
        size = norm(u, axes, shard)
        over = size > largest
        return u * jnp.where(over, largest / jnp.where(over, size, 1), 1)

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        u, clipping = symbols.named(u), symbols.number("c", self.clipping)
        of_weights, of_update = (reduced("norm", x, "unit", self._axes) for x in (W, u))
        largest = clipping * call("max", of_weights, symbols.number("w_min", self.eps))
        return u * call("min", 1, largest / of_update)

    def _axes(self, x: jax.Array) -> Axes:
        return _axes_of_a_unit(x) if self.axis is None else self.axis


def _axes_of_a_unit(x: jax.Array) -> Axes:
    """Return the axes of one unit, by the layouts that JAX's libraries use."""
    if sum(size != 1 for size in x.shape) <= 1:
        return None
    if x.ndim <= 3:
        return 0
    if x.ndim <= 5:
        return tuple(range(x.ndim - 1))
    raise ValueError(f"adaptive_clip: an array of {x.ndim} axes has no usual layout: pass axis")
