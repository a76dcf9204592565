"""Adam's two moments in 4 bytes: one uint32 per element.

    bit  31 ... 24   23 ... 16   15     14 ... 7   6 ... 0
         v's         v's         m's    m's        m's
         exponent    8 bits      sign   exponent   7 bits

m is a bfloat16. v is never negative and needs no sign, so it gets one more bit of precision. Both
have float32's range and are rounded stochastically (`adamx.core.rounding`); since the averages are
linear, they stay unbiased.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamx.core.concept import Slots
from adamx.core.rounding import bits_of, from_bits
from adamx.storage.storage import Storage

_LARGEST = float(jnp.finfo(jnp.bfloat16).max)
_HIGH = np.uint32(0xFFFF0000)


class packed16(Storage):
    """Store `mu` and `nu` as one uint32 per element: 4 bytes per parameter where Adam needs 8.

    Other slots stay as they are.

    Attributes:
        inner: the concept with the slots `mu` and `nu`, such as `scale_by_adam()`; `nu` is never
            negative.
        name: the slot of the words: uint32, shaped like the parameter.

    Raises:
        ValueError: if `inner` does not have `mu` and `nu`.
        TypeError: at `init`, for float64 or complex parameters: their moments are not float32.

    Example:
        >>> import adamx, jax.numpy as jnp
        >>> tx = packed16(adamx.scale_by_adam(eps=0.0))
        >>> updates, state = tx.update(jnp.array([4.0, -8.0]), tx.init(jnp.zeros(2)))
        >>> updates.round(1), state["moments"].dtype
        (Array([ 1., -1.], dtype=float32), dtype('uint32'))
    """

    name: str = "moments"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pair(self)

    def encode(self, slots: Slots, bits: Slots) -> Slots:
        mu, nu = pair(self, slots)
        # one word of noise for both, since each is right on average; no noise if one of them is
        # too large for it or not finite
        fits = jnp.maximum(jnp.abs(mu), nu) < _LARGEST
        half = jnp.full_like(bits["mu"], 16)
        noise = (bits["mu"] >> half) * fits.astype(jnp.uint32)
        low = (bits_of(mu) + noise) >> half
        high = ((bits_of(nu) + (noise >> 1)) << 1) & _HIGH  # a NaN's sign is shifted out
        return others(slots) | {self.name: high | low}

    def decode(self, stored: Slots) -> Slots:
        word = stored[self.name]
        half = jnp.full_like(word, 16)
        mu, nu = from_bits(word << half), from_bits((word >> half) << 15)
        return {n: x for n, x in stored.items() if n != self.name} | {"mu": mu, "nu": nu}


def check_pair(storage: Any) -> None:
    """Raise unless the concept inside a storage of two moments has both."""
    slots = storage.inner.slot_names()
    if not {"mu", "nu"} <= set(slots):
        name = type(storage).__name__
        raise ValueError(
            f"{name}: stores mu and nu, Adam's two moments, in one word, but the slots here are "
            f"{sorted(slots)}: bfloat16 stores any slots, in 2 bytes each"
        )


def pair(storage: Any, slots: Slots) -> tuple[jax.Array, jax.Array]:
    """Return mu and nu; raise unless they are float32."""
    for name in ("mu", "nu"):
        if slots[name].dtype != jnp.float32:
            raise TypeError(
                f"{type(storage).__name__}: packs float32 moments, but {name} of a parameter of "
                f"this dtype, or of a gradient without its parameter, is {slots[name].dtype}: use "
                'moments="float32" for float64 and complex parameters; for such gradients of '
                "float32 parameters call update(grads, state, params)"
            )
    return slots["mu"], slots["nu"]


def others(slots: Slots) -> Slots:
    """Return the slots that are not packed."""
    return {name: x for name, x in slots.items() if name not in ("mu", "nu")}
