"""Exponential moving average of the mean square of each block: Adam-mini's second moment.

    nu_t = decay * nu_{t-1} + (1 - decay) * mean(|u_t|^2),    nu_0 = 0,    the mean over one block

This is `ema_of_squares` with one number for each block of elements instead of each element. The
paper's blocks are the smallest dense blocks of the Hessian: an output neuron of a linear layer, a
head of query and key projections, a token of an embedding, any other array as a whole. A block
extends over the axes that are averaged over, which depend on the layout.

Source: Zhang et al. (2024), Algorithms 1 and 3, https://arxiv.org/abs/2406.16793
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from adamx.core.arithmetic import average, limited_square, placed_like, zeros
from adamx.core.checks import Decay
from adamx.core.concept import Slots
from adamx.core.norms import mean
from adamx.core.schedules import scheduled_decay
from adamx.core.step import LeafStep, Step
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr, last, reduced
from adamx.formula.symbols import Symbols

BlockAxes = tuple[int, ...] | Callable[[str, jax.Array], tuple[int, ...]] | None
"""The axes to average over, for all leaves or as a function of a leaf's path and the leaf."""


class ema_of_mean_squares(Transformation):
    """Replace the updates by the moving average of their mean square over each block.

    Attributes:
        decay: weight of the past, in [0, 1): a number, array or schedule.
        axes: the axes to average over: a tuple, or a function from a leaf's path, such as
            "dense/kernel", and the leaf to a tuple; None means all but the last of a matrix or
            kernel, and all of a vector. () averages nothing. A scalar has no axes. None makes one
            block for each output of a kernel (in, out) or (height, width, in, out).
        name: the slot that keeps the average: real, float32 or wider, shaped like the parameter but
            with size 1 along the averaged axes, in the squared unit of the updates. A sharded
            parameter's slot is sharded along the other axes.

    Raises:
        ValueError: if `decay` is a number outside [0, 1), or a 16-bit array.

    Example:
        Two outputs; the first one's squares, 1 and 49, have the mean 25:

        >>> import jax.numpy as jnp
        >>> tx, grads = ema_of_mean_squares(0.5), jnp.array([[1.0, 2.0], [7.0, 2.0]])
        >>> updates, state = tx.update(grads, tx.init(grads))
        >>> state["nu_mean"]
        Array([[12.5,  2. ]], dtype=float32)
        >>> updates
        Array([[12.5,  2. ],
               [12.5,  2. ]], dtype=float32)
    """

    decay: Decay
    axes: BlockAxes = None
    name: str = "nu_mean"

    def for_leaf(self, path: str, leaf: jax.Array) -> Transformation:
        if not callable(self.axes):
            return self
        return self.replace(axes=tuple(self.axes(path, leaf)))

    def slots(self, param: jax.Array) -> Slots:
        # a reduction keeps the slot of a sharded parameter sharded along the other axes
        start = placed_like(zeros(param), param)
        return {self.name: start.real.sum(self._axes(param), keepdims=True)}

    def scalars(self, step: Step) -> Any:
        return scheduled_decay(self, step.count)

    def accumulate(self, u: jax.Array, slots: Slots, step: LeafStep) -> Slots:
        nu, square = slots[self.name], mean(limited_square(u), self._axes(u), step.shard)
        square = jnp.minimum(square, jnp.finfo(nu.dtype).max)  # where the sum overflows
        decay, weight = step.scalars
        return {self.name: average(nu, square, decay, weight)}

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        return jnp.broadcast_to(slots[self.name], u.shape)

    def _axes(self, x: jax.Array) -> tuple[int, ...]:
        if x.ndim == 0:
            return ()
        if isinstance(self.axes, tuple):
            return self.axes
        return tuple(range(x.ndim - 1)) or (0,)

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        b, v = symbols.number("b", self.decay), symbols.slot(self.name)
        mean = reduced("mean", u**2, "block", self._axes)
        return symbols.define(v, b * last(v) + (1 - b) * mean, 0)
