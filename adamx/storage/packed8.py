"""Adam's two moments in 2 bytes: one uint16 per element.

    bit  15 ... 7   6         5 ... 0
         v's code   m's sign  code of |m| / sqrt(v)

v + 2^-92 is a number of 7 exponent and 2 mantissa bits, up to 2^35.6, so that v = 0 has a code. m
is stored as its ratio to the root of v, which is bounded: with m_0 = v_0 = 0, Cauchy and Schwarz
give for every sequence of gradients

    |m_t| <= c sqrt(v_t),    c = (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)),    where b1^2 < b2.

The ratio is companded: with x = 223 / c * |m| / S, each octave of 1 + x has eight codes. S, about
the root of the rounded v, is computed by halving a float's bits and subtracting 2^-46, so that it
is 0 for v = 0; it is at most 1.061 sqrt(v). m is divided and multiplied by the same S, so that no
error remains. Whatever the rounding does, the decoded

    |m| <= 1.061 c sqrt(v):

a v that is rounded down cannot make a step explode, as it does if v is rounded within a block. An
infinite m keeps its sign, with the largest v; if one of them is NaN, or v infinite, m is NaN. Both
are rounded stochastically between two neighbours, on a scale that is linear there, so without bias,
except that m fades out as v falls to 2^-92.

A finite gradient above the root of the largest v, 2^17.8, counts as that: otherwise v would stop
growing and the gradient would not, and a formula that divides the gradient itself by the root of v,
such as Nesterov's, would step as far as the gradient is large.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from adamx.core.arithmetic import limit_finite
from adamx.core.checks import DECAY, Positive, Scalar, checked
from adamx.core.concept import Slots
from adamx.core.rounding import INFINITY, bits_of, from_bits
from adamx.core.step import LeafStep
from adamx.storage.pair import Pair

ConstantDecay = Annotated[
    Scalar,
    dataclasses.replace(
        DECAY, constant='the bound needs constant decays: moments="packed16" takes schedules'
    ),
]
_STEPS = 223.0  # 1 + x ends with the code 62: 224 = 2^7 * 1.75
_ONE = np.uint32(1016)  # the bits of 1.0, cut like the bits of 1 + x
_FIRST = np.uint32(140)  # code k means the float32 with the bits (k + 140) << 21, minus 2^-92
_FLOOR, _ROOT_OF_FLOOR, _TINY = 2.0**-92, 2.0**-46, 2.0**-126
_LAST = np.uint32(510) + _FIRST
_LARGEST = math.sqrt(1.5 * 2.0**35)  # the root of the number with the last code
_ROOT = np.uint32(0x1FC00000)  # half the exponent's offset, to be added to a float's halved bits
_INFINITE = np.uint32(510 << 7 | 63)  # m infinite, with the largest v
_NAN = np.uint32(511 << 7 | 63)


@checked
def ratio_bound(b1: ConstantDecay, b2: ConstantDecay) -> Scalar:
    """Return the largest |m| / sqrt(v) that any sequence of gradients can give.

    Args:
        b1: decay of m, in [0, 1).
        b2: decay of v, in [0, 1), above b1^2.

    Raises:
        ValueError: if a decay is out of its range, or b1^2 >= b2, so that there is no bound.

    Example:
        >>> round(ratio_bound(0.9, 0.999), 3)
        7.27
    """
    if isinstance(b1, int | float) and isinstance(b2, int | float):
        if b1**2 >= b2:
            raise ValueError(
                f"packed8: |mu| / sqrt(nu) has a bound only where b1^2 < b2, got b1={b1}, b2={b2}: "
                'use moments="packed16"'
            )
        return (1 - b1) / math.sqrt((1 - b2) * (1 - b1**2 / b2))
    return (1 - b1) / jnp.sqrt((1 - b2) * (1 - b1**2 / b2))


class packed8(Pair):
    """Store `mu` and `nu` as one uint16 per element: 2 bytes per parameter where Adam needs 8.

    Other slots stay as they are. The spacing is 14 to 25 % for v and about 10 % for m: a single
    update is off by some 13 %, without bias; `docs/low-precision.md` shows the effect on training.
    Gradients beyond 2.2e5 count as that, so that the update is bounded whatever they are.

    Attributes:
        inner: the concept with the slots `mu` and `nu`, averages of the gradient and its square.
        bound: the largest |mu| / sqrt(nu), to which larger ratios are limited. `ratio_bound`
            computes it from the decays.
        name: the slot of the words: uint16, shaped like the parameter. None means the format's
            name, and what follows mu and nu: "packed8", "packed8_deviation".

    Raises:
        ValueError: if `inner` does not have `mu` and `nu`, or the bound is not positive.
        TypeError: at `init`, for float64 or complex parameters: their moments are not float32.

    Example:
        >>> import adamx, jax.numpy as jnp
        >>> tx = packed8(adamx.scale_by_adam(), ratio_bound(0.9, 0.999))
        >>> tx.init(jnp.zeros(2))["packed8"]
        Array([0, 0], dtype=uint16)
    """

    bound: Positive
    name: str | None = None

    def accumulate(self, u: jax.Array, slots: Slots, step: LeafStep) -> Slots:
        return super().accumulate(_limited(u), slots, step)

    def emit(self, u: jax.Array, slots: Slots, step: LeafStep) -> jax.Array:
        return super().emit(_limited(u), slots, step)

    def encode(self, slots: Slots, bits: Slots) -> Slots:
        mu, nu = self.pair(slots)
        of_mu, of_nu = (bits[name] for name in self._two)
        size = jnp.abs(mu)
        code = jnp.minimum((bits_of(nu + _FLOOR) + (of_nu >> 11)) >> 21, _LAST)
        root = jnp.maximum(_root(code << 20), _TINY)  # 0 / 0 is 0
        x = jnp.minimum(size * (_STEPS / self.bound) / root, _STEPS)
        y = ((bits_of(1 + x) + (of_mu >> 12)) >> 20) - _ONE
        word = ((code - _FIRST) << 7) | y
        odd = jnp.where(bits_of(size) == INFINITY, _INFINITE, _NAN)
        word = jnp.where(jnp.maximum(bits_of(size), bits_of(nu)) < INFINITY, word, odd)
        sign = (bits_of(mu) >> 25) & 64
        # the last operation is an OR of two uint16: XLA would fuse a conversion into the kernel
        # that reads the words, and copy them
        return self.packed(slots, word.astype(jnp.uint16) | sign.astype(jnp.uint16))

    def decode(self, stored: Slots) -> Slots:
        word = stored[self.word].astype(jnp.uint32)
        code = ((word & 0xFF80) << 13) + (_FIRST << 20)  # the code, shifted by 20
        y, sign = word & 63, (word & 64) << 25
        nu = from_bits(code << 1) - _FLOOR
        size = (from_bits((y << 20) + (_ONE << 20)) - 1) * (_root(code) * (self.bound / _STEPS))
        # infinity, or NaN where the last bit of v's code is set
        odd = ((word & 128) << 15) | INFINITY
        mu = from_bits(jnp.where(y == 63, odd, bits_of(size)) | sign)
        return self.unpacked(stored, mu, nu)


def _limited(u: jax.Array) -> jax.Array:
    """Return the gradient, with |u| at most the root of the largest v; inf and NaN stay."""
    return limit_finite(u, _LARGEST)


def _root(code: jax.Array) -> jax.Array:
    """Return S, about the root of the number with this code, shifted by 20."""
    return from_bits(code + _ROOT) - _ROOT_OF_FLOOR
