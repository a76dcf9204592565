"""What the arithmetic promises: accuracy, dtypes, gradients of any value, derivatives.

Accuracy is judged by mpmath and by the float64 reference. Where Optax 0.2.8 does something else,
its answer stands beside ours, so that the reason for a line of code can be seen; when it is mended
there, the line about it can go.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import mpmath
import numpy as np
import optax
import pytest
import reference

import adamx
from adamx.core.arithmetic import (
    average,
    compute_dtype,
    divide,
    is_inexact,
    limit_for_squares,
    limit_sum,
    limited_square,
    real_dtype,
    root,
    squared_magnitude,
    widen,
)
from adamx.transforms.bias_correction import one_minus_power

r = reference
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)
LARGEST = float(np.finfo(np.float32).max)
SMALLEST = float(np.finfo(np.float32).tiny)

# --- Bias correction -----------------------------------------------------------------------------

DECAYS = (0.0, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999)
COUNTS = np.unique(
    np.concatenate(
        [
            np.arange(1, 41),
            np.round(np.logspace(0, 7, 120)).astype(np.int64),
            [2**24 - 1, 2**24, 2**24 + 1, 10**7, 2**31 - 1],
        ]
    )
)


@functools.cache
def one_minus_power_by_mpmath(decay: float) -> list[Any]:
    """1 - decay^t for all COUNTS in 50 digits, for exactly this double."""
    with mpmath.workdps(50):
        return [1 - mpmath.mpf(decay) ** int(t) for t in COUNTS]


def worst_error(values: Any, decay: float, power: int = 1) -> float:
    """The largest relative error of values against (1 - decay^t)^power."""
    with mpmath.workdps(50):
        pairs = zip(np.asarray(values, np.float64), one_minus_power_by_mpmath(decay), strict=True)
        return max(float(abs(mpmath.mpf(float(x)) / true**power - 1)) for x, true in pairs)


@pytest.mark.parametrize("decay", DECAYS)
def test_bias_correction_is_accurate_in_float32(decay: float) -> None:
    """To 4e-7: log(decay), t and their product, each rounded by 6e-8, and expm1, 1.5 ULP.

    1 - exp(-x) is no worse conditioned than x, so that they add to 1.8e-7 + 1.8e-7.
    """
    values = one_minus_power(decay, jnp.asarray(COUNTS, jnp.int32))
    assert values.dtype == np.float32
    assert worst_error(values, decay) <= 4e-7


@pytest.mark.parametrize("kind", [jnp.asarray, np.asarray])
@pytest.mark.parametrize("decay", DECAYS)
def test_bias_correction_by_an_array_is_accurate(decay: float, kind: Any) -> None:
    """To the same 4e-7, of 1 - b^t where b is the float32 that the array holds."""
    array = kind(np.float32(decay))
    values = one_minus_power(array, jnp.asarray(COUNTS, jnp.int32))
    assert values.dtype == np.float32
    assert worst_error(values, float(np.float32(decay))) <= 4e-7


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("decay", DECAYS)
def test_bias_correction_is_accurate_in_float64(decay: float) -> None:
    """4e-7 and the same roundings of 2^-53 in place of 2^-24: 7.5e-16."""
    for given in (decay, jnp.asarray(decay), np.asarray(decay)):
        values = one_minus_power(given, jnp.asarray(COUNTS, jnp.int32))
        assert values.dtype == np.float64
        assert worst_error(values, decay) <= 7.5e-16


@pytest.mark.parametrize("decay", DECAYS)
def test_correction_of_an_update_is_accurate(decay: float) -> None:
    """What comes out of the transformation, 1 / (1 - decay^t) for an update of one.

    A quotient more: 4e-7 and 6e-8. t is the count of the state and one.
    """
    tx, ones = adamx.bias_correction(decay), jnp.ones(2)
    update = jax.jit(tx.update)
    values = [update(ones, {"count": jnp.asarray(t - 1, jnp.int32)})[0][0] for t in COUNTS.tolist()]
    assert worst_error(values, decay, power=-1) <= 4.6e-7


def test_optax_cancels_where_adamx_does_not() -> None:
    """Optax's 1 - b^t in float32, at the same counts: 1.3e-5 and more."""
    with jax.numpy_dtype_promotion("standard"):
        inverse = [
            optax.tree.bias_correction(jnp.ones([]), 0.999, jnp.asarray(t, jnp.int32))
            for t in (1, 2, 3)
        ]
    true = [1 - mpmath.mpf(0.999) ** t for t in (1, 2, 3)]
    errors = [float(abs(float(x) * y - 1)) for x, y in zip(inverse, true, strict=True)]
    assert max(errors) > 1.2e-5


def test_count_stops_at_the_largest_integer() -> None:
    """A state that has counted to 2^31 - 1 goes on with corrections of one."""
    tx = adamx.adam(0.5, eps=0.0)
    state = {**tx.init(jnp.zeros(1)), "count": jnp.asarray(2**31 - 1, jnp.int32)}
    updates, state = tx.update(jnp.ones(1), state)
    assert state["count"] == 2**31 - 1
    np.testing.assert_allclose(updates, -0.5 * 0.1 / math.sqrt(0.001), rtol=1e-6)


# --- Dtypes, root, quotient ----------------------------------------------------------------------


def test_compute_dtype_is_float32_or_wider() -> None:
    for dtypes, expected in (
        (("bfloat16",), "float32"),
        (("float16",), "float32"),
        (("float32",), "float32"),
        (("float64",), "float64"),
        (("bfloat16", "float16"), "float32"),
        (("float32", "float64"), "float64"),
        (("complex64",), "complex64"),
        (("complex64", "float32"), "complex64"),
        (("complex64", "float64"), "complex128"),
        (("complex128", "bfloat16"), "complex128"),
    ):
        assert compute_dtype(*(jnp.dtype(d) for d in dtypes)) == expected
        assert compute_dtype(*(jnp.dtype(d) for d in reversed(dtypes))) == expected


def test_real_dtype_is_that_of_the_magnitude() -> None:
    for dtype, real in (
        ("bfloat16", "bfloat16"),
        ("float32", "float32"),
        ("complex64", "float32"),
        ("complex128", "float64"),
    ):
        assert real_dtype(jnp.dtype(dtype)) == real


def test_is_inexact_tells_what_can_be_optimized() -> None:
    for x in (1.0, 1j, np.float32(1), jnp.ones(1, jnp.bfloat16), np.ones(1, np.complex64)):
        assert is_inexact(x)
    for x in (1, True, np.int32(1), jnp.ones(1, jnp.int32), np.ones(1, bool)):
        assert not is_inexact(x)


