"""The size of an array: its root mean square and its norm.

    rms(x) = sqrt(mean(|x|^2)),    norm(x) = sqrt(n) rms(x) = sqrt(sum(|x|^2))

These are plain sums of squares, in float32 or, for wider arrays, in float64. In float32 an element
below 1.1e-19 counts as 0, and a norm above 1.8e19 as infinite, so that what is divided by it is 0
(in float64 1.5e-154 and 1.3e154). A second sum of scaled elements would widen that range. But a GPU
would read every array twice for it, or wait for the host to choose, and each norm would take twice
as long to compile. The derivative at x = 0 is 0 (`adamx.core.arithmetic.root`); the plain root
would give NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from adamx.core.arithmetic import compute_dtype, real_dtype, root, squared_magnitude
from adamx.core.shard import WHOLE, Axes, Shard, axis_size, total, total_of_all

_COUNTED_BY_INT32 = 2**31


def rms(x: jax.Array, axes: Axes = None, shard: Shard = WHOLE) -> jax.Array:
    """Return the root of the mean of |x|^2: real, and 0 for an empty array.

    Args:
        x: real or complex.
        axes: to reduce over; they stay, with size 1, so that the result broadcasts against x.
        shard: which shard of an array x is; the result is the whole array's.

    Example:
        >>> rms(jnp.array([3e10, 4e10, 0.0, 0.0]))
        Array([2.5e+10], dtype=float32)
        >>> rms(jnp.array([[1.0, 2.0], [7.0, 2.0]]), axes=0)
        Array([[5., 2.]], dtype=float32)
    """
    return root(mean_square(x, axes, shard))


def mean_square(x: jax.Array, axes: Axes = None, shard: Shard = WHOLE) -> jax.Array:
    """Return the mean of |x|^2; arguments as for `rms`."""
    return mean(squared_magnitude(x), axes, shard)


def mean(x: jax.Array, axes: Axes = None, shard: Shard = WHOLE) -> jax.Array:
    """Return the mean; arguments as for `rms`."""
    return total(x, axes, shard) / reduced_size(x, axes, shard)


def norm(x: jax.Array, axes: Axes = None, shard: Shard = WHOLE) -> jax.Array:
    """Return the root of the sum of |x|^2; arguments as for `rms`.

    Example:
        >>> norm(jnp.array([3.0, 4.0])), norm(jnp.zeros((0,)))
        (Array([5.], dtype=float32), Array([0.], dtype=float32))
    """
    return math.sqrt(reduced_size(x, axes, shard)) * rms(x, axes, shard)


def reduced_size(x: jax.Array, axes: Axes = None, shard: Shard = WHOLE) -> float:
    """Return how many elements of an array are reduced to one, at least 1.

    It is a float, as int32 ends at 2^31. Arguments as for `rms`.

    Example:
        >>> reduced_size(jnp.zeros((2, 3)), 0), reduced_size(jnp.zeros((2, 3)), None)
        (2.0, 6.0)
    """
    many = axes if isinstance(axes, tuple) else range(x.ndim) if axes is None else (axes,)
    own = math.prod(x.shape[axis] for axis in many)
    return float(max(own * axis_size(shard.along(x, axes)), 1))


def count(flags: jax.Array, dtype: DTypeLike, shard: Shard = WHOLE) -> jax.Array:
    """Return how many flags of an array are True; arguments as for `count_here`.

    The shard is which one the flags are.
    """
    return total_of_all([count_here(flags, dtype)], [flags], [shard])


def count_here(flags: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Return how many of the flags that a device has are True.

    Args:
        flags: bools; the last axis has less than 2^32.
        dtype: the result's, a floating one.
    """
    if flags.size < _COUNTED_BY_INT32:
        return jnp.sum(flags, dtype=jnp.int32).astype(dtype)
    return jnp.sum(jnp.sum(flags, -1, dtype=jnp.uint32).astype(dtype))


def sum_of_all_squares(leaves: Sequence[jax.Array], shards: Sequence[Shard] = ()) -> jax.Array:
    """Return the sum of |u|^2 over all elements: infinite if it overflows.

    Everything that needs this sum calls this function, so that the compiler can merge the sums. It
    must not merge the squares with those of a second moment, which XLA:CPU would then write to
    memory and read twice, 12 bytes an element: so this sums -|u|^2.

    Args:
        leaves: arrays in compute dtype.
        shards: which shards of arrays they are; () if each is a whole one.

    Example:
        >>> print(sum_of_all_squares([jnp.array([1.0, 2.0]), jnp.array(3.0)]))
        14.0
    """
    dtype = real_dtype(compute_dtype(*(u.dtype for u in leaves)))
    sums = [jnp.sum(_minus_squares(u)).astype(dtype) for u in leaves]
    # once, of the total: devices add one number, and not one for each array
    return jnp.abs(total_of_all(sums, leaves, shards)) if sums else jnp.zeros([], dtype)


def _minus_squares(x: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(x):
        return _minus_squares(x.real) + _minus_squares(x.imag)
    return x * -x


def global_norm(leaves: Sequence[jax.Array], shards: Sequence[Shard] = ()) -> jax.Array:
    """Return the root of the sum of squares over all elements of all leaves.

    Args:
        leaves: arrays in compute dtype; with none the norm is 0.
        shards: which shards of arrays they are; () if each is a whole one.

    Returns:
        A scalar, float32 or float64: inf where an element is infinite, NaN where one is NaN.

    Example:
        >>> print(global_norm([jnp.array([3.0]), jnp.array([4.0])]))
        5.0
        >>> print(global_norm([jnp.array([1e20])]))
        inf
    """
    return root(sum_of_all_squares(leaves, shards))
