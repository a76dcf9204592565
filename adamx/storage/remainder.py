"""A float32 number as a bfloat16 and a remainder: exactly, in 2 + 2 bytes.

    rest = bits mod 2^16                from -2^15 to 2^15 - 1: the low half, read as an int16
    high = (bits - rest) >> 16          the nearest bfloat16, ties away from zero
    bits = (high << 16) + rest

With ties to even it could not be exact: 65537 float32 numbers round to the bfloat16 0x3f80, one
more than an int16 has values. With ties away from zero, each bfloat16 gets 65536. float16 has no
such remainder: 8.6e8 positive float32 numbers round to its zero.

A remainder of one byte instead of two makes a number of 24 bits, rounded stochastically.

Finite numbers stay finite. The 2^15 of each sign that are nearer to 2^128 than to the largest
bfloat16 count as the largest float32 number that rounds to it: 0.2 % less at most.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from adamx.core.rounding import INFINITY, SIGN, add_noise, bits_of, from_bits

_LARGEST = np.uint32(0x7F7F7FFF)  # of the numbers that round to the largest bfloat16
_HIGH24 = np.uint32(0xFFFFFF00)


def split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return float32 numbers as the nearest bfloat16 and an int16 remainder.

    `join` returns every number up to 3.395e38 bit for bit, but a NaN may become another NaN.

    Returns:
        The rounded numbers, still in float32, and the remainder.

    Example:
        >>> high, rest = split(jnp.array([1.0, 1.001], jnp.float32))
        >>> high, rest
        (Array([1., 1.], dtype=float32), Array([   0, 8389], dtype=int16))
        >>> join(high, rest)
        Array([1.   , 1.001], dtype=float32)
    """
    return _halves(x, _limited(bits_of(x), _LARGEST), jnp.int16)


def join(high: jax.Array, rest: jax.Array) -> jax.Array:
    """Return the float32 numbers from their two halves.

    If `high` was changed after `split`, to zero or infinity for instance, the remainder is limited
    so that the result rounds to `high`.

    Args:
        high: the rounded numbers, in bfloat16 or in float32.
        rest: an int16 remainder, or an int8 one in units of 256.
    """
    wide = rest.astype(jnp.int32) * (256 if rest.dtype == jnp.int8 else 1)
    bits = bits_of(high.astype(jnp.float32))
    magnitude = bits & ~SIGN
    wide = jnp.where(magnitude == 0, jnp.maximum(wide, 0), wide)
    wide = jnp.where(magnitude == INFINITY, 0, wide)
    # with a NaN any remainder makes a NaN
    return from_bits(bits + wide.astype(jnp.uint32))


def split8(x: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Round float32 numbers stochastically to 24 bits, and split them into a bfloat16 and an int8.

    Args:
        x: float32 numbers.
        noise: random bits, uint32, of the same shape.

    Example:
        >>> high, rest = split8(jnp.array([1.001], jnp.float32), jnp.array([0], jnp.uint32))
        >>> rest, join(high, rest)
        (Array([32], dtype=int8), Array([1.0009766], dtype=float32))
    """
    x = from_bits(_limited(bits_of(x), _LARGEST & _HIGH24))
    return _halves(x, add_noise(x, noise, 8) & _HIGH24, jnp.int8)


def _halves(x: jax.Array, bits: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """Return the rounded numbers and their remainders, from the bits of x, which may be rounded.

    The remainder is the low bits, read as a signed number. The high half is computed from it: XLA
    for TPU writes both in one kernel only if one is made of the other.
    """
    bits = jnp.where(jnp.isnan(x), INFINITY | np.uint32(0x00400000), bits)
    drop = 16 - jnp.iinfo(dtype).bits
    low = (bits >> drop).astype(f"uint{16 - drop}")
    rest = jax.lax.bitcast_convert_type(low, dtype)
    return from_bits(bits - (rest.astype(jnp.int32) << drop).astype(jnp.uint32)), rest


def _limited(bits: jax.Array, largest: np.uint32) -> jax.Array:
    """Return the bits of float32 numbers with finite magnitudes limited."""
    magnitude = bits & ~SIGN
    finite = magnitude < INFINITY
    return jnp.where(finite, (bits & SIGN) | jnp.minimum(magnitude, largest), bits)
