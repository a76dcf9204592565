"""Leaves that grew along an axis: an embedding with more rows, a stack with more layers.

    slot = [slot_saved, first[n:]]      along that axis: n rows were saved, first is the start value

A slot that lacks the axis, such as one mean square for all rows, goes on for old and new rows.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from adamx.core.arithmetic import shared_axes
from adamx.core.leaves import on_device
from adamx.core.paths import check_all_used, check_pattern, leaves_by_path, matches, text

Rows = Mapping[Any, int]
"""The axis along which leaves grew, by pattern."""


class Grown(NamedTuple):
    """A leaf that grew.

    Attributes:
        axis: the axis along which it grew, >= 0.
        kept: how many rows were saved.
        shape: the parameter's shape.
    """

    axis: int
    kept: int
    shape: tuple[int, ...]


Leaves = Mapping[str, Grown | None]
"""All leaves by path; None is one that did not grow."""


def grown_leaves(rows: Rows, params: Any, start: Any, saved: Mapping[str, Any]) -> Leaves:
    """Return which leaves grew.

    Args:
        rows: as for `adapt_state`.
        params: the parameters.
        start: the first state of the transformation that made the saved one.
        saved: the saved arrays, by path in the state.

    Raises:
        TypeError: if `rows` is not a mapping from patterns to whole numbers.
        ValueError: if a pattern matches no leaf, if a leaf has no such axis or fewer rows than were
            saved, or if its slots were saved with different numbers of rows.
    """
    shapes = {path: jnp.shape(x) for path, x in leaves_by_path(params).items()}
    axes = _axes(rows, params, shapes)
    found: dict[str, Grown] = {}
    for place, first in leaves_by_path(start).items():
        path, before = leaf_of(place, shapes), jnp.shape(saved.get(place, 0.0))
        if path not in axes or len(before) != jnp.ndim(first):
            continue
        leaf = Grown(axes[path], 0, shapes[path])
        axis = _axis_of(first.shape, leaf)
        if axis is None:
            continue
        if before[axis] > first.shape[axis]:
            raise ValueError(
                f"adapt_state: {place!r} was saved with {before[axis]} rows along axis {axis} and "
                f"has {first.shape[axis]} here, but rows= is for leaves that grew: index the saved "
                "slots as you indexed the parameter, saved['mu'][...] = saved['mu'][...][kept]"
            )
        if found.setdefault(path, leaf._replace(kept=before[axis])).kept != before[axis]:
            raise ValueError(
                f"adapt_state: {place!r} was saved with {before[axis]} rows along axis {axis}, and "
                f"another slot of {path!r} with {found[path].kept}: is it one state?"
            )
    grew = {path: x for path, x in found.items() if x.kept < x.shape[x.axis]}
    return dict.fromkeys(shapes) | grew


def grown_leaf(place: str, leaves: Leaves) -> Grown | None:
    """Return the leaf of a slot, by the slot's path in the state; None if it did not grow."""
    path = leaf_of(place, leaves)
    return None if path is None else leaves[path]


def _axes(rows: Rows, params: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Return the axis of each leaf that a pattern matches; the first match counts."""
    if not isinstance(rows, Mapping):
        raise TypeError(
            "adapt_state: rows must map patterns to axes, as {'embed': 0}, where the leaf grew "
            f"along its first axis, got {rows!r}"
        )
    for pattern, axis in rows.items():
        check_pattern("adapt_state", pattern)
        if isinstance(axis, bool) or not isinstance(axis, int | np.integer):
            raise TypeError(
                f"adapt_state: rows[{text(pattern)!r}] must be an axis, a whole number such as 0, "
                f"got {axis!r}"
            )
    check_all_used("adapt_state", list(rows), params)
    found: dict[str, int] = {}
    for path, shape in shapes.items():
        for pattern, axis in rows.items():
            if path not in found and matches(pattern, path):
                if not -len(shape) <= axis < len(shape):
                    raise ValueError(
                        f"adapt_state: rows[{text(pattern)!r}] is axis {axis}, which leaf {path!r} "
                        f"of shape {list(shape)} does not have"
                    )
                found[path] = int(axis) % len(shape)
    return found


def leaf_of(place: str, leaves: Mapping[str, Any]) -> str | None:
    """Return the path of a slot's leaf, which ends the slot's own path; None without one.

    Example:
        >>> leaf_of("trace/trace/dense/w", {"w": 1.0, "dense/w": 2.0}), leaf_of("mu", {"": 1.0})
        ('dense/w', '')
    """
    keys = place.split("/")
    ends = ("/".join(keys[start:]) for start in range(1, len(keys) + 1))
    return next((end for end in ends if end in leaves), None)


def _axis_of(slot: tuple[int, ...], leaf: Grown) -> int | None:
    """Return the axis of a slot's shape along which its leaf grew; None if the slot lacks it."""
    shared = shared_axes(slot, leaf.shape)
    return shared.index(leaf.axis) if leaf.axis in shared else None


def saved_shape(first: tuple[int, ...], leaf: Grown | None) -> tuple[int, ...]:
    """Return the shape that a slot had before its leaf grew, from that of its start value.

    Example:
        >>> saved_shape((3, 2), Grown(axis=0, kept=1, shape=(3, 2))), saved_shape((3, 2), None)
        ((1, 2), (3, 2))
    """
    if leaf is None or (axis := _axis_of(first, leaf)) is None:
        return first
    return (*first[:axis], leaf.kept, *first[axis + 1 :])


def with_new_rows(value: jax.Array, first: jax.Array, leaf: Grown) -> jax.Array:
    """Return the saved rows of a slot, followed by the new rows of its start value.

    Args:
        value: the slot, with the saved rows, or with all of which only these are taken.
        first: its start value, of the same dtype.
        leaf: its leaf.

    Example:
        >>> with_new_rows(jnp.ones(1), jnp.zeros(3), Grown(axis=0, kept=1, shape=(3,)))
        Array([1., 0., 0.], dtype=float32)
    """
    axis = _axis_of(first.shape, leaf)
    if axis is None:
        return value
    join = functools.partial(_joined, axis, leaf.kept)
    if isinstance(value, Tracer) or isinstance(first, Tracer):
        return join(value, first)
    value, first = on_device((value, first))
    where, there = first.sharding, value.sharding
    if not isinstance(where, NamedSharding):
        return join(value, first)
    # with automatic axes, since the saved rows may not be a multiple of the devices
    same = isinstance(there, NamedSharding) and _devices(there) == _devices(where)
    before = _automatic(there if same else where.update(spec=PartitionSpec()))
    after = _automatic(where)
    value, first = jax.device_put((value, first), (before, after))
    return jax.device_put(jax.jit(join, out_shardings=after)(value, first), where)


def _joined(axis: int, kept: int, value: jax.Array, first: jax.Array) -> jax.Array:
    old = jax.lax.slice_in_dim(value, 0, kept, axis=axis)
    new = jax.lax.slice_in_dim(first, kept, None, axis=axis)
    return jnp.concatenate([old, new], axis)


def _devices(where: Any) -> list[Any]:
    return [*where.mesh.devices.flat]


def _automatic(where: Any) -> NamedSharding:
    """Return the same sharding on a mesh all of whose axes are automatic."""
    types = (AxisType.Auto,) * len(where.mesh.axis_names)
    return where.update(mesh=where.mesh.update(axis_types=types))
