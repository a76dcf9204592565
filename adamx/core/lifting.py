"""From one array to any pytree: `init` and `update`, the state, the kernels.

    state = {"count": t, <recorded scalar>: value, ..., <slot>: tree of that slot, ...}

Only if leaves began late, the state has one more entry, by the paths of these leaves:

    "began": {path: {"count": the count at which it began, <recorded scalar>: its own value, ...}}

A transformation consists of `segments()`: runs of leafwise concepts, and stages that act on the
whole tree. A run becomes one kernel: a function of one leaf, traced once for each (shape, dtype)
whatever the number of leaves. Values common to all leaves (1 - b^t, the learning rate) are computed
once per step, outside the kernels.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from adamx.core import errors
from adamx.core.arithmetic import (
    placed_like,
)
from adamx.core.concept import (
    Concept,
    Slots,
    all_adjustables,
    any_of,
    disjoint,
    first_recorded,
    held,
    hook,
    recorded,
)
from adamx.core.kernel import Now, Variant
from adamx.core.leaves import Leaves, completed, take_apart
from adamx.core.paths import leaves_by_path
from adamx.core.precision_warning import warn_of_rounding
from adamx.core.shard import check_alike
from adamx.core.step import Step
from adamx.core.value import as_pytree
from adamx.formula.adjustable import adjustable

State = dict[str, Any]

BEGAN = "began"
"""The state's entry for the leaves that began late."""

_MANY_LEAVES = 64  # one trace, or one compilation, for each shape costs some hundred calls
_MAX_COUNT = np.iinfo(np.int32).max


# ------------------------------------------------------------------------------ the whole program


class Between(NamedTuple):
    """The cheaper program that replaces a transformation in the calls between two full steps.

    Attributes:
        tx: the cheap transformation. It needs only those entries of the state that it names.
        counter: the entry of the state that counts the calls since the last full step.
        every: the value of the counter at which the next full step is due.
        moves: whether it moves the parameters; False means that its updates are None.
        always_counts: whether each call raises the counter; False if a step may be skipped.
        ended_by: an extra argument of `update`, a bool, that makes the next full step due.
        full: the same transformation with every step a full one, where a full step differs only in
            the counter and in entries of the state that `tx` does not have. A program of its own
            computes these, without a branch, and `tx` the rest. None: one program does both.
    """

    tx: Stage
    counter: str
    every: int
    moves: bool = True
    always_counts: bool = True
    ended_by: str = ""
    full: Stage | None = None

    def inside(self, outer: Stage) -> Between:
        """Return these programs inside a transformation that has one child."""
        full = self.full and outer.with_children([self.full])
        return self._replace(tx=outer.with_children([self.tx]), full=full)


