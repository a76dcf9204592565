"""A step whose gradient is not finite is no step.

    taken_t = every element of g_t is finite
    state_t, w_t = the optimizer's where taken_t, else state_{t-1}, w_{t-1}

One NaN would otherwise stay in both averages for ever. The selection happens inside the kernels of
the optimizer, which read and write what they do anyway; only g is read once more. No branch over
the trees is compiled.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adamx.core import errors, lifting
from adamx.core.arithmetic import compute_dtype, widen
from adamx.core.expressions import Expr
from adamx.core.foreign import as_concept
from adamx.core.formula import Symbols
from adamx.core.lifting import Leaves, State
from adamx.core.step import Step
from adamx.core.transformation import Transformation
from adamx.transforms.clip_by_global_norm import clip_by_global_norm, sum_of_all_squares

COUNTERS = ("skipped", "consecutive_skipped")


def all_finite(leaves: Sequence[jax.Array], before_clip: bool = False) -> jax.Array:
    """Say whether no element of the leaves is NaN or infinite.

    A sum is finite only where all elements are (inf - inf is NaN); where it is not, one looks.

    Args:
        leaves: arrays in compute dtype.
        before_clip: whether a clip by the global norm comes next: its sum of squares serves as
            well, so that both share one reading of the gradients.

    Example:
        >>> print(all_finite([jnp.array([3e38, 3e38])]), all_finite([jnp.array([1.0, jnp.nan])]))
        True False
    """

    def look() -> jax.Array:
        # not a maximum: that of large or sharded arrays overlooks NaN, a sum nowhere; and not
        # u * 0, which XLA:CPU would write to memory before it sums
        return jnp.array([jnp.sum(u - u) == 0 for u in leaves]).all()

    if before_clip:
        total = sum_of_all_squares(leaves)
    else:  # a sum as it stands: XLA:CPU would write squares, or magnitudes, to memory first
        dtype = compute_dtype(*(u.dtype for u in leaves))
        sums = [jnp.sum(u).astype(dtype) for u in leaves]
        total = sum(sums, start=jnp.zeros([], dtype))
    return jax.lax.cond(jnp.isfinite(total), lambda: jnp.array(True), look)


class skip_nonfinite(Transformation):
    """Leave everything as it is in a step whose gradient holds a NaN or an infinity.

    In such a step the parameters, the slots, the count and with it the schedules, and all recorded
    scalars stay what they are, bit for bit; the state counts it in `skipped` (int32, all so far)
    and `consecutive_skipped` (int32, 0 after a finite gradient; it counts on when the guard has
    given up).

    Attributes:
        tx: the whole optimizer, an adamx or Optax transformation, clips included.
        max_consecutive: how many steps in a row are skipped; the next one is taken whatever its
            gradient, which makes the parameters NaN and the trouble visible, as in
            `optax.apply_if_finite`. None means that all are skipped.

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

    tx: optax.GradientTransformation
    max_consecutive: int | None = None

    holds_trees = True
    stands_alone = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "tx", as_concept(self.tx, "skip_nonfinite: tx"))
        limit = self.max_consecutive
        if limit is not None and not (isinstance(limit, numbers.Integral) and limit >= 0):
            raise ValueError(
                "skip_nonfinite: max_consecutive must be a whole number >= 0 or None, "
                f"got {limit!r}"
            )
        object.__setattr__(self, "max_consecutive", None if limit is None else int(limit))

    @property
    def leafwise(self) -> bool:
        return False

    def tree_names(self) -> tuple[str, ...]:
        return self.children[0].tree_names()

    def state_names(self) -> tuple[str, ...]:
        return (*self.children[0].state_names(), *COUNTERS)

    def init_tree(self, leaves: Leaves) -> State:
        entries = (segment.init_tree(leaves) for segment in self.children[0].segments())
        counters = {name: jnp.zeros([], jnp.int32) for name in COUNTERS}  # two buffers to donate
        return lifting.disjoint(*entries, counters)

    def update_tree(self, leaves: Leaves, step: Step, last: bool) -> tuple[Leaves, State]:
        present = [widen(u, compute_dtype(u.dtype)) for u in leaves.values if u is not None]
        heads = [p for s in self.children[0].segments()[:1] for p in (s, *s.children[:1])]
        finite = all_finite(present, any(isinstance(p, clip_by_global_norm) for p in heads))
        skipped, in_a_row = (errors.counter(step.state, name) for name in COUNTERS)
        given_up = False if self.max_consecutive is None else in_a_row >= self.max_consecutive
        taken = finite | given_up
        inner = step.only_if(taken)
        leaves, entries = lifting.run(self.children[0], leaves, inner, narrow=last)
        counts = jnp.where(taken, skipped, skipped + 1), jnp.where(finite, 0, in_a_row + 1)
        counts = step.kept(counts, (skipped, in_a_row))
        return leaves, lifting.counted(entries, inner) | dict(zip(COUNTERS, counts, strict=True))

    def reveal_tree(self, state: Mapping[str, Any]) -> State:
        return lifting.disjoint(*(s.reveal_tree(state) for s in self.children[0].segments()))

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        symbols.remark("a step whose gradient is not finite changes nothing")
        return self.children[0].formula(u, symbols)
