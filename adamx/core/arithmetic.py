"""The arithmetic that several concepts share: which dtype to compute in, and a square root.

Three dtypes have names: *compute* is float32, or wider for a wider leaf; *store* is a slot's;
*emit* is the incoming gradient's. This module widens, `lifting` narrows.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import numbers
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

LIMIT = 2.0**60
"""The largest number that is squared in float32, and room for the correction of its average."""


@functools.cache
def compute_dtype(*dtypes: DTypeLike) -> np.dtype:
    """Return the dtype to compute in: float32 or wider, complex if one of the dtypes is complex.

    Example:
        >>> [str(compute_dtype(d)) for d in ("bfloat16", "float16", "float64", "complex64")]
        ['float32', 'float32', 'float64', 'complex64']
    """
    double = any(jnp.finfo(dtype).bits > 32 for dtype in dtypes)
    if any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes):
        return np.dtype(np.complex128 if double else np.complex64)
    return np.dtype(np.float64 if double else np.float32)


def real_dtype(dtype: DTypeLike) -> np.dtype:
    """Return the dtype of |x| for x of the given dtype.

    Example:
        >>> str(real_dtype("complex64")), str(real_dtype("bfloat16"))
        ('float32', 'bfloat16')
    """
    return np.dtype(jnp.finfo(dtype).dtype)


def is_inexact(x: Any) -> bool:
    """Say whether x is, or is an array of, real or complex floating-point numbers."""
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def widen(x: Any, compute: DTypeLike) -> Any:
    """Cast a complex array to the compute dtype, a real one to its real dtype; leave the rest.

    Python numbers keep their double precision until they meet an array.
    """
    if isinstance(x, numbers.Number) or not is_inexact(x):
        return x
    real = not jnp.issubdtype(jnp.result_type(x), jnp.complexfloating)
    return jnp.asarray(x).astype(real_dtype(compute) if real else compute)


def cast(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Return x in a dtype: x itself where it has it, since `astype` takes a while to trace.

    Example:
        >>> cast(jnp.ones(1), jnp.bfloat16).dtype
        dtype(bfloat16)
    """
    return x if x.dtype == dtype else x.astype(dtype)