def test_widen_leaves_numbers_and_integers_alone() -> None:
    """A Python number keeps its double precision until it meets an array."""
    for x in (0.999, 1, True, 1j):
        assert widen(x, np.dtype("float32")) is x
    integers = jnp.arange(2)
    assert widen(integers, np.dtype("float32")) is integers


@pytest.mark.usefixtures("x64")
def test_widen_casts_arrays_to_compute_dtype_or_its_real_part() -> None:
    for dtype, compute, expected in (
        ("bfloat16", "float32", "float32"),
        ("float16", "float32", "float32"),
        ("float64", "float32", "float32"),
        ("float32", "float64", "float64"),
        ("float32", "complex64", "float32"),
        ("bfloat16", "complex64", "float32"),
        ("float32", "complex128", "float64"),
        ("complex64", "complex64", "complex64"),
        ("complex64", "complex128", "complex128"),
    ):
        for x in (jnp.ones(2, jnp.dtype(dtype)), np.ones((), jnp.dtype(dtype))):
            wide = widen(x, jnp.dtype(compute))
            assert isinstance(wide, jax.Array)
            assert wide.dtype == expected
            assert wide.shape == x.shape


@pytest.mark.usefixtures("x64")
def test_zeros_are_in_the_compute_dtype() -> None:
    for dtype, expected in (
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("float64", "float64"),
        ("complex64", "complex64"),
    ):
        zeros = adamx.zeros(jnp.ones((2, 3), jnp.dtype(dtype)))
        assert zeros.dtype == expected
        np.testing.assert_array_equal(zeros, np.zeros((2, 3)))
    assert adamx.zeros(jnp.ones(2), jnp.bfloat16).dtype == jnp.bfloat16


def test_squared_magnitude_is_real() -> None:
    square = squared_magnitude(jnp.array([3 + 4j, -2j, 5.0]))
    assert square.dtype == np.float32
    np.testing.assert_array_equal(square, [25.0, 4.0, 25.0])
    np.testing.assert_array_equal(squared_magnitude(jnp.array([-3.0, 0.5])), [9.0, 0.25])


def test_squared_magnitude_is_smooth_at_zero() -> None:
    """Both its derivatives are true there, where |x| itself has a kink."""
    for x in (
        lambda a: a,
        lambda a: jax.lax.complex(a, 0 * a),
        lambda a: jax.lax.complex(0 * a, a),
    ):

        def square(a: jax.Array, x: Any = x) -> jax.Array:
            return squared_magnitude(x(a))

        assert jax.grad(square)(0.0) == 0
        assert jax.grad(jax.grad(square))(0.0) == 2


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_root_is_the_square_root_to_the_last_bit(dtype: str) -> None:
    x = jnp.asarray(np.append(np.logspace(-37, 38, 301), [0.0, -0.0, np.inf]), dtype)
    np.testing.assert_array_equal(root(x), jnp.sqrt(x))
    np.testing.assert_array_equal(jax.jvp(root, (x,), (x,))[0], jnp.sqrt(x))
    np.testing.assert_array_equal(jax.jit(jax.vmap(root))(x), jax.jit(jnp.sqrt)(x))
    assert root(x).dtype == dtype
    assert np.isnan(root(jnp.asarray(-1.0)))


@pytest.mark.usefixtures("x64")
def test_derivative_of_root_is_true_but_for_zero_where_it_is_zero() -> None:
    """1 / (2 sqrt(x)), by every way of taking it; the true one is infinite at 0."""
    x = jnp.array([0.0, 1e-12, 0.25, 4.0, 1e12])
    slope = np.array([0.0, 0.5e6, 1.0, 0.25, 0.5e-6])
    bend = np.array([0.0, -0.25e18, -2.0, -1 / 32, -0.25e-18])
    # a root and a quotient: 2 roundings; their derivative some 6 more
    for derivative in (jax.grad(root), jax.jacfwd(root), jax.jacrev(root)):
        np.testing.assert_allclose(jax.jit(jax.vmap(derivative))(x), slope, rtol=4e-16)
    for derivative in (jax.grad(jax.grad(root)), jax.hessian(root)):
        np.testing.assert_allclose(jax.jit(jax.vmap(derivative))(x), bend, rtol=2e-15)


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_derivative_of_an_angle_is_finite_where_it_is_zero(dtype: str) -> None:
    """atan2 itself has NaN there; at 1 nothing depends on the magnitude but a phase."""
    tx = adamx.adam_atan2(1.0)

    def moved(g: jax.Array) -> jax.Array:
        return jnp.sum(tx.update(g, tx.init(g), g)[0].real)

    assert np.isfinite(jax.grad(moved)(jnp.array([0.0, 1.0], dtype))).all()


def test_nothing_over_nothing_is_nothing() -> None:
    n = jnp.array([1.0, -6.0, 0.0, 3.0, -3.0, 0.0])
    d = jnp.array([4.0, 2.0, 5.0, 0.0, 0.0, 0.0])
    np.testing.assert_array_equal(divide(n, d), [0.25, -3.0, 0.0, 0.0, 0.0, 0.0])
    with jax.numpy_dtype_promotion("standard"):
        quotient = divide(jax.lax.complex(n, n), d)
    np.testing.assert_array_equal(quotient, [0.25 + 0.25j, -3 - 3j, 0, 0, 0, 0])
    assert np.isnan(divide(jnp.array(jnp.nan), jnp.array(2.0)))
    assert np.isnan(divide(jnp.array(2.0), jnp.array(jnp.nan)))
    for derivative in jax.grad(lambda n, d: jnp.sum(divide(n, d)), argnums=(0, 1))(n, d):
        assert np.all(np.isfinite(derivative))
        assert np.all(derivative[3:] == 0)


def test_limit_for_squares_acts_where_float32_does_not_hold_the_square() -> None:
    """At 2^60: its square, the sum of 255 such, and what the correction makes of it are finite."""
    limit = 2.0**60
    u = jnp.array([0.0, -3.0, limit, -limit, 2 * limit, -3e38, 3e38, jnp.inf, -jnp.inf, jnp.nan])
    limited = [0.0, -3.0, limit, -limit, limit, -limit, limit, np.inf, -np.inf, np.nan]
    for dtype in (jnp.bfloat16, jnp.float32):
        np.testing.assert_array_equal(limit_for_squares(u, dtype), limited)
    both = limit_for_squares(jax.lax.complex(u, u[::-1]), jnp.complex64)
    np.testing.assert_array_equal(both.real, limited)
    np.testing.assert_array_equal(both.imag, limited[::-1])
    assert limit_for_squares(u, jnp.float16) is u
    with jax.enable_x64(True):
        wide = jnp.array([1e300, -3e38])
        for dtype in (jnp.bfloat16, jnp.float32, jnp.float64):
            assert limit_for_squares(wide, dtype) is wide
        wide = jax.lax.complex(wide, wide)
        assert limit_for_squares(wide, jnp.complex128) is wide
    assert 255 * limit**2 < LARGEST


