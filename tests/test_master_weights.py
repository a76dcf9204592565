"""Masters: split and join are exact, and 16-bit parameters follow the float32 trajectory."""

import os
import warnings
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jmp
import numpy as np
import optax
import pytest
from flax.training import dynamic_scale

import adamx
from adamx import master_weights, masters
from adamx.core.rounding import bits_of, from_bits
from adamx.storage.remainder import join, split, split8

KEEP = ("remainder", "remainder8", "float32")
BF16 = jnp.bfloat16


# ------------------------------------------------------------------------------ split and join


def some_bit_patterns():
    """2^22 at random, and those around every multiple of 2^15, where the rounding turns."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 2**32, 2**22, dtype=np.uint32)
    turns = np.arange(0, 2**32, 2**15, dtype=np.uint64)[:, None] + np.arange(-2, 3, dtype=np.int64)
    return [drawn, (turns.ravel() % 2**32).astype(np.uint32)]


def all_bit_patterns():
    parts = range(0, 2**32, 2**26)
    return (np.arange(n, n + 2**26, dtype=np.uint64).astype(np.uint32) for n in parts)


@jax.jit
def broken(bits):
    """Where a number is not what was split, or its half not a bfloat16 nearest to it.

    Finite numbers that would round to infinity count as the largest that does not.
    """
    x = from_bits(bits)
    high, rest = split(x)
    back = join(high.astype(BF16), rest)
    over = jnp.isfinite(x) & (bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F7F7FFF))
    kept = jnp.where(over, bits & np.uint32(0x80000000) | np.uint32(0x7F7F7FFF), bits)
    same = (bits_of(back) == kept) | (jnp.isnan(x) & jnp.isnan(back))
    same &= jnp.isinf(high) == jnp.isinf(x)
    near = bits_of(high) & np.uint32(0xFFFF) == 0
    # |x - high| <= half a spacing, in units of the last place of float32
    rest = rest.astype(jnp.int32)
    near &= (rest >= -(2**15)) & (rest < 2**15) & (jnp.isnan(high) == jnp.isnan(x))
    return ~(same & near)


def test_split_and_join_are_exact():
    """By sampling; over all 2^32 patterns with ADAMX_EXHAUSTIVE=1 (a minute)."""
    patterns = all_bit_patterns() if "ADAMX_EXHAUSTIVE" in os.environ else some_bit_patterns()
    for bits in patterns:
        assert not broken(jnp.asarray(bits)).any()


def test_the_half_is_the_nearest_bfloat16_with_ties_away_from_zero():
    x = jnp.asarray(np.array([1 + 2**-8, -1 - 2**-8, 1 + 3 * 2**-8, 1 + 2**-9], np.float32))
    high, _ = split(x)
    np.testing.assert_array_equal(high, [1 + 2**-7, -1 - 2**-7, 1 + 2**-6, 1])
    drawn = jnp.asarray(np.random.default_rng(1).normal(size=10_000).astype(np.float32))
    np.testing.assert_array_equal(split(drawn)[0], drawn.astype(BF16).astype(jnp.float32))


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int16])
def test_join_of_a_half_that_was_changed_rounds_to_that_half(dtype):
    changed = jnp.array([0.0, -0.0, 1.0, -2.0, 1e-30, jnp.inf, -jnp.inf, jnp.nan], BF16)
    for rest in (jnp.iinfo(dtype).min, -1, 0, 1, jnp.iinfo(dtype).max):
        back = join(changed, jnp.full(8, rest, dtype))
        again, _ = split(back)
        np.testing.assert_array_equal(again, changed.astype(jnp.float32))


def test_one_byte_of_remainder_rounds_to_24_bits_without_bias():
    x = jnp.full(100_000, 1 + 100 * 2.0**-23)
    noise = jnp.asarray(np.random.default_rng(2).integers(0, 2**32, x.size, dtype=np.uint32))
    high, rest = split8(x, noise)
    assert rest.dtype == jnp.int8
    back = np.asarray(join(high.astype(BF16), rest), np.float64)
    assert set(back) == {1.0, 1 + 256 * 2.0**-23}
    share = 100 / 256
    assert abs((back > 1).mean() - share) < 5 * np.sqrt(share * (1 - share) / x.size)


@pytest.mark.parametrize("bits", [0x7F800001, 0xFF8000FF, 0x7FC00000, 0xFFFFFFFF])
def test_a_nan_stays_one_whatever_its_bits(bits):
    """The payload of the first two would be cut off: they would be infinity."""
    x = jnp.array([bits], jnp.uint32).view(jnp.float32)
    for high, rest in (split(x), split8(x, jnp.array([0], jnp.uint32))):
        assert jnp.isnan(high).all() and jnp.isnan(join(high, rest)).all()


# ---------------------------------------------------------------------------------- the trajectory


OPTIMIZERS = {
    "sgd": lambda: adamx.sgd(1e-3),
    "sgd_momentum": lambda: adamx.sgd(1e-3, momentum=0.9, nesterov=True),
    "rmsprop": lambda: adamx.rmsprop(1e-3),
    "adagrad": lambda: adamx.adagrad(1e-2),
    "adam": lambda: adamx.adam(1e-3),
    "adamw": lambda: adamx.adamw(1e-3, weight_decay=0.1),
    "adamw_packed16": lambda: adamx.adamw(1e-3, weight_decay=0.1, moments="packed16"),
    "adamw_packed8": lambda: adamx.adamw(1e-3, weight_decay=0.1, moments="packed8"),
}


def problem(steps=60, size=4099, seed=0):
    """Parameters of order 1, and bfloat16 gradients from 1e-6 to 10."""
    rng = np.random.default_rng(seed)
    params = {"w": jnp.asarray(rng.normal(size=size), BF16), "b": jnp.zeros((3, 5), BF16)}
    grads = [
        {
            "w": jnp.asarray(rng.normal(size=size) * 10.0 ** rng.uniform(-6, 1, size), BF16),
            "b": jnp.asarray(rng.normal(size=(3, 5)), BF16),
        }
        for _ in range(steps)
    ]
    return params, grads


def train(tx, params, grads, step=None):
    step = step or adamx.make_step(tx)
    params = jax.tree.map(jnp.copy, params)
    state = tx.init(params)
    for g in grads:
        params, state = step(params, state, g)
    return params, state


def wide(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


FAST = [("remainder", name) for name in ("sgd_momentum", "rmsprop", "adamw", "adamw_packed8")]
FAST += [("float32", "adamw")]


@pytest.mark.parametrize(
    ("keep", "name"),
    [
        pytest.param(keep, name, marks=() if (keep, name) in FAST else pytest.mark.slow)
        for keep in ("remainder", "float32")
        for name in OPTIMIZERS
    ],
)
def test_masters_follow_the_float32_trajectory_bit_for_bit(name, keep):
    params, grads = problem()
    wanted, plain = train(OPTIMIZERS[name](), wide(params), [wide(g) for g in grads])
    got, state = train(master_weights(OPTIMIZERS[name](), keep), params, grads)
    assert_same(masters(got, state), wanted)
    for slot in plain:
        assert_same(state[slot], plain[slot])
    rounded = jax.tree.map(
        lambda w: split(w)[0].astype(BF16) if keep == "remainder" else w.astype(BF16), wanted
    )
    assert_same(got, rounded)
    assert all(leaf.dtype == BF16 for leaf in jax.tree.leaves(got))


def test_a_train_step_of_ones_own_follows_it_too():
    """With `optax.apply_updates`, and the gradients computed in the same program."""

    def run(tx, params, dtype):
        @jax.jit
        def step(params, state, x):
            def loss(p):
                return jnp.sum(jnp.square((x * p["w"]).astype(BF16)).astype(jnp.float32))

            grads = jax.grad(loss)(jax.tree.map(lambda p: p.astype(BF16), params))
            grads = jax.tree.map(lambda g: g.astype(dtype), grads)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = tx.init(params)
        for seed in range(20):
            x = jnp.asarray(np.random.default_rng(seed).normal(size=257), BF16)
            params, state = step(params, state, x)
        return params, state

    params = {"w": jnp.asarray(np.random.default_rng(9).normal(size=257), BF16)}
    with jax.numpy_dtype_promotion("standard"):
        got, state = run(master_weights(adamx.adam(1e-3), "float32"), params, BF16)
        # the model sees the rounded weights in both: round to nearest even, as "float32" does
        wanted, _ = run(adamx.adam(1e-3), wide(params), jnp.float32)
    assert_same(masters(got, state), wanted)


def test_small_steps_travel_the_whole_way():
    """2000 steps of 4e-6 on parameters at 1: 0.008, of which Optax in bfloat16 travels none."""
    params, grads = jnp.ones(4096, BF16), jnp.ones(4096, BF16)

    def travelled(tx):
        got, state = train(tx, params, [grads] * 2000)
        return float((1 - masters(got, state)).mean())

    with jax.numpy_dtype_promotion("standard"):
        stuck, _ = train(optax.sgd(4e-6), params, [grads] * 3)
    np.testing.assert_array_equal(stuck, params)
    for keep in ("remainder", "float32"):
        # 2000 roundings of a float32 near 1, of half a ULP of 2^-24 each, all alike
        assert abs(travelled(master_weights(adamx.sgd(4e-6), keep)) - 0.008) < 2000 * 2.0**-25
    # a walk of 2000 roundings to 2^-16, averaged over 4096 equal parameters that round alike
    walk = np.sqrt(2000 * 4e-6 * 2.0**-16)
    assert abs(travelled(master_weights(adamx.sgd(4e-6), "remainder8")) - 0.008) < 5 * walk


def test_float16_keeps_a_whole_float32():
    params, grads = problem()
    params, grads = jax.tree.map(lambda x: x.astype(jnp.float16), (params, grads))
    wanted, _ = train(adamx.adam(1e-3), wide(params), [wide(g) for g in grads])
    got, state = train(master_weights(adamx.adam(1e-3)), params, grads)
    assert state["remainder"]["w"] is None and state["master"]["w"].dtype == jnp.float32
    assert_same(masters(got, state), wanted)
    assert got["w"].dtype == jnp.float16


def test_wide_parameters_are_left_alone():
    params = {"w": jnp.ones(3), "half": jnp.ones(3, BF16)}
    tx = master_weights(adamx.sgd(0.5))
    state = tx.init(params)
    assert state["remainder"]["w"] is None and state["remainder"]["half"].dtype == jnp.int16
    updates, state = tx.update(params, state, params)
    np.testing.assert_array_equal(updates["w"], -0.5)
    assert updates["half"].dtype == jnp.float32
    np.testing.assert_array_equal(masters(params, state)["w"], params["w"])


def test_a_frozen_leaf_keeps_its_remainder():
    params, grads = problem(steps=2)
    tx = master_weights(adamx.adam(1e-3))
    updates, state = tx.update(grads[0], tx.init(params), params)
    params = adamx.apply_updates(params, updates)
    updates, after = tx.update(grads[1] | {"b": None}, state, params)
    assert updates["b"] is None
    np.testing.assert_array_equal(after["remainder"]["b"], state["remainder"]["b"])


@pytest.mark.parametrize(
    ("keep", "bytes_per_parameter"), [("remainder", 2), ("remainder8", 1), ("float32", 4)]
)
def test_what_is_kept_takes_the_bytes_it_should(keep, bytes_per_parameter):
    state = master_weights(adamx.sgd(0.1), keep).init(jnp.ones(1024, BF16))
    kept = sum(x.nbytes for x in jax.tree.leaves(state) if x.ndim)
    assert kept == 1024 * bytes_per_parameter


# ------------------------------------------------------------------- changed from outside, and lost


@pytest.mark.parametrize("keep", KEEP)
def test_parameters_changed_from_outside_are_adopted(keep):
    params, grads = problem(steps=5, size=64)
    tx = master_weights(adamx.sgd(0.01), keep)
    params, state = train(tx, params, grads)
    changed = {"w": jnp.linspace(-2, 2, 64).astype(BF16), "b": params["b"]}
    adopted = np.asarray(masters(changed, state)["w"], np.float64)
    target = np.asarray(changed["w"], np.float64)
    half = np.ldexp(1.0, np.frexp(np.abs(target))[1] - 9)
    limit = 0 if keep == "float32" else half
    assert (np.abs(adopted - target) <= limit).all()
    np.testing.assert_array_equal(masters(changed, state)["b"], masters(params, state)["b"])
    # and trained on from there
    updates, _ = tx.update(grads[0], state, changed)
    moved = np.asarray(adamx.apply_updates(changed, updates)["w"], np.float64)
    step = 0.01 * np.abs(np.asarray(grads[0]["w"], np.float64))
    assert (np.abs(moved - target) <= step + 3 * half).all()


@pytest.mark.parametrize("keep", KEEP)
def test_parameters_that_came_back_wider_are_refused(keep):
    """What `equinox.apply_updates` does to 16-bit parameters."""
    params = {"layer": {"w": jnp.ones(3, BF16)}}
    tx = master_weights(adamx.sgd(0.1), keep)
    updates, state = tx.update(params, tx.init(params), params)
    with jax.numpy_dtype_promotion("standard"):
        wider = eqx.apply_updates(params, updates)
    assert wider["layer"]["w"].dtype == jnp.float32
    with pytest.raises(TypeError, match=r"leaf 'layer/w' is float32.*equinox\.apply"):
        tx.update(params, state, wider)
    # nothing is lost: the state still works
    tx.update(params, state, adamx.apply_updates(params, updates))


@pytest.mark.parametrize("keep", ["remainder", "remainder8", "float32"])
def test_masters_of_another_shape_or_kind_are_refused(keep):
    tx, params = adamx.master_weights(adamx.sgd(0.1), keep), jnp.ones(2, jnp.bfloat16)
    name = "master" if keep == "float32" else keep
    state = tx.init(params)
    other = tx.init(jnp.ones((3, 2), jnp.bfloat16))
    with pytest.raises(ValueError, match=rf"state\['{name}'\] has shape \[3, 2\]"):
        tx.update(params, other, params)
    with pytest.raises(TypeError, match="master_weights: leaf '' is bfloat16"):
        jax.eval_shape(lambda: tx.update(params, state | {name: "w"}, params))


def test_a_step_that_shrinks_a_weight_too_much_is_off_by_a_ulp_of_the_old_one():
    """The documented exception: p + u, in float32, cannot express a result 2^-15 times smaller."""
    params = jnp.ones(1, BF16)
    target = np.float32(2.0**-20 * 1.2345)
    tx = master_weights(adamx.sgd(1.0))
    grads = jnp.ones(1) - target
    updates, _ = tx.update(grads, tx.init(params), params)
    got = float(adamx.apply_updates(params, updates)[0])
    assert abs(got - float(target)) <= 2.0**-24 + 2.0**-9 * float(target)


def test_params_are_needed():
    tx = master_weights(adamx.sgd(0.1))
    params = jnp.ones(2, BF16)
    with pytest.raises(ValueError, match="master_weights: update needs params"):
        tx.update(params, tx.init(params))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: master_weights(adamx.sgd(0.1), "int4"), ValueError, "keep must be one of"),
        (
            lambda: master_weights(cast(Any, 0.1)),
            TypeError,
            "must be an adamx or Optax transformation",
        ),
        (
            lambda: adamx.chain(master_weights(adamx.sgd(0.1)), adamx.scale(2.0)),
            ValueError,
            "must be the last stage",
        ),
        (lambda: master_weights(master_weights(adamx.sgd(0.1))), ValueError, "two stages keep"),
        (lambda: masters(jnp.ones(2), {"count": 0}), ValueError, "the state has no masters"),
    ],
)
def test_what_cannot_be_is_refused_at_construction(build: Any, error, message):
    with pytest.raises(error, match=message):
        build()


def test_it_stands_behind_a_clip_and_around_one():
    params, grads = problem(steps=3, size=16)
    clip = optax.clip(0.1)
    with jax.numpy_dtype_promotion("standard"):
        inside, a = train(master_weights(adamx.chain(clip, adamx.adam(0.01))), params, grads)
        behind, b = train(adamx.chain(clip, master_weights(adamx.adam(0.01))), params, grads)
    # clipped in float32, and in bfloat16, in which 0.1 is 2^-9 off; Adam does not see a scale
    assert_close = lambda x, y: np.testing.assert_allclose(x, y, rtol=0.02, atol=1e-3)  # noqa: E731
    jax.tree.map(assert_close, masters(inside, a), masters(behind, b))


def test_prints_and_compares_and_reads():
    tx = master_weights(adamx.adam(1e-3, moments="packed16"))
    assert tx == master_weights(adamx.adam(1e-3, moments="packed16"))
    assert repr(tx).startswith("master_weights(")
    params = {"w": jnp.ones(2, BF16)}
    assert set(adamx.moments(tx.init(params), tx)) == {"mu", "nu"}
    assert "learning_rate" in tx.init(params)


# ------------------------------------------------------------------------------- in the same memory


@pytest.mark.parametrize(("keep", "most"), [("remainder", 50), ("remainder8", 48), ("float32", 46)])
def test_the_step_copies_nothing(keep, most):
    """float32's 40 bytes a parameter, and what is read and written of the remainder.

    With a remainder the new master goes through 4 bytes of temporary memory: parameter and
    remainder are both made from it, in a kernel each.
    """
    n = 2**16
    tx, params = master_weights(adamx.adam(1e-3), keep), jnp.zeros(n, BF16)
    compiled: Any = adamx.make_step(tx).lower(params, tx.init(params), params).compile()
    assert compiled.cost_analysis()["bytes accessed"] / n < most + 0.01
    assert f"[{n}]{{0}} copy(" not in compiled.as_text()
    temp = 0 if keep == "float32" else 4 * n
    assert compiled.memory_analysis().temp_size_in_bytes < temp + 1024


# ------------------------------------------------------------------------------------- the warning


def warned(tx, params):
    """The warnings of `init`, each at the line of the caller."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tx.init(params)
    assert all(w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught if w.category is adamx.PrecisionWarning]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_16_bit_parameters_without_a_remedy_warn_once_and_name_both(dtype):
    params = {"w": jnp.ones(2, dtype), "b": jnp.ones(3, dtype), "wide": jnp.ones(2)}
    (message,) = warned(adamx.adamw(1e-3), params)
    assert "2 of the parameters' leaves are" in message and jnp.dtype(dtype).name in message
    assert "master_weights" in message and "rounding='stochastic'" in message


