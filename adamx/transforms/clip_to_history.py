"""Clip the norm of each array to a multiple of its own moving average.

    n_t = |u_t|,    the norm of one array
    h_t  = min(n_1, ..., n_t),    u'_t = u_t                       t <= warmup
    h_t  = decay h_{t-1} + (1 - decay) min(n_t, factor h_{t-1})    t > warmup
    u'_t = u_t min(1, factor h_{t-1} / n_t)                        t > warmup

No number in the unit of the gradients has to be chosen: each array is compared with itself, and a
spike enters its average clipped. The paper clips by the global norm in the warm-up, which is a
stage of its own: `clip_by_global_norm(lambda t: jnp.where(t < warmup, 1.0, jnp.inf))` before this.
A norm of 0, as a layer has behind weights of zero, and one that is not finite leave h as it is: a
rule of this library.

Source: Wang et al. (2025), AdaGC, https://arxiv.org/abs/2502.11034
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from adamx.core.arithmetic import average, placed_like, zeros
from adamx.core.checks import Decay, NonNegative, whole_number
from adamx.core.concept import Slots
from adamx.core.norms import norm
from adamx.core.schedules import scheduled_decay
from adamx.core.step import LeafStep, Step
from adamx.core.transformation import Transformation
from adamx.formula.expressions import ONE, Expr, T, call, last, reduced, where
from adamx.formula.symbols import Symbols


class clip_to_history(Transformation):
    """Scale each array down where its norm exceeds `factor` times its own moving average.

    Before `adamw` it clips the gradient. After the scaling by the second moment, as in
    `chain(scale_by_adam(), clip_to_history(), scale_by_learning_rate(1e-3))`, it clips the update.
    It acts on one array, so it may be used anywhere; `clip_by_zscore` compares the norm of the
    whole tree. An infinite norm makes an array 0 after the warm-up, NaN stays. An array without an
    average, whose norms were all 0, is not clipped.

    Attributes:
        factor: the largest |u| / h, >= 0. It should be above 1: below, the average, and with it the
            updates, falls in every step.
        decay: weight of the past, in [0, 1): a number, array or schedule.
        warmup: how many steps clip nothing, >= 1.
        name: the slot that keeps the average: real, float32 or wider, with the parameter's number
            of axes, each of size 1, in the unit of the updates; 0 as long as there is none.

    Raises:
        TypeError: if `warmup` is not a whole number.
        ValueError: if a number is out of its range.

    Example:
        The norm of the first step is 5; 20 is more than twice that, and becomes 10:

        >>> import jax.numpy as jnp
        >>> tx = clip_to_history(2.0, 0.5, warmup=1)
        >>> state = tx.init(jnp.zeros(2))
        >>> updates, state = tx.update(jnp.array([3.0, 4.0]), state)
        >>> updates, state = tx.update(jnp.array([12.0, 16.0]), state)
        >>> updates, state["norm_average"]
        (Array([6., 8.], dtype=float32), Array([7.5], dtype=float32))
    """

    factor: NonNegative = 1.05
    decay: Decay = 0.98
    _: dataclasses.KW_ONLY
    warmup: int = 100
    name: str = "norm_average"

    def __post_init__(self) -> None:
        self._set(warmup=whole_number("clip_to_history", "warmup", self.warmup))

    def slots(self, param: jax.Array) -> Slots:
        # a reduction gives the slot of a sharded parameter to all of its devices
        return {self.name: placed_like(zeros(param), param).real.sum(keepdims=True)}

    def scalars(self, step: Step) -> Any:
        return step.count > self.warmup, *scheduled_decay(self, step.count)

    def accumulate(self, u: jax.Array, slots: Slots, step: LeafStep) -> Slots:
        clips, decay, weight = step.scalars
        before, size = slots[self.name], norm(u, shard=step.shard)
        later = average(before, jnp.minimum(size, self.factor * before), decay, weight)
        later = jnp.where(clips, later, jnp.minimum(before, size))
        later = jnp.where(before > 0, later, size)
        return {self.name: jnp.where((size > 0) & jnp.isfinite(size), later, before)}

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        clips, *_ = step.scalars
        size, before = norm(u, shard=step.shard), step.old[self.name]
        over = clips & (before > 0) & (size > self.factor * before)
        return u * jnp.where(over, self.factor * before / jnp.where(over, size, 1), 1)

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        u, h = symbols.named(u), symbols.slot(self.name)
        b, c = symbols.number("b", self.decay), symbols.number("c", self.factor)
        size = symbols.named(reduced("norm", u, "array"), "norm", array=False)
        later = Expr(">", (T, symbols.number("warmup", float(self.warmup))))
        largest = c * last(h)
        average = b * last(h) + (1 - b) * call("min", size, largest)
        smallest = where(Expr(">", (T, ONE)), call("min", last(h), size), size)
        symbols.define(h, where(later, average, smallest), 0)
        return u * where(later, call("min", 1, largest / size), 1)
