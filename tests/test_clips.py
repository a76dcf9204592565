"""Clips and ratios: at any scale, at zero, of empty and complex arrays, and by the right units."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_family

import adamx
from adamx.core import norms
from adamx.core.arithmetic import real_times_complex
from adamx.core.norms import norm, rms

# what is tested does not depend on optimised code, and compiling takes most of the time
pytestmark = pytest.mark.usefixtures("quick_compiler")


def emitted(tx, u, w=None):
    return tx.update(u, tx.init(u), w)[0]


# ----------------------------------------------------------------------------------------- norms


@pytest.mark.parametrize("scale", [1e-16, 1e-12, 1.0, 1e12, 1e18])
@pytest.mark.parametrize(
    "axes", [None, *(pytest.param(axes, marks=pytest.mark.slow) for axes in (0, (0, 1), ()))]
)
def test_the_root_mean_square_is_right_wherever_squares_are_float32(scale, axes):
    x = (np.random.default_rng(0).uniform(-1, 1, size=(4, 5)) * scale).astype(np.float32)
    wanted = np.sqrt(np.mean(np.square(x.astype(np.float64)), axis=axes, keepdims=True))
    # the sum of 20 squares, a quotient and a root, each rounded
    np.testing.assert_allclose(rms(jnp.asarray(x), axes), wanted, rtol=1e-6)
    wanted = np.sqrt(np.sum(np.square(x.astype(np.float64)), axis=axes, keepdims=True))
    np.testing.assert_allclose(norm(jnp.asarray(x), axes), wanted, rtol=1e-6)


def test_units_of_very_different_scales_are_each_right():
    x = jnp.array([[3e18, 3e-18, 3.0, 0.0], [4e18, 4e-18, 4.0, 0.0]])
    np.testing.assert_allclose(norm(x, 0), [[5e18, 5e-18, 5.0, 0.0]], rtol=1e-6)


def test_a_norm_beyond_float32_is_infinite_and_one_below_it_is_zero():
    x = jnp.array([[3e30, 3e-30], [4e30, 4e-30]])
    np.testing.assert_array_equal(norm(x, 0), [[jnp.inf, 0.0]])
    np.testing.assert_array_equal(rms(x, 0), [[jnp.inf, 0.0]])


def test_the_norm_of_complex_numbers_is_real():
    x = jnp.array([3e18 + 4e18j, 0.0], jnp.complex64)
    with real_times_complex(x.dtype):
        assert norm(x).dtype == jnp.float32
        np.testing.assert_allclose(norm(x), [5e18], rtol=1e-6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_norm_does_not_hide_what_is_not_finite(bad):
    assert not jnp.isfinite(norm(jnp.array([1.0, bad, 0.0]))).any()


def test_the_derivative_of_a_norm_is_finite_at_zero_and_right_elsewhere():
    def f(x):
        return norm(x).reshape(())

    slope = jax.jit(jax.grad(f))
    along = jax.jit(lambda x: jax.jvp(f, (x,), (x,))[1])
    np.testing.assert_array_equal(slope(jnp.zeros(2)), 0)
    for scale in (1.0, 1e-15, 1e15):
        x = jnp.array([3.0, 4.0]) * scale
        np.testing.assert_allclose(slope(x), [0.6, 0.8], rtol=1e-6)
        np.testing.assert_allclose(along(x), 5 * scale, rtol=1e-6)
        together = jax.vmap(slope)(jnp.stack([x, jnp.zeros(2)]))
        np.testing.assert_allclose(together, [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)


# ----------------------------------------------------------------------------------------- clips


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_a_clip_by_rms_reaches_its_threshold_at_any_scale(scale):
    u = jnp.array([1.0, -7.0]) * scale
    np.testing.assert_allclose(
        emitted(adamx.clip_by_rms(2.5 * scale), u), np.array([0.5, -3.5]) * scale, rtol=1e-6
    )
    np.testing.assert_array_equal(emitted(adamx.clip_by_rms(5.001 * scale), u), u)


def test_a_threshold_of_zero_stops_everything():
    for tx in (
        adamx.clip_by_value(0.0),
        adamx.clip_by_rms(0.0),
        adamx.clip_by_norm(0.0),
        adamx.adaptive_clip(0.0),
    ):
        for u in (jnp.array([2.0, 0.0]), jnp.array([2j, 0.0])):
            np.testing.assert_array_equal(emitted(tx, u, u), 0)


def test_a_complex_element_is_clipped_in_size_and_keeps_its_phase():
    u = jnp.array([6 + 8j, 0.3j, 0.0])
    np.testing.assert_allclose(
        emitted(adamx.clip_by_value(5.0), u), np.array([3 + 4j, 0.3j, 0.0]), rtol=1e-6
    )


@pytest.mark.parametrize(
    "shape",
    [
        *[(), (7,), (3, 4), (2, 3, 2, 4)],
        *(
            pytest.param(shape, marks=pytest.mark.slow)
            for shape in [(1,), (1, 5), (5, 1), (2, 3, 4), (2, 1, 2, 3, 2)]
        ),
    ],
)
def test_the_units_of_an_adaptive_clip_are_those_of_optax(shape):
    generator = np.random.default_rng(1)
    u, w = (jnp.asarray(generator.normal(size=shape), jnp.float32) for _ in range(2))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        wanted: Any = optax.adaptive_grad_clip(0.5).update(u, optax.EmptyState(), w)[0]
    np.testing.assert_allclose(emitted(adamx.adaptive_clip(0.5), u, w), wanted, rtol=1e-6)


def test_an_adaptive_clip_takes_given_axes_and_asks_for_them_where_it_cannot_know():
    w = jnp.ones((2, 1, 1, 2, 1, 2))
    with pytest.raises(ValueError, match="adaptive_clip: an array of 6 axes"):
        emitted(adamx.adaptive_clip(0.5), w, w)
    got = emitted(adamx.adaptive_clip(0.5, axis=(0, -1)), w, w)
    np.testing.assert_allclose(got, 0.5 * w, rtol=1e-6)


def test_weights_at_zero_count_as_eps():
    u = jnp.array([3.0, 4.0])
    got = emitted(adamx.adaptive_clip(0.1, eps=0.5), u, jnp.zeros(2))
    np.testing.assert_allclose(got, [0.03, 0.04], rtol=1e-6)


@pytest.mark.parametrize("tx", [adamx.adaptive_clip(0.1), adamx.trust_ratio()])
def test_what_compares_with_the_weights_needs_them(tx):
    with pytest.raises(ValueError, match=f"{type(tx).__name__}: needs the parameters"):
        emitted(tx, jnp.ones(2))


# ---------------------------------------------------------------------------- ratios and blocks


def test_a_trust_ratio_passes_on_what_has_no_ratio():
    tx = adamx.trust_ratio(0.5)
    for u, w in ((jnp.ones(2), jnp.zeros(2)), (jnp.zeros(2), jnp.ones(2))):
        np.testing.assert_array_equal(emitted(tx, u, w), u)
    big, small = jnp.array([3e18, 4e18]), jnp.array([4e-5, 3e-5])
    np.testing.assert_allclose(emitted(tx, small, big), [2e18, 1.5e18], rtol=1e-6)
    # a norm that overflows is infinite: nothing is a fraction of it, and it has no fraction
    huge = jnp.array([3e30, 4e30])
    np.testing.assert_array_equal(emitted(tx, huge, big), [0, 0])
    for u in (small, huge):
        np.testing.assert_array_equal(emitted(tx, u, huge), u)
    np.testing.assert_allclose(
        emitted(adamx.trust_ratio(eps=5.0), jnp.array([0.0, 5.0]), jnp.array([4.0, 0.0])), [0, 2]
    )


def test_update_clipping_leaves_steps_alone_that_are_not_too_long():
    inner = adamx.rms_scaling(second_moment=adamx.ema_of_squares(0.75), eps=0.0)
    tx = adamx.update_clipping(inner, 0.0, 0.0)
    u, state = jnp.array([4.0, -8.0]), tx.init(jnp.zeros(2))
    first, state = tx.update(u, state)
    np.testing.assert_allclose(first, [1.0, -1.0], rtol=1e-6)
    wanted, _ = inner.update(u / 4, state)
    second, state = tx.update(u / 4, state)  # nu = (0.75 * 0.25 + 0.25 / 16) g^2, 3.25 times u^2
    np.testing.assert_array_equal(second, wanted)


def test_update_clipping_corrects_its_second_moment_and_counts_none_below_that_of_eps():
    inner, u = adamx.ema_of_squares(0.75), jnp.array([4.0, -8.0])
    alone = emitted(inner, u)
    np.testing.assert_allclose(emitted(adamx.update_clipping(inner, 0.75), u), alone, rtol=1e-6)
    np.testing.assert_allclose(emitted(adamx.update_clipping(inner, 0.0), u), alone / 2, rtol=1e-6)
    np.testing.assert_array_equal(emitted(adamx.update_clipping(inner, 0.0, 8.0), u), alone)
    # RMS^2 = (4 + 1) / 2 where the smaller second moment counts as 4 times what it is
    got = emitted(adamx.update_clipping(inner, 0.0, 4.0), u)
    np.testing.assert_allclose(got, alone / np.sqrt(2.5), rtol=1e-6)


def test_a_missing_slot_is_named():
    with pytest.raises(ValueError, match=r"update_clipping: there is no slot 'nu', only \['mu'\]"):
        emitted(adamx.update_clipping(adamx.ema(0.5), 0.5), jnp.ones(2))


def test_blocks_are_chosen_by_path_and_kept_small():
    def axes(path, leaf):
        return {"embed": (1,), "query": (0, 2), "norm": (0,), "out": ()}[path][: leaf.ndim]

    shapes = {"embed": (5, 3), "query": (3, 2, 4), "norm": (3,), "out": (2, 2)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    tx = adamx.adam_mini(0.1, axes=axes)
    state = tx.init(params)
    wanted = {"embed": (5, 1), "query": (1, 2, 1), "norm": (1,), "out": (2, 2)}
    assert jax.tree.map(jnp.shape, state["nu_mean"]) == wanted
    grads = jax.tree.map(lambda p: p * jnp.arange(float(p.size)).reshape(p.shape), params)
    _, state = tx.update(grads, state, params)
    g = np.asarray(grads["query"])
    np.testing.assert_allclose(
        state["nu_mean"]["query"], 0.05 * np.mean(g**2, axis=(0, 2), keepdims=True), rtol=1e-6
    )
    by_default = adamx.adam_mini(0.1).init(params)["nu_mean"]
    wanted = {"embed": (1, 3), "query": (1, 1, 4), "norm": (1,), "out": (1, 2)}
    assert jax.tree.map(jnp.shape, by_default) == wanted


def test_a_step_on_a_sphere_that_has_no_direction_is_none():
    """Zero weights and zero updates stay; a step into the centre is taken as it is, to zero."""
    w = {"zero": jnp.zeros(2), "still": jnp.array([3.0, 4.0]), "centre": jnp.array([3.0, 4.0])}
    u = {"zero": jnp.ones(2), "still": jnp.zeros(2), "centre": jnp.array([3.0, 4.0])}
    tx = adamx.hyperball(1.0)
    moved = jax.tree.map(jnp.add, w, emitted(tx, u, w))
    for name, expected in {**w, "centre": jnp.zeros(2)}.items():
        np.testing.assert_array_equal(moved[name], expected)
    huge = jnp.full(2, 1e30)  # whose norm overflows: no sphere is known
    assert np.isfinite(emitted(tx, jnp.ones(2), huge)).all()
    assert emitted(tx, jnp.zeros((0, 3)), jnp.zeros((0, 3))).shape == (0, 3)


def test_masters_stay_on_their_sphere():
    """Beside a bfloat16, which is 2^-8 off; a float32 norm of 64 numbers by a few roundings."""
    adamh = adamx.chain(adamx.scale_by_adam(), adamx.hyperball(0.25))
    tx = adamx.master_weights(adamh, "float32")
    w = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)), jnp.bfloat16)
    state, lengths, first = tx.init(w), [], w
    for seed in (1, 2):
        g = jnp.asarray(np.random.default_rng(seed).normal(size=w.shape), w.dtype)
        u, state = tx.update(g, state, w)
        w = adamx.apply_updates(w, u)
        lengths.append(np.linalg.norm(np.float64(adamx.masters(w, state))))
    np.testing.assert_allclose(lengths, np.linalg.norm(np.float64(first)), rtol=2 * 40 * 2.0**-24)
    assert (w != first).mean() > 0.9


def test_squares_too_large_for_their_mean_leave_it_finite():
    tx = adamx.ema_of_mean_squares(0.5)
    u = jnp.full(4, 1e19)  # the squares fit, their sum does not
    _, state = tx.update(u, tx.init(u))
    assert jnp.isfinite(state["nu_mean"]).all()


def test_a_gradient_that_the_compiler_knows_to_be_zero_has_the_norm_zero():
    """Such as that of a frozen branch."""
    tx = adamx.chain(adamx.clip_by_global_norm(1.0, record=True), adamx.sgd(0.1))
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: sum(map(jnp.sum, jax.tree.leaves(jax.lax.stop_gradient(p)))))
        return tx.update(grads(params), state, params)

    updates, state = step(params, tx.init(params))
    assert float(state["grad_norm"]) == 0.0
    assert all((u == 0).all() for u in jax.tree.leaves(updates))


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4)])
def test_flags_are_counted_alike_in_two_sums(shape, monkeypatch):
    flags = jnp.asarray(np.random.default_rng(0).uniform(size=shape) < 0.6)
    for limit in (2**31, 1):  # in one sum, and as in an array with more elements than that
        monkeypatch.setattr(norms, "_COUNTED_BY_INT32", limit)
        found = norms.count(flags, jnp.float32)
        assert found.dtype == jnp.float32 and int(found) == np.asarray(flags).sum()


# -------------------------------------------------------------------------- clips by the history

ULP = 2.0**-23


def run_of(tx, gradients):
    """Return (updates, states) of a run, each with a leading axis of steps."""

    def step(state, g):
        u, state = tx.update(g, state)
        return state, (u, state)

    first = tx.init(jax.tree.map(lambda g: jnp.zeros_like(g[0]), gradients))
    return jax.jit(lambda g: jax.lax.scan(step, first, g)[1])(gradients)


def spiky(shape, number=60):
    generator = np.random.default_rng(number)
    g = generator.normal(size=(number, *shape)).astype(np.float32)
    g[generator.uniform(size=number) < 0.15] *= 8
    return g


def test_a_clip_to_history_is_its_formula_in_float64():
    """A norm is off by 4 ULP, a step by 4 more, of which the average keeps ten steps' worth."""
    gradients = {"w": spiky((3, 4)), "b": spiky(())}
    gradients["w"][2] = gradients["w"][30] = 0  # in the warm-up and after it
    gradients["w"][0] = 0  # as behind weights that start at zero
    gradients["b"][:] = np.abs(gradients["b"])
    tx = adamx.clip_to_history(1.5, 0.9, warmup=5)
    updates, states = run_of(tx, gradients)
    for leaf, g in gradients.items():
        wanted, averages = reference_family.clip_to_history(g.astype(float), 1.5, 0.9, 5)
        sizes = np.abs(g).reshape(60, -1).sum(-1)
        clipped = np.abs(wanted).reshape(60, -1).sum(-1) < 0.999 * sizes
        assert clipped.sum() > 5 and not clipped[:5].any()
        np.testing.assert_allclose(updates[leaf], wanted, rtol=80 * ULP)
        found = states["norm_average"][leaf].reshape(60)
        np.testing.assert_allclose(found, averages, rtol=80 * ULP)