class Stage(Concept):
    """A concept applied to a tree; transformations of whole trees override some of this."""

    any_shapes = False  # whether it takes updates of other shapes than the parameters'

    def segments(self) -> list[Any]:
        """Return the parts that run one after the other over the whole tree."""
        return [self]

    def tree_names(self) -> tuple[str, ...]:
        """Return the names of the state's entries that are trees like the parameters."""
        return self.slot_names()

    def state_names(self) -> tuple[str, ...]:
        """Return the names of this transformation's entries in the state, `count` aside."""
        return (*self.tree_names(), *self.recorded_names, *all_adjustables(self))

    @property
    def leafwise(self) -> bool:
        """Whether a leaf's update depends on that leaf alone, so that it may be used anywhere."""
        over_the_tree = type(self).update_tree is not Stage.update_tree
        if over_the_tree or self.overrides("tree_scalars"):
            return False
        return all(child.leafwise for child in self.children)

    def between(self) -> Between | None:
        """Return the program between two full steps; None if every step is a full one."""
        return None

    def init_tree(self, leaves: Leaves) -> State:
        """Return this segment's entries of the state: a tree for each slot, recorded scalars.

        Args:
            leaves: the parameters, in `values`.
        """
        present = [p for p in leaves.values if p is not None]
        if any_of(self, lambda concept: concept.takes_steps):
            warn_of_rounding(present)
        return disjoint(
            self.first_slots(leaves), first_recorded(self, present), all_adjustables(self)
        )

    def first_slots(self, leaves: Leaves) -> State:
        """Return the slots' start values: by name, a tree each."""
        columns: dict[str, list[Any]] = {n: [None] * len(leaves.paths) for n in self.slot_names()}
        varies = any_of(self, lambda concept: concept.overrides("for_leaf"))
        start = _slots if is_concrete(leaves.values) else _placed_slots
        if len(leaves.paths) > _MANY_LEAVES:
            start = _once_a_shape[start]
        whole = leaves.whole()
        for i, (path, param) in enumerate(zip(leaves.paths, leaves.values, strict=True)):
            if param is not None and columns:
                concept: Any = hook(self, "for_leaf", path, whole[i]) if varies else self
                for name, value in start(as_pytree(concept), param).items():
                    if name not in columns:
                        raise ValueError(
                            f"{type(concept).__name__}.slots: started {name!r} for leaf {path!r}, "
                            f"but the names of the slots are {sorted(columns)}: define slot_names"
                        )
                    columns[name][i] = value
        return {name: leaves.tree(column) for name, column in columns.items()}

    def update_tree(self, leaves: Leaves, step: Step) -> tuple[Leaves, State]:
        """Run this segment: by default one kernel for each leaf.

        Args:
            leaves: the updates; None stays None and keeps its slots.
            step: the step.

        Returns:
            The new leaves, in compute dtype, and this segment's entries of the state.
        """
        names = self.slot_names()
        columns = {name: leaves.column(name, errors.entry(step.state, name)) for name in names}
        pairs = [(u, s) for u, s in zip(leaves.values, leaves.shards, strict=True) if u is not None]
        present = [u for u, _ in pairs]
        step = dataclasses.replace(step, shards=tuple(s for _, s in pairs))
        varies = any_of(self, lambda concept: concept.overrides("for_leaf"))
        now, arrays = Now(step, present, {}, {}), leaves.whole()
        whole = Variant(self, now)
        late, began = self._late(leaves, now)
        kernels: dict[Any, Any] = {}
        # equal variants share a kernel; most are the same object, found by its id
        variants: dict[Stage, Variant] = {self: whole}
        seen, alive = {id(self): whole}, [self]
        out = list(leaves.values)
        for i, (path, like) in enumerate(zip(leaves.paths, leaves.like(), strict=True)):
            if out[i] is None:
                continue
            own: Any = hook(self, "for_leaf", path, arrays[i]) if varies else self
            if path not in late and id(own) not in seen:
                if own not in variants:
                    variants[own] = Variant(own, now)
                seen[id(own)] = variants[own]
                alive.append(own)
            variant = Variant(own, late[path], kernels) if path in late else seen[id(own)]
            slots = {name: columns[name][i] for name in names if columns[name][i] is not None}
            errors.check_slots(path, slots, variant.slots_like(like))
            param = None if leaves.params is None else leaves.params[i]
            out[i], new = variant.kernel(out[i], slots, param, leaves.came[i], leaves.shards[i])
            for name, value in new.items():
                columns[name][i] = value
        entries = {name: leaves.tree(column) for name, column in columns.items()}
        scalars = _recorded_in(step, recorded(self, whole.scalars))
        kept = {name: held(value, step.state) for name, value in all_adjustables(self).items()}
        return leaves.with_values(out), entries | kept | scalars | began

    def _late(self, leaves: Leaves, now: Now) -> tuple[dict[str, Now], State]:
        """Return the step as each leaf sees it that began late, and the entry for these leaves."""
        entry, late = errors.beginnings(now.step.state, BEGAN), {}
        for path in (path for path in leaves.paths if path in entry):
            here = now._replace(step=now.step.since(entry[path]), known={})
            own = recorded(self, here.scalars(self))
            own = {name: x for name, x in own.items() if name in entry[path]}
            entry[path] |= _recorded_in(here.step, own)
            late[path] = here
        return late, {BEGAN: entry} if entry else {}


def _recorded_in(step: Step, scalars: Slots) -> Slots:
    """Return recorded scalars in the dtypes of the state, where a skipped step keeps the old."""
    before = {name: errors.entry(step.state, name) for name in scalars}
    for name, x in scalars.items():  # the dtype stays, also with wider gradients
        errors.check_recorded(name, before[name], x)
        check_alike(name, before[name], x)
        scalars[name] = x.astype(jnp.result_type(before[name]))
    return step.in_place_of(before, scalars)


def init(tx: Stage, params: Any) -> State:
    """Return the state before the first step; see `Transformation.init`."""
    leaves = take_apart(params, None)
    segments = hook(tx, "for_tree", params).segments()
    entries = disjoint(*(segment.init_tree(leaves) for segment in segments))
    if any_of(tx, lambda concept: bool(concept.adjustables)):
        entries = jax.tree.map(lambda x: x.first() if isinstance(x, adjustable) else x, entries)
    return {"count": jnp.zeros([], jnp.int32)} | entries


