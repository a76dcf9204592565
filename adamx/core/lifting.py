"""From one array to any pytree: `init` and `update`, the state, the kernels.

    state = {"count": t, <recorded scalar>: value, ..., <slot>: tree of that slot, ...}

A transformation gives its `segments()`: runs of leafwise concepts, with foreign transformations
between them. A run is one kernel: the function of one leaf, traced once for each (shape, dtype)
whatever the number of leaves. What is the same for all leaves (1 - b^t, the learning rate) is
computed once a step, outside the kernels.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from adamx.core import errors
from adamx.core.arithmetic import (
    compute_dtype,
    is_inexact,
    placed_like,
    real_times_complex,
    widen,
)
from adamx.core.paths import flatten
from adamx.core.step import Step

if TYPE_CHECKING:
    from adamx.core.transformation import Transformation

Result = TypeVar("Result")
State = dict[str, Any]
Slots = dict[str, jax.Array]
Start = Callable[["Transformation", str, Slots], Slots]
Prepared = tuple[Any, tuple[Any, ...]]  # a concept's own scalars, and its children's

_MAX_COUNT = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class Leaves:
    """A tree of updates taken apart; the lists are parallel and hold None where the tree does.

    Attributes:
        paths: each leaf's place in the tree, such as "dense/kernel".
        values: the updates: in emit dtype at first, in compute dtype between segments.
        params: the parameters, or None where `update` was called without.
        dtypes: the emit dtypes.
        treedef: what puts a list together again.
        start: makes what `init` gives a leaf from its concept, its path and the concept's own start
            values; None leaves these.
    """

    paths: list[str]
    values: list[Any]
    params: list[Any] | None
    dtypes: list[Any]
    treedef: Any
    start: Start | None = None

    def tree(self, values: list[Any]) -> Any:
        """Put a parallel list together again."""
        return self.treedef.unflatten(values)

    def params_tree(self) -> Any:
        """Put the parameters together, with None where there is no update, if there are any."""
        return None if self.params is None else self.tree(self.params)

    def like(self) -> list[Any]:
        """Return the parameters where there are any, the updates otherwise."""
        return self.values if self.params is None else self.params


def take_apart(updates: Any, params: Any) -> Leaves:
    """Flatten the updates, and the parameters beside them; raise where they do not fit."""
    paths, given, treedef = flatten(updates)
    values = [
        None if u is None else errors.floating(path, u)
        for path, u in zip(paths, given, strict=True)
    ]
    beside = None
    if params is not None:
        beside = errors.beside(treedef, "params", params, values)
        beside = [
            None if u is None else errors.fitting(path, u, p)
            for path, u, p in zip(paths, values, beside, strict=True)
        ]
    dtypes = [None if u is None else u.dtype for u in values]
    return Leaves(paths, values, beside, dtypes, treedef)


def disjoint(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Merge dictionaries that must have no name in common."""
    merged: dict[str, Any] = {}
    for part in parts:
        errors.check_disjoint(merged, part)
        merged |= part
    return merged


# ------------------------------------------------------------------------------ the whole program


def init(tx: Transformation, params: Any, start: Start | None = None) -> State:
    """Return the state before the first step; see `Transformation.init`, and `Leaves` for start."""
    leaves = dataclasses.replace(take_apart(params, None), start=start)
    tx = tx.resolve(params)
    entries = disjoint(*(segment.init_tree(leaves) for segment in tx.segments()))
    for name in tx.tree_names():
        column = leaves.treedef.flatten_up_to(entries[name])
        pairs = zip(column, leaves.values, strict=True)
        entries[name] = leaves.tree([x if x is None else placed_like(x, p) for x, p in pairs])
    return {"count": jnp.zeros([], jnp.int32)} | entries


