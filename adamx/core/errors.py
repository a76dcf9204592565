"""Clear errors for updates, parameters and states that do not fit each other.

Every message names the leaf's path, the expected and the given value, and the likely cause.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from optax import GradientTransformation

from adamx.core.paths import flatten, leaves_by_path

_ARRAYS = (jax.Array, np.ndarray, np.generic)


@functools.cache
def is_of_jax(dtype: np.dtype) -> bool:
    """Say whether JAX takes arrays of this dtype: not of objects, text, or another byte order."""
    try:
        jax.eval_shape(lambda x: x, np.empty(0, dtype))
    except TypeError:
        return False
    return True


def describe(x: Any) -> str:
    """Describe a leaf for a message: dtype and shape of an array, the type of anything else."""
    if isinstance(x, (*_ARRAYS, jax.ShapeDtypeStruct)):
        return f"{x.dtype}{list(x.shape)}"
    if isinstance(x, dict):
        return f"a dict with {sorted(x)[:4]}"
    return f"{type(x).__name__} {x!r}" if isinstance(x, numbers.Number) else type(x).__name__


def as_inexact(path: str, leaf: Any) -> jax.Array:
    """Return the leaf as an array; raise TypeError unless its dtype is floating or complex."""
    where = f"adamx: leaf {path!r} must be a floating-point array"
    if not isinstance(leaf, (*_ARRAYS, float, complex)):
        if isinstance(leaf, numbers.Integral):
            raise TypeError(
                f"{where}, got the integer {leaf!r}: write it as a float, or set the leaf to None"
            )
        raise TypeError(
            f"{where}, got {describe(leaf)}: for an Equinox module pass "
            "eqx.filter(model, eqx.is_inexact_array), elsewhere set such leaves to None"
        )
    if isinstance(leaf, np.ndarray | np.generic) and not is_of_jax(leaf.dtype):
        raise TypeError(
            f"{where}, got {describe(leaf)}, which JAX cannot hold: x.astype('float32') converts "
            "numbers, also those in another byte order"
        )
    array = leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)
    if getattr(array, "weak_type", False):  # from a Python number: give it a dtype of its own
        array = jax.lax.convert_element_type(array, array.dtype)
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        raise TypeError(
            f"{where}, got {describe(array)}: an optimizer cannot move integers or booleans; "
            "partition them out (eqx.partition, nnx.split, or None in their place)"
        )
    return array


def check_arrays(params: Any) -> None:
    """Raise TypeError, and name the leaf, where JAX would for one that is no array."""
    if not all(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(params)):
        for path, leaf in leaves_by_path(params).items():
            if not (leaf is None or hasattr(leaf, "dtype")):
                as_inexact(path, leaf)


def flatten_like(treedef: Any, name: str, tree: Any, updates: list[Any]) -> list[Any]:
    """Return the leaves of a tree that has the updates' structure; raise ValueError otherwise.

    Where an update is None, the tree may have anything.
    """
    try:
        leaves = treedef.flatten_up_to(tree)
        for u, leaf in zip(updates, leaves, strict=True):
            if u is not None and not jax.tree_util.all_leaves([leaf]) and leaf is not None:
                raise ValueError(f"a branch, {describe(leaf)}, in the place of a leaf")
        return leaves
    except (ValueError, TypeError) as error:
        here, there = (flatten(t)[0] for t in (treedef.unflatten(range(len(updates))), tree))
        what = name if name == "params" else f"state[{name!r}]"
        apart = differences("the updates", here, what, there)
        raise ValueError(
            f"adamx: the updates and {what} are different trees{apart} "
            f"({error}). Does the state belong to another model, or are the arguments swapped? "
            "The order is update(updates, state, params), and apply_updates(params, updates)"
        ) from None


def differences(one: str, here: Iterable[str], other: str, there: Iterable[str]) -> str:
    """Say which names only one of two has, as the end of a sentence; nothing if both are alike.

    Example:
        >>> differences("a", ["x", "y"], "b", ["y"])
        ": only in a: ['x']"
    """
    here, there = list(here), list(there)
    sides = {one: [x for x in here if x not in there], other: [x for x in there if x not in here]}
    said = [
        f"only in {name}: {found[:4]}{' and more' if len(found) > 4 else ''}"
        for name, found in sides.items()
        if found
    ]
    return f": {', '.join(said)}" if said else ""


def check_param(path: str, update: jax.Array, param: Any) -> jax.Array:
    """Return the parameter of an update as an array; raise unless there is one."""
    if param is None:
        raise ValueError(
            f"adamx: leaf {path!r} has an update, {describe(update)}, but params is None there: "
            "take the gradient with respect to the same tree that is passed as params"
        )
    return as_inexact(path, param)


def check_shape(path: str, update: jax.Array, param: Any) -> jax.Array:
    """Return the parameter as an array; raise unless the update has its shape and kind."""
    param = check_param(path, update, param)
    if update.shape != param.shape:
        raise ValueError(
            f"adamx: leaf {path!r} has an update of shape {list(update.shape)} for a parameter of "
            f"shape {list(param.shape)}: adding them would change the parameter's shape. Does the "
            "gradient still have a batch axis, or is it the gradient of another model?"
        )
    if jnp.iscomplexobj(update) != jnp.iscomplexobj(param):
        raise TypeError(
            f"adamx: leaf {path!r} has an update {describe(update)} for a parameter "
            f"{describe(param)}: one is complex, the other real"
        )
    return param


def check_state(state: Any, call: str = "update(updates, state, params)") -> None:
    """Raise unless what was given to this call as the state looks like a state of adamx."""
    if not isinstance(state, dict) or "count" not in state:
        raise TypeError(
            f"adamx: {call} expects the state that init returned, a dict with 'count', got "
            f"{describe(state)}: {what_it_may_be(state)}"
        )
    counter(state, "count")


def what_it_may_be(state: Any) -> str:
    """Guess what was given in the place of a state."""
    if isinstance(state, tuple) and not isinstance(state, GradientTransformation):
        return "adamx.from_optax(state, tx, params) converts the state of an Optax optimizer"
    for name, x in state.items() if isinstance(state, Mapping) else ():
        if isinstance(x, Mapping) and "count" in x:
            return f"is it the entry {name!r} of that?"
    return "are the arguments swapped?"


def entry(state: Mapping[str, Any], name: str) -> Any:
    """Return a state's entry; raise ValueError if there is none of that name."""
    if name not in state:
        raise ValueError(
            f"adamx: the state has no {name!r}, only {sorted(state)}: it was made by another "
            "composition; adapt_state(tx, params, state, saved_by=old_tx) carries it over"
        )
    return state[name]