def test_a_clip_by_the_zscore_is_its_formula_in_float64():
    """The deviations are a third of the norms, so that their squares lose 6 times as many ULP."""
    norms = np.exp(0.3 * np.random.default_rng(0).normal(size=80)).astype(np.float32)
    norms[[3, 20, 21, 50]] *= 6
    gradients = {
        "w": norms[:, None] * np.array([0.6, 0.0], np.float32),
        "b": norms * np.float32(-0.8),
    }
    updates, states = run_of(adamx.clip_by_zscore(2.0, 0.9, warmup=8), gradients)
    wide = np.hypot(gradients["w"][:, 0].astype(float), gradients["b"].astype(float))
    wanted, means, variances = reference_family.zclip(wide, 2.0, 0.9, 8)
    assert 4 < (wanted < 0.999 * wide).sum() < 20 and (wanted == wide)[:8].all()
    for name, expected, ulps in (("mean", means, 40), ("variance", variances, 240)):
        np.testing.assert_allclose(states[f"norm_{name}"], expected, rtol=ulps * ULP)
    for leaf, g in gradients.items():
        factor = (wanted / wide).reshape(-1, *([1] * (g.ndim - 1)))
        np.testing.assert_allclose(updates[leaf], factor * g, rtol=240 * ULP)
    np.testing.assert_array_equal(states["norm_steps"], np.minimum(np.arange(1, 81), 8))


