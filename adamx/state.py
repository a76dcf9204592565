"""Carrying a saved state over a change of configuration.

    adapted[path] = saved[path] if there is one, else the start value

The state is a flat dict of named slots, in which stages without memory have no entry: another
schedule, mask or decay does not change its structure. After other changes (another slot, a frozen
leaf, another dtype) the entries are matched by path, whatever containers a checkpoint returns. If
the storage changes, the slots are carried over as the formula sees them:

    stored = encode_new(decode_old(saved))
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from adamx.core.concept import Slots
from adamx.core.errors import describe, what_it_may_be
from adamx.core.leaves import take_apart
from adamx.core.lifting import BEGAN, State, beginnings
from adamx.core.paths import at, flatten, leaves_by_path
from adamx.core.sharding import placed
from adamx.core.transformation import Transformation
from adamx.growth import Leaves, Rows, grown_leaf, grown_leaves, saved_shape, with_new_rows
from adamx.late_start import begun, newcomers, present
from adamx.storage import masters
from adamx.storage.moments import decoded, decoded_slots, encoded


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """The changes that `adapt_state` made; prints as a sentence or two.

    Attributes:
        filled: paths in the state that were not saved and got their start values.
        dropped: paths that were saved and have no place in the state.
        rounded: paths of counts that were saved in a dtype without every whole number up to them,
            such as 1000 in bfloat16: they may have been rounded when they were cast.
        late: paths of the leaves that begin now, since none of their slots was saved.
        grown: paths in the state of the slots that got new rows, with start values.
        shared: paths in the state of the slots without rows of leaves that grew, which go on for
            old and new rows.
    """

    filled: tuple[str, ...]
    dropped: tuple[str, ...]
    rounded: tuple[str, ...] = ()
    late: tuple[str, ...] = ()
    grown: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()

    def __str__(self) -> str:
        kinds = {
            "filled in": self.filled,
            "dropped": self.dropped,
            "carried over, but perhaps rounded when saved,": self.rounded,
            "began": self.late,
            "added rows to": self.grown,
            "kept for old and new rows": self.shared,
        }
        said = [f"{kind} {len(paths)}: {_some(paths)}." for kind, paths in kinds.items() if paths]
        return "adapt_state: " + (" ".join(said) or "everything was carried over.")


def _some(paths: tuple[str, ...]) -> str:
    return ", ".join(paths[:8]) + (", ..." if len(paths) > 8 else "")


def adapt_state(
    tx: Transformation,
    params: Any,
    saved: Any,
    *,
    saved_by: Transformation | None = None,
    rows: Rows | None = None,
) -> tuple[State, Adaptation]:
    """Return the state that `tx` needs, with all entries that it shares with `saved`.

    Leaves are matched by path ("mu/dense/kernel") and cast to the dtype that `tx` uses for them.
    The count and the recorded scalars are carried over too, so schedules continue. A count that was
    saved in another dtype must still be a whole number.

    A leaf that is new in the middle of a run, or was frozen, begins now: if none of its moments was
    saved, the state keeps in `began` the count at which it starts. Its bias corrections, and all
    else that depends on the number of its steps, are then those of a run that began there, with
    schedules where the whole run has them.

    A leaf that grew, such as the embedding of a larger vocabulary, is named in `rows`: its saved
    rows keep their slots, and the rows after them start as in `tx.init`, masters from their
    parameters. A slot that has no rows, such as Adam-mini's mean square of a column, goes on for
    all of them. The new rows have the leaf's count: unlike a leaf that begins now, they take steps
    for which old moments are corrected, three to seven times as long in Adam's first hundred.

    If the two use different storages, `saved_by` says how to read the saved slots: they are
    decoded, carried over and encoded anew, rounded once, without bias. Leaves that `tx` would
    decode to the same numbers stay as they are, bit for bit.

    A scalar that is recorded once for the whole tree and is now recorded for each of several
    stacked layers, such as a learning rate, is that of each; new layers have the start value.

    Every slot is where its parameter is. If slots are to be in the host's memory, or divided over
    more devices, put the state there: `jax.device_put(state, state_sharding(tx, params, ...))`.

    Args:
        tx: the transformation to go on with.
        params: the parameters, as for `tx.init`.
        saved: a state of another composition, or the same in the containers of a checkpoint.
        saved_by: the transformation that made `saved`; needed if a storage changes: another
            `moments=`, or other decays with "packed8", whose words depend on them. None otherwise.
        rows: the axes along which leaves grew: {"embed": 0, "head/kernel": 1}, by patterns of
            paths, of which the first match counts. None means that every leaf has its old shape.

    Returns:
        The state, and the filled, dropped and perhaps rounded paths, with `saved_by` by the names
        in the formula, such as `mu`; the paths of the leaves that begin now; and those of the
        slots with new rows.

    Raises:
        TypeError: if `tx` is not an adamx transformation; if `saved` has no `count`, so it is not a
            state of adamx; or if a count is no number.
        ValueError: if a count is not a whole number from 0 to 2^31 - 1; if a saved leaf differs in
            shape from the parameter's slot and did not grow as `rows` says, or is complex and the
            slot is real (the state of another model); if a leaf of `rows` has fewer rows than were
            saved, lacks the axis, or no leaf matches; if a storage changes and `saved_by` is not
            given, or did not make `saved`; if `keep` of `master_weights` changes; if a leaf begins
            now in a stage of Optax, which has one count for all; or if two leaves have one path.

    Example:
        >>> import adamx
        >>> params = {"w": jnp.ones(2)}
        >>> saved = adamx.momentum(0.1).init(params)
        >>> state, adaptation = adapt_state(adamx.adam(0.1), params, saved)
        >>> print(adaptation)
        adapt_state: filled in 1: nu/w.

        And in another storage:

        >>> packed = adamx.adam(0.1, moments="packed16")
        >>> state, adaptation = adapt_state(packed, params, state, saved_by=adamx.adam(0.1))
        >>> print(state["packed16"]["w"].dtype, adaptation)
        uint32 adapt_state: everything was carried over.

        A leaf that is new after the first step:

        >>> tx = adamx.momentum(0.1)
        >>> _, saved = tx.update(params, tx.init(params))
        >>> state, adaptation = adapt_state(tx, params | {"new": jnp.ones(2)}, saved)
        >>> print(adaptation)
        adapt_state: filled in 1: mu/new. began 1: new.
        >>> int(state["began"]["new"]["count"])
        1

        An embedding that grew from two rows to three:

        >>> state, adaptation = adapt_state(tx, {"w": jnp.ones(3)}, saved, rows={"w": 0})
        >>> print(state["mu"]["w"], adaptation)
        [0.1 0.1 0. ] adapt_state: added rows to 1: mu/w.
    """
    if not isinstance(tx, Transformation):
        raise TypeError(
            f"adapt_state: tx must be an adamx transformation, got {describe(tx)}: the order is "
            "adapt_state(tx, params, saved)"
        )
    first = _start(tx if saved_by is None else saved_by, params, saved)
    grown = {} if rows is None else grown_leaves(rows, params, first, leaves_by_path(saved))
    if saved_by is None:
        state, adaptation = _matched(tx, first, saved, grown)
        return _with_newcomers(tx, params, state, adaptation, leaves_by_path(state))
    before, misfit = _matched(saved_by, first, saved, grown)
    before = placed(before, saved_by, params)
    if misfit.filled or misfit.dropped:
        raise ValueError(
            "adapt_state: saved_by must be the transformation that made saved, but these paths do "
            f"not fit it: {_some(misfit.filled + misfit.dropped)}"
        )
    start = _start(tx, params, saved)
    seen_before = _seen(before, saved_by, params)
    after, adaptation = _matched(tx, _seen(start, tx, params), seen_before, grown)
    leaves = take_apart(params, None)
    bound = tx.for_tree(params)
    columns = {name: leaves.column(name, start[name]) for name in tx.tree_names()}
    words, seen = leaves_by_path(before), leaves_by_path(after)
    for i, (path, param) in enumerate(zip(leaves.paths, leaves.values, strict=True)):
        if param is not None:
            first = {name: x[i] for name, x in columns.items() if x[i] is not None}
            for name, x in _stored(bound.for_leaf(path, param), path, first, words, seen).items():
                columns[name][i] = x
    slots = {name: leaves.tree(column) for name, column in columns.items()}
    rounded = tuple(name for name in misfit.rounded if name not in adaptation.dropped)
    state = {name: slots[name] if name in slots else after[name] for name in start}
    adaptation = dataclasses.replace(adaptation, rounded=rounded)
    return _with_newcomers(tx, params, state, adaptation, seen)


def _start(tx: Transformation, params: Any, saved: Any) -> State:
    """Return the first state, with the entries of the saved leaves that began late."""
    old, start = leaves_by_path(saved), tx.init(params)
    late = [path for path in present(params) if f"{BEGAN}/{path}/count" in old]
    return start | ({BEGAN: beginnings(tx, params, late, start["count"])} if late else {})


def _with_newcomers(
    tx: Transformation, params: Any, state: State, adaptation: Adaptation, seen: Slots
) -> tuple[State, Adaptation]:
    """Return the state in its place, in which the leaves begin now that have nothing saved.

    Args:
        tx: the transformation.
        params: the parameters.
        state: the adapted state.
        adaptation: what was done.
        seen: the slots, by path in the state, by the names of which `adaptation` speaks.
    """
    new = newcomers(tx, params, seen, set(adaptation.filled))
    before = placed(state, tx, params)
    after = begun(tx, params, before, new)
    late = tuple(new) if after is not before else ()
    return after, dataclasses.replace(adaptation, late=late)


def _stored(concept: Any, path: str, first: Slots, words: Slots, seen: Slots) -> Slots:
    """Return one leaf's slots: the saved words if they decode to the same, else new ones.

    Args:
        concept: the variant of the transformation for this leaf.
        path: the leaf's path.
        first: the start values of its slots.
        words: the saved slots as they were stored, by path in the state.
        seen: the slots as the formula sees them, by path in the state.
    """
    wanted = {
        name: seen[at(name, path, seen)]
        for name in jax.eval_shape(functools.partial(decoded, concept), first)
    }
    places = {name: at(name, path, words) for name in first}
    same = {name: words[place] for name, place in places.items() if place in words}
    if {n: x.dtype for n, x in same.items()} == {n: x.dtype for n, x in first.items()}:
        read = decoded(concept, same)
        if all(jnp.array_equal(read[name], x, equal_nan=True) for name, x in wanted.items()):
            return same
    return encoded(concept, wanted)


def _seen(state: State, tx: Transformation, params: Any) -> State:
    """Return a state with its slots as the formula sees them."""
    leaves = take_apart(params, None)
    slots = decoded_slots(tx.for_tree(params), leaves, state)
    others = {name: x for name, x in state.items() if name not in tx.tree_names()}
    return others | {name: leaves.tree(column) for name, column in slots.items()}


def _of_each_layer(value: Any, first: jax.Array) -> Any:
    """Return a recorded scalar with a number for each layer; new layers have the start value."""
    shape = jnp.shape(value)
    if shape == first.shape:
        return value
    if not shape:
        return jnp.broadcast_to(value, first.shape)
    if len(shape) != first.ndim or any(a > b for a, b in zip(shape, first.shape, strict=True)):
        return value
    return first.at[tuple(map(slice, shape))].set(value)


def _matched(
    tx: Transformation, start: State, saved: Any, grown: Leaves
) -> tuple[State, Adaptation]:
    """Return a state with its leaves replaced by the saved ones, matched by path and cast.

    Args:
        tx: the transformation.
        start: the first state.
        saved: the saved one; slots of leaves that grew may have the old rows or all.
        grown: which leaves grew.
    """
    old = leaves_by_path(saved)
    if "count" not in old:
        raise TypeError(
            "adapt_state: saved must be a state of adamx, with 'count' at the top, "
            f"got {describe(saved)}: {what_it_may_be(saved)}"
        )
    filled, rounded, added, shared, records = {}, [], [], [], {*tx.recorded_names}

    def carried(name: str, first: Any) -> Any:
        if first is None:
            return None
        if name not in old:
            filled[name] = first
            return first
        value, leaf = old.pop(name), grown_leaf(name, grown)
        top, *_, last = name.split("/") if "/" in name else (name, name)
        if top in records or (top == BEGAN and last in records):
            value = _of_each_layer(value, first)
        before = saved_shape(first.shape, leaf)
        if jnp.shape(value) not in (before, first.shape):
            raise ValueError(
                f"adapt_state: {name!r} was saved with shape {list(jnp.shape(value))} and has "
                f"shape {list(first.shape)} here: is it the state of another model? If the leaf "
                "grew along one axis, name it: rows={path: axis}"
            )
        value = cast(name, value, first)
        if leaf is None:
            return value
        if first.ndim:  # no number that is the whole state's or the whole leaf's
            (shared if before == first.shape else added).append(name)
        return with_new_rows(value, first, leaf)

    def cast(name: str, value: Any, first: Any) -> Any:
        if first.dtype == jnp.int32:
            if _may_be_rounded(value):
                rounded.append(name)
            return _count(name, value, first)
        value = jnp.asarray(value)
        if value.dtype == first.dtype:
            return value
        if jnp.iscomplexobj(value) and not jnp.iscomplexobj(first):
            raise ValueError(
                f"adapt_state: {name!r} was saved as {value.dtype} and is {first.dtype} here: is "
                "it the state of another model?"
            )
        if _is_word(value) or _is_word(first):
            raise _kept_otherwise(name, first, name, value)
        return value.astype(first.dtype)

    paths, firsts, treedef = flatten(start)
    state = treedef.unflatten(map(carried, paths, firsts))
    lost = {_place(name): name for name in sorted(old, key=lambda name: _is_word(old[name]))}
    for name, first in filled.items():
        other = lost.get(_place(name))
        if other and (_is_word(first) or _is_word(old[other])):
            raise _kept_otherwise(name, first, other, old[other])
    found = map(tuple, (filled, sorted(old), rounded, (), added, shared))
    return state, Adaptation(*found)


def _count(name: str, value: Any, first: jax.Array) -> jax.Array:
    """Return a saved count as int32; raise unless it is one.

    The counts of adamx are at the top of the state. An Optax stage may keep other whole numbers,
    negative ones too.
    """
    if isinstance(value, Tracer) and jnp.issubdtype(value.dtype, jnp.integer):
        return value.astype(jnp.int32)  # its value is not known
    given = np.asarray(value)
    if not jnp.issubdtype(given.dtype, jnp.integer) and not _is_floating(given):
        raise TypeError(
            f"adapt_state: {name!r} must be a whole number, got {value!r}, {describe(value)}"
        )
    most = np.iinfo(np.int32).max
    least = -most - 1 if "/" in name or np.any(np.asarray(first) < 0) else 0
    wide = given.astype(np.float64)  # integers that it rounds are out of range all the same
    if not np.all((wide == np.floor(wide)) & (wide >= least) & (wide <= most)):
        raise ValueError(
            f"adapt_state: {name!r} must be a whole number from {least} to {most}, and was saved "
            f"as {given} in {given.dtype}: was the whole state cast, or is it damaged? If you know "
            "the number, put it in as an int32"
        )
    if isinstance(value, jax.Array):  # where it is
        return value.astype(jnp.int32)
    return jnp.asarray(given.astype(np.int32))


def _may_be_rounded(value: Any) -> bool:
    """Say whether a number's dtype lacks some of the whole numbers up to it."""
    if isinstance(value, Tracer) or not _is_floating(given := np.asarray(value)):
        return False
    holds_all = 2.0 ** (jnp.finfo(given.dtype).nmant + 1)
    return bool(np.any(np.abs(given.astype(np.float64)) >= holds_all))


def _is_floating(x: np.ndarray) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _place(name: str) -> tuple[str, bool]:
    """Return the path of a slot's parameter, and whether the slot belongs to a master."""
    entry, _, path = name.partition("/")
    return path, entry in masters.NAMES


def _is_word(x: Any) -> bool:
    """Say whether this is an encoded slot; counters are int32, all other entries floating."""
    dtype = jnp.asarray(x).dtype
    return not jnp.issubdtype(dtype, jnp.inexact) and dtype != jnp.int32


def _kept_otherwise(name: str, first: Any, other: str, value: Any) -> ValueError:
    said = f"adapt_state: {name!r} is stored as {first.dtype}, and {other!r} was saved as "
    said += f"{jnp.asarray(value).dtype}: "
    if _place(name)[1]:
        return ValueError(
            said + "neither keep= of master_weights nor the parameters' 16-bit dtype can change in "
            "the middle of a run: start anew, from the float32 of adamx.masters(params, saved)"
        )
    return ValueError(
        said + "the storage has changed: name the transformation that made the saved state, "
        "adapt_state(tx, params, saved, saved_by=old_tx)"
    )
