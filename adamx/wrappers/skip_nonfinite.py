"""Steps whose gradient is not finite are skipped.

    taken_t = every element of g_t is finite
    state_t, w_t = the optimizer's if taken_t, else state_{t-1}, w_{t-1}

One NaN would otherwise stay in both averages for ever. The optimizer's kernels select, and read and
write no more than without it; only g is read once more. No branch over the trees is compiled.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from adamx.core import errors
from adamx.core.arithmetic import compute_dtype, widen
from adamx.core.leaves import Leaves
from adamx.core.lifting import Between, State
from adamx.core.norms import sum_of_all_squares
from adamx.core.shard import Shard, check_alike
from adamx.core.step import Step
from adamx.core.wrapper import Wrapper
from adamx.formula.expressions import Expr
from adamx.formula.symbols import Symbols
from adamx.transforms.clip_by_global_norm import clip_by_global_norm

COUNTERS = ("skipped", "consecutive_skipped")


def all_finite(
    leaves: Sequence[jax.Array], before_clip: bool = False, shards: Sequence[Shard] = ()
) -> jax.Array:
    """Say whether no element of the leaves is NaN or infinite.

    Args:
        leaves: arrays in compute dtype.
        before_clip: whether a clip by the global norm comes next: then its sum of squares is used,
            so that both share one reading of the gradients, and one that overflows is not finite.
        shards: which shards of arrays they are; () if each is a whole one.

    Example:
        >>> print(all_finite([jnp.array([3e38, 3e38])]), all_finite([jnp.array([1.0, jnp.nan])]))
        True False
        >>> print(all_finite([jnp.array([1e20])], before_clip=True))
        False
    """
    # u - u is 0 or NaN. Not max: XLA's can drop NaN in large or sharded arrays, sums never do; and
    # not u * 0, which XLA:CPU would write to memory before it sums. One comparison, of the total: a
    # GPU would start a kernel for that of each array
    summed = leaves if before_clip else [u - u for u in leaves]
    return jnp.isfinite(sum_of_all_squares(summed, shards))


class skip_nonfinite(Wrapper):
    """Skip each step whose gradient has a NaN or an infinity.

    In such a step the parameters, the slots, the count (and with it the schedules) and all recorded
    scalars stay as they are, bit for bit. The state counts it in `skipped` (int32, all so far) and
    `consecutive_skipped` (int32, 0 after a finite gradient; it counts on after `max_consecutive`).

    Attributes:
        tx: the whole optimizer, an adamx or Optax transformation, clips included.
        max_consecutive: how many steps in a row are skipped at most; the next one is taken whatever
            its gradient, so that the parameters become NaN and the trouble visible, as in
            `optax.apply_if_finite`. None means no limit.

    Raises:
        TypeError: if `tx` is not a transformation.
        ValueError: if `max_consecutive` is not a whole number >= 0.

    Example:
        >>> import adamx, jax.numpy as jnp
        >>> tx = skip_nonfinite(adamx.sgd(0.5))
        >>> state = tx.init(jnp.zeros(2))
        >>> updates, state = tx.update(jnp.array([1.0, jnp.inf]), state)
        >>> bool((updates == 0).all()), int(state["count"]), int(state["skipped"])
        (True, 0, 1)
        >>> tx.update(jnp.array([1.0, 2.0]), state)[0]
        Array([-0.5, -1. ], dtype=float32)
    """

    max_consecutive: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        limit = self.max_consecutive
        if limit is not None and not (isinstance(limit, numbers.Integral) and limit >= 0):
            raise ValueError(
                "skip_nonfinite: max_consecutive must be a whole number >= 0 or None, "
                f"got {limit!r}"
            )
        self._set(max_consecutive=None if limit is None else int(limit))

    def start(self) -> State:
        return {name: jnp.zeros([], jnp.int32) for name in COUNTERS}  # two buffers to donate

    def update_tree(self, leaves: Leaves, step: Step) -> tuple[Leaves, State]:
        pairs = [(u, s) for u, s in zip(leaves.values, leaves.shards, strict=True) if u is not None]
        present = [widen(u, compute_dtype(u.dtype)) for u, _ in pairs]
        heads = [p for s in self.inner.segments()[:1] for p in (s, *s.children[:1])]
        before_clip = any(isinstance(p, clip_by_global_norm) for p in heads)
        finite = all_finite(present, before_clip, [shard for _, shard in pairs])
        skipped, in_a_row = (errors.counter(step.state, name) for name in COUNTERS)
        check_alike(COUNTERS[0], skipped, finite)
        given_up = False if self.max_consecutive is None else in_a_row >= self.max_consecutive
        taken = finite | given_up
        leaves, entries = self.run(leaves, step.only_if(taken))
        counts = jnp.where(taken, skipped, skipped + 1), jnp.where(finite, 0, in_a_row + 1)
        counts = step.select(counts, (skipped, in_a_row))
        return leaves, entries | dict(zip(COUNTERS, counts, strict=True))

    def between(self) -> Between | None:
        found = self.inner_between()
        return found and found._replace(always_counts=False)

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        symbols.remark("a step whose gradient is not finite changes nothing")
        return super().formula(u, symbols)