def test_a_limited_square_is_that_of_a_limited_number() -> None:
    """Both parts of a complex number have the limit; in float64 it is the largest number."""
    square = 2.0**120
    u = jnp.array([0.0, -3.0, 2.0**60, -(2.0**61), 3e38, -jnp.inf, jnp.nan])
    squares = np.array([0.0, 9.0, square, square, square, square, np.nan])
    np.testing.assert_array_equal(limited_square(u), squares)
    np.testing.assert_array_equal(limited_square(jax.lax.complex(u, u)), 2 * squares)
    with jax.enable_x64(True):
        wide = limited_square(jnp.array([1e30, 1e200]))
        np.testing.assert_array_equal(wide, [1e30**2, np.finfo(np.float64).max])


AVERAGES = {
    "ema_of_squares": lambda: adamx.ema_of_squares(0.5),
    "sum_of_squares": lambda: adamx.sum_of_squares(),
    "seeded_ema_of_squares": lambda: adamx.seeded_ema_of_squares(0.5),
    "additive_average_of_squares": lambda: adamx.additive_average_of_squares(0.5),
    "ema_of_mean_squares": lambda: adamx.ema_of_mean_squares(0.5, axes=(0, 1)),
    "factored": lambda: adamx.factored_ema_of_squares(0.5, axes=(0, 1)),
    "not factored": lambda: adamx.factored_ema_of_squares(0.5, axes=()),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_of_squares_stays_finite_and_comes_down_again(name: str) -> None:
    """Of 512 numbers: the sum of their squares overflows, though each was limited.

    AdaGrad's sum never falls, and Yogi's average by no more than the square of the gradient.
    """
    tx, u = AVERAGES[name](), jnp.full((512, 512), 3e38)
    state = tx.init(u)
    _, state = tx.update(u, state)
    after = max(float(x.max()) for x in jax.tree.leaves(state))
    assert 2.0**118 < after < np.inf
    if name not in ("ema_of_mean_squares", "factored"):
        assert after <= 2.0**120
    _, small = tx.update(u[:2, :2], tx.init(u[:2, :2]))
    assert max(float(x.max()) for x in jax.tree.leaves(small)) <= 2.0**120
    if name not in ("sum_of_squares", "additive_average_of_squares"):
        _, state = tx.update(jnp.ones_like(u), state)
        assert max(float(x.max()) for x in jax.tree.leaves(state)) < after


def test_limit_sum_acts_on_bfloat16_alone() -> None:
    """A sum that overflowed is the largest number, unless what was added was infinite or NaN."""
    inf, nan = jnp.inf, jnp.nan
    total = jnp.array([0.0, -3.0, LARGEST, inf, -inf, inf, -inf, nan])
    u = jnp.array([0.0, 1.0, 3e38, 3e38, -3e38, inf, -inf, nan])
    limited = [0.0, -3.0, LARGEST, LARGEST, -LARGEST, inf, -inf, nan]
    np.testing.assert_array_equal(limit_sum(total, u, jnp.bfloat16), limited)
    for dtype in ("float16", "float32", "float64"):
        assert limit_sum(total, u, jnp.dtype(dtype)) is total
    with jax.enable_x64(True):
        wide = jnp.array([1e300])
        assert limit_sum(wide, wide, jnp.bfloat16) is wide


def test_average_is_a_convex_combination() -> None:
    """For all decays, as numbers and as arrays, of all sizes, exact at its end; to 4 roundings."""
    old = jnp.array([0.0, 1.0, 8.0, 1e30, 1.0, -LARGEST, LARGEST, 3.0])
    new = jnp.array([1.0, 0.0, 4.0, 4.0, 1e-30, LARGEST, LARGEST, 3.0])
    old64, new64 = (np.asarray(x, np.float64) for x in (old, new))
    for decay in (0.0, 0.25, 0.4999, 0.5, 0.75, 0.999, 1 - 2.0**-24):
        for given in (decay, jnp.asarray(decay, jnp.float32)):
            past, now = float(given) * old64, (1 - float(given)) * new64
            error = np.abs(np.asarray(average(old, new, given, 1 - given), np.float64) - past - now)
            assert np.all(error <= 4 * 2.0**-24 * (np.abs(past) + np.abs(now)))
    np.testing.assert_array_equal(average(old, new, 0.0, 1.0), new)


def test_average_of_a_constant_stays_where_the_memory_is_longer_than_one_step() -> None:
    """Its gain is one, exactly, from decay = 0.5 on; two rounded factors need not sum to one."""
    x = jnp.asarray(np.random.default_rng(5).normal(size=64), jnp.float32)
    for decay in (0.5, 0.6, 0.7, 0.8, 0.9, 0.999):
        for given in (decay, jnp.asarray(decay, jnp.float32)):
            np.testing.assert_array_equal(average(x, x, given, 1 - given), x)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "make", [adamx.ema, adamx.ema_of_squares, adamx.nesterov_ema], ids=lambda make: make.__name__
)
def test_what_an_average_takes_in_is_weighed_in_the_precision_of_its_decay(make: Any) -> None:
    """1 - 0.999 is 0.001 to 6e-8, rounded once; that of float32(0.999) is 1.3e-5 larger."""
    ones = jnp.ones(1, jnp.float32)
    for decay in (0.999, jnp.asarray(0.999, jnp.float64)):
        tx = make(decay)
        (slot,) = tx.state_names()
        _, state = tx.update(ones, tx.init(ones))
        np.testing.assert_allclose(np.asarray(state[slot], np.float64), 0.001, rtol=2.0**-24)


# --- Gradients in 16 bits ------------------------------------------------------------------------

STEPS = 50
RATE = 0.01
PARAM = 0.5


def flushed(x: np.ndarray) -> np.ndarray:
    """What XLA computes with in place of x.

    Float32 numbers below the smallest normal one, 1.2e-38, are zero to it on CPU, so bfloat16's are
    too; float16's are normal float32 numbers. Other devices keep them.
    """
    tiny = jnp.asarray(SMALLEST / 2, jnp.float32)
    flushes = float(jax.jit(lambda x: 1.5 * x)(tiny)) == 0
    return np.where(np.abs(x) < SMALLEST, 0.0, x) if flushes else x


