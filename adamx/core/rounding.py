"""Stochastic rounding: up or down at random, so that the mean is the number itself.

    round(x) = high with probability (x - low) / (high - low), else low         E[round(x)] = x

low and high are the neighbours of x in the narrow format. Rounding to nearest loses every change
below half a spacing, and an average with decay 0.999 changes by less than that at each step: stored
in bfloat16 it stops at 0.25 where it should reach 1. Rounded without bias it gets there.

The random bits are a hash of the step number and of the rounded numbers, so a run repeats bit for
bit, after a restart and in any sharding, and nobody threads a key. For a storage, the hash contains
neither an element's place in the array nor the leaf's number, so leaves of one shape share one
compiled kernel; equal elements round equally in one step, and differently in the next.
(`adamx.apply_updates` adds the place, so that parameters that start equal can diverge.)

Source: Croci et al. (2022), Stochastic rounding: implementation, error analysis and applications,
https://doi.org/10.1098/rsos.211631; the hashes are of the kind of MurmurHash3's finaliser.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

INFINITY = np.uint32(0x7F800000)
LARGEST = np.uint32(0x7F7FFFFF)
SIGN = np.uint32(0x80000000)
NARROW = (np.dtype(jnp.bfloat16), np.dtype(jnp.float16))
"""The dtypes to which float32 is rounded stochastically."""


def bits_of(x: jax.Array) -> jax.Array:
    """Return the bits of float32 numbers as uint32.

    Example:
        >>> [hex(b) for b in bits_of(jnp.array([1.0, -2.0])).tolist()]
        ['0x3f800000', '0xc0000000']
    """
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def from_bits(bits: jax.Array) -> jax.Array:
    """Return the float32 numbers that have these bits.

    Example:
        >>> from_bits(jnp.array([0x3F800000], jnp.uint32))
        Array([1.], dtype=float32)
    """
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def step_key(count: jax.Array | int) -> jax.Array:
    """Return a uint32 scalar in which every bit depends on the step number.

    It is divided by 1, which the compiler cannot know: XLA for CPU repeats no division, so it
    computes the key once. Otherwise it would write the whole hash into the kernel of every leaf, a
    fifth of the instructions that a packed step has.

    Example:
        >>> int(step_key(1)) ^ int(step_key(2)) > 2**16
        True
    """
    word = jnp.asarray(count).astype(jnp.uint32)
    one = (word >> 31) + 1  # counts end at 2^31 - 1
    return mix(word + np.uint32(0x9E3779B9)) // one


def mix(word: jax.Array) -> jax.Array:
    """Return uint32 words in which every bit depends on all bits of the given ones."""
    word = (word ^ (word >> 16)) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * np.uint32(0xC2B2AE35)
    return word ^ (word >> 16)


def random_bits(key: jax.Array, value: jax.Array) -> jax.Array:
    """Return a random word for each element, from the step's key and the element's value.

    A multiplication carries bits upwards: the high bits of the word depend on all bits of key and
    value; the low ones do not and must not be used. For one value the words of many steps are
    uniform, since the keys are; for many values in one step they are evenly spread.

    Args:
        key: from `step_key`.
        value: float32 numbers.

    Returns:
        A uint32 array of the value's shape; about 21 high bits of each word are random.

    Example:
        >>> x = jnp.array([1.0, 2.0, 1.0])
        >>> a, b = random_bits(step_key(1), x), random_bits(step_key(2), x)
        >>> bool(a[0] == a[2]), bool(a[0] == a[1]), bool(a[0] == b[0])
        (True, False, False)
    """
    return (bits_of(value) ^ key) * np.uint32(0xCC9E2D51)


def add_noise(x: jax.Array, noise: jax.Array, drop: int) -> jax.Array:
    """Return the bits of x such that cutting off the low ones rounds stochastically.

    Numbers beyond the largest one of the narrow format, infinity and NaN get no noise: finite
    numbers stay finite, infinity stays infinity, and NaN stays NaN (if its highest mantissa bit is
    set, as in every NaN that arithmetic makes).

    Args:
        x: float32 numbers.
        noise: random bits, uint32; the high `drop` bits count.
        drop: how many bits will be cut off.

    Example:
        x is half way between two multiples of 2^16, so the upper half of the noise rounds up:

        >>> x, noise = jnp.full(2, 1 + 2**-8), jnp.array([0x7FFF0000, 0x80000000], jnp.uint32)
        >>> [hex(bits >> 16) for bits in add_noise(x, noise, 16).tolist()]
        ['0x3f80', '0x3f81']
    """
    largest = (LARGEST >> drop << drop).view(np.float32)
    noise = jax.lax.select(jnp.abs(x) < largest, noise >> (32 - drop), jnp.zeros_like(noise))
    return bits_of(x) + noise


def round_stochastically(x: jax.Array, noise: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Round float32 numbers to bfloat16 or float16, up or down with the probability that fits.

    Finite numbers stay finite, but from 65520 on they become infinite in float16, as with rounding
    to nearest; infinity and NaN stay.

    Args:
        x: float32 numbers.
        noise: random bits, uint32, of the same shape; the high ones count.
        dtype: bfloat16 or float16.

    Raises:
        TypeError: if `dtype` is neither.

    Example:
        1 + 2^-9 is a quarter of the way from 1 to the next bfloat16:

        >>> noise = jnp.arange(4).astype(jnp.uint32) << 30
        >>> print(round_stochastically(jnp.full(4, 1 + 2**-9), noise, jnp.bfloat16))
        [1 1 1 1.00781]
    """
    if np.dtype(dtype) not in NARROW:
        raise TypeError(
            f"round_stochastically: dtype must be bfloat16 or float16, got {np.dtype(dtype)}"
        )
    if dtype == jnp.bfloat16:
        return from_bits(add_noise(x, noise, 16) & np.uint32(0xFFFF0000)).astype(dtype)
    # float16 has 13 bits less, and below 2^-14 the fixed spacing 2^-24
    rounded = from_bits(add_noise(x, noise, 13) & np.uint32(0xFFFFE000))
    steps = jnp.abs(x) * 2.0**24
    steps = jnp.floor(steps + (noise >> 18).astype(jnp.float32) * 2.0**-14)  # exact: 10 + 14 bits
    fixed = jnp.copysign(steps * 2.0**-24, x)
    rounded = jnp.where(jnp.abs(x) < 2.0**-14, fixed, rounded)
    over = (jnp.abs(rounded) > 65504) & (jnp.abs(x) < 65520)
    return jnp.where(over, jnp.copysign(65504.0, x), rounded).astype(dtype)
