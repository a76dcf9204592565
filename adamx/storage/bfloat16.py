"""Slots in 2 bytes each: bfloat16, rounded stochastically.

    stored = bfloat16(x), up or down with the probability that makes E[stored] = x

bfloat16 is the upper half of a float32: the same range, and 8 bits of precision.
`adamx.core.rounding` says why the rounding is stochastic.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from adamx.core.concept import Slots
from adamx.core.rounding import round_stochastically
from adamx.storage.storage import Storage


class bfloat16(Storage):
    """Store slots as bfloat16, rounded stochastically: any slots, of any optimizer.

    Attributes:
        inner: the concept that has the slots.
        only: the names of the slots to narrow; None means all. Slots of float64 or complex
            parameters stay as they are.
        nearest: True rounds to nearest instead. An average with a long memory then gets stuck: with
            decay 0.999 it changes by less than half a spacing at each step, stops at 0.25 of the
            true value, and the step becomes too long. A short memory, as in Adam's `mu`, is not
            harmed.

    Raises:
        ValueError: if `only` names a slot that `inner` does not have.

    Example:
        >>> import adamx, jax.numpy as jnp
        >>> tx = bfloat16(adamx.ema_of_squares(0.999))
        >>> state = tx.init(jnp.zeros(3))
        >>> for _ in range(3):
        ...     updates, state = tx.update(jnp.ones(3), state)
        >>> state["nu"].dtype
        dtype(bfloat16)
    """

    only: tuple[str, ...] | None = None
    nearest: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        slots = self.inner.slot_names()
        if self.only is not None:
            self._set(only=tuple(self.only))
        if unknown := sorted(set(self.only or ()) - set(slots)):
            raise ValueError(f"bfloat16: only names {unknown}, but the slots are {sorted(slots)}")

    def encode(self, slots: Slots, bits: Slots) -> Slots:
        return {name: self._narrowed(name, x, bits[name]) for name, x in slots.items()}

    def decode(self, stored: Slots) -> Slots:
        widened = jnp.float32
        return {n: x.astype(widened) if x.dtype == jnp.bfloat16 else x for n, x in stored.items()}

    def _narrowed(self, name: str, x: jax.Array, bits: jax.Array) -> jax.Array:
        if x.dtype != jnp.float32 or (self.only is not None and name not in self.only):
            return x
        if self.nearest:
            return x.astype(jnp.bfloat16)
        return round_stochastically(x, bits, jnp.bfloat16)