def signs() -> np.ndarray:
    """Up, down, and by turns."""
    return np.stack([np.ones(STEPS), -np.ones(STEPS), (-1.0) ** np.arange(STEPS)])


def values(dtype: np.dtype) -> list[float]:
    """0, the smallest subnormal number, 1e-4, 300, and the largest finite one."""
    info = ml_dtypes.finfo(dtype)
    return [0.0, float(info.smallest_subnormal), 1e-4, 300.0, float(info.max)]


def table(dtype: np.dtype, largest: float) -> np.ndarray:
    """``[STEPS, columns]``: each value in each sequence of signs, and all values in turn."""
    ordinary = [*values(dtype)[:-1], largest]
    columns = [value * sign for value in values(dtype) for sign in signs()]
    turns = np.arange(STEPS)
    for stride in (1, 2, 3):
        columns.append(np.array(ordinary)[turns * stride % 5] * (-1.0) ** (turns // 5))
    return np.stack(columns, axis=1).astype(dtype)


def sgd_momentum(w: Any, g: Any, *, learning_rate: float) -> reference.Trajectory:
    return r.sgd(w, g, learning_rate=learning_rate, momentum=0.9)


def sgd_nesterov(w: Any, g: Any, *, learning_rate: float) -> reference.Trajectory:
    return r.sgd(w, g, learning_rate=learning_rate, momentum=0.9, nesterov=True)


Method = Callable[..., reference.Trajectory]

# name: (optimizer, the reference's method)
OPTIMIZERS: dict[str, tuple[Callable[[], adamx.Transformation], Method]] = {
    "adam": (lambda: adamx.adam(RATE), r.adam),
    "adamw": (lambda: adamx.adamw(RATE, weight_decay=0.1), r.adam),
    "rmsprop": (lambda: adamx.rmsprop(RATE), r.rmsprop),
    "adagrad": (lambda: adamx.adagrad(RATE), r.adagrad),
    "momentum": (lambda: adamx.momentum(RATE), r.momentum),
    "sgd_momentum": (lambda: adamx.sgd(RATE, 0.9), sgd_momentum),
    "sgd_nesterov": (lambda: adamx.sgd(RATE, 0.9, nesterov=True), sgd_nesterov),
}
SCALED = {"adam", "adamw", "rmsprop", "adagrad"}
DTYPES = [BFLOAT16, FLOAT16]


def walk(tx: Any, gradients: Any, param: Any) -> Any:
    """Return the updates and states of all steps, at parameters that stay where they are."""
    gradients, param = jnp.asarray(gradients), jnp.asarray(param)

    def step(state: Any, grads: jax.Array) -> Any:
        updates, state = tx.update(grads, state, param)
        return state, (updates, state)

    return jax.device_get(jax.jit(lambda: jax.lax.scan(step, tx.init(param), gradients)[1])())


def walk_all(txs: list[adamx.Transformation], gradients: Any, param: Any) -> list[Any]:
    """Return what `walk` does, of several transformations in one program: compiling is slow.

    `gradients` is one array, or a list with one for each transformation.
    """
    if not isinstance(gradients, list):
        gradients = [gradients] * len(txs)
    param = jnp.asarray(param)

    def step(states: Any, grads: Any) -> Any:
        pairs = [tx.update(g, s, param) for tx, s, g in zip(txs, states, grads, strict=True)]
        return [state for _, state in pairs], pairs

    starts = [tx.init(param) for tx in txs]
    gradients = jax.tree.map(jnp.asarray, gradients)
    return jax.device_get(jax.jit(lambda: jax.lax.scan(step, starts, gradients)[1])())


def is_limited(name: str, dtype: np.dtype) -> bool:
    """Whether the optimizer takes squares of gradients that reach further than their root."""
    return dtype == BFLOAT16 and name in SCALED


def table_of(name: str, dtype: np.dtype) -> np.ndarray:
    """The gradients for one optimizer, where the largest one among others is one it can take."""
    return table(dtype, 2.0**60 if is_limited(name, dtype) else values(dtype)[-1])


@functools.cache
def runs_in_16_bits(dtype: np.dtype) -> dict[str, tuple[np.ndarray, dict[str, np.ndarray]]]:
    """The updates and states of all optimizers for gradients and parameters of a dtype."""
    tables = [table_of(name, dtype) for name in OPTIMIZERS]
    txs = [make() for make, _ in OPTIMIZERS.values()]
    param = np.full(tables[0].shape[1], PARAM, dtype)
    return dict(zip(OPTIMIZERS, walk_all(txs, tables, param), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_of_16_bit_gradients_are_true(name: str, dtype: np.dtype) -> None:
    """For every value and sign, to half an ULP of the emitted dtype and the roundings of float32.

    Those are 9 a step in the slots and 10 in the emission (test_agreement.py counts them), of the
    same optimizer on |g|: less than 0.03 ULP of a float16, 0.004 of a bfloat16, and twice that
    where they carry the result over a power of two. bfloat16 in turn has 2^60 for its largest in
    the scaled methods: see the next test.

    Nothing is exempt where float32 holds the true value. It holds no bfloat16 below 1.2e-38 (see
    `flushed`), or only to the few bits that are left there, where the device keeps such numbers;
    and no trace of many times 3.4e38: there the update is finite, and has its sign.
    """
    _, method = OPTIMIZERS[name]
    limited, g = is_limited(name, dtype), table_of(name, dtype)
    updates, state = runs_in_16_bits(dtype)[name]
    assert updates.dtype == dtype
    gradients, w = flushed(g.astype(np.float64)), np.zeros(g.shape[1])
    run = method(w, gradients, learning_rate=RATE)
    alike = method(w, np.abs(gradients), learning_rate=RATE)
    decayed = RATE * 0.1 * PARAM if name == "adamw" else 0.0
    wanted, measure = run.updates - decayed, np.abs(alike.updates) + decayed
    emitted = updates.astype(np.float64)

    assert np.all(np.isfinite(emitted))
    assert np.all(np.abs(wanted) <= float(ml_dtypes.finfo(dtype).max))
    sums = np.maximum(np.abs(run.slots.get("trace", 0.0)), np.abs(run.updates) / RATE)
    few_bits = np.maximum.accumulate((np.abs(gradients) > 0) & (np.abs(gradients) < SMALLEST))
    exempt = np.maximum.accumulate(sums) > LARGEST
    assert np.any(exempt) == (dtype == BFLOAT16 and name in ("sgd_momentum", "sgd_nesterov"))
    assert np.all(np.sign(emitted[exempt]) == np.sign(wanted[exempt]))

    info, t = ml_dtypes.finfo(dtype), np.arange(1, STEPS + 1)[:, None]
    exponent = np.floor(np.log2(np.maximum(np.abs(wanted), float(info.tiny))))
    ulp = float(info.eps) * 2.0**exponent
    bound = 0.5 * ulp + 2 * (10 + 9 * t) * 2.0**-24 * measure
    assert np.max(np.where(exempt | few_bits, 0, np.abs(emitted - wanted) / bound)) <= 1
    for slot, true in run.slots.items():
        kept = state[slot]
        assert kept.dtype == np.float32
        assert np.all(np.isfinite(kept))
        held = np.abs(gradients) <= 2.0**60 if limited else np.abs(true) <= LARGEST
        holds = np.logical_and.accumulate(held)
        error = np.abs(kept - true)[holds]
        allowed = ((4 + 9 * t) * 2.0**-24 * alike.slots[slot])[holds]
        assert np.all(error <= np.maximum(allowed, SMALLEST))


@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype(np.float32)], ids=str)
@pytest.mark.parametrize("name", sorted(SCALED))
def test_beyond_the_square_root_of_float32_a_gradient_counts_as_the_limit(name, dtype) -> None:
    """nu of 3.4e38 would be 1e76. The gradient counts as 2^60, then as before and after.

    One in ten is the largest here, the others ordinary: all updates are those of the limited
    gradients, finite, and the ordinary ones count again when nu has forgotten.
    """
    make, method = OPTIMIZERS[name]
    rng = np.random.default_rng(3)
    g = rng.normal(size=(STEPS, 32)).astype(dtype)
    huge = rng.random(g.shape) < 0.1
    info = ml_dtypes.finfo(dtype)
    g[huge] = (np.sign(g.astype(np.float64)) * float(info.max))[huge]
    limit = np.clip(g.astype(np.float64), -(2.0**60), 2.0**60)
    emitted = walk(make(), g, np.zeros(32, dtype))[0].astype(np.float64)
    wanted = method(np.zeros(32), limit, learning_rate=RATE).updates
    assert np.all(np.isfinite(emitted))
    half, rounded = float(info.eps) / 2, 1000 * 2.0**-24  # of an ULP; 460 roundings, as above
    if name in ("adam", "adamw"):
        # the numerator remembers as the denominator does
        measure = np.abs(method(np.zeros(32), np.abs(limit), learning_rate=RATE).updates)
        np.testing.assert_array_less(
            np.abs(emitted - wanted), half * np.abs(wanted) + rounded * measure + 1e-37
        )
    else:
        # 1 / 1e18 of an ordinary update may stay
        before = ~np.maximum.accumulate(huge)
        relative = half if dtype == BFLOAT16 else rounded
        np.testing.assert_allclose(emitted[before], wanted[before], rtol=relative)
        np.testing.assert_allclose(emitted, wanted, rtol=relative, atol=1e-37)


@pytest.mark.parametrize("gradient", [1e19, 3e19, 5e36, 2e37])
@pytest.mark.parametrize(
    "tx",
    [
        adamx.amsgrad(0.1),
        adamx.rmsprop(0.1, centered=True),
        adamx.rmsprop(0.1, centered=True, bias_correction=True),
    ],
    ids=["amsgrad", "centered", "centered and corrected"],
)
def test_squares_beyond_float32_make_no_infinity_and_no_nan(tx: Any, gradient: float) -> None:
    """The largest number stands for them; a mean whose square is larger is no reason to divide by
    eps, nor may two infinities be subtracted."""
    g = jnp.array([gradient, -gradient], jnp.float32)
    state = tx.init(g)
    for grads in (g, g, jnp.ones(2)):
        updates, state = tx.update(grads, state)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
    np.testing.assert_array_less(jnp.abs(updates), 1e18)


@pytest.mark.parametrize("gradient", [0.0, 1e-4])
def test_float16_gradients_that_break_optax(gradient: float) -> None:
    """Its eps = 1e-8 is 0 in float16, and so is (1e-4)^2: 0 / 0, and 1e-4 / 0."""
    g, w = jnp.full(1, gradient, jnp.float16), jnp.ones(1, jnp.float16)
    theirs: Any = optax.adam(1e-3)
    with jax.numpy_dtype_promotion("standard"):
        assert not np.isfinite(theirs.update(g, theirs.init(w), w)[0][0])
    tx = adamx.adam(1e-3)
    updates, state = tx.update(g, tx.init(w), w)
    # g / (|g| + 1e-8) of the float16 nearest to 1e-4, rounded to float16: 2^-11
    np.testing.assert_allclose(
        np.asarray(updates, np.float64), -1e-3 * (gradient > 0) / (1 + 1e-4), rtol=2.0**-11
    )
    np.testing.assert_allclose(state["nu"], 1e-3 * float(g[0]) ** 2, rtol=1e-6)


def test_bfloat16_parameters_train_where_optax_freezes() -> None:
    """nu in bfloat16 cannot shrink by a thousandth: 0.999 is 1 there. In float32 it does.

    200 gradients of +-1 by turns, then 6000 of 0.001. Optax's nu stays at 0.196 for ever, its
    steps, 2e-5, round away, and the parameter stands still; ours follow the reference.
    """
    first, then = 200, 6000
    g = np.append((-1.0) ** np.arange(first), np.full(then, 1e-3)).astype(BFLOAT16)[:, None]

    def train(tx: optax.GradientTransformation, nu_of: Callable[[Any], Any]) -> Any:
        def step(carry: Any, grads: jax.Array) -> Any:
            params, state = carry
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), (params, nu_of(state))

        start = jnp.zeros(1, jnp.bfloat16)
        walk = jax.jit(lambda: jax.lax.scan(step, (start, tx.init(start)), jnp.asarray(g))[1])
        return [np.asarray(x).astype(np.float64)[:, 0] for x in walk()]

    ours, our_nu = train(adamx.adam(0.01), lambda state: state["nu"])
    with jax.numpy_dtype_promotion("standard"):
        theirs, their_nu = train(optax.adam(0.01), lambda state: state[0].nu)
    assert their_nu[first] == their_nu[-1] > 0.1
    assert theirs[1000] == theirs[-1] > -0.02
    true = r.ema_of_squares(g.astype(np.float64), 0.999)[:, 0]
    # 6200 roundings of half an ULP, which a fall by a thousandth a step forgets: 1000 remain
    np.testing.assert_allclose(our_nu, true, rtol=1000 * 2.0**-24)
    assert true[-1] < 5e-4
    assert ours[-1] < -0.1


def test_injected_bfloat16_hyperparameters_are_refused() -> None:
    """In bfloat16 0.999 is 1, and 1 - 1^t is 0: Optax returns NaN at step one."""
    g = w = jnp.ones(1, jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        theirs: Any = optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3)
        assert np.isnan(theirs.update(g, theirs.init(w), w)[0][0])
        ours = optax.inject_hyperparams(adamx.adamw)(learning_rate=1e-3)
        with pytest.raises(ValueError, match="in float32 or wider, got an array of bfloat16"):
            ours.init(w)
        mended = optax.inject_hyperparams(adamx.adamw, hyperparam_dtype=jnp.float32)
        tx: Any = mended(learning_rate=1e-3, weight_decay=0.0)
        updates, _ = tx.update(g, tx.init(w), w)
    assert updates.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(updates, np.float64), -1e-3, rtol=2.0**-8)


