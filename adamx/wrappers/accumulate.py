"""Micro-batches: one step of the optimizer for the mean of several gradients.

    a_k = a_{k-1} + w_k g_k,    s_k = s_{k-1} + w_k,    a_0 = s_0 = 0

and the optimizer takes a step with a_k / s_k at k = every, or where the caller says so. Without
weights w_k = 1. If each gradient is a mean over a micro-batch, and w_k the number of its tokens or
examples, this is the step of the whole batch, however unequal its parts are.

The sum is kept in one slot in float32 (float64 for float64 gradients). `make_step` chooses between
two compiled programs, one that adds and one that steps, so between its steps the optimizer's own
slots are neither read nor written. Setting the sum to zero after a step would be one more pass over
the memory; instead the next gradient overwrites it.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamx.core import errors
from adamx.core.arithmetic import (
    is_inexact,
    real_dtype,
    real_times_complex,
    resharded_like,
    zeros,
)
from adamx.core.concept import Slots
from adamx.core.leaves import Leaves
from adamx.core.lifting import Between, State
from adamx.core.step import Step
from adamx.core.transformation import Transformation
from adamx.core.wrapper import Wrapper
from adamx.formula.expressions import Expr
from adamx.formula.symbols import Symbols

SUM, MICRO, WEIGHTS = "accumulated", "micro_step", "accumulated_weight"
WEIGHT, LAST = "weight", "last"


class accumulate(Wrapper):
    """Let an optimizer take one step for the mean of `every` gradients.

    The state's `count`, and with it schedules and bias corrections, counts the optimizer's steps;
    `micro_step` (int32) the gradients since the last. Between steps the updates are zero.

    Two more arguments of `update`, and of the step that `make_step` returns, are for it alone.

    With `weighted=True` each call needs `weight`, a real scalar >= 0, such as the number of tokens
    over which this gradient is the mean. The step uses sum(weight * gradient) / sum(weight). A
    gradient of weight 0 is left out, even if it is NaN; if all have weight 0, no step is taken and
    the next sum begins. The state's `accumulated_weight` is the sum of the weights, in float32.

    `last`, a bool, takes the step with this gradient if it is True, however few came before, as at
    the end of an epoch. With `weighted=True`, `weight=0, last=True` and gradients of zero take the
    step where no gradient is left.

    `make_step` runs the cheap program that adds, or the one that steps; it can choose if `last` is
    a Python bool, and runs the second if it is an array. `update` inside a program of your own
    computes both and selects: every micro-batch moves the memory of a whole step.

    A leaf without a gradient in the last micro-batch takes no step, and its sum is dropped. `every`
    may change in the middle of a sum, which is divided by the number of gradients in it;
    `weighted` between two sums.

    Around `skip_nonfinite(...)` a bad gradient spoils its whole sum, and that step is skipped;
    inside `skip_nonfinite` only the bad micro-batch is left out, and its `last` with it.

    Attributes:
        tx: the whole optimizer, an adamx or Optax transformation.
        every: how many gradients make a step, >= 1; with `last` the most.
        weighted: whether each gradient comes with a weight.

    Raises:
        TypeError: if `tx` is not a transformation; at `update`, if `weight` is not a real scalar or
            `last` not a bool.
        ValueError: if `every` is not a whole number >= 1; at `update`, if `weight` is missing, or
            is given without `weighted=True`.

    Example:
        >>> import adamx, jax.numpy as jnp
        >>> tx = accumulate(adamx.sgd(0.5), every=2)
        >>> w = jnp.array([1.0])
        >>> step, state = adamx.make_step(tx), tx.init(w)
        >>> w, state = step(w, state, jnp.array([4.0]))
        >>> w, state["accumulated"]
        (Array([1.], dtype=float32), Array([4.], dtype=float32))
        >>> w, state = step(w, state, jnp.array([2.0]))
        >>> w, int(state["count"])
        (Array([-0.5], dtype=float32), 1)

        The mean over 30 tokens and over 10 in one step, (30 * 4 + 10 * 8) / 40 = 5:

        >>> tx, w = accumulate(adamx.sgd(1.0), every=4, weighted=True), jnp.array([1.0])
        >>> step, state = adamx.make_step(tx), tx.init(w)
        >>> w, state = step(w, state, jnp.array([4.0]), weight=30, last=False)
        >>> w, state = step(w, state, jnp.array([8.0]), weight=10, last=True)
        >>> w, int(state["count"])
        (Array([-4.], dtype=float32), 1)
    """

    every: int
    weighted: bool = False

    measures_norm = False  # pyright: ignore  # that of a mean, not of the gradient that comes in

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.every, numbers.Integral) and self.every >= 1):
            raise ValueError(f"accumulate: every must be a whole number >= 1, got {self.every!r}")
        self._set(every=int(self.every))

    def slots(self, param: jax.Array) -> Slots:
        return {SUM: zeros(param)}

    def start(self) -> State:
        weights = {WEIGHTS: jnp.zeros([], jnp.float32)} if self.weighted else {}
        return {MICRO: jnp.zeros([], jnp.int32)} | weights

    def update_tree(self, leaves: Leaves, step: Step) -> tuple[Leaves, State]:
        total, weights = _added(self.weighted, leaves, step)
        added = errors.counter(step.state, MICRO) + 1
        full = (added >= self.every) | _asked(step.extra)
        divisor = weights.get(WEIGHTS, added)
        mean = [
            None if u is None else _share(a, divisor)
            for u, a in zip(leaves.values, total, strict=True)
        ]
        rest = {name: x for name, x in step.extra.items() if name not in (WEIGHT, LAST)}
        inside = dataclasses.replace(step.only_if(full & (divisor != 0)), extra=rest)
        out, entries = self.run(leaves.with_values(mean), inside)
        number = step.select(jnp.where(full, 0, added), added - 1)
        return out, entries | {SUM: leaves.tree(total), MICRO: number} | weights

    def between(self) -> Between | None:
        if self.every == 1:
            return None
        return Between(_add(self.weighted), MICRO, self.every, moves=False, ended_by=LAST)

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        kind = "weighted mean" if self.weighted else "mean"
        symbols.remark(f"g_t: the {kind} of {self.every} gradients")
        return super().formula(u, symbols)


class _add(Transformation):
    """Between two steps: add a gradient to the sum; no parameter moves."""

    weighted: bool

    def tree_names(self) -> tuple[str, ...]:
        return (SUM,)

    def state_names(self) -> tuple[str, ...]:
        return (SUM, MICRO, WEIGHTS) if self.weighted else (SUM, MICRO)

    def update_tree(self, leaves: Leaves, step: Step) -> tuple[Leaves, State]:
        number = errors.counter(step.state, MICRO)
        total, weights = _added(self.weighted, leaves, step)
        own = {SUM: leaves.tree(total), MICRO: step.select(number + 1, number)} | weights
        return leaves.with_values([None] * len(leaves.paths)), {"count": step.count - 1} | own


def _share(total: jax.Array, divisor: jax.Array) -> jax.Array:
    """Return total / divisor as a product, since XLA would store a quotient before using it."""
    divisor = jnp.where(divisor == 0, 1, divisor)  # there is no step, and its derivative is finite
    with real_times_complex(total.dtype):
        return (1 / divisor.astype(real_dtype(total.dtype))) * total


def _added(weighted: bool, leaves: Leaves, step: Step) -> tuple[list[Any], State]:
    """Return the sum so far with the updates added, leaf by leaf, and that of the weights."""
    before = leaves.column(SUM, errors.entry(step.state, SUM))
    first = errors.counter(step.state, MICRO) == 0
    weight = _weight(weighted, step.extra)
    total = list(before)
    for i, (path, u) in enumerate(zip(leaves.paths, leaves.values, strict=True)):
        if u is not None:
            slots = {} if before[i] is None else {SUM: before[i]}
            errors.check_slots(path, slots, {SUM: jax.eval_shape(zeros, u)})
        for a in jax.tree.leaves(before[i]):
            if not (isinstance(a, jax.Array | np.ndarray) and is_inexact(a)):
                raise TypeError(
                    f"adamx: leaf {path!r}: state[{SUM!r}] must be an array of floating numbers, "
                    f"got {errors.describe(a)}: is it the state that init returned?"
                )
        # a tree, if the gradients have None in the place of a whole branch
        total[i] = jax.tree.map(lambda a: jnp.where(first, 0, a), before[i])
        if u is not None:
            u = resharded_like(u.astype(total[i].dtype), total[i])
            total[i] = total[i] + _times(weight, u)
    if weight is None:
        return step.select(total, before), {}
    weights = errors.scalar(step.state, WEIGHTS)
    new = jnp.where(first, 0, weights) + weight
    return step.select(total, before), {WEIGHTS: step.select(new, weights)}


def _times(weight: jax.Array | None, u: jax.Array) -> jax.Array:
    """Return weight * u, and 0 for a weight of 0, whatever u is."""
    if weight is None:
        return u
    with real_times_complex(u.dtype):
        return jnp.where(weight == 0, 0, weight.astype(real_dtype(u.dtype)) * u)


def _weight(weighted: bool, extra: Mapping[str, Any]) -> jax.Array | None:
    """Return the gradient's weight in float32; None if all weigh the same."""
    weight = extra.get(WEIGHT)
    if not weighted:
        if weight is None:
            return None
        raise ValueError(
            "accumulate: got a weight, which needs an entry in the state: "
            "accumulate(tx, every, weighted=True)"
        )
    if weight is None:
        raise ValueError(
            "accumulate: weighted=True needs the weight of each gradient, such as the number of "
            "its tokens: update(grads, state, params, weight=tokens)"
        )
    if jnp.shape(weight) or jnp.iscomplexobj(weight):
        raise TypeError(
            "accumulate: weight must be a real scalar, one for the whole gradient, got "
            f"{errors.describe(weight)}"
        )
    return jnp.asarray(weight).astype(jnp.float32)


def _asked(extra: Mapping[str, Any]) -> jax.Array:
    """Say whether the caller asks for a step."""
    last = jnp.asarray(extra.get(LAST, False))
    if last.shape or last.dtype != bool:
        raise TypeError(f"accumulate: last must be a bool, got {errors.describe(last)}")
    return last