HISTORIES = {
    "array": lambda: adamx.clip_to_history(1.1, 0.9, warmup=4),
    "tree": lambda: adamx.clip_by_zscore(1.0, 0.9, warmup=4),
}


@pytest.mark.parametrize("name", HISTORIES)
def test_a_clip_acts_on_the_gradient_before_adam_and_on_the_update_after_it(name):
    gradients, clip, adam = {"w": spiky((5,), 20)}, HISTORIES[name](), adamx.scale_by_adam(0.0, 0.9)
    alone, memory = run_of(adam, gradients)
    shorter, _ = run_of(clip, gradients)
    first, states = run_of(adamx.chain(clip, adam), gradients)
    wanted, inside = run_of(adam, shorter)
    # the programs differ, and with them the last bits, which Adam's quotient keeps
    np.testing.assert_allclose(first["w"], wanted["w"], rtol=1e-5)
    np.testing.assert_allclose(states["mu"]["w"], inside["mu"]["w"], rtol=1e-5, atol=1e-6)
    after, states = run_of(adamx.chain(adam, clip), gradients)
    np.testing.assert_allclose(states["nu"]["w"], memory["nu"]["w"], rtol=1e-6)
    wanted, _ = run_of(clip, alone)
    np.testing.assert_allclose(after["w"], wanted["w"], rtol=1e-5)
    lengths = [np.linalg.norm(x["w"], axis=-1) for x in (alone, after)]
    assert (lengths[1] < 0.99 * lengths[0]).sum() >= 2