# --- Store, compute, emit ------------------------------------------------------------------------

EVERY: dict[str, Callable[[], adamx.Transformation]] = {
    "adam": lambda: adamx.adam(0.1),
    "adam_nesterov": lambda: adamx.adam(0.1, nesterov=True),
    "adamw": lambda: adamx.adamw(optax.constant_schedule(0.1), weight_decay=0.1),
    # eps is large since a centred, corrected variance is 0 in the first step, but for rounding
    "rmsprop": lambda: adamx.rmsprop(
        0.1, eps=0.5, eps_in_sqrt=True, centered=True, momentum=0.9, bias_correction=True
    ),
    "adagrad": lambda: adamx.adagrad(0.1),
    "momentum": lambda: adamx.momentum(0.1),
    "sgd": lambda: adamx.sgd(0.1, momentum=0.9, nesterov=True),
}
REAL_SLOTS = {"nu", "sum_of_squares"}

# (parameter, gradient, slots; real slots are real): compute is the widest of the first two
BASIC = [
    ("bfloat16", "bfloat16", "float32"),
    ("complex64", "complex64", "complex64"),
    ("float64", "float64", "float64"),
    ("float32", "float64", "float32"),
]
POLICY = [
    *BASIC,
    ("float16", "float16", "float32"),
    ("bfloat16", "float32", "float32"),
    ("float32", "bfloat16", "float32"),
    ("float32", "float32", "float32"),
    ("float64", "float32", "float64"),
    ("float64", "bfloat16", "float64"),
    ("complex128", "complex128", "complex128"),
    ("complex64", "complex128", "complex64"),
]

