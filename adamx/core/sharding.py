"""The sharding of an optimizer's state: like its parameters, or over more devices.

    ZeRO-1:  slots are divided over a mesh axis that the parameters do not use

A slot gets its parameter's sharding by itself, also under `jax.jit(tx.init)`. `state_sharding` is
for everything that needs explicit shardings: `out_shardings`, `jax.device_put`, checkpoints, and
layouts in which the slots are sharded differently. JAX's own partitioner does the communication.

Source of ZeRO-1: Rajbhandari et al. (2020), section 5.1, https://arxiv.org/abs/1910.02054
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import jax
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jax.tree_util import DictKey

from adamx.core.arithmetic import shared_axes
from adamx.core.errors import describe
from adamx.core.foreign import as_transformation
from adamx.core.lifting import is_committed
from adamx.core.paths import with_path_of


def state_sharding(
    tx: optax.GradientTransformation | optax.MultiSteps,
    params: Any,
    *,
    state: Any = None,
    over: str | tuple[str, ...] | None = None,
    memory_kind: str | None = None,
) -> Any:
    """Return the sharding of each array in the state, in a tree like the state.

    A slot shaped like its parameter has the parameter's sharding. A slot that is shorter along some
    axes, or lacks some, has it along the shared axes. Counts and other scalars are on all devices.

    Args:
        tx: any adamx or Optax transformation.
        params: the parameters, or their shapes with shardings (`jax.ShapeDtypeStruct`).
        state: a state, or its shapes, with the entries of leaves that began late; None means that
            of `tx.init(params)`.
        over: names of mesh axes over which the slots are divided as well (ZeRO-1), usually the
            data axes. Those that a parameter already uses are left out. Its slots are divided along
            its first dimension that the others divide evenly; without one, or where a slot is
            shorter there, they are sharded like the parameter. None means no axis.
        memory_kind: the memory of the slots, such as "pinned_host", but not of the scalars. None
            means the parameters' memory.

    Raises:
        TypeError: if `tx` is not a transformation.
        ValueError: if a parameter has no sharding, or the mesh has no axis of a name in `over`.

    Warns:
        UserWarning: if `over` divides no slot.

    Example:
        >>> import adamx, jax.numpy as jnp
        >>> mesh = jax.make_mesh((1, 1), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)
        >>> column = NamedSharding(mesh, PartitionSpec(None, "model"))
        >>> params = {"w": jax.ShapeDtypeStruct((4, 6), jnp.float32, sharding=column)}
        >>> tuple(state_sharding(adamx.adamw(1e-3), params)["mu"]["w"].spec)
        (None, 'model')
        >>> tuple(state_sharding(adamx.adamw(1e-3), params, over="data")["mu"]["w"].spec)
        ('data', 'model')
    """
    tx = as_transformation(tx, "state_sharding: tx")
    axes = (over,) if isinstance(over, str) else tuple(over or ())
    known = {}
    for path, param in jax.tree_util.tree_flatten_with_path(params)[0]:
        where = getattr(param, "sharding", None)
        if where is None:
            raise ValueError(
                f"state_sharding: {jax.tree_util.keystr(path)} has no sharding: params must be "
                f"arrays, or shapes with shardings, got {describe(param)}"
            )
        names = where.mesh.axis_names if isinstance(where, NamedSharding) else ()
        if missing := [axis for axis in axes if axis not in names]:
            raise ValueError(
                "state_sharding: over must name axes of the parameters' mesh: "
                f"{jax.tree_util.keystr(path)} is on a mesh with axes {list(names)}, "
                f"which has no {missing[0]!r}"
            )
        known[path] = param
    names = {jax.tree_util.keystr(path, simple=True, separator="/"): path for path in known}
    everywhere = _on_all_devices([param.sharding for param in known.values()])
    slots: list[bool] = []  # whether each is divided over more axes than its parameter

    def of(path: tuple[Any, ...], leaf: Any) -> Sharding | None:
        param = with_path_of(path, known)
        if param is None and isinstance(path[-1], DictKey):  # what monitor keeps for each layer
            param = known.get(names.get(path[-1].key, ()))
        if param is None or leaf.ndim == 0:
            return everywhere
        where = alike(_divided(param.sharding, param.shape, axes), param.shape, leaf.shape)
        slots.append(where != alike(param.sharding, param.shape, leaf.shape))
        return where if memory_kind is None else where.with_memory_kind(memory_kind)

    shapes = jax.eval_shape(tx.init, params) if state is None else jax.eval_shape(lambda: state)
    found = jax.tree_util.tree_map_with_path(of, shapes)
    if axes and slots and not any(slots):
        warnings.warn(
            f"state_sharding: over={over!r} divides no slot: each parameter is divided over these "
            "axes already, or has no dimension that they divide evenly",
            stacklevel=2,
        )
    return found


def placed(state: Any, tx: optax.GradientTransformation, params: Any) -> Any:
    """Return a state with each slot where its parameter is, and scalars on all devices.

    It stays as it is if the parameters are not arrays, and where something is traced.
    """
    if not all(
        isinstance(x, jax.Array) and not isinstance(x, Tracer) for x in jax.tree.leaves(params)
    ):
        return state
    committed = any(map(is_committed, jax.tree.leaves(params)))

    def put(x: Any, where: Sharding | None) -> Any:
        if where is None or isinstance(x, Tracer):
            return x
        there = isinstance(x, jax.Array) and x.sharding.is_equivalent_to(where, x.ndim)
        stays = there and (is_committed(x) or not committed)
        return x if stays else jax.device_put(x, where)

    return jax.tree.map(put, state, state_sharding(tx, params, state=state))


def _on_all_devices(shardings: list[Sharding]) -> Sharding | None:
    for where in shardings:
        if isinstance(where, NamedSharding):
            return NamedSharding(where.mesh, PartitionSpec())
    return shardings[0] if shardings else None


def alike(where: Sharding, param: tuple[int, ...], shape: tuple[int, ...]) -> Sharding:
    """Return a sharding of a parameter along the axes that a slot shares with it."""
    if shape == param or not isinstance(where, NamedSharding):
        return where
    entries = _entries(where, len(param))
    spec = [None if axis is None else entries[axis] for axis in shared_axes(shape, param)]
    return where.update(spec=PartitionSpec(*(spec if any(spec) else ())))


def _divided(where: Sharding, shape: tuple[int, ...], axes: tuple[str, ...]) -> Sharding:
    """Return the sharding with the first possible dimension divided over the axes still free."""
    if not isinstance(where, NamedSharding):
        return where
    entries = [_names(entry) for entry in _entries(where, len(shape))]
    free = [axis for axis in axes if all(axis not in names for names in entries)]
    for i, names in enumerate(entries if free else ()):
        if shape[i] % math.prod(where.mesh.shape[axis] for axis in (*names, *free)) == 0:
            entries[i] = (*names, *free)
            return where.update(spec=PartitionSpec(*(names or None for names in entries)))
    return where


def _entries(where: NamedSharding, ndim: int) -> tuple[Any, ...]:
    return (*where.spec, *[None] * (ndim - len(where.spec)))


def _names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
