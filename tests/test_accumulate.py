"""Micro-batches: `accumulate` against the large batch, in two programs and in one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import thinned

import adamx

# what is tested does not depend on optimised code, and compiling takes most of the time
pytestmark = pytest.mark.usefixtures("quick_compiler")

ULP = 2.0**-23


def start():
    return {"w": jnp.array([[1.0, -2.0], [3.0, 4.0]]), "b": jnp.array([0.5, 0.0])}


def gradients(number, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {"w": jnp.asarray(rng.normal(size=(2, 2)), jnp.float32), "b": jnp.asarray(
            rng.normal(size=2), jnp.float32)}
        for _ in range(number)
    ]  # fmt: skip


def means(grads, every):
    """The mean of each run of micro-batches, in float64."""
    groups = [grads[i : i + every] for i in range(0, len(grads) - every + 1, every)]
    return [
        jax.tree.map(lambda *g: np.mean(np.asarray(g, np.float64), 0), *group) for group in groups
    ]


@pytest.mark.parametrize(
    "every",
    [1, pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("how", thinned(["two programs", "one program", "eager"]))
def test_micro_batches_make_the_step_of_the_large_batch(every, how):
    """SGD with momentum: linear, so that the mean's error is what is left.

    Summing `every` gradients rounds every - 1 times and the share twice (1 / every and the
    product); trace, rate and parameter are rounded in both. Relative to the sum of magnitudes, over
    4 steps: (every + 6) ULP a step.
    """
    grads = gradients(4 * every)
    tx = adamx.accumulate(adamx.sgd(0.1, 0.9), every)
    step = adamx.make_step(tx)

    @jax.jit
    def one(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return adamx.apply_updates(params, updates), state

    params, state = start(), tx.init(start())
    for g in grads:
        if how == "eager":
            updates, state = tx.update(g, state, params)
            params = adamx.apply_updates(params, updates)
        else:
            params, state = (step if how == "two programs" else one)(params, state, g)
    assert int(state["count"]) == 4 and int(state["micro_step"]) == 0

    plain = adamx.sgd(0.1, 0.9)
    wanted, other = start(), plain.init(start())
    for mean in means(grads, every):
        mean = jax.tree.map(lambda m: jnp.asarray(m, jnp.float32), mean)
        wanted, other = adamx.make_step(plain)(wanted, other, mean)
    bound = 4 * (every + 6) * ULP * (4 + 4)  # weights up to 4, and the way gone
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=bound), params, wanted)


@pytest.mark.parametrize("how", ["update", "make_step"])
def test_between_steps_nothing_moves_but_the_sum(how):
    tx = adamx.accumulate(adamx.adamw(optax.linear_schedule(0.1, 0.0, 9)), 3)
    params = start()
    state = tx.init(params)
    g = gradients(2)
    before = jax.device_get(state)
    for k in range(2):
        if how == "make_step":
            params, state = adamx.make_step(tx)(params, state, g[k])
        else:
            updates, state = tx.update(g[k], state, params)
            assert not any(u.any() for u in jax.tree.leaves(updates))
        for name in before.keys() - {"accumulated", "micro_step"}:
            jax.tree.map(np.testing.assert_array_equal, state[name], before[name])
        assert int(state["micro_step"]) == k + 1
    total = jax.tree.map(jnp.add, *g)
    jax.tree.map(np.testing.assert_array_equal, state["accumulated"], total)
    jax.tree.map(np.testing.assert_array_equal, params, start())


def test_the_sum_is_float32_whatever_the_gradients_dtype():
    """256 times 1 + 2^-7 in bfloat16: a sum in bfloat16 would stop at 256."""
    tx = adamx.accumulate(adamx.sgd(1.0), 256)
    w = jnp.zeros(2)
    state, step = tx.init(w), adamx.make_step(tx)
    g = jnp.full(2, 1 + 2.0**-7, jnp.bfloat16)
    for _ in range(256):
        w, state = step(w, state, g)
    np.testing.assert_array_equal(w, -(1 + 2.0**-7))
    assert state["accumulated"].dtype == jnp.float32


@pytest.mark.usefixtures("x64")
def test_the_sum_is_float64_where_the_parameter_is():
    tx = adamx.accumulate(adamx.sgd(1.0), np.int64(2))  # pyright: ignore
    for dtype in (jnp.float64, jnp.float32):
        w = jnp.zeros(2, dtype)
        _, state = tx.update(w, tx.init(w))
        assert state["accumulated"].dtype == dtype


def test_two_programs_and_one_are_bit_for_bit_the_same():
    tx = adamx.accumulate(adamx.chain(adamx.clip_by_global_norm(1.0), adamx.sgd(0.5, 0.5)), 4)
    one = jax.jit(lambda p, s, g: _applied(tx, p, s, g))
    two = adamx.make_step(tx)
    a, b = (start(), tx.init(start())), (start(), tx.init(start()))
    for g in gradients(8):
        g = jax.tree.map(lambda x: jnp.round(8 * x) / 8, g)  # sums are exact
        a, b = one(a[0], a[1], g), two(b[0], b[1], g)
        jax.tree.map(np.testing.assert_array_equal, a[1], b[1])
    jax.tree.map(lambda x, y: np.testing.assert_array_max_ulp(x, y, 2), a[0], b[0])


def _applied(tx, params, state, grads):
    updates, state = tx.update(grads, state, params)
    return adamx.apply_updates(params, updates), state


def test_a_run_resumes_in_the_middle_of_a_sum():
    tx = adamx.accumulate(adamx.adam(0.1), 3)
    grads = gradients(7)
    a = (start(), tx.init(start()))
    step = adamx.make_step(tx)
    for g in grads[:4]:
        a = step(*a, g)
    saved = jax.device_get(a)  # as a checkpoint gives it back: NumPy arrays, in a new process
    b: Any = jax.tree.map(jnp.asarray, saved)
    fresh = adamx.make_step(tx)
    for g in grads[4:]:
        a, b = step(a[0], a[1], g), fresh(b[0], b[1], g)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert int(b[1]["count"]) == 2 and int(b[1]["micro_step"]) == 1


@pytest.mark.parametrize("how", ["make_step", "update"])
@pytest.mark.parametrize("every", [2, 3, 5])
def test_a_sum_is_divided_by_the_number_of_gradients_in_it_whatever_every_has_become(every, how):
    w = jnp.zeros(1)
    state = adamx.accumulate(adamx.sgd(1.0), 4).init(w)
    for _ in range(3):
        w, state = adamx.make_step(adamx.accumulate(adamx.sgd(1.0), 4))(w, state, jnp.ones(1))
    tx = adamx.accumulate(adamx.sgd(1.0), every)
    for k in range(4, 6):
        if how == "make_step":
            w, state = adamx.make_step(tx)(w, state, jnp.ones(1))
        else:
            updates, state = tx.update(jnp.ones(1), state)
            w = adamx.apply_updates(w, updates)
        if k >= every:
            break
    assert (float(w[0]), int(state["micro_step"])) == (-1.0, 0)


def test_one_step_function_serves_two_runs_at_once():
    """What it remembers belongs to a state, and not to the function."""
    tx = adamx.accumulate(adamx.sgd(1.0), 2)
    step = adamx.make_step(tx)
    a, b = (jnp.zeros(1), tx.init(jnp.zeros(1))), (jnp.zeros(1), tx.init(jnp.zeros(1)))
    a = step(*a, jnp.ones(1))
    b = step(*b, jnp.ones(1))
    a = step(*a, jnp.ones(1))
    assert (float(a[0][0]), float(b[0][0])) == (-1.0, 0.0)
    b = step(*b, jnp.ones(1))
    assert float(b[0][0]) == -1.0


def test_the_step_function_works_under_jit_and_vmap_as_one_program():
    tx = adamx.accumulate(adamx.sgd(1.0), 2)
    step = adamx.make_step(tx)
    w, state = jnp.zeros(1), tx.init(jnp.zeros(1))
    for _ in range(2):
        w, state = jax.jit(lambda w, s: step(w, s, jnp.ones(1)))(w, state)
    assert float(w[0]) == -1.0
    many = jnp.zeros((3, 1))
    states = jax.vmap(tx.init)(many)
    for _ in range(2):
        many, states = jax.vmap(step)(many, states, jnp.ones((3, 1)))
    np.testing.assert_array_equal(many, -1.0)


def test_two_programs_are_compiled_and_no_more():
    tx = adamx.accumulate(adamx.adamw(0.1), 3)
    step = adamx.make_step(tx)
    a = (start(), tx.init(start()))
    for g in gradients(9):
        before = a
        a = step(*a, g)
        assert before[1]["accumulated"]["w"].is_deleted()  # both work in place
    assert [program._cache_size() for program in step._programs] == [1, 1]  # pyright: ignore


def test_the_device_is_asked_at_the_start_only(monkeypatch):
    tx = adamx.accumulate(adamx.adamw(0.1), 2)
    step = adamx.make_step(tx)
    a = step(start(), tx.init(start()), start())

    def wait(_):
        raise AssertionError("the step waited for the device")

    monkeypatch.setattr("adamx.training.int", wait, raising=False)
    for g in gradients(4):
        a = step(*a, g)
    monkeypatch.undo()
    assert int(a[1]["count"]) == 2 and int(a[1]["micro_step"]) == 1


def test_extra_arguments_reach_the_optimizer_in_the_steps_last_gradient():
    def update(updates, state, params=None, **extra):
        del params
        factor = extra["factor"]
        return jax.tree.map(lambda u: factor * u, updates), state

    scaled = optax.GradientTransformationExtraArgs(optax.identity().init, update)
    tx = adamx.accumulate(adamx.chain(scaled, adamx.sgd(1.0)), 2)
    step, w = adamx.make_step(tx), jnp.zeros(1)
    state = tx.init(w)
    for factor in (100.0, 3.0):
        w, state = step(w, state, jnp.ones(1), factor=factor)
    assert float(w[0]) == -3.0


def test_a_guard_inside_and_outside():
    bad = jax.tree.map(lambda x: x.at[0].set(jnp.nan), gradients(1)[0])
    g = gradients(4)
    outside = adamx.skip_nonfinite(adamx.accumulate(adamx.sgd(1.0), 2))
    inside = adamx.accumulate(adamx.skip_nonfinite(adamx.sgd(1.0)), 2)
    a, b = (start(), outside.init(start())), (start(), inside.init(start()))
    for grads in (g[0], bad, g[1], g[2]):
        a, b = adamx.make_step(outside)(*a, grads), adamx.make_step(inside)(*b, grads)
    # outside: the bad one is left out, g0 and g1 make a step, g2 waits
    assert [int(a[1][k]) for k in ("count", "skipped", "micro_step")] == [1, 1, 1]
    wanted = jax.tree.map(lambda p, x, y: p - (x + y) / 2, start(), g[0], g[1])
    jax.tree.map(lambda x, y: np.testing.assert_array_max_ulp(x, y, 4), a[0], wanted)
    # inside: g0 and the bad one spoil a step, which is skipped, g1 and g2 make the next
    assert [int(b[1][k]) for k in ("count", "skipped", "micro_step")] == [1, 1, 0]
    wanted = jax.tree.map(lambda p, x, y: p - (x + y) / 2, start(), g[1], g[2])
    jax.tree.map(lambda x, y: np.testing.assert_array_max_ulp(x, y, 4), b[0], wanted)


def test_a_bad_micro_batch_counts_once_wherever_it_is_in_its_sum():
    bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), start())
    tx = adamx.accumulate(adamx.skip_nonfinite(adamx.sgd(1.0)), 3)
    for place in range(3):
        state = tx.init(start())
        for k, g in enumerate(gradients(3)):
            _, state = tx.update(bad if k == place else g, state)
        counters = ("count", "skipped", "consecutive_skipped")
        assert [int(state[name]) for name in counters] == [0, 1, 1]


def test_masters_accumulate_too():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), start())
    tx = adamx.accumulate(adamx.master_weights(adamx.sgd(2.0**-9)), 2)
    step, state = adamx.make_step(tx), tx.init(params)
    for _ in range(200):
        params, state = step(params, state, jax.tree.map(jnp.ones_like, params))
    moved = jax.tree.map(lambda p: p - 100 * 2.0**-9, start())
    jax.tree.map(np.testing.assert_array_equal, adamx.masters(params, state), moved)


def test_masters_see_the_mean_in_float32():
    """The mean of 1 and 1 + 2^-7 is no bfloat16, nor is the update."""
    params = jnp.ones(2, jnp.bfloat16)
    for tx in (
        adamx.accumulate(adamx.master_weights(adamx.sgd(2.0**-12)), 2),
        adamx.master_weights(adamx.accumulate(adamx.sgd(2.0**-12), 2)),
    ):
        p, state = params, tx.init(params)
        for g in (1.0, 1 + 2.0**-7):
            updates, state = tx.update(jnp.full(2, g, jnp.bfloat16), state, p)
            p = adamx.apply_updates(p, updates)
        wanted = 1 - 2.0**-12 * (1 + 2.0**-8)
        np.testing.assert_array_equal(adamx.masters(p, state), np.float32(wanted))


def test_stochastic_rounding_goes_with_it():
    tx = adamx.accumulate(adamx.sgd(2.0**-11), 2)
    step = adamx.make_step(tx, rounding="stochastic")
    w = jnp.ones(1600, jnp.bfloat16)
    state = tx.init(w)
    for _ in range(2):
        w, state = step(w, state, -jnp.ones(1600, jnp.bfloat16))
    assert 0 < float((w.astype(jnp.float32) - 1).mean()) < 2.0**-9


def test_a_leaf_without_gradient_waits():
    tx = adamx.accumulate(adamx.sgd(1.0), 2)
    params = start()
    state, step = tx.init(params), adamx.make_step(tx)
    for _ in range(2):
        params, state = step(params, state, {"w": jnp.ones((2, 2)), "b": None})
    np.testing.assert_array_equal(params["w"], start()["w"] - 1)
    np.testing.assert_array_equal(params["b"], start()["b"])


def test_one_none_stands_for_a_whole_branch_of_gradients():
    tx = adamx.accumulate(adamx.sgd(1.0), 2)
    params: Any = {"a": start(), "c": jnp.ones(1)}
    state = tx.init(params)
    for grads in (params, {"a": None, "c": jnp.ones(1)}):
        updates, state = tx.update(grads, state, params)
    assert updates["a"] is None and float(updates["c"][0]) == -1.0
    jax.tree.map(np.testing.assert_array_equal, state["accumulated"]["a"], start())


def test_mistakes_are_named_before_anything_is_donated():
    for every in (0, -1, 1.5, "2", None):
        with pytest.raises(ValueError, match="every must be a whole number >= 1"):
            adamx.accumulate(adamx.sgd(0.1), every)  # pyright: ignore
    tx = adamx.accumulate(adamx.sgd(0.1), 2)
    step, params = adamx.make_step(tx), start()
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"leaf 'b': state\['accumulated'\] has shape \[2\]"):
        step(params, state, {"w": jnp.ones((2, 2)), "b": jnp.ones(3)})
    with pytest.raises(TypeError, match="arguments swapped"):
        step(params, params, state)
    with pytest.raises(ValueError, match="the state has no 'micro_step'"):
        step(params, adamx.sgd(0.1).init(params), start())
    params, state = step(params, state, start())  # nothing was lost
    with pytest.raises(ValueError, match="accumulate wraps the whole optimizer"):
        adamx.chain(adamx.clip_by_global_norm(1.0), tx)


def test_lower_shows_the_program_that_the_call_would_run():
    tx = adamx.accumulate(adamx.adamw(0.1), 2)
    step, params = adamx.make_step(tx), start()
    state = tx.init(params)
    adding = step.lower(params, state, params).as_text()
    state = state | {"micro_step": jnp.int32(1)}
    closing = step.lower(params, state, params).as_text()
    assert "sqrt" not in adding and "sqrt" in closing
    abstract = jax.eval_shape(lambda: (params, state, params))
    assert "sqrt" in step.lower(*abstract).as_text()


@pytest.mark.parametrize("wrong", [object(), np.array([True]), np.array([1])])
def test_a_sum_that_is_none_is_refused_also_where_there_is_no_gradient(wrong):
    tx, params = adamx.accumulate(adamx.sgd(0.1), 2), {"b": jnp.ones(1), "w": jnp.ones(1)}
    state = tx.init(params)
    state["accumulated"]["b"] = wrong
    for grads in ({"b": None, "w": params["w"]}, params):
        with pytest.raises(TypeError, match=r"leaf 'b': state\['accumulated'\]"):
            jax.eval_shape(lambda g=grads: tx.update(g, state, params))
