"""The kernel of one leaf, and what all leaves share in a step.

    slots_t = accumulate(u, slots_{t-1}),    u' = emit(u, slots_t)

A kernel is traced once for each (shape, dtype), whatever the number of leaves. Scalars common to
all leaves (1 - b^t, the learning rate) are computed once a step, outside the kernels.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from adamx.core.arithmetic import (
    compute_dtype,
    divided_like,
    is_inexact,
    narrowed,
    real_times_complex,
    widen,
)
from adamx.core.concept import Concept, Scalars, Slots, accumulated, emitted, hook, scalars_of
from adamx.core.shard import Shard
from adamx.core.step import LeafStep, Step
from adamx.core.value import as_pytree


class Now(NamedTuple):
    """The step as all leaves see it that began together.

    Attributes:
        step: the step.
        leaves: the updates of the whole tree.
        known: the scalars of the concepts that have been asked for.
        of_tree: those that were read off the tree, for leaves of all ages.
    """

    step: Step
    leaves: Sequence[jax.Array]
    known: dict[Any, Scalars]
    of_tree: dict[Any, Any]

    def scalars(self, tx: Concept) -> Scalars:
        """Return the scalars of a concept and its children."""
        return scalars_of(tx, self.step, self.leaves, self.known, self.of_tree)


class Variant:
    """The scalars, kernel and shapes of slots of all leaves with the same variant of a concept."""

    def __init__(self, tx: Concept, now: Now, kernels: dict[Any, Any] | None = None) -> None:
        """Make the kernel, or take one that does the same for a leaf of another age."""
        self.scalars: Scalars = now.scalars(tx)
        self.kernel: Callable[..., tuple[jax.Array, Slots]]
        if kernels is None:
            self.kernel = leaf_kernel(tx, now.step, self.scalars)
        else:
            self.kernel = _shared_kernel(tx, now.step, self.scalars, kernels)
        self.slots_like: Callable[[jax.Array], dict[str, jax.ShapeDtypeStruct]] = slots_like(tx)


def _shared_kernel(
    tx: Concept, step: Step, scalars: Scalars, kernels: dict[Any, Any]
) -> Callable[..., tuple[jax.Array, Slots]]:
    """Return the kernel of a leaf that began late: one is traced for leaves of all such ages."""
    flat, treedef = jax.tree.flatten(scalars)
    fixed = tuple(x if isinstance(x, numbers.Number) else None for x in flat)
    arrays = [x for x, number in zip(flat, fixed, strict=True) if number is None]
    key = tx, treedef, fixed
    if key not in kernels:

        def kernel(count: jax.Array, arrays: list[jax.Array], *leaf: Any) -> Any:
            rest = iter(arrays)
            own = treedef.unflatten([next(rest) if x is None else x for x in fixed])
            return leaf_kernel(tx, dataclasses.replace(step, count=count), own)(*leaf)

        kernels[key] = jax.jit(kernel, static_argnums=(5, 6))
    return functools.partial(kernels[key], step.count, arrays)


def slots_like(tx: Concept) -> Callable[[jax.Array], dict[str, jax.ShapeDtypeStruct]]:
    """Return the function that gives the shapes of a concept's slots for a parameter."""
    start = functools.partial(hook, tx, "slots")
    cached = functools.cache(lambda *like: jax.eval_shape(start, jax.ShapeDtypeStruct(*like)))
    return lambda param: cached(param.shape, param.dtype)


def leaf_kernel(
    tx: Concept, step: Step, scalars: Scalars
) -> Callable[..., tuple[jax.Array, Slots]]:
    """Return the function of one leaf: widen, accumulate, store, emit from the stored slots.

    In a skipped step the kernel writes the old slots back, which needs no extra copy.
    """
    as_stored = frozenset(tx.stored_names())

    @functools.partial(jax.jit, static_argnums=(3, 4))
    def kernel(
        u: jax.Array, slots: Slots, param: jax.Array | None, came: Any, shard: Shard
    ) -> tuple[jax.Array, Slots]:
        u, param = divided_like(slots.values(), u, param)
        present = [x for x in (u, param, *slots.values()) if x is not None and is_inexact(x)]
        compute = compute_dtype(*(x.dtype for x in present))
        wide = functools.partial(widen, compute=compute)

        def seen(slots: Slots) -> Slots:
            return {name: x if name in as_stored else wide(x) for name, x in slots.items()}

        concept = jax.tree.map(wide, as_pytree(tx)).tx
        own, inner = jax.tree.map(wide, scalars)
        u, param, old = wide(u), jax.tree.map(wide, param), seen(slots)
        here = LeafStep(step.count, own, inner, old, param, came, shard)
        with real_times_complex(compute):
            new = accumulated(concept, u, old, here)
            new = {name: narrowed(x, slots[name].dtype) for name, x in new.items()}
            stored = slots | step.select(new, {name: slots[name] for name in new})
            out = emitted(concept, u, seen(stored), here)
        return step.emitted(out.astype(compute)), stored

    return kernel