def update(
    tx: Stage, updates: Any, state: State, params: Any, extra: Mapping[str, Any], wide: bool = False
) -> tuple[Any, State]:
    """Return (outgoing updates, new state); see `Transformation.update`.

    With `wide` the updates stay in compute dtype, for a caller that rounds them itself.
    """
    errors.check_state(state)
    shaped_alike = (state[name] for name in tx.tree_names() if name in state)
    whole = completed(updates, next(shaped_alike, None) if params is None else params)
    leaves = take_apart(whole, params)
    if wide:
        leaves = dataclasses.replace(leaves, emit=[None] * len(leaves.paths))
    tx = hook(tx, "for_tree", leaves.tree(leaves.like()))
    errors.check_beginnings(state, BEGAN, leaves.paths)
    count = jnp.minimum(state["count"], _MAX_COUNT - 1) + 1
    step = Step(count=count, state=state | {"count": count}, extra=extra)
    leaves, entries = run(tx, leaves, step)
    kept = {BEGAN: state[BEGAN]} if BEGAN in state else {}  # unless a segment has changed it
    new = {"count": count} | kept | entries
    errors.check_names(state, new)
    out, none = leaves.tree(leaves.narrowed().values), lambda x: x is None
    if whole is not updates:  # one None for a branch again
        out = jax.tree.map(lambda u, x: u if u is None else x, updates, out, is_leaf=none)
    return out, state | new


def age(state: Mapping[str, Any], path: str) -> Any:
    """Return the number of steps that a leaf has taken since it began.

    Args:
        state: the whole state.
        path: the leaf's path.
    """
    own = state.get(BEGAN, {}).get(path)
    return state["count"] if own is None else state["count"] - own["count"]


def beginnings(tx: Stage, params: Any, paths: Sequence[str], count: Any) -> State:
    """Return the entries of leaves that begin at a count, by path; each has arrays of its own."""
    bound, found = tx.for_tree(params), leaves_by_path(params)
    return {
        path: {"count": jnp.array(count, jnp.int32)} | bound.beginning(path, found[path])
        for path in paths
    }


def run(tx: Stage, leaves: Leaves, step: Step) -> tuple[Leaves, State]:
    """Run the segments of a transformation one after the other.

    Args:
        tx: the transformation, after `for_tree`.
        leaves: the updates.
        step: the step.

    Returns:
        The new leaves, and the segments' entries of the state.

    Raises:
        ValueError: if an update has another shape than its parameter where a concept reads it.
    """
    new: State = {}
    for segment in tx.segments():
        if not segment.any_shapes:
            leaves.check_shapes()
        here = dataclasses.replace(step, state={**step.state, **new})
        leaves, entries = hook(segment, "update_tree", leaves, here)
        new |= entries
    leaves.check_shapes()
    return leaves, new


def _slots(tree: as_pytree, param: jax.Array) -> Slots:
    return hook(tree.tx, "slots", param)


def _placed_slots(tree: as_pytree, param: jax.Array) -> Slots:
    return {name: placed_like(x, param) for name, x in _slots(tree, param).items()}


_once_a_shape = {start: jax.jit(start) for start in (_slots, _placed_slots)}


def is_concrete(*trees: Any) -> bool:
    """Say whether every leaf is an array or a number, so that jit can take the trees."""
    leaves = jax.tree.leaves(trees)
    kinds = set(map(type, leaves))
    if not all(issubclass(kind, _CONCRETE) and not issubclass(kind, Tracer) for kind in kinds):
        return False
    return np.ndarray not in kinds or all(
        errors.is_of_jax(x.dtype) for x in leaves if isinstance(x, np.ndarray)
    )


def on_many_devices(tree: Any) -> bool:
    """Say whether an array of the tree is on more than one device."""
    return any(len(x.devices()) > 1 for x in jax.tree.leaves(tree) if isinstance(x, jax.Array))


def committed_with(params: Any, state: Any) -> Any:
    """Return a state committed to the devices of its parameters, if those are committed.

    A step returns all arrays committed as soon as one of its arguments is. A count or a rate that
    is not would have the second step compiled anew, since JAX compiles for where arrays lie.
    """
    arrays = [x for x in jax.tree.leaves(params) if is_committed(x)]
    if not arrays:
        return state
    where = arrays[0].sharding
    if isinstance(where, NamedSharding):
        where = NamedSharding(where.mesh, PartitionSpec())
    elif len(where.device_set) == 1:
        where = SingleDeviceSharding(*where.device_set)
    stays = lambda x: isinstance(x, Tracer) or is_committed(x)  # noqa: E731
    return jax.tree.map(lambda x: x if stays(x) else jax.device_put(x, where), state)


def is_committed(x: Any) -> bool:
    """Say whether x is an array that JAX may not move to another device by itself."""
    return isinstance(x, jax.Array) and not isinstance(x, Tracer) and x.committed


_CONCRETE = (jax.Array, np.ndarray, np.generic, numbers.Number)