def counter(state: Mapping[str, Any], name: str) -> Any:
    """Return a counter of the state; raise TypeError unless it is one whole number, of 32 bits."""
    count = entry(state, name)
    if _kind(count) is not jnp.integer or jnp.shape(count):
        remedy = "is it the state that init returned?"
        if type(count).__module__.startswith("flax.nnx"):
            remedy = "nnx.to_pure_dict(nnx.state(optimizer))['opt_state'] has arrays in their place"
        raise TypeError(
            f"adamx: state[{name!r}] must be a whole number, got {describe(count)}: {remedy}"
        )
    if jnp.result_type(count).itemsize < 4:
        raise TypeError(
            f"adamx: state[{name!r}] must have 32 bits, got {describe(count)}, which counts to "
            f"{jnp.iinfo(count.dtype).max}: it was cast; adapt_state(tx, params, state) carries it "
            "over"
        )
    return count


def scalar(state: Mapping[str, Any], name: str) -> Any:
    """Return a state's entry; raise ValueError unless it is one real number."""
    value = entry(state, name)
    check_recorded(name, value, jnp.zeros([], jnp.float32))
    return value


def check_recorded(name: str, value: Any, new: jax.Array) -> None:
    """Raise unless a state's entry is an array like the new one that replaces it."""
    same_kind = _kind(value) == _kind(new) and jnp.shape(value) == new.shape
    if not same_kind or (_kind(new) is jnp.floating and not _as_wide(value, new)):
        raise ValueError(
            f"adamx: state[{name!r}] is {describe(value)}, expected {describe(new)}: it was made "
            "by another composition; adapt_state(tx, params, state) carries it over"
        )