def update(
    tx: Transformation,
    updates: Any,
    state: State,
    params: Any,
    extra: Mapping[str, Any],
    narrow: bool = True,
) -> tuple[Any, State]:
    """Return (outgoing updates, new state); see `Transformation.update`, and `run` for narrow."""
    errors.check_state(state)
    leaves = take_apart(updates, params)
    tx = tx.resolve(leaves.tree(leaves.like()))
    count = jnp.minimum(state["count"], _MAX_COUNT - 1) + 1
    step = Step(count=count, state=state | {"count": count}, extra=extra)
    leaves, entries = run(tx, leaves, step, narrow)
    new = {"count": count} | entries
    errors.check_names(state, new)
    return leaves.tree(leaves.values), {name: new[name] for name in state}


def run(tx: Transformation, leaves: Leaves, step: Step, narrow: bool) -> tuple[Leaves, State]:
    """Run the segments of a transformation one after the other.

    Args:
        tx: the transformation, with what depends on the whole tree settled.
        leaves: the updates.
        step: the step, without what belongs to one concept or leaf.
        narrow: whether the updates leave in their emit dtypes; else in compute dtype.

    Returns:
        The new leaves, and the entries of the state that the segments own.
    """
    new: State = {}
    segments = tx.segments()
    for number, segment in enumerate(segments):
        last = narrow and (number + 1 == len(segments) or segments[number + 1].is_foreign)
        here = dataclasses.replace(step, state={**step.state, **new})
        leaves, entries = segment.update_tree(leaves, here, last)
        new |= entries
    return leaves, new


# --------------------------------------------------------------- one segment of leafwise concepts


def init_leaves(tx: Transformation, leaves: Leaves) -> State:
    """Return the entries of a leafwise segment: a tree for each slot, and recorded scalars."""
    columns: dict[str, list[Any]] = {name: [None] * len(leaves.paths) for name in slot_names(tx)}
    for i, (path, param) in enumerate(zip(leaves.paths, leaves.values, strict=True)):
        if param is not None:
            concept = tx.bind(path, param)
            first = concept.slots(param)
            if leaves.start:
                first = leaves.start(concept, path, first)
            for name, value in first.items():
                columns[name][i] = value
    present = [p for p in leaves.values if p is not None]
    slots = {name: leaves.tree(column) for name, column in columns.items()}
    return disjoint(slots, recorded_first(tx, present))


def update_leaves(
    tx: Transformation, leaves: Leaves, step: Step, last: bool
) -> tuple[Leaves, State]:
    """Run one kernel over the leaves; narrow to the emit dtypes where it is the last of its kind.

    Args:
        tx: the segment: a concept, or a chain of them.
        leaves: the updates; leaves that are None stay None, and their slots as they are.
        step: the step, without what belongs to one concept or leaf.
        last: whether the updates leave adamx here.

    Returns:
        The new leaves, and the entries of the state that this segment owns.
    """
    names = slot_names(tx)
    columns = {
        name: errors.beside(leaves.treedef, name, errors.entry(step.state, name), leaves.values)
        for name in names
    }
    present = [u for u in leaves.values if u is not None]
    binds = any_of(tx, lambda concept: concept.overrides("bind"))
    whole = Variant(tx, step, present)
    # equal variants share a kernel; most are the same object, which is found without comparing
    variants, seen, alive = {tx: whole}, {id(tx): whole}, [tx]
    out = list(leaves.values)
    for i, (path, like) in enumerate(zip(leaves.paths, leaves.like(), strict=True)):
        if out[i] is None:
            continue
        bound = tx.bind(path, like) if binds else tx
        if id(bound) not in seen:
            if bound not in variants:
                variants[bound] = Variant(bound, step, present)
            seen[id(bound)] = variants[bound]
            alive.append(bound)
        variant = seen[id(bound)]
        slots = {name: columns[name][i] for name in names if columns[name][i] is not None}
        errors.check_slots(path, slots, variant.slots_like(like))
        param = None if leaves.params is None else leaves.params[i]
        out[i], new = variant.kernel(out[i], slots, param, leaves.dtypes[i], last)
        for name, value in new.items():
            columns[name][i] = value
    entries = {name: leaves.tree(column) for name, column in columns.items()}
    scalars = recorded(tx, whole.prepared)
    before = {name: errors.entry(step.state, name) for name in scalars}
    for name, x in scalars.items():  # float64 gradients of float32 parameters change no dtype
        errors.check_recorded(name, before[name], x)
        scalars[name] = x.astype(jnp.result_type(before[name]))
    return dataclasses.replace(leaves, values=out), entries | step.kept(scalars, before)


