"""The current step: as the tree sees it, and as one leaf sees it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from adamx.core.shard import WHOLE, Shard


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of the whole tree: the argument of `scalars`, `tree_scalars` and `update_tree`.

    Attributes:
        count: int32 scalar, t in the papers: 1 in the first step.
        state: the whole state before this step, with the changes already made by earlier segments
            of the chain; empty before the first step.
        extra: the extra keyword arguments of `update`.
        taken: a bool scalar. False means: skip this step; slots and scalars keep their old values
            and the updates are zero. None means that the step is taken, and nothing is selected.
        shards: which shards of arrays the leaves of `tree_scalars` are, for `global_norm`.
        began: for a leaf that began late, an int32 scalar: the steps taken before it began. Then
            `count` is the leaf's own, and schedules still get the count of the run. None for all
            other leaves.
    """

    count: jax.Array
    state: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    taken: jax.Array | None = None
    shards: tuple[Shard, ...] = ()
    began: jax.Array | None = None

    def since(self, beginning: Mapping[str, Any]) -> Step:
        """Return the step as a leaf sees it that began late.

        Args:
            beginning: the leaf's entry in `state["began"]`: the count at which it began, and the
                leaf's own recorded scalars.
        """
        began = beginning["count"]
        age = self.count - began
        own = {**self.state, **beginning, "count": age}
        return dataclasses.replace(self, count=age, state=own, began=began)

    def of_run(self) -> Step:
        """Return the step with the count of the whole run, for what reads all leaves."""
        if self.began is None:
            return self
        return dataclasses.replace(self, count=self.count + self.began, began=None)

    def only_if(self, taken: jax.Array) -> Step:
        """Return the same step, skipped unless `taken` is True as well."""
        both = taken if self.taken is None else self.taken & taken
        return dataclasses.replace(self, taken=both)

    def select(self, new: Any, old: Any) -> Any:
        """Return the new values if the step is taken, the old ones if it is skipped.

        Args:
            new: a tree of arrays.
            old: a tree like it.
        """
        taken = self.taken
        if taken is None:
            return new
        return jax.tree.map(lambda a, b: jnp.where(taken, a, b), new, old)

    def in_place_of(self, old: Any, new: Any) -> Any:
        """Select new values that do not depend on the old ones, which are read all the same.

        XLA leaves out an argument that nothing reads, and a result that takes no argument's place
        is elsewhere in each step. A GPU then has to be told so for every kernel, which is a quarter
        of the time of a step of 150 small arrays. The count is never below 0.

        Args:
            old: a tree of arrays in the state.
            new: a tree like it.
        """
        if self.taken is None and isinstance(self.count, Tracer):
            return dataclasses.replace(self, taken=self.count >= 0).select(new, old)
        return self.select(new, old)

    def emitted(self, update: jax.Array) -> jax.Array:
        """Return an outgoing update, or -0 in a skipped step: p + (-0) is p, even for p = -0."""
        return update if self.taken is None else self.select(update, -jnp.zeros_like(update))


@dataclasses.dataclass(frozen=True)
class LeafStep:
    """One step of one leaf: the argument of `accumulate` and `emit`.

    Attributes:
        count: int32 scalar, t in the papers: 1 in the first step.
        scalars: the result of this concept's own `scalars` or `tree_scalars`; floating-point
            scalars have the (real) compute dtype of the leaf.
        inner: the same for its children, for `child`.
        old: the leaf's slots before this step, in compute dtype.
        param: the parameter in compute dtype; None if `update` was called without params.
        grad_dtype: the gradient's dtype before widening.
        shard: which shard of an array the leaf is, inside `in_shard_map`.

    Example:
        >>> import adamx, jax.numpy as jnp
        >>> class of_two_steps(adamx.Transformation):
        ...     def slots(self, param):
        ...         return {"last": adamx.zeros(param)}
        ...     def accumulate(self, u, slots, step):
        ...         return {"last": u}
        ...     def emit(self, u, slots, step):
        ...         return (u + step.old["last"]) / 2
        >>> tx = of_two_steps()
        >>> _, state = tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))
        >>> tx.update(jnp.array([2.0]), state)[0]
        Array([3.], dtype=float32)
    """

    count: jax.Array
    scalars: Any
    inner: tuple[Any, ...]
    old: dict[str, jax.Array]
    param: jax.Array | None
    grad_dtype: Any
    shard: Shard = WHOLE

    def child(self, index: int) -> LeafStep:
        """Return the step as the child concept number `index` sees it."""
        scalars, inner = self.inner[index]
        return dataclasses.replace(self, scalars=scalars, inner=inner)

    def needs_param(self, concept: Any) -> jax.Array:
        """Return the parameter; raise ValueError with the concept's name if there is none."""
        if self.param is None:
            name = type(concept).__name__
            raise ValueError(f"{name}: needs the parameters: update(updates, state, params)")
        return self.param
