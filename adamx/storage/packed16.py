"""Adam's two moments in 4 bytes: one uint32 per element.

    bit  31 ... 24   23 ... 16   15     14 ... 7   6 ... 0
         v's         v's         m's    m's        m's
         exponent    8 bits      sign   exponent   7 bits

m is a bfloat16. v is never negative and needs no sign, so it gets one more bit of precision. Both
have float32's range and are rounded stochastically (`adamx.core.rounding`); since the averages are
linear, they stay unbiased.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from adamx.core.concept import Slots
from adamx.core.rounding import bits_of, from_bits
from adamx.storage.pair import Pair

_LARGEST = float(jnp.finfo(jnp.bfloat16).max)
_HIGH = np.uint32(0xFFFF0000)


class packed16(Pair):
    """Store `mu` and `nu` as one uint32 per element: 4 bytes per parameter where Adam needs 8.

    Other slots stay as they are.

    Attributes:
        inner: the concept with the slots `mu` and `nu`, such as `scale_by_adam()`; `nu` is never
            negative. Slots whose names go on after that, as `nu_deviation` does, will do.
        name: the slot of the words: uint32, shaped like the parameter. None means the format's
            name, and what follows mu and nu: "packed16", "packed16_deviation".

    Raises:
        ValueError: if `inner` does not have `mu` and `nu`.
        TypeError: at `init`, for float64 or complex parameters: their moments are not float32.

    Example:
        >>> import adamx, jax.numpy as jnp
        >>> tx = packed16(adamx.scale_by_adam(eps=0.0))
        >>> updates, state = tx.update(jnp.array([4.0, -8.0]), tx.init(jnp.zeros(2)))
        >>> updates.round(1), state["packed16"].dtype
        (Array([ 1., -1.], dtype=float32), dtype('uint32'))
    """

    name: str | None = None

    def encode(self, slots: Slots, bits: Slots) -> Slots:
        mu, nu = self.pair(slots)
        # one word of noise for both, since each is right on average; no noise if one of them is
        # too large for it or not finite
        fits = jnp.maximum(jnp.abs(mu), nu) < _LARGEST
        noise = bits[self._two[0]]
        half = jnp.full_like(noise, 16)
        noise = (noise >> half) * fits.astype(jnp.uint32)
        low = (bits_of(mu) + noise) >> half
        high = ((bits_of(nu) + (noise >> 1)) << 1) & _HIGH  # a NaN's sign is shifted out
        return self.packed(slots, high | low)

    def decode(self, stored: Slots) -> Slots:
        word = stored[self.word]
        half = jnp.full_like(word, 16)
        mu, nu = from_bits(word << half), from_bits((word >> half) << 15)
        return self.unpacked(stored, mu, nu)
