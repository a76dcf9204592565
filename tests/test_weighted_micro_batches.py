"""`accumulate` with a weight for each gradient, and steps that are taken early."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import mesh_of, numbers_of_programs, thinned
from table import OUTSIDE

import adamx
from adamx.inspect.program import read_program

pytestmark = pytest.mark.usefixtures("quick_compiler")

ULP = 2.0**-23
PARTS = (3, 1, 7, 5)


def start() -> Any:
    return {"w": jnp.array([[1.0, -2.0], [3.0, 4.0]]), "b": jnp.array([0.5, 0.0])}


def gradients(number, seed=0):
    rng = np.random.default_rng(seed)
    drawn = [{"w": rng.normal(size=(2, 2)), "b": rng.normal(size=2)} for _ in range(number)]
    return [jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), g) for g in drawn]


def one_program(tx):
    @jax.jit
    def step(params, state, grads, **extra):
        updates, state = tx.update(grads, state, params, **extra)
        return adamx.apply_updates(params, updates), state

    return step


def eager(tx):
    def step(params, state, grads, **extra):
        updates, state = tx.update(grads, state, params, **extra)
        return adamx.apply_updates(params, updates), state

    return step


def in_scans(tx):
    @jax.jit
    def step(params, state, grads, **extra):
        def one(carry, extra):
            updates, state = tx.update(grads, carry[1], carry[0], **extra)
            return (adamx.apply_updates(carry[0], updates), state), None

        many = {name: jnp.asarray(x)[None] for name, x in extra.items()}
        return jax.lax.scan(one, (params, state), many, length=1)[0]

    return step


WAYS = {
    "make_step": adamx.make_step,
    "one program": one_program,
    "scan": in_scans,
    "eager": eager,
}
HOW = thinned(WAYS)


@pytest.mark.parametrize("how", HOW)
def test_unequal_parts_make_the_step_of_the_whole_batch(how):
    """Each part's gradient is the mean of its tokens' gradients; 16 tokens, two steps.

    Four products and three sums round seven times, the share twice; momentum, rate and parameter
    twice in either run. Relative to the sum of magnitudes: 13 ULP a step.
    """
    drawn = np.random.default_rng(1).normal(size=(2, 16, 2, 2))
    tx = adamx.accumulate(adamx.sgd(0.1, 0.9), len(PARTS), weighted=True)
    plain = adamx.sgd(0.1, 0.9)
    step, whole = WAYS[how](tx), adamx.make_step(plain)
    w = jnp.asarray([[1.0, -2.0], [3.0, 4.0]])
    a, b = (jnp.copy(w), tx.init(w)), (jnp.copy(w), plain.init(w))
    for tokens in drawn:
        for part in np.split(tokens, np.cumsum(PARTS)[:-1]):
            a = step(*a, jnp.asarray(part.mean(0), jnp.float32), weight=len(part))
        b = whole(*b, jnp.asarray(tokens.mean(0), jnp.float32))
    assert int(a[1]["count"]) == 2 and float(a[1]["accumulated_weight"]) == 16
    np.testing.assert_allclose(a[0], b[0], rtol=0, atol=2 * 13 * ULP * 4)  # no weight exceeds 4
    of_means = np.mean([p.mean(0) for p in np.split(drawn[0], np.cumsum(PARTS)[:-1])], 0)
    assert np.abs(of_means - drawn[0].mean(0)).max() > 0.1  # equal weights: another step


@pytest.mark.parametrize(
    ("dtype", "weight"),
    [("bfloat16", 1), ("float64", np.int64(1)), ("float32", 1.0), ("float16", True)],
)
def test_weights_of_one_change_no_bit(dtype, weight):
    with jax.enable_x64(dtype == "float64"):
        plain = adamx.accumulate(adamx.sgd(0.1, 0.9), 3)
        tx = adamx.accumulate(adamx.sgd(0.1, 0.9), 3, weighted=True)
        steps = one_program(tx), one_program(plain)
        params = jnp.arange(1, 9, dtype=jnp.float64 if dtype == "float64" else jnp.float32)
        a, b = (params, tx.init(params)), (params, plain.init(params))
        for t in range(6):
            g = (jnp.sin(params * (t + 1)) / 3).astype(dtype)
            a, b = steps[0](*a, g, weight=weight), steps[1](*b, g)
        del a[1]["accumulated_weight"]
        chex.assert_trees_all_equal(a, b)
        assert a[1]["accumulated"].dtype == params.dtype


def test_equal_weights_are_multi_steps():
    """Sums of three and their shares: 4 ULP of the way of at most 0.1 * 3 a step."""
    tx = adamx.accumulate(adamx.sgd(0.1), 3, weighted=True)
    other = optax.MultiSteps(optax.sgd(0.1), 3)
    a, b = (start(), tx.init(start())), (start(), other.init(start()))
    with jax.numpy_dtype_promotion("standard"):
        for g in gradients(6):
            a = eager(tx)(*a, g, weight=512)
            b = eager(other)(*b, g)
    jax.tree.map(
        lambda u, v: np.testing.assert_allclose(u, v, rtol=2 * ULP, atol=8 * ULP), a[0], b[0]
    )


def test_a_weight_of_zero_leaves_a_gradient_out_whatever_it_is():
    tx = adamx.accumulate(adamx.sgd(1.0), 3, weighted=True)
    a, b = (start(), tx.init(start())), (start(), tx.init(start()))
    g = gradients(2)
    empty = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), g[0])  # the mean over no token
    for grads, weight in ((empty, 0), (g[0], 2), (g[1], 6)):
        a = adamx.make_step(tx)(*a, grads, weight=weight)
    for grads, weight, last in ((g[0], 2, False), (g[1], 6, True)):
        b = adamx.make_step(tx)(*b, grads, weight=weight, last=last)
    chex.assert_trees_all_equal(a, b)
    assert int(a[1]["count"]) == 1


@pytest.mark.parametrize("how", HOW)
def test_a_sum_without_weight_takes_no_step_and_the_next_one_is_right(how):
    tx = adamx.accumulate(adamx.sgd(0.5, 0.9), 2, weighted=True)
    step = WAYS[how](tx)
    a = start(), tx.init(start())
    before = jax.device_get(a)
    for _ in range(2):
        a = step(*a, start(), weight=0)
    chex.assert_trees_all_equal(jax.device_get(a)[0], before[0])
    assert [int(a[1][name]) for name in ("count", "micro_step")] == [0, 0]
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), a[1]["trace"])
    for _ in range(2):
        a = step(*a, start(), weight=3)
    assert int(a[1]["count"]) == 1 and np.isfinite(a[0]["w"]).all()
    assert float(a[1]["accumulated_weight"]) == 6


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("number", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_the_last_gradient_takes_the_step_early(how, number):
    """Bit for bit the step of as many gradients as there are; the next sum begins anew."""
    tx, whole = (adamx.accumulate(adamx.sgd(0.1, 0.9), every) for every in (8, number))
    a, b = (start(), tx.init(start())), (start(), whole.init(start()))
    ways = WAYS[how](tx), WAYS[how](whole)
    for t, g in enumerate(gradients(2 * number)):
        a = ways[0](*a, g, last=t % number == number - 1)
        b = ways[1](*b, g)
    chex.assert_trees_all_equal(a[1], b[1])
    jax.tree.map(lambda u, v: np.testing.assert_array_max_ulp(u, v, 2), a[0], b[0])
    assert int(a[1]["count"]) == 2 and int(a[1]["micro_step"]) == 0


def test_a_sum_is_closed_without_another_gradient():
    tx = adamx.accumulate(adamx.sgd(1.0), 8, weighted=True)
    step, a = adamx.make_step(tx), (start(), tx.init(start()))
    g = gradients(2)
    for grads, weight in zip(g, (1, 3), strict=True):
        a = step(*a, grads, weight=weight)
    a = step(*a, jax.tree.map(jnp.zeros_like, g[0]), weight=0, last=True)
    wanted = jax.tree.map(lambda p, u, v: p - (u + 3 * v) / 4, start(), *g)
    jax.tree.map(lambda u, v: np.testing.assert_array_max_ulp(u, v, 4), a[0], wanted)
    assert int(a[1]["count"]) == 1


def weighted(name):
    return OUTSIDE[name](adamx.accumulate(adamx.sgd(0.1, 0.9), 4, weighted=True))


# each program of these is compiled: the innermost and the outermost are fast
NESTED = thinned(OUTSIDE, keep=5)


@pytest.mark.parametrize("name", NESTED)
def test_a_micro_step_with_a_weight_moves_no_more(name):
    """12 bytes a parameter, and one more reading of the gradient for a guard outside."""
    size = 2**20
    params = {"w": jnp.zeros(size)}
    tx = weighted(name)
    lowered = adamx.make_step(tx).lower(params, tx.init(params), params, weight=3, last=False)
    program = read_program(lowered.compile(), params)
    floor = 16 if "skip" in name else 12
    assert program.always == pytest.approx(floor, rel=1e-3)  # and scalars
    assert program.copies == 0 and program.temp_bytes < size


@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_make_step_ends_where_one_program_for_all_calls_ends(name, dtype):
    """Bit for bit, with weights, early steps and bad gradients at any place."""
    tx = weighted(name)
    params = jax.tree.map(lambda p: p.astype(dtype), start())
    a: Any = jax.tree.map(jnp.copy, params), tx.init(params)
    b: Any = params, tx.init(params)
    steps: Any = adamx.make_step(tx), one_program(tx)
    ends = {1: True, 4: np.True_, 7: jnp.array(True), 10: jnp.array(False), 12: True}
    for t, g in enumerate(gradients(16)):
        bad = jnp.nan if t in (4, 9) and "skip" in name else 1
        g = jax.tree.map(lambda x, bad=bad: (bad * x).astype(dtype), g)
        extra: Any = {"weight": t % 4, "last": ends.get(t, False)}
        a, b = steps[0](*a, g, **extra), steps[1](*b, g, **extra)
        chex.assert_trees_all_equal(a, b)
    assert int(a[1]["count"]) >= 4


def test_a_python_bool_chooses_the_program_and_an_array_runs_the_one_that_does_both():
    tx = adamx.monitor(adamx.accumulate(adamx.sgd(0.5), 4), every=3, groups=("*",))
    step: Any = adamx.make_step(tx)
    a = start(), tx.init(start())
    ran = numbers_of_programs(step)
    no, yes = jnp.array(False), jnp.array(True)
    lasts = [False, True, False, False, True, False, np.False_, np.True_, True, no, yes, False]
    micro = []
    for g, last in zip(gradients(12), lasts, strict=True):
        a = step(*a, g, last=last)
        micro.append(int(a[1]["micro_step"]))
    # -1 measures, 1 steps, 2 adds alone
    assert ran == [2, 1, -1, 2, 2, 1, -1, 2, 2, 1, -1, 1, 1, 1, -1, 2]
    assert micro == [1, 0, 1, 2, 0, 1, 2, 0, 0, 1, 0, 1]


def test_the_device_is_not_asked_for_an_early_step(monkeypatch):
    tx = adamx.accumulate(adamx.sgd(0.1), 5, weighted=True)
    step, a = adamx.make_step(tx), (start(), tx.init(start()))
    weight = jnp.float32(3)
    for t in range(3):
        a = step(*a, start(), weight=weight, last=t % 3 == 2)

    def wait(_):
        raise AssertionError("the step waited for the device")

    monkeypatch.setattr("adamx.training.int", wait, raising=False)
    for t in range(3, 9):
        a = step(*a, start(), weight=weight, last=t % 3 == 2)
    monkeypatch.undo()
    assert int(a[1]["count"]) == 3
    assert [program._cache_size() for program in step._programs] == [1, 1]  # pyright: ignore


def test_its_own_arguments_are_its_own_and_the_others_go_on():
    seen = []

    def update(updates, state, params=None, **extra):
        del params
        seen.append(sorted(extra))
        return jax.tree.map(lambda u: extra["factor"] * u, updates), state

    scaled = optax.GradientTransformationExtraArgs(optax.identity().init, update)
    tx = adamx.accumulate(adamx.chain(scaled, adamx.sgd(1.0)), 4, weighted=True)
    outer = optax.chain(optax.identity(), tx)
    w = jnp.zeros(1)
    state = outer.init(w)
    updates: Any = None
    for factor, last in ((100.0, False), (3.0, True)):
        extra: Any = {"weight": 2, "last": last, "factor": factor}
        updates, state = outer.update(jnp.ones(1), state, w, **extra)
    assert float(updates[0]) == -3.0
    assert set(map(tuple, seen)) == {(), ("factor",)}  # first it is asked what it keeps


def test_a_leaf_without_gradient_waits():
    tx = adamx.accumulate(adamx.sgd(1.0), 8, weighted=True)
    step, a = adamx.make_step(tx), (start(), tx.init(start()))
    for last in (False, True):
        a = step(*a, {"w": jnp.ones((2, 2)), "b": None}, weight=4, last=last)
    np.testing.assert_array_equal(a[0]["w"], start()["w"] - 1)
    np.testing.assert_array_equal(a[0]["b"], start()["b"])


def test_a_complex_gradient_is_weighted():
    tx = adamx.accumulate(adamx.sgd(1.0), 2, weighted=True)
    w = jnp.zeros(1, jnp.complex64)
    state = tx.init(w)
    for g, weight in ((4 + 8j, 1), (8 - 4j, 3)):
        updates, state = tx.update(jnp.array([g], jnp.complex64), state, w, weight=weight)
    np.testing.assert_array_equal(updates, np.complex64(-(28 - 4j) / 4))


def test_each_lane_of_a_vmap_ends_where_it_is_told():
    tx = adamx.accumulate(adamx.sgd(1.0), 4, weighted=True)

    def lane(w, state, g, weight, last):
        updates, state = tx.update(g, state, w, weight=weight, last=last)
        return w + updates, state

    step = adamx.make_step(tx)
    for run in (lane, lambda w, s, g, weight, last: step(w, s, g, weight=weight, last=last)):
        w = jnp.zeros((3, 1))
        state = jax.vmap(tx.init)(w)
        weights = jnp.array([1.0, 0.0, 3.0])
        for last in (jnp.array([False, False, True]), jnp.array([True, False, False])):
            w, state = jax.jit(jax.vmap(run))(w, state, jnp.ones((3, 1)), weights, last)
        np.testing.assert_array_equal(w[:, 0], [-1, 0, -1])
        np.testing.assert_array_equal(state["micro_step"], [0, 2, 1])


def test_a_run_resumes_in_the_middle_of_a_weighted_sum():
    tx = adamx.accumulate(adamx.sgd(0.1, 0.9), 4, weighted=True)
    step, a = adamx.make_step(tx), (start(), tx.init(start()))
    grads = gradients(8)
    for t, g in enumerate(grads[:6]):
        a = step(*a, g, weight=t + 1, last=False)
    b: Any = jax.tree.map(jnp.asarray, jax.device_get(a))
    fresh: Any = adamx.make_step(tx)
    for t, g in enumerate(grads[6:]):
        extra: Any = {"weight": 7 * (t + 1), "last": t == 1}
        a, b = step(a[0], a[1], g, **extra), fresh(*b, g, **extra)
    chex.assert_trees_all_equal(a, b)
    assert int(b[1]["count"]) == 2


def test_sharded_sums_are_the_same():
    mesh = mesh_of((8,), ("x",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    tx = adamx.accumulate(adamx.sgd(0.1, 0.9), 8, weighted=True)
    w, g = jnp.linspace(-1, 1, 32), jnp.linspace(0.5, 2, 32)
    results = []
    for put in (lambda x: x, lambda x: jax.device_put(x, place)):
        a = put(jnp.copy(w)), tx.init(put(w))
        step = adamx.make_step(tx)
        for t in range(5):
            a = step(*a, put(g / (t + 1)), weight=t + 1, last=t == 4)
        results.append(a)
    assert results[1][0].sharding == place and results[1][1]["accumulated"].sharding == place
    jax.tree.map(lambda u, v: np.testing.assert_array_max_ulp(u, v, 2), *jax.device_get(results))


@pytest.mark.parametrize(
    ("weighted", "extra", "error", "text"),
    [
        (False, {"weight": 3}, ValueError, "weighted=True"),
        (True, {}, ValueError, "needs the weight of each gradient"),
        (True, {"weight": None}, ValueError, "needs the weight of each gradient"),
        (True, {"weight": np.ones(2)}, TypeError, r"real scalar.*got float\d\d\[2\]"),
        (True, {"weight": 1j}, TypeError, "real scalar"),
        (False, {"last": 1}, TypeError, "last must be a bool, got int32"),
        (False, {"last": np.zeros(2, bool)}, TypeError, r"last must be a bool, got bool\[2\]"),
    ],
)
@pytest.mark.parametrize("how", ["make_step", "eager"])
def test_mistakes_are_named_before_anything_is_donated(how, weighted, extra, error, text):
    tx = adamx.accumulate(adamx.sgd(0.1), 2, weighted=weighted)
    step, a = WAYS[how](tx), (start(), tx.init(start()))
    with pytest.raises(error, match=text):
        step(*a, start(), **extra)
    step(*a, start(), **({"weight": 1} if weighted else {}))  # nothing was lost


def test_a_state_without_the_sum_of_weights_is_refused_and_can_be_adapted():
    plain = adamx.accumulate(adamx.sgd(0.1), 2)
    tx = adamx.accumulate(adamx.sgd(0.1), 2, weighted=True)
    with pytest.raises(ValueError, match="no 'accumulated_weight'"):
        tx.update(start(), plain.init(start()), weight=1)
    state, said = adamx.adapt_state(tx, start(), plain.init(start()))
    assert said.filled == ("accumulated_weight",)
    tx.update(start(), state, weight=1)


def test_the_formula_says_that_the_mean_is_weighted():
    tx = adamx.accumulate(adamx.sgd(0.1), 2, weighted=True)
    assert "the weighted mean of 2 gradients" in str(adamx.summary(tx, start()))
