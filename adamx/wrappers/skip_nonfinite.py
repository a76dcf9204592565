"""Steps whose gradient is not finite are skipped.

    taken_t = every element of g_t is finite
    state_t, w_t = the optimizer's if taken_t, else state_{t-1}, w_{t-1}

One NaN would otherwise stay in both averages for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

from adamx.core.lifting import State
from adamx.core.norms import sum_of_all_squares
from adamx.core.shard import Shard
from adamx.core.step import Step
from adamx.formula.expressions import Expr
from adamx.formula.symbols import Symbols
from adamx.wrappers.guard import guard


def all_finite(
    leaves: Sequence[jax.Array], before_norm: bool = False, shards: Sequence[Shard] = ()
) -> jax.Array:
    """Say whether no element of the leaves is NaN or infinite.

    Args:
        leaves: arrays in compute dtype.
        before_norm: whether the norm of the tree is needed next: then its sum of squares is used,
            so that both share one reading of the gradients, and one that overflows is not finite.
        shards: which shards of arrays they are; () if each is a whole one.

    Example:
        >>> print(all_finite([jnp.array([3e38, 3e38])]), all_finite([jnp.array([1.0, jnp.nan])]))
        True False
        >>> print(all_finite([jnp.array([1e20])], before_norm=True))
        False
    """
    # u - u is 0 or NaN. Not max: XLA's can drop NaN in large or sharded arrays, sums never do; and
    # not u * 0, which XLA:CPU would write to memory before it sums. One comparison, of the total: a
    # GPU would start a kernel for that of each array
    summed = leaves if before_norm else [u - u for u in leaves]
    return jnp.isfinite(sum_of_all_squares(summed, shards))


class skip_nonfinite(guard):
    """Skip each step whose gradient has a NaN or an infinity.

    In such a step the parameters, the slots, the count (and with it the schedules) and all recorded
    scalars stay as they are, bit for bit. The state counts it in `skipped` (int32, all so far) and
    `consecutive_skipped` (int32, 0 after a finite gradient; it counts on after `max_consecutive`).

    Attributes:
        tx: the whole optimizer, an adamx or Optax transformation, clips included.
        max_consecutive: how many steps in a row are skipped at most; then each is taken until a
            good one comes. None means no limit. The parameters then become NaN and the trouble
            visible, as in `optax.apply_if_finite`.

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

    max_consecutive: int | None = None  # pyright: ignore

    counters: ClassVar[tuple[str, str]] = ("skipped", "consecutive_skipped")

    def judged(
        self, leaves: Sequence[jax.Array], shards: Sequence[Shard], step: Step
    ) -> tuple[jax.Array, State]:
        return all_finite(leaves, self.inner.measures_norm, shards), {}

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        symbols.remark("a step whose gradient is not finite changes nothing")
        return super().formula(u, symbols)
