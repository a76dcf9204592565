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

import jax.numpy as jnp
from jax.core import Tracer

from adamx.core import errors
from adamx.core.concept import parts
from adamx.core.foreign import named
from adamx.core.leaves import take_apart
from adamx.core.lifting import BEGAN, State, beginnings, committed_with
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


def reset(
    tx: Transformation,
    state: Any,
    params: Any,
    patterns: Pattern | list[Pattern] | tuple[Pattern, ...],
) -> State:
    """Return a state in which some leaves begin anew, with the moments of a first step.

    Their slots get their start values, and `began` the count: their next steps are those of a run
    that begins now, with schedules where the whole run has them. All else stays as it is: the other
    leaves, `count`, the masters of `master_weights` and a sum of `accumulate`.

    Args:
        tx: the transformation that made the state.
        state: the state.
        params: the parameters, as for `tx.init`.
        patterns: which leaves: a pattern of paths, such as "head/*", a compiled regular expression,
            or several of them.

    Returns:
        The new state.

    Raises:
        TypeError: if `state` is not a state of adamx, or a pattern not one.
        ValueError: if a pattern matches no leaf, if the state has not the entries of `tx`, or if a
            stage of Optax keeps something for one of these leaves.

    Example:
        >>> import adamx
        >>> tx, params = adamx.momentum(1.0, decay=0.5), {"w": jnp.ones(1), "v": jnp.ones(1)}
        >>> _, state = tx.update(params, tx.init(params))
        >>> state = reset(tx, state, params, "v")
        >>> print(state["mu"], int(state["count"]), int(state["began"]["v"]["count"]))
        {'v': Array([0.], dtype=float32), 'w': Array([0.5], dtype=float32)} 1 1
    """
    errors.check_state(state)
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
        start = tx.init(whole)
    for name in _foreign_names(tx):
        _check_foreign("reset", name, [leaves.paths[i] for i in chosen], leaves_by_path(start))
    new = dict(state)
    for name in sorted({*tx.tree_names()} - _of_wrappers(tx)):
        column = leaves.column(name, errors.entry(state, name))
        first = leaves.column(name, start[name])
        for i in chosen:
            column[i] = first[i]
        new[name] = leaves.tree(column)
    return begun(tx, params, new, [leaves.paths[i] for i in chosen])


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
