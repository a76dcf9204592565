"""A state of adamx from slots that another library has kept, and what a composition is asked first.

state = {"count": t, recorded scalars after t steps, slot: what was found under each leaf's path}
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Set
from typing import Any

import jax
import jax.numpy as jnp

from adamx.core import lifting
from adamx.core.chain import chain
from adamx.core.concept import parts
from adamx.core.errors import describe
from adamx.core.foreign import named
from adamx.core.lifting import State
from adamx.core.paths import flatten
from adamx.core.transformation import Transformation
from adamx.storage.storage import Storage

Found = dict[str, dict[str, tuple[str, Any]]]
"""By slot and by the leaf's path: where the array was found, for messages, and the array."""

_RATE = "learning_rate"


def check_plain(function: str, tx: Any) -> None:
    """Raise unless a state of `tx` consists of plain slots and of scalars known from the count."""
    if not isinstance(tx, Transformation):
        raise TypeError(
            f"{function}: tx must be the adamx transformation whose state this is about, got {tx!r}"
        )
    for part in parts(tx):
        if isinstance(part, Storage):
            raise ValueError(
                f"{function}: tx must keep float32 slots, got {type(part).__name__}: convert with "
                'moments="float32", and adapt_state(tx, params, state) takes it to this storage'
            )
        if isinstance(part, named) and (names := part.state_names()):
            raise ValueError(
                f"{function}: tx holds a stage of Optax whose state stands under {names[0]!r}: "
                f"convert without that stage, and add its state as it is: state | {{{names[0]!r}: "
                "...}"
            )


def stands_before(tx: Transformation, first: type, second: type) -> bool:
    """Say whether in some chain of a composition a concept stands anywhere before another.

    Example:
        >>> import adamx
        >>> stands_before(adamx.amsgrad(0.1), adamx.bias_correction, adamx.running_max)
        True
    """
    for part in parts(tx):
        if isinstance(part, chain):
            kinds = [type(stage) for stage in part.stages]
            if first in kinds and second in kinds[kinds.index(first) :]:
                return True
    return False


def assemble(
    function: str,
    source: str,
    tx: Transformation,
    params: Any,
    found: Found,
    count: int,
    given: Mapping[str, Any],
) -> State:
    """Return the state of `tx` after `count` steps, with the slots that were found.

    Args:
        function: the function that asks, for messages.
        source: what the slots come from, for messages.
        tx: the transformation to go on with.
        params: the parameters.
        found: the slots.
        count: the steps taken.
        given: recorded scalars that are known; the others are computed.

    Raises:
        ValueError: if a slot is missing, is left over, or does not fit, or the count is no int32.
    """
    if not 0 <= count < 2**31:
        raise ValueError(f"{function}: count must be in [0, 2^31), got {count}")
    shapes = jax.eval_shape(functools.partial(lifting.init, tx), params)
    left = {slot: dict(leaves) for slot, leaves in found.items()}
    entries: State = {}
    for slot in tx.tree_names():
        paths, starts, treedef = flatten(shapes[slot])
        values = []
        for name, start in zip(paths, starts, strict=True):
            if start is None:
                values.append(None)
                continue
            if name not in left.get(slot, {}):
                raise ValueError(
                    f"{function}: tx keeps {slot!r} of {name!r}, and {source} has nothing of the "
                    f"kind{_instead(left)}: give the transformation that {source} was made by; "
                    "what it has not, such as masters or an average of the parameters, comes "
                    "afterwards, with adapt_state(tx, params, state)"
                )
            values.append(_fitted(function, slot, name, *left[slot].pop(name), start))
        entries[slot] = treedef.unflatten(values)
    for slot, leaves in left.items():
        for name, (where, _) in leaves.items():
            raise ValueError(
                f"{function}: {where} is {slot!r} of {name!r}, which tx does not keep, only "
                f"{[*tx.tree_names()]}: give the transformation that {source} was made by, and "
                "the parameters of the same model"
            )
    scalars = {name: x for name, x in shapes.items() if name not in entries} | dict(given)
    computed = _after(tx, params, count, scalars.keys() - {_RATE, "count"} - given.keys())
    merged = computed | entries | dict(given)
    return {name: merged[name] for name in shapes}


def _instead(left: Found) -> str:
    names = sorted(slot for slot, leaves in left.items() if leaves)
    return f", only {names}" if names else ""


def _fitted(function: str, slot: str, path: str, where: str, value: Any, start: Any) -> jax.Array:
    """Return an array in the dtype in which the slot is kept; raise where it does not fit."""
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
            "squares of its two parts, as PyTorch keeps them, cannot be converted: let the slot "
            "start anew, or train the two parts as two real arrays"
        )
    return jnp.asarray(value).astype(start.dtype)


def _after(tx: Transformation, params: Any, count: int, others: Set[str]) -> State:
    """Return count and recorded scalars after some steps: those of a run on no leaves at all.

    The learning rate is that of the last step; other scalars remember, and need all of them.
    """
    nothing = jax.tree.map(lambda _: None, params)
    steps = count if others else min(count, 1)
    return _run(tx.for_tree(params), nothing, jnp.int32(count - steps), jnp.int32(steps))


@jax.jit
def _run(tx: Transformation, nothing: Any, start: jax.Array, steps: jax.Array) -> State:
    def one(_: Any, state: State) -> State:
        return lifting.update(tx, nothing, state, nothing, {})[1]

    return jax.lax.fori_loop(0, steps, one, lifting.init(tx, nothing) | {"count": start})
