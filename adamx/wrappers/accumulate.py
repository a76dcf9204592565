"""Micro-batches: one step of the optimizer for the mean of several gradients.

    a_1 = g_1,    a_k = a_{k-1} + g_k,    and the optimizer takes a step with a_k / k at k = every

If the gradients are means over equally large micro-batches, this is the step of the large batch.
The sum is kept in one slot in float32 (float64 for float64 gradients). `make_step` chooses between
two compiled programs, one that adds and one that steps, so between its steps the optimizer's own
slots are neither read nor written. Setting the sum to zero after a step would be one more pass over
the memory; instead the next gradient overwrites it.
"""

from __future__ import annotations

import numbers
from typing import Any

import jax
import jax.numpy as jnp

from adamx.core import errors
from adamx.core.arithmetic import real_dtype, real_times_complex, zeros
from adamx.core.concept import Slots
from adamx.core.lifting import Between, Leaves, State
from adamx.core.step import Step
from adamx.core.transformation import Transformation
from adamx.core.wrapper import Wrapper
from adamx.formula.expressions import Expr
from adamx.formula.symbols import Symbols

SUM, MICRO = "accumulated", "micro_step"


class accumulate(Wrapper):
    """Let an optimizer take one step for the mean of `every` gradients.

    The state's `count`, and with it schedules and bias corrections, counts the optimizer's steps;
    `micro_step` (int32) the gradients since the last. Between steps the updates are zero.

    `make_step` runs the cheap program that adds, or the one that steps. `update` inside a program
    of your own computes both and selects: every micro-batch moves the memory of a whole step.

    A leaf without a gradient in the last micro-batch takes no step, and its sum is dropped. `every`
    may change in the middle of a sum, which is divided by the number of gradients in it.

    Around `skip_nonfinite(...)` a bad gradient spoils its whole sum, and that step is skipped;
    inside `skip_nonfinite` only the bad micro-batch is left out.

    Attributes:
        tx: the whole optimizer, an adamx or Optax transformation.
        every: how many gradients make a step, >= 1.

    Raises:
        TypeError: if `tx` is not a transformation.
        ValueError: if `every` is not a whole number >= 1.

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
    """

    every: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.every, numbers.Integral) and self.every >= 1):
            raise ValueError(f"accumulate: every must be a whole number >= 1, got {self.every!r}")
        self._set(every=int(self.every))

    def slots(self, param: jax.Array) -> Slots:
        return {SUM: zeros(param)}

    def start(self) -> State:
        return {MICRO: jnp.zeros([], jnp.int32)}

    def update_tree(self, leaves: Leaves, step: Step) -> tuple[Leaves, State]:
        total = _added(leaves, step)
        added = errors.counter(step.state, MICRO) + 1
        full = added >= self.every
        mean = [
            None if u is None else _share(a, added)
            for u, a in zip(leaves.values, total, strict=True)
        ]
        inside, entries = self.run(leaves.with_values(mean), step.only_if(full))
        number = step.select(jnp.where(full, 0, added), added - 1)
        return inside, entries | {SUM: leaves.tree(total), MICRO: number}

    def between(self) -> Between | None:
        return Between(_add(), MICRO, self.every, moves=False) if self.every > 1 else None

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        symbols.remark(f"g_t: the mean of {self.every} gradients")
        return super().formula(u, symbols)


class _add(Transformation):
    """Between two steps: add a gradient to the sum; no parameter moves."""

    def tree_names(self) -> tuple[str, ...]:
        return (SUM,)

    def state_names(self) -> tuple[str, ...]:
        return (SUM, MICRO)

    def update_tree(self, leaves: Leaves, step: Step) -> tuple[Leaves, State]:
        number = errors.counter(step.state, MICRO)
        own = {SUM: leaves.tree(_added(leaves, step)), MICRO: step.select(number + 1, number)}
        return leaves.with_values([None] * len(leaves.paths)), {"count": step.count - 1} | own


def _share(total: jax.Array, number: jax.Array) -> jax.Array:
    """Return total / number as a product, since XLA would store a quotient before using it."""
    with real_times_complex(total.dtype):
        return (1 / number.astype(real_dtype(total.dtype))) * total


def _added(leaves: Leaves, step: Step) -> list[Any]:
    """Return the sum so far with the updates added, leaf by leaf."""
    before = leaves.column(SUM, errors.entry(step.state, SUM))
    first = errors.counter(step.state, MICRO) == 0
    total = list(before)
    for i, (path, u) in enumerate(zip(leaves.paths, leaves.values, strict=True)):
        # a tree, if the gradients have None in the place of a whole branch
        total[i] = jax.tree.map(lambda a: jnp.where(first, 0, a), before[i])
        if u is not None:
            slots = {} if before[i] is None else {SUM: before[i]}
            errors.check_slots(path, slots, {SUM: jax.eval_shape(zeros, u)})
            total[i] = total[i] + u.astype(total[i].dtype)
    return step.select(total, before)