def reveal_leaves(tx: Transformation, state: Mapping[str, Any]) -> State:
    """Return the slots of a leafwise segment as the formula sees them: a tree for each."""
    names = slot_names(tx)
    if not names:
        return {}
    kept = [errors.entry(state, name) for name in names]
    paths, _, treedef = flatten(kept[0])
    columns = [treedef.flatten_up_to(tree) for tree in kept]
    tx, revealed = tx.resolve(kept[0]), []
    for path, *values in zip(paths, *columns, strict=True):
        slots = {name: x for name, x in zip(names, values, strict=True) if x is not None}
        like = next(iter(slots.values()), None)
        revealed.append({} if like is None else tx.bind(path, like).reveal(slots))
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    return {
        name: treedef.unflatten([slots.get(name) for slots in revealed])
        for name in jax.eval_shape(lambda leaf: tx.reveal(tx.slots(leaf)), scalar)
    }


class Variant:
    """What the leaves that a concept is bound to alike share in one step.

    Attributes:
        kernel: the function of one leaf.
        prepared: the scalars of the step.
    """

    def __init__(self, tx: Transformation, step: Step, leaves: Sequence[jax.Array]) -> None:
        """Make the kernel, and compute the scalars from the step and the leaves."""
        self.prepared = prepare(tx, step, leaves)
        self.kernel = leaf_kernel(tx, step.count, step.taken, self.prepared)
        self._slots = functools.cache(
            lambda shape, dtype: jax.eval_shape(tx.slots, jax.ShapeDtypeStruct(shape, dtype))
        )

    def slots_like(self, param: jax.Array) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes of the slots that a parameter starts with."""
        return self._slots(param.shape, param.dtype)


def leaf_kernel(
    tx: Transformation, count: jax.Array, taken: jax.Array | None, prepared: Prepared
) -> Callable[..., tuple[jax.Array, Slots]]:
    """Return the function of one leaf: widen, accumulate, store, and emit from what was stored.

    In a step that is not taken what is stored is what was there: the memory is read and written as
    ever, which needs no copy, and what is emitted comes from the same slots.
    """

    @functools.partial(jax.jit, static_argnums=(3, 4))
    def kernel(
        u: jax.Array,
        slots: Slots,
        param: jax.Array | None,
        emit: Any,
        last: bool,
    ) -> tuple[jax.Array, Slots]:
        floating = [x for x in (u, param, *slots.values()) if x is not None and is_inexact(x)]
        compute = compute_dtype(*(x.dtype for x in floating))
        wide = functools.partial(widen, compute=compute)
        concept = jax.tree.map(wide, tx)
        scalars, inner = jax.tree.map(wide, prepared)
        u, param, old = jax.tree.map(wide, (u, param, slots))
        step = Step(
            count=count, scalars=scalars, inner=inner, old=old, param=param, dtype=emit, taken=taken
        )
        with real_times_complex(compute):
            new = concept.accumulate(u, old, step)
            errors.check_accumulated(concept, slots, new)
            new = {name: x.astype(slots[name].dtype) for name, x in new.items()}
            stored = slots | step.kept(new, {name: slots[name] for name in new})
            out = concept.emit(u, jax.tree.map(wide, stored), step)
        errors.check_emitted(concept, u, out)
        return step.emitted(out.astype(emit if last else compute)), stored

    return kernel


def counted(entries: State, step: Step) -> State:
    """Return a wrapper's entries, with the count of the steps that were taken among them."""
    return {"count": step.kept(step.count, step.count - 1)} | entries


