"""The clip by the global norm and the guard against gradients that are not finite."""

import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import mesh_of
from jax.sharding import NamedSharding, PartitionSpec

import adamx
from adamx.transforms.clip_by_global_norm import global_norm
from adamx.wrappers.skip_nonfinite import all_finite

pytestmark = pytest.mark.usefixtures("quick_compiler")

PARAMS = {"w": jnp.array([[1.0, -2.0], [3.0, -0.0]]), "b": jnp.array([0.5, 0.0])}
GRADS = {"w": jnp.array([[3.0, 0.0], [0.0, -4.0]]), "b": jnp.array([12.0, 0.0])}
BAD = GRADS | {"b": jnp.array([jnp.nan, 1.0])}
ULP = 2.0**-23


def same_bits(a, b):
    """Equal to the last bit, the sign of zero included."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


# ------------------------------------------------------------------------------------- the norm


@pytest.mark.parametrize("size", [1e-16, 1e-12, 1e-3, 1.0, 1e10, 1e17])
def test_the_norm_is_right_wherever_its_square_is_a_float32(size):
    """A square is rounded, a sum of n terms n - 1 times, the root once: (n + 2) / 2 ULP at most.

    Squares of the smallest size that are rounded to zero, below 2^-126, are less than 1e-6 of one.
    """
    g = np.random.default_rng(0).normal(size=100).astype(np.float32) * np.float32(size)
    leaves = [jnp.asarray(g[:60]), jnp.asarray(g[60:].reshape(5, 8))]
    wide = np.concatenate([np.asarray(x, np.float64).ravel() for x in leaves])
    for norm in (global_norm(leaves), jax.jit(global_norm)(leaves)):
        np.testing.assert_allclose(norm, np.linalg.norm(wide), rtol=(100 + 2) / 2 * ULP)


def test_the_norm_of_many_elements_is_not_summed_in_one_loop():
    """A plain loop in float32 would stop at 2^24; partial sums of powers of two are exact."""
    assert float(global_norm([jnp.ones(2**26)])) == 2.0**13


def test_the_norm_of_what_is_not_finite_is_not_finite():
    assert np.isinf(global_norm([jnp.array([1.0, jnp.inf])]))
    assert np.isnan(global_norm([jnp.array([1.0, jnp.nan])]))
    assert float(global_norm([])) == 0 and float(global_norm([jnp.zeros((0, 3))])) == 0


@pytest.mark.usefixtures("x64")
def test_the_norm_is_float64_where_a_leaf_is():
    big, tiny = jnp.array([3e100, 4e100]), jnp.array([3e-100, 4e-100])
    assert float(global_norm([big])) == pytest.approx(5e100, rel=1e-15)
    assert float(global_norm([tiny])) == pytest.approx(5e-100, rel=1e-15)
    mixed = global_norm([jnp.array([3.0], jnp.float32), jnp.array([4.0])])
    assert mixed.dtype == jnp.float64 and float(mixed) == 5
    assert global_norm([jnp.array([3.0], jnp.float32)]).dtype == jnp.float32


def test_the_norm_counts_both_parts_of_complex_numbers():
    assert float(global_norm([jnp.array([3 + 4j]), jnp.array([12.0])])) == 13
    assert float(global_norm([jnp.array([3e18 + 4e18j])])) == pytest.approx(5e18, rel=4 * ULP)


def test_the_norm_has_a_derivative_also_at_zero():
    for size in (1.0, 1e-15, 1e15):
        g = jnp.array([3.0, 4.0]) * size
        np.testing.assert_allclose(jax.grad(lambda g: global_norm([g]))(g), [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(jax.grad(lambda g: global_norm([g]))(jnp.zeros(2)), [0.0, 0.0])


# ------------------------------------------------------------------------------------- the clip


def test_a_clip_shortens_what_is_too_long_and_leaves_the_rest():
    tx = adamx.clip_by_global_norm(6.5, record=True)
    updates, state = tx.update(GRADS, tx.init(PARAMS))
    assert float(state["grad_norm"]) == 13
    jax.tree.map(lambda u, g: np.testing.assert_array_equal(u, g / 2), updates, GRADS)
    tx = adamx.clip_by_global_norm(13.0)
    updates, state = tx.update(GRADS, tx.init(PARAMS))
    assert set(state) == {"count"}
    same_bits(updates, GRADS)


def test_a_clip_to_nothing_stops_everything_and_zeros_stay():
    tx = adamx.clip_by_global_norm(0.0)
    for grads in (GRADS, jax.tree.map(jnp.zeros_like, GRADS)):
        updates, _ = tx.update(grads, tx.init(PARAMS))
        assert all((u == 0).all() for u in jax.tree.leaves(updates))


@pytest.mark.parametrize("largest", [math.inf, np.float32(math.inf), np.array(math.inf)])
def test_an_infinite_limit_records_the_norm_and_clips_nothing(largest):
    """As `clip_grad_norm_` with infinity in PyTorch; also where the norm itself is no number."""
    tx = adamx.clip_by_global_norm(largest, record=True)
    for x in (3.0, 0.0, 3e38, math.inf, math.nan):
        grads = {"w": jnp.full(4, x), "b": jnp.ones(2)}
        updates, state = tx.update(grads, tx.init(grads))
        jax.tree.map(np.testing.assert_array_equal, updates, grads)
        with np.errstate(over="ignore"):
            norm = np.sqrt(4 * np.float32(x) * np.float32(x) + 2)
        np.testing.assert_allclose(state["grad_norm"], norm, rtol=3e-7)  # 2 ULP
    slope = jax.grad(lambda u: tx.update(u, tx.init(u))[0].sum())(jnp.array([0.0, 2.0]))
    np.testing.assert_array_equal(slope, 1.0)
    assert adamx.from_dict(json.loads(json.dumps(adamx.to_dict(tx)))) == tx


def test_a_clip_with_a_schedule_and_two_records():
    tx = adamx.chain(
        adamx.clip_by_global_norm(optax.linear_schedule(6.5, 3.25, 1), record="before"),
        adamx.scale(2.0),
        adamx.clip_by_global_norm(1.0, record="after"),
    )
    state = tx.init(PARAMS)
    for before, after in ((13, 13), (13, 6.5)):
        _, state = tx.update(GRADS, state)
        assert (float(state["before"]), float(state["after"])) == (before, after)


def test_a_clip_is_optaxs_up_to_the_rounding_of_the_factor():
    """Ours multiplies by max_norm / norm, Optax divides and multiplies: three roundings each."""
    tx, theirs = adamx.clip_by_global_norm(1.7), optax.clip_by_global_norm(1.7)
    g = jax.tree.map(lambda x: x * 0.7 + 0.1, GRADS)
    ours = tx.update(g, tx.init(g))[0]
    with jax.numpy_dtype_promotion("standard"):
        other = theirs.update(g, theirs.init(g))[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=6 * ULP), ours, other)


def test_a_clip_prints_its_arguments_and_is_built_alike():
    assert repr(adamx.clip_by_global_norm(1.0)) == "clip_by_global_norm(1.0)"
    assert repr(adamx.clip_by_global_norm(1.0, True)) == "clip_by_global_norm(1.0, record=True)"
    assert repr(adamx.clip_by_global_norm(2.0, "n")) == "clip_by_global_norm(2.0, record='n')"
    assert adamx.clip_by_global_norm(1.0) == adamx.clip_by_global_norm(1)
    assert adamx.clip_by_global_norm(1.0) != adamx.clip_by_global_norm(1.0, True)


def test_a_clip_in_a_branch_is_an_error_that_says_where_it_can_stand():
    with pytest.raises(ValueError, match=r"reads the whole tree.*top-level adamx\.chain"):
        adamx.combine(jnp.add, adamx.clip_by_global_norm(1.0), adamx.identity())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("limit", [np.float32, np.float64])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_limit_of_any_precision_serves_gradients_of_any(limit, dtype):
    grads = {"w": jnp.array([3.0, -4.0], dtype)}
    for given in (jnp.array(1.0, limit), lambda _: jnp.array(1.0, limit)):
        tx = adamx.clip_by_global_norm(given)
        updates = tx.update(grads, tx.init(grads))[0]["w"]
        assert updates.dtype == dtype
        np.testing.assert_allclose(updates, [0.6, -0.8], rtol=4 * np.finfo(dtype).eps)


@pytest.mark.usefixtures("x64")
def test_a_recorded_norm_keeps_its_dtype_where_the_gradients_have_another():
    params, grads = jnp.zeros(2, jnp.float32), jnp.array([3.0, 4.0])
    tx = adamx.skip_nonfinite(adamx.chain(adamx.clip_by_global_norm(9, True), adamx.sgd(1)))
    _, state = tx.update(grads, tx.init(params), params)
    assert state["grad_norm"].dtype == jnp.float32 and float(state["grad_norm"]) == 5


def test_a_norm_is_not_kept_as_the_count():
    with pytest.raises(ValueError, match="'count' is the state's own"):
        adamx.clip_by_global_norm(1.0, record="count")


# ------------------------------------------------------------------------------------ the guard


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("size", [2, 100, 2**12 + 3, 2**18])
def test_a_guard_sees_one_bad_element_among_many_wherever_it_is(size, value):
    look = jax.jit(all_finite, static_argnums=1)
    assert look([jnp.full(size, 3e38)]) and look([jnp.ones(size)], True)
    for place in (0, 1, size // 2, size - 1):
        bad = jnp.ones(size).at[place].set(value)
        assert not look([jnp.ones(3), bad]) and not look([bad, jnp.ones(3)], True)


def test_a_guard_sees_a_bad_element_on_any_device():
    mesh = mesh_of((2,), ("data",))
    for place in (0, 3):
        bad = jnp.ones(4).at[place].set(jnp.nan)
        bad = jax.device_put(bad, NamedSharding(mesh, PartitionSpec("data")))
        assert not jax.jit(all_finite)([bad])


def test_a_guard_sees_both_parts_of_complex_numbers():
    for part in (jnp.nan, jnp.inf):
        assert not all_finite([jnp.array([complex(part, 1)])])
        assert not all_finite([jnp.array([complex(1, part)])])
    assert all_finite([jnp.array([3e38 + 3e38j])])  # of which the magnitude is no float32


def test_a_skipped_step_keeps_the_signs_of_zeros():
    w = jnp.array([complex(-0.0, -0.0), complex(0.0, -0.0), complex(-0.0, 0.0)])
    tx = adamx.skip_nonfinite(adamx.adamw(0.1))
    updates, _ = tx.update(jnp.full_like(w, jnp.nan), tx.init(w), w)
    same_bits(adamx.apply_updates(w, updates), w)


def test_a_guard_around_nothing_counts():
    tx = adamx.skip_nonfinite(adamx.chain(), np.int8(1))  # pyright: ignore
    updates, state = tx.update(BAD, tx.init(PARAMS))
    assert int(state["skipped"]) == 1 and not any(u.any() for u in jax.tree.leaves(updates))


def guarded_optimizers():
    """What a guard may hold: every kind of memory there is."""
    decay = optax.linear_schedule(0.5, 0.9, 10)
    rate = optax.linear_schedule(0.1, 0.0, 10)
    return {
        "adamw": adamx.adamw(rate),
        "clip": adamx.chain(adamx.clip_by_global_norm(1.0, record=True), adamx.adam(rate)),
        "decays": adamx.adam(0.1, b1=decay, b2=decay),
        "packed16": adamx.adam(rate, moments="packed16"),
        "optax": adamx.chain(optax.scale_by_adam(), adamx.scale_by_learning_rate(rate)),
        "masters": adamx.master_weights(adamx.adamw(rate)),
        "masters8": adamx.master_weights(adamx.adamw(rate), "remainder8"),
        "groups": adamx.by_path({"b": adamx.sgd(rate, 0.9)}, default=adamx.adamw(rate)),
        "average": adamx.chain(adamx.adamw(rate), adamx.ema_of_params(0.9)),
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        # what is infinite is no other thing to what is guarded
        pytest.param(
            name, value, marks=pytest.mark.slow if jnp.isinf(value) and name != "adamw" else ()
        )
        for name in guarded_optimizers()
        for value in (jnp.nan, jnp.inf, -jnp.inf)
    ],
)
def test_a_skipped_step_changes_nothing_but_its_counters(name, value):
    dtype = jnp.bfloat16 if name.startswith("masters") else jnp.float32
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    grads = jax.tree.map(lambda g: g.astype(dtype), GRADS)
    tx = adamx.skip_nonfinite(guarded_optimizers()[name])
    step = jax.jit(
        lambda p, s, g: (lambda u, s: (adamx.apply_updates(p, u), s))(*tx.update(g, s, p))
    )
    with jax.numpy_dtype_promotion("standard" if name == "optax" else "strict"):
        params, state = step(params, tx.init(params), grads)
        bad = grads | {"w": grads["w"].at[0, 1].set(value)}
        after_params, after = step(params, state, bad)
        same_bits(after_params, params)
        counters = {"skipped": 1, "consecutive_skipped": 1}
        assert {name: int(after[name]) for name in counters} == counters
        same_bits(
            {k: v for k, v in after.items() if k not in counters},
            {k: v for k, v in state.items() if k not in counters},
        )
        # and goes on as if the step had not been
        _, a = step(params, state, grads)
        _, b = step(after_params, after, grads)
        assert int(b["skipped"]) == 1 and int(b["consecutive_skipped"]) == 0
        same_bits(*({k: v for k, v in x.items() if k not in counters} for x in (a, b)))


@pytest.mark.parametrize("size", [1e20, 2e38])
def test_a_norm_that_overflows_stops_a_clip_and_is_skipped_with_a_guard(size):
    """The gradients are finite, their squares are not; without a clip no square is needed."""
    clipped = adamx.chain(adamx.clip_by_global_norm(1.0, record=True), adamx.sgd(1.0))
    huge = jax.tree.map(lambda g: jnp.full_like(g, size), GRADS)
    updates, state = clipped.update(huge, clipped.init(PARAMS))
    assert all((u == 0).all() for u in jax.tree.leaves(updates)) and int(state["count"]) == 1
    assert np.isposinf(state["grad_norm"])
    for inner, skipped in ((clipped, 1), (adamx.sgd(1.0), 0)):
        tx = adamx.skip_nonfinite(inner)
        updates, state = tx.update(huge, tx.init(PARAMS))
        assert int(state["skipped"]) == skipped and int(state["count"]) == 1 - skipped
        assert all(jnp.isfinite(u).all() for u in jax.tree.leaves(updates))


def test_a_clip_leaves_a_norm_alone_that_underflows():
    tx = adamx.clip_by_global_norm(1.0)
    tiny = jax.tree.map(lambda g: g * 1e-25, GRADS)
    updates, _ = tx.update(tiny, tx.init(PARAMS))
    same_bits(updates, tiny)


def test_the_guard_gives_up_after_max_consecutive_steps_as_optax_does():
    tx = adamx.skip_nonfinite(adamx.sgd(1.0), max_consecutive=2)
    theirs = optax.apply_if_finite(optax.sgd(1.0), 2)
    state = tx.init(PARAMS)
    with jax.numpy_dtype_promotion("standard"):
        other: Any = theirs.init(PARAMS)
        for grads in (BAD, GRADS, BAD, BAD, BAD, BAD, GRADS, BAD):
            updates, state = tx.update(grads, state)
            wanted, other = theirs.update(grads, other)
            jax.tree.map(np.testing.assert_array_equal, updates, wanted)
            assert int(state["consecutive_skipped"]) == int(other.notfinite_count)
    assert int(state["skipped"]) == 4  # of six bad ones: the third and fourth in a row were taken
    assert int(state["count"]) == 4


def test_without_a_limit_the_guard_never_gives_up():
    tx = adamx.skip_nonfinite(adamx.momentum(1.0))
    updates, state = GRADS, tx.init(PARAMS)
    for _ in range(5):
        updates, state = tx.update(BAD, state)
    assert not any(u.any() for u in jax.tree.leaves(updates))
    assert (int(state["skipped"]), int(state["consecutive_skipped"])) == (5, 5)


def test_the_guard_wraps_the_whole_optimizer_or_says_so():
    with pytest.raises(
        ValueError, match=r"skip_nonfinite wraps the whole optimizer.*chain\(\.\.\.\)"
    ):
        adamx.chain(adamx.clip_by_global_norm(1.0), adamx.skip_nonfinite(adamx.adam(0.1)))
    with pytest.raises(ValueError, match=r"^by_path: skip_nonfinite wraps the whole optimizer"):
        adamx.by_path({"w": adamx.skip_nonfinite(adamx.adam(0.1))}, default=None)
    with pytest.raises(ValueError, match=r"^chain: skip_nonfinite wraps the whole optimizer"):
        inner = adamx.master_weights(adamx.skip_nonfinite(adamx.adam(0.1)))
        adamx.chain(adamx.clip_by_global_norm(1.0), inner)
    with pytest.raises(ValueError, match=r"^by_path: skip_nonfinite wraps the whole optimizer"):
        adamx.by_path({"w": adamx.chain(adamx.skip_nonfinite(adamx.adam(0.1)))}, default=None)
    with pytest.raises(TypeError, match=r"^skip_nonfinite: tx must be an adamx or Optax transf"):
        adamx.skip_nonfinite(0.1)  # pyright: ignore
    for bad in (-1, 0.5, "3"):
        with pytest.raises(ValueError, match="max_consecutive must be a whole number >= 0 or None"):
            adamx.skip_nonfinite(adamx.adam(0.1), max_consecutive=bad)  # pyright: ignore


def test_a_guard_around_masters_and_inside_them_agree():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    inner = adamx.adamw(0.01)
    outside = adamx.skip_nonfinite(adamx.master_weights(inner))
    inside = adamx.master_weights(adamx.skip_nonfinite(inner))
    a, b = (params, outside.init(params)), (_copied(params), inside.init(params))
    for grads in (GRADS, BAD, GRADS):
        grads = jax.tree.map(lambda g: g.astype(jnp.bfloat16), grads)
        (p, s), (q, t) = _copied(a), _copied(b)
        a, b = adamx.make_step(outside)(p, s, grads), adamx.make_step(inside)(q, t, grads)
    same_bits(a[0], b[0])
    assert int(a[1]["count"]) == int(b[1]["count"]) == 2


def _copied(tree) -> Any:
    return jax.tree.map(jnp.copy, tree)


# ------------------------------------------------------------------- moments read out, carried over


def test_moments_and_adapt_state_see_through_the_wrappers():
    plain, guarded = adamx.adam(0.1), adamx.skip_nonfinite(adamx.adam(0.1))
    _, state = plain.update(GRADS, plain.init(PARAMS))
    carried, adaptation = adamx.adapt_state(guarded, PARAMS, state)
    assert adaptation.filled == ("consecutive_skipped", "skipped") and not adaptation.dropped
    _, after = guarded.update(GRADS, carried)
    _, wanted = plain.update(GRADS, state)
    same_bits({k: after[k] for k in wanted}, wanted)
    same_bits(adamx.moments(after, guarded), adamx.moments(wanted, plain))
    summed = adamx.accumulate(adamx.adam(0.1, moments="packed16"), 2)
    found = adamx.moments(summed.init(PARAMS), summed)
    assert set(found) == {"mu", "nu", "accumulated"}