def beginnings(state: Mapping[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """Return a copy of a state's entry for the leaves that began late; empty without one."""
    return {path: dict(entry) for path, entry in state.get(name, {}).items()}


def check_beginnings(state: Mapping[str, Any], name: str, paths: Sequence[str]) -> None:
    """Raise unless a state's entry for the leaves that began late is one, and of these leaves."""
    found = state.get(name, {})
    if not isinstance(found, Mapping) or not all(isinstance(x, Mapping) for x in found.values()):
        raise TypeError(
            f"adamx: state[{name!r}] must be a dict of the leaves that began late, by path, each a "
            f"dict with 'count', got {describe(found)}: adapt_state(tx, params, state) carries "
            "other containers over"
        )
    if unknown := sorted(found.keys() - set(paths)):
        raise ValueError(
            f"adamx: state[{name!r}] has {unknown[:4]}, and the leaves are {list(paths[:6])}: is "
            "it the state of another model? adapt_state(tx, params, state) carries it over"
        )
    for path, own in found.items():
        try:
            counter(own, "count")
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error} (in state[{name!r}][{path!r}])") from None


def check_names(state: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise unless the states before and after a step have the same entries."""
    for name in new:
        entry(state, name)
    if unknown := sorted(state.keys() - new.keys()):
        raise ValueError(
            f"adamx: the state holds {unknown}, which this transformation does not keep: it was "
            "made by another composition; adapt_state(tx, params, state, saved_by=old_tx) carries "
            "it over"
        )


def check_slots(path: str, slots: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise unless a leaf's slots are like its concept's start values."""
    missing, unknown = (
        sorted(expected.keys() - slots.keys()),
        sorted(slots.keys() - expected.keys()),
    )
    if missing and unknown:
        raise ValueError(
            f"adamx: leaf {path!r} keeps {unknown} in the state where this gradient needs "
            f"{missing}: the state was made by another composition or for an array of another "
            "shape: inside shard_map adamx.in_shard_map(tx, specs) shows whole arrays, and "
            "otherwise adapt_state(tx, params, state, saved_by=old_tx) carries the state over"
        )
    for name, start in expected.items():
        if name not in slots:
            raise ValueError(
                f"adamx: leaf {path!r} has an update, but state[{name!r}] is None there: the leaf "
                "was None (or frozen) at init; adapt_state(tx, params, state) fills it in"
            )
        if _kind(slots[name]) != _kind(start):
            raise TypeError(
                f"adamx: leaf {path!r}: state[{name!r}] is {describe(slots[name])} where this "
                f"gradient needs {start.dtype}: is it the state or the gradient of another model?"
            )
        if jnp.shape(slots[name]) == start.shape and not _as_wide(slots[name], start):
            raise TypeError(
                f"adamx: leaf {path!r}: state[{name!r}] is {jnp.result_type(slots[name])} and this "
                f"transformation keeps it as {start.dtype}: it was cast, or is the state of "
                "another composition; adapt_state(tx, params, state) carries it over"
            )
        if jnp.shape(slots[name]) != start.shape:
            raise ValueError(
                f"adamx: leaf {path!r}: state[{name!r}] has shape {list(jnp.shape(slots[name]))} "
                f"where this gradient needs {list(start.shape)}: is it the state or the gradient "
                "of another model?"
            )
    if unknown:
        raise ValueError(
            f"adamx: leaf {path!r} keeps {unknown} in the state, which this transformation does "
            "not: it was made by another composition; adapt_state(tx, params, state, "
            "saved_by=old_tx) carries it over"
        )


def _as_wide(x: Any, start: Any) -> bool:
    """Say whether a slot has its dtype; without parameters, float64 gradients ask for float64."""
    here, there = _dtype(x), start.dtype
    if here == there:
        return True
    return jnp.issubdtype(here, jnp.inexact) and min(map(_bits, (here, there))) >= 32


def _bits(dtype: Any) -> int:
    return jnp.finfo(dtype).bits


def check_foreign_leaves(name: str, state: Any, fresh: Any) -> None:
    """Raise if a leaf of a foreign stage's state is another kind or shape than in a fresh one."""
    given, wanted = leaves_by_path(state), leaves_by_path(fresh)
    for path in wanted.keys() & given.keys():
        x, like = given[path], wanted[path]
        if _kind(x) != _kind(like) or jnp.shape(x) != jnp.shape(like):
            raise _misfit(name, path, describe(x), describe(like))


def check_foreign_tree(name: str, state: Any, fresh: Any) -> None:
    """Raise if a foreign stage's state has other entries than a fresh one."""
    given, wanted = leaves_by_path(state), leaves_by_path(fresh)
    for path in {**wanted, **given}:
        if path not in given:
            raise _misfit(name, path, "missing", describe(wanted[path]))
        if path not in wanted:
            raise _misfit(name, path, describe(given[path]), "none")


def _misfit(name: str, path: str, given: str, wanted: str) -> ValueError:
    return ValueError(
        f"adamx: leaf {path!r} of state[{name!r}] is {given} where these parameters need {wanted}: "
        "is it the state or the gradient of another model?"
    )


def check_unique(names: Sequence[str]) -> None:
    """Raise if two entries of the state have one name, or one has a name of the state's own."""
    if own := [name for name in ("count", "began") if name in names]:
        raise ValueError(
            f"adamx: {own[0]!r} is the state's own: use another name, with name= for a concept and "
            "named(name, tx) for a foreign transformation"
        )
    if twice := [name for name in names if names.count(name) > 1]:
        check_disjoint(twice, twice)


def _kind(x: Any) -> Any:
    """Return the kind of numbers that a leaf holds, None if it is no array and no number."""
    if not isinstance(x, (*_ARRAYS, jax.ShapeDtypeStruct, numbers.Number)):
        return None
    return _kind_of(_dtype(x))


def _dtype(x: Any) -> Any:
    return x.dtype if hasattr(x, "dtype") else jnp.result_type(x)


@functools.cache
def _kind_of(dtype: Any) -> Any:
    kinds = (jnp.floating, jnp.complexfloating, jnp.integer)
    return next((kind for kind in kinds if jnp.issubdtype(dtype, kind)), str(dtype))


def check_disjoint(names: Iterable[str], more: Iterable[str]) -> None:
    """Raise if two stages use one name in the state."""
    if clash := sorted(set(names) & set(more)):
        raise ValueError(
            f"adamx: two stages keep {clash[0]!r} in the state: give one of them another name, "
            "with name= for a concept and named(name, tx) for a foreign transformation, or leave "
            "one out, if both are whole optimizers"
        )


def check_accumulated(
    concept: str, slots: Mapping[str, jax.Array], new: Mapping[str, jax.Array]
) -> None:
    """Raise if the concept of this name returned a slot that differs from its start value."""
    for name, value in new.items():
        if name not in slots:
            raise ValueError(f"{concept}: accumulate returned {name!r}, which slots did not start")
        if value.shape != slots[name].shape:
            raise ValueError(
                f"{concept}: accumulate returned {name!r} of shape {list(value.shape)}, slots "
                f"started it with {list(slots[name].shape)}"
            )
        if jnp.iscomplexobj(value) and not jnp.iscomplexobj(slots[name]):
            raise TypeError(f"{concept}: accumulate returned a complex {name!r} for a real slot")


def check_emitted(concept: str, u: jax.Array, out: jax.Array) -> None:
    """Raise if the concept of this name changed the update's shape, or made a real one complex."""
    if out.shape != u.shape or (jnp.iscomplexobj(out) and not jnp.iscomplexobj(u)):
        raise ValueError(
            f"{concept}: emit returned {describe(out)} for an update "
            f"{describe(u)}: shape and kind have to stay"
        )
