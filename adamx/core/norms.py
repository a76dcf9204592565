"""The size of an array: its root mean square and its norm, at any scale.

    rms(x) = sqrt(mean(|x|^2)),    norm(x) = sqrt(n) rms(x) = sqrt(sum(|x|^2))

In float32 the square of 2e19 is infinite and the square of 1e-23 is zero. If the sum of squares
leaves the range in which it is accurate, it is computed again from x / max|x|. That is a branch on
one scalar: ordinary arrays are read once, at no extra cost. The derivative at x = 0 is 0
(`adamx.core.arithmetic.root`); the plain root would give NaN.

Source: Blue (1978), A portable Fortran program to find the Euclidean norm of a vector,
https://doi.org/10.1145/355769.355771 (for the ranges: three in the paper, two here)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from adamx.core.arithmetic import (
    compute_dtype,
    real_dtype,
    real_times_complex,
    root,
    squared_magnitude,
)

Axes = int | tuple[int, ...] | None
"""The axes to reduce over; None means all of them."""


def rms(x: jax.Array, axes: Axes = None) -> jax.Array:
    """Return the root of the mean of |x|^2: real, and 0 for an empty array.

    Args:
        x: real or complex.
        axes: to reduce over; they stay, with size 1, so that the result broadcasts against x.

    Example:
        >>> rms(jnp.array([3e30, 4e30, 0.0, 0.0]))
        Array([2.5e+30], dtype=float32)
        >>> rms(jnp.array([[1.0, 2.0], [7.0, 2.0]]), axes=0)
        Array([[5., 2.]], dtype=float32)
    """
    count = reduced_size(x, axes)

    def plain() -> jax.Array:
        return root(sum_of_squares / count)

    def scaled() -> jax.Array:
        largest = jnp.max(_bound(x), axes, keepdims=True, initial=0)
        # the unit and its inverse are finite and not zero; it cancels, so it needs no derivative
        unit = jax.lax.stop_gradient(jnp.clip(largest, tiny, 0.25 / tiny))
        return unit * root(jnp.sum(squared_magnitude(x / unit), axes, keepdims=True) / count)

    sum_of_squares = jnp.sum(squared_magnitude(x), axes, keepdims=True)
    info = jnp.finfo(sum_of_squares.dtype)
    tiny, eps, most = float(info.tiny), float(info.eps), float(info.max)
    # next to such a sum, squares rounded to zero, each below tiny, do not matter
    accurate = (sum_of_squares >= tiny / eps**2) & (sum_of_squares <= most)
    return jax.lax.cond(jnp.all(accurate), plain, scaled)


def norm(x: jax.Array, axes: Axes = None) -> jax.Array:
    """Return the root of the sum of |x|^2; arguments as for `rms`.

    Example:
        >>> norm(jnp.array([3.0, 4.0])), norm(jnp.zeros((0,)))
        (Array([5.], dtype=float32), Array([0.], dtype=float32))
    """
    return math.sqrt(reduced_size(x, axes)) * rms(x, axes)


def reduced_size(x: jax.Array, axes: Axes) -> int:
    """Return how many elements are reduced to one, at least 1.

    Example:
        >>> reduced_size(jnp.zeros((2, 3)), 0), reduced_size(jnp.zeros((2, 3)), None)
        (2, 6)
    """
    if axes is None:
        return max(x.size, 1)
    many = axes if isinstance(axes, tuple) else (axes,)
    return max(math.prod(x.shape[axis] for axis in many), 1)


def _bound(x: jax.Array) -> jax.Array:
    """Return |x|, or for a complex x its larger part, at least 0.7 |x|, which cannot overflow."""
    if jnp.iscomplexobj(x):
        return jnp.maximum(jnp.abs(x.real), jnp.abs(x.imag))
    return jnp.abs(x)


# For float32 and float64: the sum below which squares of single elements may have been lost, and
# the factors by which smaller and overflowing updates are multiplied: powers of two, which round
# nothing, far enough from both ends of the range.
_SCALES = {4: (2.0**-80, 2.0**-96, 2.0**80), 8: (2.0**-800, 2.0**-700, 2.0**500)}


def sum_of_all_squares(leaves: Sequence[jax.Array]) -> jax.Array:
    """Return the sum of |u|^2 over all elements: infinite if it overflows.

    Everything that needs this sum calls this function, so that the compiler can merge the sums.

    Args:
        leaves: arrays in compute dtype.

    Example:
        >>> print(sum_of_all_squares([jnp.array([1.0, 2.0]), jnp.array(3.0)]))
        14.0
    """
    dtype = real_dtype(compute_dtype(*(u.dtype for u in leaves)))
    sums = [jnp.sum(squared_magnitude(u)).astype(dtype) for u in leaves]
    return sum(sums, start=jnp.zeros([], dtype))


def global_norm(leaves: Sequence[jax.Array]) -> jax.Array:
    """Return the root of the sum of squares over all elements of all leaves.

    Args:
        leaves: arrays in compute dtype; with none the norm is 0.

    Returns:
        A scalar, float32 or float64: inf where an element is infinite, NaN where one is NaN.

    Example:
        Numbers whose squares overflow float32, or underflow:

        >>> print(global_norm([jnp.array([3e30]), jnp.array([4e30])]))
        5e+30
        >>> print(global_norm([jnp.array([3e-30, 4e-30])]))
        5e-30
    """
    plain = sum_of_all_squares(leaves)
    small, down, up = _SCALES[plain.dtype.itemsize]

    def scaled() -> jax.Array:
        # not a constant: the compiler would rewrite (c u)^2 as c^2 u^2, which overflows
        factor = jnp.where(plain <= small, up, down).astype(plain.dtype)
        shares = []
        for u in leaves:
            with real_times_complex(u.dtype):
                shares.append(factor.astype(real_dtype(u.dtype)) * u)
        total = sum_of_all_squares(shares)
        # where XLA knows that the updates are zero, the factor is zero too, and 0 * inf is NaN
        return jnp.where(jnp.isnan(total) & (plain == 0), 0, root(total) / factor)

    usual = (plain > small) & (plain < jnp.inf)
    return jax.lax.cond(usual, lambda: jnp.sqrt(plain), scaled)