WIDE = {"float64", "complex128"}


@pytest.mark.parametrize(("name", "x64"), [*((name, True) for name in EVERY), ("adamw", False)])
def test_dtypes_of_slots_and_updates(name: str, x64: bool) -> None:
    """Slots are float32 or what the parameter is where that is wider; updates are as gradients.

    Several in one tree, under strict promotion, for two steps.
    """
    policy = POLICY if name == "adamw" else BASIC
    policy = [line for line in policy if x64 or not WIDE.intersection(line)]
    with jax.enable_x64(x64):
        params = [jnp.ones((2,), jnp.dtype(p)) for p, _, _ in policy]
        grads = [jnp.full((2,), 0.5, jnp.dtype(g)) for _, g, _ in policy]
        tx = EVERY[name]()
        state = tx.init(params)
        step = jax.jit(tx.update)
        _, once = step(grads, state, params)
        updates, twice = step(grads, once, params)
    for number, (_, emitted, stored) in enumerate(policy):
        assert updates[number].dtype == emitted
        assert np.all(np.isfinite(np.asarray(updates[number]).astype(np.complex128)))
        for of_state in (state, once, twice):
            for slot in of_state.keys() - {"count", "learning_rate"}:
                real = slot in REAL_SLOTS
                wanted = real_dtype(jnp.dtype(stored)) if real else jnp.dtype(stored)
                assert of_state[slot][number].dtype == wanted
    assert twice["learning_rate"].dtype == np.float32
    assert twice["count"].dtype == np.int32


@pytest.mark.usefixtures("x64")
def test_float64_is_computed_in_float64() -> None:
    """A gradient that float32 would round shows in the slot, for parameters or slots as wide."""
    g = np.array([1 + 2.0**-40])
    state = walk(adamx.momentum(0.1, decay=0.5), g[None], np.zeros(1))[1]
    assert state["mu"][0, 0] == 0.5 * g[0]


@pytest.mark.usefixtures("x64")
def test_float32_parameters_do_under_x64_what_they_do_without() -> None:
    """To 4 ULP: the hyperparameters' own rounding is the same, expm1 is the other precision's."""
    g = np.random.default_rng(4).normal(size=(10, 8)).astype(np.float32)
    w, txs = np.ones(8, np.float32), [EVERY[name]() for name in ("adamw", "rmsprop", "adagrad")]
    under = walk_all(txs, g, w)
    with jax.enable_x64(False):
        without = walk_all(txs, g, w)
    for (here, _), (there, _) in zip(under, without, strict=True):
        assert here.dtype == there.dtype == np.float32
        scale = np.maximum.accumulate(np.abs(there))
        assert np.all(np.abs(here - there) <= 4 * 2.0**-23 * scale)


def test_complex_is_two_reals_with_one_square() -> None:
    """For a gradient on a line through 0 in the complex plane Adam does what it does on that line.

    (3 + 4i) / 5 times a real gradient: a product of components more, 3 roundings.
    """
    g = np.random.default_rng(5).normal(size=(10, 6)).astype(np.float32)
    direction = np.complex64((3 + 4j) / 5)
    txs = [EVERY[name]() for name in ("adam_nesterov", "adagrad", "sgd")]
    on_line = walk_all(txs, g, np.zeros(6, np.float32))
    in_plane = walk_all(txs, g * direction, np.zeros(6, np.complex64))
    for (real, state), (turned, complex_state) in zip(on_line, in_plane, strict=True):
        scale = np.maximum.accumulate(np.abs(real))
        assert np.all(np.abs(turned - direction * real) <= 40 * 2.0**-24 * scale)
        for slot in REAL_SLOTS & state.keys():
            np.testing.assert_allclose(complex_state[slot], state[slot], rtol=40 * 2.0**-24)


# --- Hyperparameters and parameters of every kind ------------------------------------------------