@pytest.mark.parametrize("name", HISTORIES)
def test_what_is_not_finite_leaves_a_history_as_it_is(name):
    g = np.array([1.0, 1.2, 0.9, 1.1, 1.0, np.inf, 1e30, np.nan, 1.0])[:, None]
    updates, states = run_of(HISTORIES[name](), {"w": np.repeat(g, 2, 1)})
    for entry in states.values():
        rows = np.asarray(jax.tree.leaves(entry)[0])
        if rows.dtype != np.int32:
            assert np.isfinite(rows).all()
            for t in (5, 6, 7):
                np.testing.assert_array_equal(rows[t], rows[4])
    out = np.asarray(updates["w"])
    assert np.isnan(out[[5, 7]]).all() and (out[6] == 0).all() and np.isfinite(out[8]).all()


@pytest.mark.parametrize("name", HISTORIES)
def test_a_history_begins_where_it_joins_an_older_run(name):
    inner, params = adamx.sgd(1.0), jnp.zeros(2)
    state = inner.init(params) | {"count": jnp.int32(1000)}
    tx = adamx.chain(HISTORIES[name](), inner)
    state, adaptation = adamx.adapt_state(tx, params, state)
    assert all(path.startswith("norm_") for path in adaptation.filled)
    for size in (3.0, 4.0):
        updates, state = tx.update(jnp.full(2, size), state)
        assert updates[0] == -3.0 if size == 3.0 else updates[0] < -3.2
    again = tx.update(jnp.full(2, 1.0), state)[0]
    np.testing.assert_array_equal(again, -1.0)


