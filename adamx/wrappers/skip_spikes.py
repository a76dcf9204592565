"""Steps whose loss or gradient is far above those of the last steps are skipped.

    taken_t = x_t <= mean(x) + sigma * std(x),    x: the last `window` taken steps

for x = |g|, the norm of the whole gradient, and for x = the loss, if the caller passes it. One
batch of bad data would otherwise move the weights as far as hundreds of good ones, and stay in the
averages for as long. A loss or a norm that is not finite is a spike too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from adamx.core import errors
from adamx.core.checks import NonNegative, whole_number
from adamx.core.lifting import State
from adamx.core.norms import global_norm
from adamx.core.shard import Shard
from adamx.core.step import Step
from adamx.formula.expressions import Expr
from adamx.formula.symbols import Symbols
from adamx.formula.values import value_text
from adamx.wrappers.guard import guard

NORMS, LOSSES = "recent_norms", "recent_losses"
LOSS = "loss"


class skip_spikes(guard):
    """Skip each step whose loss or gradient norm is a spike beside those of the last steps.

    A spike is above the mean of the last `window` taken steps by more than `sigma` standard
    deviations. Nothing is skipped before half the window is filled, so put `skip_nonfinite` around
    it, which skips NaN from the first step on. The two, and a clip by the norm inside them, share
    one reading of the gradients.

    `update`, and the step that `make_step` returns, take the loss as `loss=`, a real scalar. It is
    optional, and has a history of its own; a step without it is judged by its gradient alone. On
    several devices it is the mean over all of them (`jax.lax.pmean` inside `shard_map`).

    In a skipped step the parameters, the slots, the count (and with it the schedules) and all
    recorded scalars stay as they are, bit for bit. The state counts it in `spikes` (int32, all so
    far) and `consecutive_spikes` (int32, 0 after a step that is no spike; it counts on after
    `max_consecutive`). `recent_norms` and `recent_losses` are the last taken values, newest first
    (float32 [window], 0 where there is none yet; a value that is 0 or not finite does not enter).
    To change `window` in the middle of a run, leave the two out of what `adapt_state` gets.

    Skipped values do not enter the history, so a lasting change of level, as when another kind of
    data begins, looks like a spike that never ends: without a limit no step is taken any more. With
    `max_consecutive` the new level enters after that many skipped steps, and within a few steps
    more is the usual one.

    Inside `accumulate` the loss is that of the last micro-batch. Around it each micro-batch is
    judged, and a bad one is left out.

    Attributes:
        tx: the whole optimizer, an adamx or Optax transformation.
        window: how many taken steps are remembered, >= 1.
        sigma: how many standard deviations above the mean a usual value is at most, >= 0.
        max_consecutive: how many steps in a row are skipped at most; then each is taken until a
            good one comes. None means no limit.

    Raises:
        TypeError: if `tx` is not a transformation or `window` not a whole number; at `update`, if
            `loss` is not a real scalar.
        ValueError: if `window` is below 1, `sigma` a number that is negative or not finite, or
            `max_consecutive` not a whole number >= 0.

    Example:
        The norms 1 and 3 have the mean 2 and the deviation 1, so that 4 is usual and 4.5 is not:

        >>> import adamx, jax.numpy as jnp
        >>> tx = skip_spikes(adamx.sgd(1.0), window=4, sigma=2.0)
        >>> state = tx.init(jnp.zeros(1))
        >>> for g in (1.0, 3.0, 4.5):
        ...     updates, state = tx.update(jnp.array([g]), state)
        >>> float(updates[0]), int(state["spikes"]), int(state["count"])
        (-0.0, 1, 2)
        >>> updates, state = tx.update(jnp.array([4.0]), state, loss=0.5)
        >>> float(updates[0]), state["recent_norms"], state["recent_losses"][0]
        (-4.0, Array([4., 3., 1., 0.], dtype=float32), Array(0.5, dtype=float32))
    """

    window: int = 128
    sigma: NonNegative = 6.0
    max_consecutive: int | None = None  # pyright: ignore

    counters: ClassVar[tuple[str, str]] = ("spikes", "consecutive_spikes")
    measures_norm = True  # pyright: ignore

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(window=whole_number("skip_spikes", "window", self.window))

    def start(self) -> State:
        empty = {name: jnp.zeros([self.window], jnp.float32) for name in (NORMS, LOSSES)}
        return super().start() | empty

    def judged(
        self, leaves: Sequence[jax.Array], shards: Sequence[Shard], step: Step
    ) -> tuple[jax.Array, State]:
        values = {NORMS: global_norm(leaves, shards), LOSSES: _loss(step.extra)}
        good, entered = jnp.array(True), {}
        for name, value in values.items():
            recent = errors.entry(step.state, name)
            errors.check_recorded(name, recent, jnp.zeros([self.window], jnp.float32))
            entered[name] = recent
            if value is not None:
                x = value.astype(recent.dtype)
                good &= _is_usual(x, recent, self.sigma)
                later = jnp.concatenate([x[None], recent[:-1]])
                entered[name] = jnp.where((x != 0) & jnp.isfinite(x), later, recent)
        return good, entered

    def formula(self, u: Expr, symbols: Symbols) -> Expr:
        symbols.remark(
            f"a step whose loss or |g_t| is above those of the last {self.window} by "
            f"{value_text(self.sigma)} standard deviations changes nothing"
        )
        return super().formula(u, symbols)


def _is_usual(x: jax.Array, recent: jax.Array, sigma: Any) -> jax.Array:
    """Say whether x is at most the mean of the last values and sigma deviations, or they are few.

    Only differences are computed, so that equal values have no deviation and none is a spike by
    rounding, in units of the largest, so that no square overflows. Those to NaN and infinity are
    NaN, and compare as False.
    """
    known = recent != 0
    number = jnp.sum(known, dtype=jnp.int32)
    apart = jnp.where(known, recent - x, 0)
    largest = jnp.max(jnp.abs(apart))
    unit = jax.lax.rsqrt(jnp.where(largest == 0, 1, largest))
    apart = apart * unit * unit  # 1 / 3e38 would be subnormal, and count as 0
    share = 1 / jnp.maximum(number, 1).astype(recent.dtype)
    mean = share * jnp.sum(apart)
    variance = share * jnp.sum(jnp.where(known, jnp.square(apart - mean), 0))
    return (2 * number < recent.size) | (mean + sigma * jnp.sqrt(variance) >= 0)


def _loss(extra: Mapping[str, Any]) -> jax.Array | None:
    """Return the loss as an array; None if the caller did not pass it."""
    loss = extra.get(LOSS)
    if loss is None:
        return None
    array = jnp.asarray(loss)
    real = jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)
    if array.shape or not real:
        raise TypeError(
            "skip_spikes: loss must be a real scalar, the loss of this step's batch, got "
            f"{errors.describe(array)}"
        )
    return array.astype(jnp.float32)
