"""Leaves that begin late: added, thawed or reset in the middle of a run.

    u'_leaf = (the step t - N of a run whose schedules start at N)      began[leaf] = N

A run has one count. Moments that start at zero in step N are too small for a correction by
1 - b^t: Adam's step would be three to seven times the learning rate for a hundred steps. So the
state keeps N for each such leaf, and the values that are recorded for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from adamx.core import errors
from adamx.core.concept import parts
from adamx.core.foreign import named
from adamx.core.leaves import take_apart
from adamx.core.lifting import BEGAN, State, age, beginnings, committed_with, is_committed
from adamx.core.paths import (
    Pattern,
    at,
    check_all_used,
    check_pattern,
    flatten,
    leaves_by_path,
    matches,
)
from adamx.core.precision_warning import PrecisionWarning
from adamx.core.transformation import Transformation
from adamx.core.wrapper import Wrapper
from adamx.storage import masters
from adamx.storage.moments import without_storages
from adamx.transforms.averages_of_params import ema_of_params, mean_of_params
from adamx.wrappers.by_path import by_path


def reset(
    tx: Transformation,
    state: Any,
    params: Any,
    patterns: Pattern | list[Pattern] | tuple[Pattern, ...],
    *,
    to: Any = None,
) -> State:
    """Return a state in which some leaves begin anew, or go on from an earlier state.

    Their slots get their start values, and `began` the count: their next steps are those of a run
    that begins now, with schedules where the whole run has them. All else stays as it is: the other
    leaves, `count`, the masters of `master_weights` and a sum of `accumulate`.

    With `to`, their slots are those of another state, and their age is what it was there. So leaves
    that were frozen for a while go on as if no step had passed: `to` is the state from before.

    Args:
        tx: the transformation that made the state.
        state: the state.
        params: the parameters, as for `tx.init`.
        patterns: which leaves: a pattern of paths, such as "head/*", a compiled regular expression,
            or several of them.
        to: an earlier state that `tx` made; None means the start.

    Returns:
        The new state.

    Raises:
        TypeError: if `state` is not a state of adamx, or a pattern not one.
        ValueError: if a pattern matches no leaf, if a state has not the entries of `tx`, if a stage
            of Optax keeps something for one of these leaves, or if one has taken more steps in `to`
            than the whole run has now.

    Example:
        >>> import adamx
        >>> tx, params = adamx.momentum(1.0, decay=0.5), {"w": jnp.ones(1), "v": jnp.ones(1)}
        >>> _, state = tx.update(params, tx.init(params))
        >>> state = reset(tx, state, params, "v")
        >>> print(state["mu"], int(state["count"]), int(state["began"]["v"]["count"]))
        {'v': Array([0.], dtype=float32), 'w': Array([0.5], dtype=float32)} 1 1
        >>> _, later = tx.update(params, state)
        >>> reset(tx, later, params, "w", to=state)["mu"]["w"]
        Array([0.5], dtype=float32)
    """
    for given in (state,) if to is None else (state, to):
        errors.check_state(given, "reset(tx, state, params, patterns)")
    many = patterns if isinstance(patterns, tuple | list) else (patterns,)
    for pattern in many:
        check_pattern("reset", pattern)
    check_all_used("reset", many, params)
    leaves = take_apart(params, None)
    chosen = [
        i
        for i, (path, param) in enumerate(zip(leaves.paths, leaves.values, strict=True))
        if param is not None and any(matches(p, path) for p in many)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrecisionWarning)  # which init gave
        whole = masters.masters(params, state) if {*masters.NAMES} & state.keys() else params
        start = tx.init(whole) if to is None else to
    for name in _foreign_names(tx):
        _check_foreign("reset", name, [leaves.paths[i] for i in chosen], leaves_by_path(start))
    new = dict(state)
    for name in sorted({*tx.tree_names()} - _of_wrappers(tx)):
        column = leaves.column(name, errors.entry(state, name))
        first = leaves.column(name, errors.entry(start, name))
        for i in chosen:
            column[i] = _put_where(column[i], first[i])
        new[name] = leaves.tree(column)
    again = [leaves.paths[i] for i in chosen]
    return begun(tx, params, new, again) if to is None else _aged(tx, params, new, again, to)


def _put_where(old: Any, new: Any) -> Any:
    """Return a slot in the place of another one, which may be offloaded or divided further."""
    arrays = all(isinstance(x, jax.Array) and not isinstance(x, Tracer) for x in (old, new))
    if not arrays or not is_committed(old) or old.sharding.is_equivalent_to(new.sharding, new.ndim):
        return new
    return jax.device_put(new, old.sharding)


def _aged(
    tx: Transformation, params: Any, state: State, paths: Sequence[str], to: Mapping[str, Any]
) -> State:
    """Return a state in which some leaves have the age and the recorded scalars of another one."""
    groups = [part for part in parts(tx) if isinstance(part, by_path)]
    found = leaves_by_path(params)

    def recorded(path: str, name: str) -> Any:
        if (own := to.get(BEGAN, {}).get(path)) is not None:
            return own[name]
        x = errors.entry(to, name)
        for group in groups:  # the outer ones first
            if name in group.state_names() and isinstance(x, Mapping):
                x = x[group.label(path, found[path])]
        return x

    entries = beginnings(tx, params, paths, state["count"])
    for path, entry in entries.items():
        steps, count = age(to, path), entry["count"]
        if not isinstance(count - steps, Tracer) and int(count) < int(steps):
            raise ValueError(
                f"reset: leaf {path!r} has taken {int(steps)} steps in `to`, and the whole run "
                f"only {int(count)}: `to` must be an earlier state of the same run"
            )
        entry |= {name: recorded(path, name) for name in entry.keys() - {"count"}}
        entry["count"] = count - steps
    new = jax.tree.map(lambda x: jnp.array(x, copy=True), entries)  # buffers of their own
    return state | {BEGAN: state.get(BEGAN, {}) | committed_with(params, new)}


def present(params: Any) -> list[str]:
    """Return the paths of the leaves that are not None."""
    return [path for path, x in zip(*flatten(params)[:2], strict=True) if x is not None]


def begun(tx: Transformation, params: Any, state: State, paths: Sequence[str]) -> State:
    """Return a state in which some leaves begin now; before the first step all do."""
    count = state["count"]
    if not paths or (not isinstance(count, Tracer) and int(count) == 0):
        return state
    new = committed_with(params, beginnings(tx, params, paths, count))
    return state | {BEGAN: state.get(BEGAN, {}) | new}


def newcomers(
    tx: Transformation, params: Any, slots: Mapping[str, Any], filled: Set[str]
) -> list[str]:
    """Return the paths of the leaves of which an adapted state had nothing but start values.

    What wrappers keep, such as masters, does not count: it goes on while a leaf is frozen. Nor do
    averages of the parameters, if there is anything else.

    Args:
        tx: the transformation.
        params: the parameters.
        slots: the leaves of the adapted state, by path, as they are stored or as formulas see them.
        filled: which of them got their start values.

    Raises:
        ValueError: if a stage of Optax has start values for some leaves, and its old count.
    """
    for name in _foreign_names(tx):
        own = {place: x for place, x in slots.items() if place.startswith(f"{name}/")}
        if any(_is_counter(x) for place, x in own.items() if place not in filled):
            _check_foreign("adapt_state", name, present(params), filled)
    averages = {p.name for p in parts(tx) if isinstance(p, mean_of_params | ema_of_params)}
    names = {*tx.tree_names(), *without_storages(tx).tree_names()} - _of_wrappers(tx)

    def starts(path: str) -> bool:
        kinds = ([at(n, path, slots) for n in kind] for kind in (names - averages, averages))
        kept = next((here for places in kinds if (here := slots.keys() & set(places))), set())
        return bool(kept) and kept <= filled

    return [path for path in present(params) if starts(path)]


def _of_wrappers(tx: Transformation) -> set[str]:
    """Return the names of the slots that wrappers keep, such as masters: no moments."""
    return {n for part in parts(tx) if isinstance(part, Wrapper) for n in part.slot_names()}


def _foreign_names(tx: Transformation) -> list[str]:
    """Return the entries of the Optax stages that have memory."""
    return [name for p in parts(tx) if isinstance(p, named) for name in p.state_names()]


def _is_counter(x: Any) -> bool:
    return not jnp.shape(x) and jnp.issubdtype(jnp.result_type(x), jnp.integer)


def _check_foreign(function: str, name: str, paths: Iterable[str], places: Iterable[str]) -> None:
    """Raise if an Optax stage keeps something for leaves that begin in the middle of a run."""
    for place in places:
        for path in paths:
            if place.startswith(f"{name}/") and f"/{place}".endswith(f"/{path}"):
                raise ValueError(
                    f"{function}: leaf {path!r} begins in the middle of the run, and the Optax "
                    f"stage {name!r} keeps {place!r} and one count for all leaves, so that it "
                    "would correct the bias of this leaf as if it were old: take adamx's own "
                    "method in its place, or start this stage anew: delete its entry from the state"
                )