def everything_of(kind: Callable[[float], Any]) -> adamx.Transformation:
    """Every concept, with all its numbers of one kind; all are powers of two, or sums of two."""
    return adamx.chain(
        adamx.add_decayed_weights(kind(0.5)),
        adamx.scale(kind(-2.0)),
        adamx.nesterov_ema(kind(0.5), name="ahead"),
        adamx.rms_scaling(
            second_moment=adamx.sum_of_squares(kind(0.5)), eps=kind(0.5), eps_root=kind(0.25)
        ),
        adamx.scale_by_adam(kind(0.5), kind(0.75), kind(0.125), kind(0.0625)),
        adamx.rms_scaling(second_moment=adamx.ema_of_squares(kind(0.5), kind(2.0), name="nu2")),
        adamx.trace(kind(0.5)),
        adamx.scale_by_learning_rate(kind(0.25)),
    )


KINDS: dict[str, Callable[[float], Any]] = {
    "numpy_float32": np.float32,
    "numpy_float64": np.float64,
    "numpy_array_float32": lambda x: np.array(x, np.float32),
    "numpy_array_float64": lambda x: np.array(x, np.float64),
    "jax_array": lambda x: jnp.asarray(x, jnp.float32),
}
SOME = np.random.default_rng(6).normal(size=(3, 4)).astype(np.float32)


@functools.cache
def steps_of_python_numbers(x64: bool) -> list[np.ndarray]:
    """What `everything_of` does with Python numbers."""
    with jax.enable_x64(x64):
        return list(walk(everything_of(float), SOME, SOME[0])[0])


@pytest.mark.parametrize(
    ("kind", "x64"),
    [*((kind, False) for kind in KINDS), ("numpy_array_float64", True), ("jax_array", True)],
)
def test_hyperparameters_may_be_numbers_of_any_kind(kind: str, x64: bool) -> None:
    """They do what the same Python number does, to 8 ULP where an array goes another way.

    Eagerly, where arrays are arguments of the compiled step, and inside a jit that holds them.
    """
    wanted = steps_of_python_numbers(x64)
    with jax.enable_x64(x64):
        tx, w = everything_of(KINDS[kind]), jnp.asarray(SOME[0])
        states = [tx.init(w), tx.init(w)]
        inline = jax.jit(lambda g, state: tx.update(g, state, w))
        for g, there in zip(SOME, wanted, strict=True):
            eager, states[0] = tx.update(jnp.asarray(g), states[0], w)
            inside, states[1] = inline(jnp.asarray(g), states[1])
            assert eager.dtype == inside.dtype == there.dtype == np.float32
            allowed = 8 * 2.0**-23 * np.max(np.abs(there))
            assert np.max(np.abs(eager - there)) <= allowed
            assert np.max(np.abs(inside - there)) <= allowed


def test_numpy_numbers_become_python_numbers() -> None:
    """So that a NumPy number keeps no dtype of its own, and all its double precision."""
    assert everything_of(np.float64) == everything_of(np.float32) == everything_of(float)
    assert type(adamx.ema(np.float64(0.999)).decay) is float
    assert adamx.adam(0.1, b2=np.float64(0.999)) == adamx.adam(0.1, b2=0.999)


def test_integers_are_numbers() -> None:
    """As rates, decays, eps and initial values: bit for bit what the float does."""
    makers: list[Callable[[Any], adamx.Transformation]] = [
        lambda k: adamx.adam(k(1), k(0), k(0), k(1), k(1)),
        lambda k: adamx.adamw(k(1), weight_decay=k(2), eps=k(0), nesterov=True),
        lambda k: adamx.rmsprop(k(1), k(0), k(1), k(1), momentum=k(1), bias_correction=True),
        lambda k: adamx.adagrad(k(3), k(1), k(0)),
        lambda k: adamx.momentum(k(1), k(0)),
        lambda k: adamx.sgd(k(1), k(1), nesterov=True),
        lambda k: adamx.chain(adamx.scale(k(-3)), adamx.add_decayed_weights(k(1))),
        lambda k: adamx.sgd(optax.constant_schedule(k(2))),
    ]
    as_integers = walk_all([make(int) for make in makers], SOME, SOME[0])
    as_floats = walk_all([make(float) for make in makers], SOME, SOME[0])
    assert all(updates.dtype == np.float32 for updates, _ in as_integers)
    jax.tree.map(np.testing.assert_array_equal, as_integers, as_floats)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.complex64])
def test_parameters_and_gradients_may_be_numpy_arrays(dtype: Any) -> None:
    """They do what the JAX array made of them does; float64 is float32 there without x64."""
    w, g = SOME[0].astype(dtype), SOME[1].astype(dtype)
    for name in ("adamw", "rmsprop"):
        tx = EVERY[name]()
        updates, state = tx.update({"w": g}, tx.init({"w": w}), {"w": w})
        arrays = {"w": jnp.asarray(w)}
        wanted = tx.update({"w": jnp.asarray(g)}, tx.init(arrays), arrays)
        assert updates["w"].dtype == wanted[0]["w"].dtype
        jax.tree.map(np.testing.assert_array_equal, (updates, state), wanted)


# --- Derivatives of a step -----------------------------------------------------------------------

HISTORY = np.array(
    [[0.0, 0.7, -0.2, 0.0, 0.3], [0.0, -1.1, 0.4, 0.0, 2.0], [0.0, 0.2, 3.0, 0.0, -0.6]]
)
NOW = np.array([0.0, 0.0, 1.7, 0.3, -0.8])  # at rest; g = 0; moving; first gradient; turning


def adam_step(g: Any, past: Any) -> Any:
    """Adam's step after the gradients of the past, in mpmath's arithmetic."""
    b1, b2, eps = mpmath.mpf(0.9), mpmath.mpf(0.999), mpmath.mpf(1e-8)
    t, m, v = len(past) + 1, mpmath.mpf(0), mpmath.mpf(0)
    for x in (*past, g):
        m, v = b1 * m + (1 - b1) * x, b2 * v + (1 - b2) * x * x
    return -RATE * m / (1 - b1**t) / (mpmath.sqrt(v / (1 - b2**t)) + eps)


def rmsprop_step(g: Any, past: Any) -> Any:
    """RMSprop's step."""
    v, b, eps = mpmath.mpf(0), mpmath.mpf(0.9), mpmath.mpf(1e-8)
    for x in (*past, g):
        v = b * v + (1 - b) * x * x
    return -RATE * g / (mpmath.sqrt(v) + eps)


def adagrad_step(g: Any, past: Any) -> Any:
    """AdaGrad's step from an initial sum of 0."""
    total = mpmath.fsum(x * x for x in (*past, g))
    return -RATE * g / (mpmath.sqrt(total) + mpmath.mpf(1e-7))