def prepare(tx: Transformation, step: Step, leaves: Sequence[jax.Array] | None) -> Prepared:
    """Return the scalars of a concept and its children; the first child may read the leaves too."""
    if leaves is not None and tx.overrides("measure"):
        wide = [widen(u, compute_dtype(u.dtype)) for u in leaves]
        own = tx.measure(step, wide)
    else:
        own = tx.prepare(step)
    children = tx.children
    inner = [prepare(child, step, None if i else leaves) for i, child in enumerate(children)]
    return own, tuple(inner)


def recorded(tx: Transformation, prepared: Prepared) -> Slots:
    """Return the scalars that a concept and its children keep in the state."""
    own, inner = prepared
    children = zip(tx.children, inner, strict=True)
    return disjoint(_kept(tx, own), *(recorded(child, part) for child, part in children))


def recorded_first(tx: Transformation, leaves: Sequence[jax.Array], inner: bool = True) -> Slots:
    """Return the same before the first step: its scalars, and zeros for what reads the tree."""
    step, kept = Step(count=jnp.ones([], jnp.int32)), {}
    if tx.overrides("record") and tx.overrides("measure"):
        kept = jax.eval_shape(lambda leaves: _kept(tx, tx.measure(step, leaves)), leaves)
        kept = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), kept)
    elif tx.overrides("record"):
        kept = _kept(tx, tx.prepare(step))
    children = tx.children if inner else ()
    return disjoint(kept, *(recorded_first(child, leaves) for child in children))


def _kept(tx: Transformation, own: Any) -> Slots:
    """Return what a concept records of its own scalars: floats as float32, or float64 arrays."""
    scalars = {name: jnp.asarray(x) for name, x in tx.record(own).items()}
    return {
        name: x.astype(jnp.float32) if is_inexact(x) and (x.weak_type or x.itemsize < 4) else x
        for name, x in scalars.items()
    }


def parts(tx: Transformation) -> Iterator[Transformation]:
    """Yield a concept, its children, and theirs."""
    yield tx
    for child in tx.children:
        yield from parts(child)


def any_of(tx: Transformation, holds: Callable[[Transformation], bool]) -> bool:
    """Say whether something holds for a concept or for one of its children."""
    return any(map(holds, parts(tx)))


def remembered(function: Callable[[Any], Result]) -> Callable[[Any], Result]:
    """Keep what a function of a concept returns in the concept, which never changes."""
    key = f"__{function.__name__}__"

    @functools.wraps(function)
    def once(tx: Any) -> Result:
        if key not in vars(tx):
            vars(tx)[key] = function(tx)
        return vars(tx)[key]

    return once


@remembered
def slot_names(tx: Transformation) -> tuple[str, ...]:
    """Return the names of a concept's slots; they do not depend on the parameter."""
    if not tx.overrides("slots"):
        return tuple(name for child in tx.children for name in slot_names(child))
    return tuple(jax.eval_shape(tx.slots, jax.ShapeDtypeStruct((), jnp.float32)))


@remembered
def recorded_names(tx: Transformation) -> tuple[str, ...]:
    """Return the names of the scalars that a concept and its children keep in the state."""
    names: list[str] = []
    if tx.overrides("record"):
        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        names += jax.eval_shape(lambda leaf: recorded_first(tx, [leaf], inner=False), scalar)
    return (*names, *(name for child in tx.children for name in recorded_names(child)))


def is_concrete(*trees: Any) -> bool:
    """Say whether every leaf is an array or a number, so that jit can take the trees."""
    kinds = set(map(type, jax.tree.leaves(trees)))
    return all(issubclass(kind, _CONCRETE) and not issubclass(kind, Tracer) for kind in kinds)


def on_many_devices(tree: Any) -> bool:
    """Say whether an array of the tree lies on more than one device."""
    return any(len(x.devices()) > 1 for x in jax.tree.leaves(tree) if isinstance(x, jax.Array))


_CONCRETE = (jax.Array, np.ndarray, np.generic, numbers.Number)