def narrowed(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Cast to a dtype, such that what reads the result has rounded numbers.

    XLA for GPU takes a cast and the cast back for nothing at all, and would go on with the number
    as it was before. To reduce the precision to the dtype's own, which changes no number, keeps it
    from that.

    Example:
        >>> narrowed(jnp.array([1 + 2.0**-9]), jnp.bfloat16)
        Array([1], dtype=bfloat16)
    """
    narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype)
    if not narrow or (narrow.bits >= 32 and x.dtype == dtype):
        return x.astype(dtype)

    def same(x: jax.Array) -> jax.Array:
        return x

    def rounded(x: jax.Array) -> jax.Array:
        return jax.lax.reduce_precision(x, narrow.nexp, narrow.nmant)

    return jax.lax.platform_dependent(x.astype(dtype), cpu=same, tpu=same, default=rounded)


def real_times_complex(compute: DTypeLike) -> contextlib.AbstractContextManager[Any]:
    """Let real scalars meet complex arrays where the user has set strict dtype promotion.

    A kernel mixes no other dtypes: all its arrays have been widened to one compute dtype.
    """
    if jnp.issubdtype(compute, jnp.complexfloating):
        return jax.numpy_dtype_promotion("standard")
    return contextlib.nullcontext()


def zeros(param: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
    """Return zeros shaped (and sharded) like a parameter: the usual start of a slot.

    Args:
        param: the parameter, of any floating or complex dtype.
        dtype: the slot's dtype; None means the parameter's compute dtype: float32 or wider. A
            complex parameter's slot is complex64 or wider: JAX has no narrower dtype.

    Example:
        >>> zeros(jnp.ones(2, jnp.bfloat16))
        Array([0., 0.], dtype=float32)
    """
    compute = compute_dtype(param.dtype)
    narrow = dtype is not None and not jnp.issubdtype(compute, jnp.complexfloating)
    return jnp.zeros_like(param, dtype if narrow else compute)


def placed_like(start: jax.Array, param: jax.Array) -> jax.Array:
    """Return a start value on the devices of its parameter, also under jit.

    In `jax.jit(tx.init)` zeros depend on nothing, and would all be made on one device. A slot of
    another shape is sharded along the axes that it shares with its parameter (`shared_axes`).
    """
    if not isinstance(param, Tracer):
        return start  # outside jit `zeros_like` has placed it
    axes = shared_axes(start.shape, param.shape)
    own = tuple(i for i, axis in enumerate(axes) if axis is None)
    # The select inherits the sharding of its condition. The barrier keeps XLA from simplifying it
    # before the partitioner has run.
    others = tuple(i for i in range(param.ndim) if i not in axes)
    true = jnp.all(param == param, others) if others else param == param
    if own:
        true = jnp.broadcast_to(jnp.expand_dims(true, own), start.shape)
    start = resharded_like(start, true)
    return jax.lax.select(true, start, jax.lax.optimization_barrier(start))


def divided_like(slots: Iterable[jax.Array], *arrays: Any) -> tuple[Any, ...]:
    """Return a leaf's arrays sharded like its first slot of their shape, None as it is.

    Slots may be divided over more devices than their parameter (ZeRO-1). On a mesh with explicit
    axes operands then have to be brought together, which is done here for the whole kernel.
    """
    slots = list(slots)

    def put(x: Any) -> Any:
        if x is None:
            return None
        return resharded_like(x, next((slot for slot in slots if slot.shape == x.shape), x))

    return tuple(map(put, arrays))


def resharded_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """Return an array sharded like another one of its shape, where that is on an explicit mesh.

    An array that is on no mesh, such as the zeros of a state made before there was one, goes with
    any: JAX's operations take the mesh of their other operands.
    """
    here, where = (jax.typeof(a).sharding for a in (x, like))
    return x if where.mesh.empty or here == where else jax.sharding.reshard(x, where)


def shared_axes(shape: tuple[int, ...], param: tuple[int, ...]) -> tuple[int | None, ...]:
    """Return, for each axis of a slot, the corresponding axis of its parameter, or None.

    If both have the same number of axes, equally long ones correspond. If the slot has fewer, there
    must be exactly one way to get its shape by leaving out axes of the parameter: in a square
    matrix a row is as long as a column.

    Args:
        shape: the slot's shape.
        param: the parameter's shape.

    Example:
        >>> shared_axes((1, 3), (2, 3)), shared_axes((2,), (2, 3)), shared_axes((2,), (2, 2))
        ((None, 1), (0,), (None,))
    """
    if len(shape) == len(param):
        return tuple(
            i if a == b else None for i, (a, b) in enumerate(zip(shape, param, strict=True))
        )
    ways = [
        axes
        for axes in itertools.combinations(range(len(param)), len(shape))
        if tuple(param[i] for i in axes) == shape
    ]
    return ways[0] if len(ways) == 1 else (None,) * len(shape)


def average(old: jax.Array, new: jax.Array, decay: Any, weight: Any) -> jax.Array:
    """Return decay * old + weight * new, where weight is 1 - decay: one step of an average.

    In float32 the two rounded factors do not sum to one (0.999 and 0.001 are 1.3e-8 over), and over
    a memory of 1000 steps that makes the average 1.3e-5 too large, for ever. A long memory is
    therefore computed as old + (weight * new - weight * old), whose gain is one; with two products,
    opposite numbers near the largest one do not overflow. For decay < 0.5 the plain form is better:
    it forgets an old value far above the new one.

    Args:
        old: the average so far.
        new: the incoming value, of the same shape and dtype.
        decay: in [0, 1), a float or a scalar array.
        weight: 1 - decay, in the precision in which decay was given.

    Example:
        >>> average(jnp.array([8.0]), jnp.array([4.0]), 0.75, 0.25)
        Array([7.], dtype=float32)
        >>> average(jnp.array([1e30]), jnp.array([4.0]), 0.0, 1.0)
        Array([4.], dtype=float32)
    """
    weighted = weight * new
    if isinstance(decay, float) and decay < 0.5:
        return decay * old + weighted
    long = old + (weighted - weight * old)
    if isinstance(decay, float):
        return long
    return jnp.where(decay < 0.5, decay * old + weighted, long)


def squared_magnitude(x: jax.Array) -> jax.Array:
    """Return |x|^2, which is real even if x is complex.

    Example:
        >>> squared_magnitude(jnp.array([3 + 4j, 2j]))
        Array([25.,  4.], dtype=float32)
    """
    if jnp.iscomplexobj(x):
        return jnp.square(x.real) + jnp.square(x.imag)
    return jnp.square(x)


def limited_square(x: jax.Array) -> jax.Array:
    """Return |x|^2 for an average of squares, at most 2^120, so that it is finite.

    It is the square of `limit_for_squares`, and infinity counts too. An array that was limited for
    a numerator as well would be written to memory before a sum of its squares. NaN stays. In
    float64 a square that overflows is the largest number.

    Example:
        >>> limited_square(jnp.array([3.0, 1e30]))
        Array([9.000000e+00, 1.329228e+36], dtype=float32)
    """
    if jnp.finfo(x.dtype).bits > 32:
        return jnp.minimum(squared_magnitude(x), jnp.finfo(x.dtype).max)
    if jnp.iscomplexobj(x):
        return limited_square(x.real) + limited_square(x.imag)
    return jnp.minimum(squared_magnitude(x), LIMIT**2)


@jax.custom_jvp
def root(x: jax.Array) -> jax.Array:
    """Return sqrt(x), with the derivative 0 instead of infinity at x = 0.

    The chain rule multiplies infinity by d(g^2)/dg = 0: NaN at g = 0, where the derivative of
    g / (sqrt(g^2) + eps) is 1 / eps. With 0 the product is right. The values are sqrt's.

    Example:
        >>> print(jax.grad(lambda g: g / (root(g * g) + 0.5))(0.0))
        2.0
    """
    return jnp.sqrt(x)


@root.defjvp
def _root_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> Any:
    (x,), (dx,) = primals, tangents
    zero = x == 0
    slope = jnp.where(zero, 0, 0.5 / jnp.sqrt(jnp.where(zero, 1, x)))
    return root(x), slope * dx


def divide(numerator: jax.Array, denominator: jax.Array, least: Any = 0.0) -> jax.Array:
    """Return numerator / denominator, and 0 where the denominator is 0.

    Where it cannot be 0 the two selects are left out, which are a fifth of the time that Adam's
    step takes to compile.

    Args:
        numerator: any array.
        denominator: >= 0 where `least` is above 0.
        least: a lower bound of the denominator. Only a normal float counts: compiled code rounds
            subnormal numbers to 0, and arrays cannot be read.

    Example:
        >>> divide(jnp.array([1.0, 0.0]), jnp.array([4.0, 0.0]))
        Array([0.25, 0.  ], dtype=float32)
    """
    if isinstance(least, float) and least >= jnp.finfo(denominator.dtype).tiny:
        return numerator / denominator
    zero = denominator == 0
    return jnp.where(zero, 0, numerator / jnp.where(zero, 1, denominator))


def limit_for_squares(u: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Limit a gradient to |u| <= 2^60, so that float32 holds its square.

    Both bfloat16 and float32 reach 3.4e38, and squares above 1.8e19 overflow. A square that counts
    as the largest number would be far too small for its gradient, and Adam's step, which divides
    one by the root of the other, could be 1e19 times too long. The bits below sqrt(max) leave room
    for the bias correction of the square, and for the two parts of a complex number, each of which
    is limited. NaN and inf stay. float16 cannot overflow, and float64 is left alone.

    Args:
        u: the update in compute dtype.
        dtype: the gradient's dtype before widening.

    Example:
        >>> limit_for_squares(jnp.array([1e30, -2.0, jnp.inf]), jnp.float32)
        Array([ 1.1529215e+18, -2.0000000e+00,            inf], dtype=float32)
        >>> limit_for_squares(jnp.array([6e4, -2.0]), jnp.float16)
        Array([ 6.e+04, -2.e+00], dtype=float32)
    """
    if dtype == jnp.float16 or jnp.finfo(u.dtype).bits > 32:
        return u
    if jnp.iscomplexobj(u):
        return jax.lax.complex(*(limit_for_squares(x, x.dtype) for x in (u.real, u.imag)))
    return limit_finite(u, LIMIT)


def limit_finite(x: jax.Array, largest: float) -> jax.Array:
    """Limit finite numbers to |x| <= largest; NaN and inf stay.

    `jnp.where(jnp.isinf(x), x, jnp.clip(...))` makes twice as many operations, to which the time to
    compile a step is proportional.

    Example:
        >>> limit_finite(jnp.array([5.0, -2.0, -jnp.inf]), 3.0)
        Array([  3.,  -2., -inf], dtype=float32)
    """
    bound = np.asarray(largest, x.dtype)
    return jax.lax.select(jax.lax.is_finite(x), jax.lax.clamp(-bound, x, bound), x)


def limit_sum(total: jax.Array, u: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Reduce an overflowed sum of bfloat16 gradients to the largest finite number.

    An infinite sum would stay infinite; this one falls again when the gradients do. The sum is left
    alone where the update itself is infinite, and for other dtypes.

    Args:
        total: the sum in compute dtype.
        u: the update that was added.
        dtype: the gradient's dtype before widening.

    Example:
        >>> limit_sum(jnp.array([jnp.inf, 2.0]), jnp.array([3e38, 1.0]), jnp.bfloat16)
        Array([3.4028235e+38, 2.0000000e+00], dtype=float32)
    """
    if dtype != jnp.bfloat16 or jnp.finfo(u.dtype).bits > 32:
        return total
    largest = float(jnp.finfo(total.dtype).max)
    return jnp.where(jnp.isinf(u), total, jnp.clip(total, -largest, largest))