# name: (optimizer, step, its derivative at g = 0 where all gradients have been 0)
STEPS_OF: dict[str, tuple[Callable[[], adamx.Transformation], Callable[..., Any], float]] = {
    "adam": (lambda: adamx.adam(RATE), adam_step, 0.1 / (1 - 0.9**4) / 1e-8),
    "rmsprop": (lambda: adamx.rmsprop(RATE), rmsprop_step, 1 / 1e-8),
    "adagrad": (lambda: adamx.adagrad(RATE, 0.0), adagrad_step, 1 / 1e-7),
}


def derivatives(
    step: Callable[..., Any], at_rest: float, order: int
) -> tuple[np.ndarray, np.ndarray]:
    """The true derivatives of the step NOW by the gradient, and what roundings are relative to.

    A derivative is a sum of terms of both signs, each some (step / g^order): where a first gradient
    follows upon rest, its step is lr whatever its size, and the terms cancel.
    """
    true, measure = [-RATE * at_rest if order == 1 else 0.0], [0.0]
    with mpmath.workdps(40):
        for g, past in list(zip(NOW, HISTORY.T, strict=True))[1:]:
            of_g = functools.partial(step, past=[mpmath.mpf(x) for x in past])
            true.append(float(mpmath.diff(of_g, mpmath.mpf(g), order)))
            measure.append(float(abs(of_g(mpmath.mpf(g)) / g**order)) if g else 0.0)
    return np.array(true), np.maximum(np.abs(true), measure)


def next_step(tx: adamx.Transformation) -> tuple[Callable[[Any], Any], Any]:
    """The step after HISTORY as a function of the gradient, and the state it starts from."""
    w = jnp.zeros(HISTORY.shape[1])
    state = tx.init(w)
    for g in HISTORY:
        _, state = tx.update(jnp.asarray(g, w.dtype), state, w)
    return lambda g: tx.update(g, state, w)[0], state


@pytest.mark.parametrize(
    ("name", "x64"), [("adam", True), ("rmsprop", True), ("adagrad", True), ("adam", False)]
)
def test_first_derivative_of_a_step_is_true(name: str, x64: bool) -> None:
    """By jacfwd, jacrev, and vmap of grad; also at g = 0, where it is -lr / eps at rest.

    Some 60 roundings: a step and its derivative after three more steps, terms of both signs.
    """
    make, step, at_rest = STEPS_OF[name]
    true, measure = derivatives(step, at_rest, order=1)
    with jax.enable_x64(x64):
        tx = make()
        f, state = next_step(tx)
        now = jnp.asarray(NOW, jnp.float64 if x64 else jnp.float32)

        def all_ways(g: jax.Array) -> Any:
            along = {name: 0 if jnp.ndim(state[name]) else None for name in state}
            alone = jax.vmap(jax.grad(lambda g, s: tx.update(g, s, g)[0]), in_axes=(0, along))
            return jax.jacfwd(f)(g), jax.jacrev(f)(g), alone(g, state)

        forward, reverse, alone = (np.asarray(x, np.float64) for x in jax.jit(all_ways)(now))
    roundings = 60 * (2.0**-53 if x64 else 2.0**-24)
    for derivative in (np.diag(forward), np.diag(reverse), alone):
        assert np.all(np.abs(derivative - true) <= roundings * measure)
    for jacobian in (forward, reverse):
        assert np.all(jacobian[~np.eye(len(NOW), dtype=bool)] == 0)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", STEPS_OF)
def test_second_derivative_of_a_step_is_true_and_zero_at_rest(name: str) -> None:
    """At rest g / (|g| + eps) has two, -2 / eps^2 to the right, 2 / eps^2 to the left: their mean.

    Some 100 roundings.
    """
    make, step, at_rest = STEPS_OF[name]
    f, _ = next_step(make())
    bend = np.asarray(jax.jit(jax.hessian(lambda g: jnp.sum(f(g))))(jnp.asarray(NOW)))
    true, measure = derivatives(step, at_rest, order=2)
    assert bend[0, 0] == 0
    assert np.all(np.abs(np.diag(bend) - true) <= 100 * 2.0**-53 * measure)
    assert np.all(bend[~np.eye(len(NOW), dtype=bool)] == 0)


@pytest.mark.parametrize("name", STEPS_OF)
def test_taking_derivatives_does_not_change_the_step(name: str) -> None:
    """To one ULP, for what one program fuses and the other does not."""
    make, _, _ = STEPS_OF[name]
    f, _ = next_step(make())
    now = jnp.asarray(NOW, jnp.float32)
    value, _ = jax.jit(lambda g: jax.jvp(f, (g,), (jnp.ones_like(g),)))(now)
    np.testing.assert_allclose(value, jax.jit(f)(now), rtol=2.0**-22)


def test_derivative_at_zero_where_optax_has_none() -> None:
    """One Adam step from rest: -lr / eps, where sqrt(g^2) alone gives infinity times 0."""

    def slope(tx: Any) -> float:
        zero = jnp.zeros([])
        return float(jax.jit(jax.grad(lambda g: tx.update(g, tx.init(zero), zero)[0]))(zero))

    with jax.numpy_dtype_promotion("standard"):
        assert math.isnan(slope(optax.adam(RATE)))
    np.testing.assert_allclose(slope(adamx.adam(RATE)), -RATE / 1e-8, rtol=1e-6)
    np.testing.assert_allclose(slope(adamx.adamw(RATE)), -RATE / 1e-8, rtol=1e-6)
    np.testing.assert_allclose(slope(adamx.rmsprop(RATE)), -RATE / 1e-8, rtol=1e-6)
    np.testing.assert_allclose(
        slope(adamx.rmsprop(RATE, eps=1e-8, eps_in_sqrt=True)), -RATE / 1e-4, rtol=1e-6
    )


@pytest.mark.parametrize("name", STEPS_OF)
def test_zero_over_zero_is_zero_with_a_finite_derivative(name: str) -> None:
    """eps = 0 and no gradient yet: the step is 0, and stays so for the derivative's convention."""
    make = {
        "adam": lambda: adamx.adam(RATE, eps=0.0),
        "rmsprop": lambda: adamx.rmsprop(RATE, eps=0.0),
        "adagrad": lambda: adamx.adagrad(RATE, 0.0, eps=0.0),
    }[name]
    f, _ = next_step(make())
    now = jnp.asarray(NOW, jnp.float32)
    assert f(now)[0] == 0
    for slope in jax.jit(lambda g: (jax.jacfwd(f)(g), jax.jacrev(f)(g)))(now):
        assert slope[0, 0] == 0
        assert np.all(np.isfinite(slope))
