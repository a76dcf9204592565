"""Wrappers around a whole optimizer: the base of `skip_nonfinite`, `accumulate` and the others.

    (u'_t, state_t) = around(optimizer)(g_t, state_{t-1})

A wrapper sees the whole tree, before and after the optimizer inside it. Its own entries are in the
same flat state: slots for each leaf (`slots`), and others (`start`).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import optax

from adamx.core import errors, lifting
from adamx.core.checks import ranges_of
from adamx.core.concept import Slots, disjoint
from adamx.core.foreign import as_concept
from adamx.core.kernel import slots_like
from adamx.core.leaves import Leaves
from adamx.core.lifting import Between, State
from adamx.core.step import Step
from adamx.core.transformation import Transformation
from adamx.formula.expressions import Expr
from adamx.formula.symbols import Symbols


class Wrapper(Transformation):
    """The base of all wrappers around a whole optimizer: subclass it and define `update_tree`.

    A subclass may also define `slots(param)` (arrays kept for each leaf, as for a concept),
    `start()` (other entries of the state) and `between()` (a cheaper program for the calls between
    two full steps). Where the optimizer inside does not get the updates that come in, it says
    `measures_norm = False`.

    Attributes:
        tx: the whole optimizer, an adamx or Optax transformation.

    Raises:
        TypeError: if `tx` is not a transformation.

    Example:
        No step before the third call:

        >>> import adamx, jax.numpy as jnp
        >>> class patient(adamx.Wrapper):
        ...     def start(self):
        ...         return {"calls": jnp.zeros([], jnp.int32)}
        ...     def update_tree(self, leaves, step):
        ...         calls = step.state["calls"] + 1
        ...         leaves, entries = self.run(leaves, step.only_if(calls >= 3))
        ...         return leaves, entries | {"calls": calls}
        >>> tx, w = patient(adamx.sgd(0.5)), jnp.zeros(1)
        >>> state = tx.init(w)
        >>> for _ in range(3):
        ...     updates, state = tx.update(jnp.ones(1), state)
        ...     w = w + updates
        >>> w, int(state["count"])
        (Array([-0.5], dtype=float32), 1)
    """

    tx: optax.GradientTransformation

    place = "outermost"

    def __post_init__(self) -> None:
        self._set(tx=as_concept(self.tx, f"{type(self).__name__}: tx"))

    @classmethod
    def check_argument(cls, name: str, value: Any) -> None:
        if name in ranges_of(cls):  # `as_concept` checks the transformation
            ranges_of(cls)[name].check(cls.__name__, name, value)

    @property
    def inner(self) -> Transformation:
        """The optimizer inside."""
        return self.children[0]

    @property
    def any_shapes(self) -> bool:  # pyright: ignore
        return self.inner.segments()[0].any_shapes

    def slots(self, param: jax.Array) -> Slots:
        """Return the start values of the wrapper's own slots for one leaf."""
        return {}

    def start(self) -> State:
        """Return the start values of its other entries: by name, each an array or any pytree."""
        return {}

    def update_tree(self, leaves: Leaves, step: Step) -> tuple[Leaves, State]:
        """Return the outgoing leaves, and the state's entries of the optimizer inside and its own.

        Args:
            leaves: the updates (`values`) and parameters (`params`), in lists parallel to `paths`.
            step: the step; the optimizer inside skips `step.only_if(condition)` if that is False.
        """
        return self.run(leaves, step)

    def run(self, leaves: Leaves, step: Step) -> tuple[Leaves, State]:
        """Run the optimizer inside; its entries include the count of the steps taken."""
        leaves, entries = lifting.run(self.inner, leaves, step)
        return leaves, {"count": step.select(step.count, step.count - 1)} | entries

    def own(self, leaves: Leaves, step: Step) -> dict[str, list[Any]]:
        """Return the wrapper's own slots in the state, by name, in lists parallel to the leaves.

        Raises:
            ValueError: if they are not in the state, or not like their start values.
        """
        found = {
            name: leaves.column(name, errors.entry(step.state, name)) for name in self.slot_names()
        }
        start = slots_like(self)
        for i, (path, like) in enumerate(zip(leaves.paths, leaves.like(), strict=True)):
            if leaves.values[i] is not None:
                slots = {name: x[i] for name, x in found.items() if x[i] is not None}
                errors.check_slots(path, slots, start(like))
        return found

    def inner_between(self) -> Between | None:
        """Return the inner optimizer's program between two full steps, inside this wrapper.

        A wrapper may return it as its own `between` if its `update_tree` gives the same for updates
        that are None, without parameters, as for updates of zero.
        """
        found = self.inner.between()
        return found and found.inside(self)

    def tree_names(self) -> tuple[str, ...]:
        return (*self.inner.tree_names(), *self.slot_names())

    def state_names(self) -> tuple[str, ...]:
        return (*self.inner.state_names(), *self.slot_names(), *self._start_names)

    @functools.cached_property
    def _start_names(self) -> tuple[str, ...]:
        return tuple(jax.eval_shape(self.start))

    def init_tree(self, leaves: Leaves) -> State:
        entries = (segment.init_tree(leaves) for segment in self.inner.segments())
        return disjoint(*entries, self.first_slots(leaves), self.start())

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        return self.inner.formula(u, symbols)
