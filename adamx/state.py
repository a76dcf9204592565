"""Carrying a saved state over a change of configuration.

    adapted[path] = saved[path] where it is there, the start value otherwise

The state is a flat dict of named slots, in which stages without memory have no entry: a schedule,
a mask or a decay changes nothing in it. What does change it (another slot, a frozen leaf, another
dtype) is matched here by path, so that the containers a checkpoint gives back do not matter.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from adamx.core.errors import describe
from adamx.core.lifting import State
from adamx.core.paths import flatten, leaves_by_path
from adamx.core.transformation import Transformation


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """What `adapt_state` did; prints as a sentence or two.

    Attributes:
        filled: paths in the state that were not saved and got their start values.
        dropped: paths that were saved and have no place in the state.
    """

    filled: tuple[str, ...]
    dropped: tuple[str, ...]

    def __str__(self) -> str:
        if not self.filled and not self.dropped:
            return "adapt_state: everything was carried over."
        said = [f"filled in {len(self.filled)}: {_some(self.filled)}."] if self.filled else []
        said += [f"dropped {len(self.dropped)}: {_some(self.dropped)}."] if self.dropped else []
        return "adapt_state: " + " ".join(said)


def _some(paths: tuple[str, ...]) -> str:
    return ", ".join(paths[:8]) + (", ..." if len(paths) > 8 else "")


def adapt_state(tx: Transformation, params: Any, saved: Any) -> tuple[State, Adaptation]:
    """Return the state that `tx` needs, with everything that `saved` has of it.

    Leaves are matched by path ("mu/dense/kernel") and cast to the dtype that `tx` keeps them in.
    The count and the recorded scalars come along, so that a schedule goes on where it was.

    Args:
        tx: the transformation to go on with.
        params: the parameters, as for `tx.init`.
        saved: a state of another composition, or the same in the containers of a checkpoint.

    Returns:
        The state, and what was filled in and dropped.

    Raises:
        TypeError: if `saved` has no `count`, so that it is no state of adamx.
        ValueError: if a saved leaf has another shape than the parameter's slot, or is complex
            where that is real, as those of another model would.

    Example:
        >>> import adamx
        >>> params = {"w": jnp.ones(2)}
        >>> saved = adamx.momentum(0.1).init(params)
        >>> state, adaptation = adapt_state(adamx.adam(0.1), params, saved)
        >>> print(adaptation)
        adapt_state: filled in 1: nu/w.
    """
    old = leaves_by_path(saved)
    if "count" not in old:
        raise TypeError(
            "adapt_state: saved must be a state of adamx, with 'count' at the top, "
            f"got {describe(saved)} with {sorted(old)[:4]}"
        )
    names, starts, treedef = flatten(tx.init(params))
    leaves, filled = [], []
    for name, start in zip(names, starts, strict=True):
        if start is None:
            leaves.append(None)
            continue
        if name not in old:
            filled.append(name)
            leaves.append(start)
            continue
        value = old.pop(name)
        if jnp.shape(value) != start.shape:
            raise ValueError(
                f"adapt_state: {name!r} was saved with shape {list(jnp.shape(value))} and has "
                f"shape {list(start.shape)} here: is it the state of another model?"
            )
        value = jnp.asarray(value)
        if jnp.iscomplexobj(value) and not jnp.iscomplexobj(start):
            raise ValueError(
                f"adapt_state: {name!r} was saved as {value.dtype} and is {start.dtype} here: is "
                "it the state of another model?"
            )
        leaves.append(value if value.dtype == start.dtype else value.astype(start.dtype))
    return treedef.unflatten(leaves), Adaptation(tuple(filled), tuple(sorted(old)))
