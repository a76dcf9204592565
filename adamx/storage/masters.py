"""The formats of float32 masters of 16-bit parameters, and how to read them.

    "remainder"    w = join(param, int16)      exact
    "remainder8"   w = join(param, int8)       24 bits
    "float32"      w                           a copy

The formats of the remainders are in `adamx.storage.remainder`. The parameter of a finite master is
finite: the nearest number of its dtype. From infinity no finite update would lead back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from adamx.core import errors
from adamx.core.arithmetic import compute_dtype, divided_like, limit_finite, narrowed
from adamx.core.concept import Slots
from adamx.core.leaves import on_device, take_apart
from adamx.storage.remainder import join

NAMES = ("remainder", "remainder8", "master")
"""The names of the slots: a format each, so that one is never read as the other."""


def names(keep: str) -> tuple[str, ...]:
    """Return the names of the slots that a format has; float16 parameters have a copy."""
    return ("master",) if keep == "float32" else (keep, "master")


def start(keep: str, param: jax.Array) -> Slots:
    """Return the start value of one parameter's slot; no slot from 32 bits on."""
    if jnp.finfo(param.dtype).bits >= 32:
        return {}
    if param.dtype != jnp.bfloat16 or keep == "float32":
        return {"master": param.astype(compute_dtype(param.dtype))}
    return {keep: jnp.zeros_like(param, jnp.int8 if keep == "remainder8" else jnp.int16)}


@jax.jit
def joined(param: jax.Array, slots: Slots) -> jax.Array:
    """Return one parameter's master; a copy counts only where it still rounds to the parameter."""
    (param,) = divided_like(slots.values(), param)
    for name in ("remainder", "remainder8"):
        if name in slots:
            return join(param, slots[name])
    if "master" in slots:
        copy, wide = slots["master"], param.astype(compute_dtype(param.dtype))
        return jnp.where(rounded(copy, param.dtype) == param, copy, wide)
    return param


def rounded(master: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Return the parameter of a master that is a copy: the nearest finite number, or infinity.

    Example:
        >>> rounded(jnp.array([1e6, 0.5, jnp.inf]), jnp.float16).tolist()
        [65504.0, 0.5, inf]
    """
    return narrowed(limit_finite(master, float(jnp.finfo(dtype).max)), dtype)


def masters(params: Any, state: Mapping[str, Any]) -> Any:
    """Return the float32 weights that the optimizer works on.

    For evaluation in full precision, and for export.

    Args:
        params: the parameters, as they go into `update`.
        state: the state of an optimizer in `master_weights`.

    Returns:
        A tree shaped like params: float32 for 16-bit parameters, the parameter itself for others.

    Raises:
        TypeError: if `state` is not a state of adamx.
        ValueError: if the state has no masters.

    Example:
        >>> import adamx, jax.numpy as jnp
        >>> tx = adamx.master_weights(adamx.sgd(2**-10))
        >>> params = jnp.ones(1, jnp.bfloat16)
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> masters(adamx.apply_updates(params, updates), state)
        Array([0.99902344], dtype=float32)
    """
    errors.check_state(state, "masters(params, state)")
    leaves = take_apart(params, None)
    names = [name for name in NAMES if name in state]
    if not names:
        raise ValueError(f"masters: the state has no masters, only {sorted(state)}")
    columns = [leaves.column(name, on_device(state[name])) for name in names]
    found = []
    for param, *own in zip(leaves.values, *columns, strict=True):
        slots = {name: x for name, x in zip(names, own, strict=True) if x is not None}
        found.append(None if param is None else joined(param, slots))
    return leaves.tree(found)
