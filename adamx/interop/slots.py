"""A state of adamx from another library's slots, and the checks of a composition before that.

state = {"count": t, recorded scalars after t steps, slot: the array found for each leaf's path}
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Set
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from adamx.core import lifting
from adamx.core.chain import chain
from adamx.core.concept import parts
from adamx.core.errors import describe
from adamx.core.foreign import named
from adamx.core.lifting import BEGAN, State, beginnings
from adamx.core.paths import flatten
from adamx.core.sharding import placed
from adamx.core.transformation import Transformation
from adamx.storage.moments import slot_of_kind
from adamx.storage.storage import Storage

Found = dict[str, dict[str, tuple[str, Any]]]
"""By slot and by the leaf's path: the array, with the place it was found at, for messages."""

_RATE = "learning_rate"


def check_plain(function: str, tx: Any) -> None:
    """Raise unless a state of `tx` consists of plain slots and of scalars known from the count."""
    if not isinstance(tx, Transformation):
        raise TypeError(
            f"{function}: tx must be the adamx transformation of the state, got {describe(tx)}: "
            f"the order is {function}(state, tx, params)"
        )
    for part in parts(tx):
        if isinstance(part, Storage):
            raise ValueError(
                f"{function}: tx must have float32 slots, got {type(part).__name__}: convert with "
                'moments="float32", and adapt_state(tx, params, state, saved_by=that) changes to '
                "this storage"
            )
        if isinstance(part, named) and (names := part.state_names()):
            raise ValueError(
                f"{function}: tx has an Optax stage whose state is stored under {names[0]!r}: "
                f"convert without it, and add its state as it is: state | {{{names[0]!r}: ...}}"
            )


def comes_before(tx: Transformation, first: type, second: type) -> bool:
    """Say whether a chain in a composition has one concept anywhere before another.

    Example:
        >>> import adamx
        >>> comes_before(adamx.amsgrad(0.1), adamx.bias_correction, adamx.running_max)
        True
    """
    chains = [[*map(type, part.stages)] for part in parts(tx) if isinstance(part, chain)]
    return any(first in kinds and second in kinds[kinds.index(first) :] for kinds in chains)


def assemble(
    function: str,
    source: str,
    tx: Transformation,
    params: Any,
    found: Found,
    count: int,
    given: Mapping[str, Any],
    late: Mapping[str, int] = MappingProxyType({}),
) -> State:
    """Return the state of `tx` after `count` steps, with the slots that were found.

    Args:
        function: the calling function, for messages.
        source: the origin of the slots, for messages.
        tx: the transformation to go on with.
        params: the parameters.
        found: the slots.
        count: the number of steps taken.
        given: recorded scalars that are known; the others are computed.
        late: the counts at which leaves began late, by path; those at `count` have start values.

    Raises:
        ValueError: if a slot is missing, is left over, or does not fit, or the count overflows.
    """
    if not 0 <= count < 2**31:
        raise ValueError(f"{function}: count must be in [0, 2^31), got {count}")
    shapes = jax.eval_shape(functools.partial(lifting.init, tx), params)
    own = {slot: slot_of_kind(slot, tx.tree_names()) or slot for slot in found}
    anew = {path for path, began in late.items() if began == count}
    first = lifting.init(tx, params) if anew else shapes
    left = {own[slot]: dict(leaves) for slot, leaves in found.items()}
    entries: State = {}
    for slot in tx.tree_names():
        paths, starts, treedef = flatten(first[slot])
        values = []
        for name, start in zip(paths, starts, strict=True):
            if start is None or name in anew:
                values.append(start)
                continue
            if name not in left.get(slot, {}):
                names = sorted(slot for slot, leaves in left.items() if leaves)
                has = f"only {names}" if names else "no slots"
                raise ValueError(
                    f"{function}: tx keeps {slot!r} of {name!r}, and {source} has {has}: "
                    f"give the transformation that made {source}; adapt_state(tx, params, state) "
                    "then adds other slots, such as masters or an average of the parameters"
                )
            values.append(_fitted(function, slot, name, *left[slot].pop(name), start))
        entries[slot] = treedef.unflatten(values)
    for slot, leaves in left.items():
        for name, (where, _) in leaves.items():
            raise ValueError(
                f"{function}: {where} is {slot!r} of {name!r}, which tx does not keep, only "
                f"{[*tx.tree_names()]}: give the transformation that made {source}, and the "
                "parameters of the same model"
            )
    scalars = {name: x for name, x in shapes.items() if name not in entries} | dict(given)
    computed = _after(tx, params, count, scalars.keys() - {_RATE, "count"} - given.keys())
    merged = computed | entries | dict(given)
    state = {name: merged[name] for name in shapes}
    return placed(state | _began(tx, params, count, late), tx, params)


def _fitted(function: str, slot: str, path: str, where: str, value: Any, start: Any) -> jax.Array:
    """Return an array in the slot's dtype; raise if it does not fit."""
    if not hasattr(value, "shape") or value.shape != start.shape:
        shape = list(jnp.shape(value)) if hasattr(value, "shape") else describe(value)
        raise ValueError(
            f"{function}: {where}, {slot!r} of {path!r}, has shape {shape} and has shape "
            f"{list(start.shape)} here: is it the state of another model, or a transposed array?"
        )
    if jnp.iscomplexobj(value) != jnp.issubdtype(start.dtype, jnp.complexfloating):
        raise ValueError(
            f"{function}: {where}, {slot!r} of {path!r}, is {value.dtype} and is {start.dtype} "
            "here: adamx averages the squared magnitude of a complex gradient, which is real; "
            "PyTorch's squares of its two parts cannot be converted: let the slot start anew, or "
            "train the two parts as two real arrays"
        )
    return jnp.asarray(value).astype(start.dtype)


def _began(tx: Transformation, params: Any, count: int, late: Mapping[str, int]) -> State:
    """Return the entry of leaves that began late, with what is recorded for them after their steps.

    Args:
        tx: the transformation.
        params: the parameters.
        count: the number of steps taken.
        late: the counts at which they began, by path.
    """
    entry: State = {}
    for number in sorted(set(late.values())):
        own = [path for path, began in late.items() if began == number]
        start = beginnings(tx, params, own, number)
        names = {name for scalars in start.values() for name in scalars}
        entry |= _after(tx, params, count, names - {_RATE, "count"}, start, number)[BEGAN]
    return {BEGAN: entry} if entry else {}


def _after(
    tx: Transformation,
    params: Any,
    count: int,
    others: Set[str],
    late: Mapping[str, Any] = MappingProxyType({}),
    began: int = 0,
) -> State:
    """Return count and recorded scalars after some steps, from a run on a tree without leaves.

    The learning rate needs only the last step; other scalars depend on all steps.

    Args:
        tx: the transformation.
        params: the parameters.
        count: the number of steps taken.
        others: the names of the recorded scalars but for the learning rate.
        late: entries of leaves that began late.
        began: the count at which the run begins.
    """
    nothing = jax.tree.map(lambda _: None, params)
    steps = count - began if others else min(count - began, 1)
    first = {BEGAN: dict(late)} if late else {}
    return _run(tx.for_tree(params), nothing, jnp.int32(count - steps), jnp.int32(steps), first)


@jax.jit
def _run(
    tx: Transformation, nothing: Any, start: jax.Array, steps: jax.Array, first: State
) -> State:
    def one(_: Any, state: State) -> State:
        return lifting.update(tx, nothing, state, nothing, {})[1]

    state = lifting.init(tx, nothing) | {"count": start} | first
    return jax.lax.fori_loop(0, steps, one, state)
