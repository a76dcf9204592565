"""Guards: wrappers that skip a step unless its gradient, or its loss, is good.

    taken_t = good_t or too many steps in a row have been skipped
    state_t, w_t = the optimizer's if taken_t, else state_{t-1}, w_{t-1}

The optimizer's kernels select, and read and write no more than without it; only g is read once
more. No branch over the trees is compiled.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp

from adamx.core import errors
from adamx.core.arithmetic import compute_dtype, widen
from adamx.core.leaves import Leaves
from adamx.core.lifting import Between, State
from adamx.core.shard import Shard, check_alike
from adamx.core.step import Step
from adamx.core.wrapper import Wrapper


class guard(Wrapper):
    """The base of `skip_nonfinite` and `skip_spikes`: subclass it and define `judged`.

    Attributes:
        tx: the whole optimizer, an adamx or Optax transformation.
        counters: the state's names for the number of bad steps: all that were skipped, and those
            since the last good one.
    """

    if TYPE_CHECKING:  # each subclass says where it stands among its arguments
        max_consecutive: ClassVar[int | None]

    counters: ClassVar[tuple[str, str]] = ("", "")

    def __post_init__(self) -> None:
        super().__post_init__()
        limit = self.max_consecutive
        if limit is not None and not (isinstance(limit, numbers.Integral) and limit >= 0):
            raise ValueError(
                f"{type(self).__name__}: max_consecutive must be a whole number >= 0 or None, "
                f"got {limit!r}"
            )
        self._set(max_consecutive=None if limit is None else int(limit))

    def start(self) -> State:
        return {name: jnp.zeros([], jnp.int32) for name in self.counters}  # buffers to donate

    def judged(
        self, leaves: Sequence[jax.Array], shards: Sequence[Shard], step: Step
    ) -> tuple[jax.Array, State]:
        """Say whether a step is good, and return the entries that change if it is taken.

        Args:
            leaves: the updates of the whole tree, in compute dtype.
            shards: which shards of arrays they are.
            step: the step.
        """
        raise NotImplementedError

    def update_tree(self, leaves: Leaves, step: Step) -> tuple[Leaves, State]:
        pairs = [(u, s) for u, s in zip(leaves.values, leaves.shards, strict=True) if u is not None]
        present = [widen(u, compute_dtype(u.dtype)) for u, _ in pairs]
        good, entered = self.judged(present, [shard for _, shard in pairs], step)
        skipped, in_a_row = (errors.counter(step.state, name) for name in self.counters)
        check_alike(self.counters[0], skipped, good)
        given_up = False if self.max_consecutive is None else in_a_row >= self.max_consecutive
        taken = good | given_up
        inside = step.only_if(taken)
        leaves, entries = self.run(leaves, inside)
        counts = jnp.where(taken, skipped, skipped + 1), jnp.where(good, 0, in_a_row + 1)
        counts = step.select(counts, (skipped, in_a_row))
        entered = inside.select(entered, {name: step.state[name] for name in entered})
        return leaves, entries | entered | dict(zip(self.counters, counts, strict=True))

    def between(self) -> Between | None:
        found = self.inner_between()
        return found and found._replace(always_counts=False)