def test_what_needs_no_warning_does_not_warn():
    half, wide_params = jnp.ones(2, BF16), jnp.ones(2)
    assert not warned(adamx.adam(1e-3), wide_params)
    assert not warned(master_weights(adamx.adam(1e-3)), half)
    assert not warned(adamx.chain(adamx.identity(), master_weights(adamx.adam(1e-3))), half)
    assert not warned(adamx.ema(0.9), half)
    tx = adamx.adam(1e-3)
    step = adamx.make_step(tx, rounding="stochastic")
    assert not warned(step, half)
    assert warned(tx, half) and warned(adamx.make_step(tx), half)


def test_a_step_leaves_nothing_in_its_transformation():
    tx = adamx.adam(1e-3)
    before = dict(vars(tx))
    params = jnp.ones(2, BF16)
    step = adamx.make_step(tx, rounding="stochastic")
    step(params, step.init(params), jnp.ones(2, BF16))
    assert all(vars(tx)[name] is value for name, value in before.items())
    made = vars(tx).keys() - before.keys()  # all from its fields alone
    assert made <= {"_apart", "_hash", "_key", "_slot_names", "children", "recorded_names"}


# ----------------------------------------------------------------------------------- loss scaling


def test_works_with_the_dynamic_loss_scale_of_flax():
    """fp16: gradients of 1e-8 underflow unscaled; a scale of 2^16 carries them.

    An overflow halves the scale. The step with an overflow is left out by the caller.
    """
    tx = master_weights(adamx.adam(1e-2))
    params = {"w": jnp.ones(4, jnp.float16)}
    state = tx.init(params)
    scale = dynamic_scale.DynamicScale(growth_interval=5)

    def loss(p, x):
        return jnp.sum((p["w"] * x).astype(jnp.float32)) * 1e-6

    with jax.numpy_dtype_promotion("standard"):
        for t in range(12):
            x = jnp.full(4, 60000.0 if t == 3 else 0.01, jnp.float16)
            grad_fn = scale.value_and_grad(loss)
            scale, finite, _, grads = grad_fn(params, x)
            updates, new_state = tx.update(grads, state, params)
            new_params = adamx.apply_updates(params, updates)
            pick = lambda new, old: jnp.where(finite, new, old)  # noqa: B023, E731
            params = jax.tree.map(pick, new_params, params)
            state = jax.tree.map(pick, new_state, state)
    assert jnp.isfinite(params["w"]).all()
    assert (params["w"] < 1).all()


def test_works_with_the_dynamic_loss_scale_of_jmp():
    tx = master_weights(adamx.adam(1e-2))
    params = {"w": jnp.ones(4, jnp.float16)}
    state = tx.init(params)
    scale = jmp.DynamicLossScale(jnp.float32(2.0**15), period=5)

    def loss(p, x):
        return jnp.sum((p["w"] * x).astype(jnp.float32)) * 1e-6

    with jax.numpy_dtype_promotion("standard"):
        for t in range(12):
            x = jnp.full(4, 60000.0 if t == 3 else 0.01, jnp.float16)
            grads = jax.grad(lambda p, x: scale.scale(loss(p, x)))(params, x)  # noqa: B023
            grads = scale.unscale(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
            finite = jmp.all_finite(grads)
            scale = scale.adjust(finite)
            updates, new_state = tx.update(grads, state, params)
            new_params = adamx.apply_updates(params, updates)
            params = jmp.select_tree(finite, new_params, params)
            state = jmp.select_tree(finite, new_state, state)
    assert jnp.isfinite(params["w"]).all()
    assert (params["w"] < 1).all()
