"""Micro-batches: one step of the optimizer for the mean of several gradients.

    a_1 = g_1,    a_k = a_{k-1} + g_k,    and the optimizer's step takes a_k / k, at k = every

With gradients that are means over equally large micro-batches this is the step of the large batch.
The sum is kept in float32 (float64 where the gradient is), whatever the gradient's dtype, in one
slot; the optimizer's own slots are neither read nor written between its steps where `make_step`
chooses between two compiled programs, one that adds and one that steps. The sum is not set to zero
after a step, but overwritten by the next gradient: that would be one more pass over the memory.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adamx.core import errors, lifting
from adamx.core.arithmetic import real_dtype, real_times_complex, zeros
from adamx.core.expressions import Expr
from adamx.core.foreign import as_concept
from adamx.core.formula import Symbols
from adamx.core.lifting import Leaves, State
from adamx.core.step import Step
from adamx.core.transformation import Transformation

SUM, MICRO = "accumulated", "micro_step"


class accumulate(Transformation):
    """Let an optimizer take one step for the mean of `every` gradients.

    The state's `count`, and with it schedules and bias corrections, counts the optimizer's steps;
    `micro_step` (int32) the gradients since the last. Between steps the updates are zero.

    `make_step` runs the cheap program that adds, or the one that steps. `update` inside a program
    of your own holds both and selects: at every micro-batch it moves the memory of a whole step.

    A leaf without gradient in the last micro-batch takes no step, and its sum is dropped. `every`
    may be changed in the middle of a sum: it is divided by the number of gradients in it.

    Around `skip_nonfinite(...)` a bad gradient spoils its whole sum, and that step is skipped;
    inside it, a bad micro-batch alone is left out.

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

    tx: optax.GradientTransformation
    every: int

    holds_trees = True
    stands_alone = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "tx", as_concept(self.tx, "accumulate: tx"))
        if not (isinstance(self.every, numbers.Integral) and self.every >= 1):
            raise ValueError(f"accumulate: every must be a whole number >= 1, got {self.every!r}")
        object.__setattr__(self, "every", int(self.every))

    @property
    def leafwise(self) -> bool:
        return False

    def tree_names(self) -> tuple[str, ...]:
        return (*self.children[0].tree_names(), SUM)

    def state_names(self) -> tuple[str, ...]:
        return (*self.children[0].state_names(), SUM, MICRO)

    def init_tree(self, leaves: Leaves) -> State:
        entries = (segment.init_tree(leaves) for segment in self.children[0].segments())
        start = [None if p is None else zeros(p) for p in leaves.values]
        own = {SUM: leaves.tree(start), MICRO: jnp.zeros([], jnp.int32)}
        return lifting.disjoint(*entries, own)

    def update_tree(self, leaves: Leaves, step: Step, last: bool) -> tuple[Leaves, State]:
        total = _added(leaves, step)
        added = errors.counter(step.state, MICRO) + 1
        full = added >= self.every
        mean = [
            None if u is None else _share(a, added)
            for u, a in zip(leaves.values, total, strict=True)
        ]
        inner = step.only_if(full)
        inside = dataclasses.replace(leaves, values=mean)
        inside, entries = lifting.run(self.children[0], inside, inner, narrow=last)
        own = {SUM: leaves.tree(total), MICRO: step.kept(jnp.where(full, 0, added), added - 1)}
        return inside, lifting.counted(entries, inner) | own

    def add(self, kept: State, updates: Any) -> State:
        """Return the two entries of the state, `accumulated` and `micro_step`, one gradient on."""
        leaves = lifting.take_apart(updates, None)
        step = Step(count=kept[MICRO], state=kept)
        return {SUM: leaves.tree(_added(leaves, step)), MICRO: kept[MICRO] + 1}

    def reveal_tree(self, state: Mapping[str, Any]) -> State:
        entries = (s.reveal_tree(state) for s in self.children[0].segments())
        return lifting.disjoint(*entries, {SUM: errors.entry(state, SUM)})

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        symbols.remark(f"g_t: the mean of {self.every} gradients")
        return self.children[0].formula(u, symbols)


def _share(total: jax.Array, number: jax.Array) -> jax.Array:
    """Return total / number, as a product: a quotient would be stored before it is used."""
    with real_times_complex(total.dtype):
        return (1 / number.astype(real_dtype(total.dtype))) * total


def _added(leaves: Leaves, step: Step) -> list[Any]:
    """Return the sum so far with the updates added, leaf by leaf."""
    kept = errors.beside(leaves.treedef, SUM, errors.entry(step.state, SUM), leaves.values)
    first = errors.counter(step.state, MICRO) == 0
    total = list(kept)
    for i, (path, u) in enumerate(zip(leaves.paths, leaves.values, strict=True)):
        # a tree, where one None stands for a whole branch of the gradients
        total[i] = jax.tree.map(lambda a: jnp.where(first, 0, a), kept[i])
        if u is not None:
            slots = {} if kept[i] is None else {SUM: kept[i]}
            errors.check_slots(path, slots, {SUM: jax.eval_shape(zeros, u)})
            total[i] = total[i] + u.astype(total[i].dtype)
    return step.kept(total, kept)
