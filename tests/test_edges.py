"""Numbers at the edges of what a dtype can hold: masters, counts, dtypes that meet."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamx

pytestmark = pytest.mark.usefixtures("quick_compiler")

BF16, F16 = jnp.bfloat16, jnp.float16
KEEP = ("remainder", "remainder8", "float32")


# --------------------------------------------------------------------- masters near the largest


def near_the_largest(dtype: Any) -> np.ndarray:
    """The 40 largest numbers, infinity and a NaN of either sign."""
    infinity = int(np.asarray(jnp.array(jnp.inf, dtype)).view(np.uint16))
    magnitudes = np.append(np.arange(infinity - 40, infinity + 1), 0x7FFF).astype(np.uint16)
    return np.concatenate([magnitudes, magnitudes | 0x8000]).view(dtype)


@pytest.mark.parametrize(
    ("keep", "dtype"), [*((keep, BF16) for keep in KEEP), ("remainder", F16), ("float32", F16)]
)
def test_masters_near_the_largest_number_are_those_of_float32(keep, dtype):
    """Up, to infinity in part, and down again; float32 is the reference, in which w is added."""
    start = near_the_largest(dtype)
    steps = np.random.default_rng(0).choice([-1, 1], (6, start.size)) * np.sign(
        start.astype(np.float32)
    )
    steps = np.where(np.isfinite(steps), steps, 1) * float(jnp.finfo(dtype).max) * 2.0**-6
    tx = adamx.master_weights(adamx.sgd(1.0), keep)
    params, wanted = jnp.asarray(start), start.astype(np.float32)
    state, step = tx.init(params), adamx.make_step(tx)
    # the largest number that rounds to a finite bfloat16, with the bits that the remainder has
    most = {"remainder": 0x7F7F7FFF, "remainder8": 0x7F7F7F00}.get(keep if dtype == BF16 else "")
    for u in steps.astype(np.float32):
        params, state = step(params, state, -jnp.asarray(u))
        with np.errstate(over="ignore"):
            wanted = wanted + u
        if most:
            limit = np.uint32(most).view(np.float32)
            wanted = np.where(np.isinf(wanted), wanted, np.clip(wanted, -limit, limit))
        got = np.asarray(adamx.masters(params, state))
        # 24 bits, rounded at random, in each of the steps
        np.testing.assert_allclose(got, wanted, rtol=6 * 2.0**-15 if keep == "remainder8" else 0)
        finite = np.isfinite(wanted)
        assert np.array_equal(np.isfinite(np.asarray(params, np.float32)), finite)
        np.testing.assert_allclose(  # half a spacing, or a whole one beyond the largest
            np.asarray(params, np.float32)[finite & (abs(wanted) < jnp.finfo(dtype).max)],
            wanted[finite & (abs(wanted) < jnp.finfo(dtype).max)],
            rtol=float(jnp.finfo(dtype).eps),
        )
    assert np.isinf(wanted).sum() >= 2 and np.isfinite(wanted).any()


@pytest.mark.parametrize("keep", KEEP)
def test_a_parameter_that_was_set_to_infinity_stays_there(keep):
    tx = adamx.master_weights(adamx.sgd(2.0**-12), keep)
    params = jnp.array([1.0, -1.0], BF16)
    step = adamx.make_step(tx)
    params, state = step(params, tx.init(params), jnp.ones(2, BF16))
    infinite = jnp.array([jnp.inf, -jnp.inf], BF16)
    np.testing.assert_array_equal(adamx.masters(infinite, state), infinite.astype(jnp.float32))
    params, state = step(jnp.copy(infinite), state, jnp.ones(2, BF16))
    np.testing.assert_array_equal(params, infinite)


# ------------------------------------------------------------------------------ dtypes that meet


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("moments", "steps"), [("bfloat16", 3), ("packed16", 3), ("packed8", 1)])
def test_a_storage_keeps_what_the_parameter_asks_for_whatever_the_gradients_are(moments, steps):
    """With exact averages, so that both round the same numbers, at random."""
    tx = adamx.adam(0.1, b1=0.5, b2=0.75, moments=moments)
    params = {"w": jnp.zeros(64, jnp.float32)}
    states = {}
    for dtype in (jnp.float32, jnp.float64):
        state = tx.init(params)
        for t in range(1, steps + 1):
            g = {"w": (jnp.arange(1.0, 65) * t).astype(dtype)}
            _, state = tx.update(g, state, params)
        states[dtype] = state
    jax.tree.map(np.testing.assert_array_equal, *states.values())
    dtypes = [jax.tree.map(lambda x: x.dtype, state) for state in states.values()]
    assert dtypes[0] == dtypes[1]
    if moments != "bfloat16":
        with pytest.raises(TypeError, match=r"is float64: use moments.*update\(grads, state, par"):
            tx.update({"w": jnp.ones(64)}, tx.init(params))


@pytest.mark.parametrize(
    "dtype", [BF16, F16, jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float8_e4m3b11fnuz]
)
def test_what_the_precision_warning_recommends_works(dtype):
    params = {"w": jnp.ones(3, dtype), "b": jnp.ones(2, BF16)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adamx.sgd(2.0**-6).init(params)
    (said,) = (str(w.message) for w in caught)
    assert str(np.dtype(dtype)) in said and "bfloat16" in said
    steps = {"master_weights": adamx.make_step(adamx.master_weights(adamx.sgd(2.0**-6)))}
    if "stochastic" in said:
        steps["stochastic"] = adamx.make_step(adamx.sgd(2.0**-6), rounding="stochastic")
    assert ("stochastic" in said) == (jnp.finfo(dtype).bits == 16)
    for step in steps.values():
        here = jax.tree.map(jnp.copy, params)
        state = step.init(here)
        for _ in range(32):
            here, state = step(here, state, params)
        for x in jax.tree.leaves(here):  # 1 - 32 / 64; every number on the way is a bfloat16
            np.testing.assert_array_equal(x.astype(jnp.float32), 0.5)


# ------------------------------------------------------------------------------- counts, saved


COUNTING: dict[str, tuple[str, adamx.Transformation]] = {
    "adam": ("count", adamx.adam(0.1)),
    "accumulate": ("micro_step", adamx.accumulate(adamx.sgd(0.1), 5)),
    "monitor": ("monitor_step", adamx.monitor(adamx.sgd(0.1))),
    "guard": ("consecutive_skipped", adamx.skip_nonfinite(adamx.sgd(0.1))),
    "stage": ("scale_by_schedule/count", adamx.chain(optax.scale_by_schedule(lambda _: 0.5))),
}


def with_count(state, path, value):
    entry, _, rest = path.partition("/")
    return state | {entry: state[entry]._replace(**{rest: value}) if rest else value}


@pytest.mark.parametrize("name", COUNTING)
@pytest.mark.parametrize(
    "value",
    [
        *(
            jnp.asarray(x, dtype)
            for x in (0.5, jnp.inf, -jnp.inf, jnp.nan)
            for dtype in (BF16, F16)
        ),
        jnp.float32(2.0**31),
        np.float64(-3.0e9),
        np.uint32(2**31),
        np.int64(2**40),
        2**31,
        "12",
        np.bool_(True),
        1j,
    ],
)
def test_a_count_that_is_none_is_refused_with_path_and_value(name, value):
    path, tx = COUNTING[name]
    saved = with_count(tx.init(jnp.ones(2)), path, value)
    error = TypeError if isinstance(value, str | np.bool_ | complex) else ValueError
    with pytest.raises(error, match=rf"{path}' must be a whole number.*{str(value)[1:4]}"):
        adamx.adapt_state(tx, jnp.ones(2), saved)
    with pytest.raises(error, match=path):
        adamx.adapt_state(tx, jnp.ones(2), saved, saved_by=tx)


@pytest.mark.parametrize("name", COUNTING)
def test_a_count_is_carried_exactly_or_said_to_be_perhaps_rounded(name):
    path, tx = COUNTING[name]
    entry, _, rest = path.partition("/")
    params = jnp.ones(2)
    holds_all = {BF16: 2**8, F16: 2**11, jnp.float32: 2**24, jnp.float8_e4m3fn: 2**4}
    cases = [
        (jnp.asarray(n, d), n, n == most) for d, most in holds_all.items() for n in (most - 1, most)
    ]
    cases += [(kind(n), n, False) for kind in (np.int64, np.uint32, np.float64, int, float)
              for n in (7, 2**31 - 1)]  # fmt: skip
    cases += [(jnp.uint8(255), 255, False), (np.array(3), 3, False)]
    for value, number, rounded in cases:
        saved = with_count(tx.init(params), path, value)
        for saved_by in (None, tx):
            state, adaptation = adamx.adapt_state(tx, params, saved, saved_by=saved_by)
            found = getattr(state[entry], rest) if rest else state[entry]
            assert found.dtype == jnp.int32 and int(found) == number
            assert adaptation == adamx.Adaptation((), (), (path,) if rounded else ())
            assert ("perhaps rounded" in str(adaptation)) == rounded
            assert ("everything was carried over" in str(adaptation)) != rounded


def test_a_negative_count_is_refused_but_other_whole_numbers_may_be_negative():
    tx = COUNTING["adam"][1]
    with pytest.raises(ValueError, match=r"'count' must be a whole number from 0.*-5"):
        adamx.adapt_state(tx, jnp.ones(2), tx.init(jnp.ones(2)) | {"count": jnp.int32(-5)})

    class from_below(adamx.Wrapper):
        def start(self):
            return {"best": jnp.full([], -1, jnp.int32)}

        def update_tree(self, leaves, step):
            leaves, entries = self.run(leaves, step)
            return leaves, entries | {"best": step.state["best"]}

    for path, tx in (("best", from_below(adamx.sgd(0.1))), COUNTING["stage"]):
        saved = with_count(tx.init(jnp.ones(2)), path, np.int64(-2))
        state, _ = adamx.adapt_state(tx, jnp.ones(2), saved)
        assert -2 in [int(x) for x in jax.tree.leaves(state) if x.dtype == jnp.int32]


def test_adapt_state_can_be_traced():
    tx, params = adamx.adam(0.1), jnp.ones(2)
    state = jax.jit(lambda saved: adamx.adapt_state(tx, params, saved)[0])(tx.init(params))
    assert state.keys() == tx.init(params).keys()


@pytest.mark.parametrize("make", [adamx.adamw, adamx.lion, adamx.sgdw, adamx.nadamw])
def test_a_decay_of_zero_reads_no_parameters(make):
    tx, grads, params = make(0.1, weight_decay=0), jnp.full(2, -1.0), jnp.array([jnp.inf, 1.0])
    state = tx.init(params)
    wanted, _ = tx.update(grads, state)
    for update in (tx.update, jax.jit(tx.update)):
        updates, _ = update(grads, state, params)
        assert jnp.isfinite(updates).all()
        np.testing.assert_array_equal(updates, wanted)
    with pytest.raises(ValueError, match="params"):
        make(0.1, weight_decay=lambda step: 0.0).update(grads, state)