def test_the_papers_warm_up_is_a_clip_that_ends():
    ends = adamx.clip_by_global_norm(lambda t: jnp.where(t < 2, 1.0, jnp.inf))
    tx = adamx.chain(ends, adamx.clip_to_history(2.0, 0.5, warmup=2))
    updates, states = run_of(tx, {"w": np.array([[3, 4], [0.3, 0.4], [3, 4], [0.5, 0]])})
    lengths = np.linalg.norm(updates["w"], axis=-1)
    np.testing.assert_allclose(lengths, [1.0, 0.5, 1.0, 0.5], rtol=4 * ULP)
    found = states["norm_average"]["w"][:, 0]
    np.testing.assert_allclose(found, [1.0, 0.5, 0.75, 0.625], rtol=4 * ULP)


def test_two_clips_by_the_zscore_keep_their_own_histories():
    with pytest.raises(ValueError, match="two stages keep 'norm_"):
        adamx.chain(adamx.clip_by_zscore(), adamx.scale_by_adam(), adamx.clip_by_zscore())
    second = adamx.clip_by_zscore(name="update_norm")
    state = adamx.chain(adamx.clip_by_zscore(), second).init(jnp.zeros(2))
    assert {"norm_mean", "update_norm_mean", "norm_steps", "update_norm_steps"} < state.keys()


@pytest.mark.parametrize("function", [adamx.clip_to_history, adamx.clip_by_zscore])
def test_a_warm_up_is_a_number_of_steps(function):
    with pytest.raises(ValueError, match=f"{function.__name__}: warmup must be a whole number"):
        function(warmup=0)
