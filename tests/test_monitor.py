"""Statistics of the steps: each against NumPy in float64, in groups, in two programs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamx

# what is tested does not depend on optimised code, and compiling takes most of the time
pytestmark = pytest.mark.usefixtures("quick_compiler")

LR, B1, B2, EPS = 0.1, 0.9, 0.99, 1e-2


def start(dtype=jnp.float32):
    generator = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(generator.normal(size=shape), dtype)  # noqa: E731
    return {"dense": {"kernel": draw(4, 3), "bias": draw(3)}, "scale": draw(5)}


def gradients(step, params):
    generator = np.random.default_rng(10 + step)
    draw = lambda p: jnp.asarray(0.02 * generator.normal(size=p.shape), p.dtype)  # noqa: E731
    return jax.tree.map(draw, params)


def flat(tree):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def trained(tx, steps, params=None, step=None):
    params = start() if params is None else params
    state, step = tx.init(params), step or adamx.make_step(tx)
    for t in range(steps):
        params, state = step(params, state, gradients(t, params))
    return params, state


def by_hand(steps, leaves: Callable[[Any], Any] = lambda tree: tree):
    """Return the statistics of AdamW's last step in float64."""
    w = flat(leaves(start()))
    m = v = u = g = root = np.zeros_like(w)
    for t in range(1, steps + 1):
        w = w + u
        g = flat(leaves(gradients(t - 1, start())))
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g**2
        root = np.sqrt(v / (1 - B2**t))
        u = -LR * (m / (1 - B1**t) / (root + EPS) + 1e-4 * w)
    return {
        "grad_norm": np.sqrt((g**2).sum()),
        "update_norm": np.sqrt((u**2).sum()),
        "param_norm": np.sqrt((w**2).sum()),
        "update_mean": np.abs(u).mean(),
        "signal_to_noise": (m**2 / v).mean(),
        "eps_share": np.less(root, EPS).mean(),
        "update_to_param": np.sqrt((u**2).sum() / (w**2).sum()),
        "step_size": np.abs(u).mean() / LR,
    }


def adamw(**more):
    return adamx.adamw(LR, b1=B1, b2=B2, eps=EPS, **more)


@pytest.mark.parametrize("compiled", ["make_step", "update"])
def test_each_statistic_is_what_its_formula_says(compiled):
    tx = adamx.monitor(adamw(), every=3, groups=("dense/*",))

    @jax.jit
    def branching(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = branching if compiled == "update" else None
    _, state = trained(tx, 4, step=step)  # the third is measured
    found = adamx.statistics(state)
    for group, part in (("dense/*", lambda t: t["dense"]), ("others", lambda t: t["scale"])):
        for name, wanted in by_hand(3, part).items():
            # 20 elements, 3 steps of a few roundings each: 2^-24 of the sum for each of them, and
            # the smallest element's v against the eps that divides it, 10 times that
            np.testing.assert_allclose(found[f"{name}/{group}"], wanted, rtol=200 * 2**-24)
    assert 0 < found["eps_share/others"] < 1
    assert found["monitor_step"] == 1 and found["count"] == 4
    assert all(isinstance(value, int | float) for value in found.values())


def test_without_groups_each_leaf_is_one():
    _, state = trained(adamx.monitor(adamw(), every=1), 2)
    assert set(state["monitor"]["grad_norm"]) == {"dense/bias", "dense/kernel", "scale"}
    found = adamx.statistics(state)
    wanted = by_hand(2, lambda tree: tree["dense"]["kernel"])
    np.testing.assert_allclose(
        found["update_norm/dense/kernel"], wanted["update_norm"], rtol=200 * 2**-24
    )


def test_one_array_needs_no_path():
    tx = adamx.monitor(adamx.sgd(0.5), every=1)
    w = jnp.array([3.0, 4.0])
    _, state = tx.update(jnp.array([0.0, 2.0]), tx.init(w), w)
    found = adamx.statistics(state)
    assert found["param_norm"] == 5 and found["update_to_param"] == 0.2
    assert found["step_size"] == 1


def test_the_training_is_that_without_a_monitor():
    params, state = trained(adamw(), 5)
    watched, kept = trained(adamx.monitor(adamw(), every=7), 5)  # never measured
    jax.tree.map(np.testing.assert_array_equal, (watched, kept["nu"]), (params, state["nu"]))
    watched, kept = trained(adamx.monitor(adamw(), every=1), 5)
    jax.tree.map(np.testing.assert_array_equal, kept["nu"], state["nu"])
    # where the update is read, w + u is no longer contracted into one rounding: half a ULP of w,
    # or of a u as large, at each of five steps
    for a, b in zip(jax.tree.leaves(watched), jax.tree.leaves(params), strict=True):
        assert (np.abs(a - b) <= 5 * np.spacing(np.maximum(np.abs(b), np.float32(LR)))).all()


def test_what_is_packed_is_measured_as_the_formula_sees_it():
    tx = adamx.monitor(adamw(moments="packed16"), every=1, groups=("*",))
    _, state = trained(tx, 3)
    assert "mu" not in state
    found, wanted = adamx.statistics(state), by_hand(3)
    # m has 8 bits and v 9, rounded stochastically three times: 2^-7 a time, twice for a square
    np.testing.assert_allclose(
        found["signal_to_noise/*"], wanted["signal_to_noise"], rtol=3 * 3 * 2**-7
    )


def test_parameters_that_an_update_cannot_move_are_counted():
    tx = adamx.monitor(adamx.sgd(1.0), every=1)
    params = {"w": jnp.array([1.0, 1.0, 1.0, 2.0**-9], jnp.bfloat16), "f32": jnp.ones(2)}
    # of a spacing of 2^-8 below 1, a quarter is lost and three quarters are not; 0 moves nothing
    moves = {"w": jnp.array([2.0**-10, 3 * 2.0**-10, 0.0, 2.0**-10]), "f32": jnp.full(2, 1e-9)}
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), moves, params)
    _, state = tx.update(grads, tx.init(params), params)
    assert state["monitor"]["stuck_share"] == {"w": 0.25}


def test_two_programs_are_compiled_and_the_cheap_one_runs_always():
    tx = adamx.monitor(adamw(), every=3)
    step = adamx.make_step(tx)
    _, state = trained(tx, 7, step=step)
    assert int(state["monitor_step"]) == 1
    _, between = step._programs  # pyright: ignore
    (measuring,) = step._apart  # pyright: ignore
    assert between._cache_size() == measuring._cache_size() == 1 and step._cache_size() == 2  # pyright: ignore
    like = {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
    programs = (between, tx), (adamx.make_step(adamw()), adamw())  # pyright: ignore
    costs: Any = [
        program.lower(like, jax.eval_shape(of.init, like), like).compile().cost_analysis()
        for program, of in programs
    ]
    moved = [cost["bytes accessed"] for cost in costs]
    assert moved[0] <= moved[1] + 32  # and the counter


def test_none_keeps_the_state_and_measures_nothing():
    on, off = (adamx.monitor(adamw(), every=every) for every in (1, None))
    params, state = trained(on, 2)
    _, after = adamx.make_step(off)(params, jax.tree.map(jnp.copy, state), gradients(9, params))
    jax.tree.map(np.testing.assert_array_equal, after["monitor"], state["monitor"])
    assert int(after["count"]) == 3


def test_a_skipped_step_is_seen():
    tx = adamx.monitor(adamx.skip_nonfinite(adamw()), every=1, groups=("*",))
    params, state = trained(tx, 2)
    bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
    _, state = adamx.make_step(tx)(params, state, bad)
    found = adamx.statistics(state)
    assert found["skipped"] == 1 and found["count"] == 2
    assert np.isnan(found["grad_norm/*"]) and found["update_norm/*"] == 0


def test_inside_accumulate_the_mean_gradient_is_measured():
    tx = adamx.accumulate(adamx.monitor(adamx.sgd(1.0), every=1, groups=("*",)), 2)
    params, state = trained(tx, 3)  # the third is the first of the next two
    mean = (flat(gradients(0, params)) + flat(gradients(1, params))) / 2
    found = adamx.statistics(state)
    np.testing.assert_allclose(found["grad_norm/*"], np.sqrt((mean**2).sum()), rtol=20 * 2**-24)
    assert found["monitor_step"] == 0 and found["micro_step"] == 1


def test_what_a_leaf_without_gradient_was_measured_as_stays():
    tx = adamx.monitor(adamw(), every=1)
    params, state = trained(tx, 1)
    grads = gradients(1, params) | {"scale": None}
    before = adamx.statistics(state)
    _, state = tx.update(grads, state, params)
    after = adamx.statistics(state)
    assert after["grad_norm/scale"] == before["grad_norm/scale"]
    assert after["grad_norm/dense/bias"] != before["grad_norm/dense/bias"]


def test_one_eps_for_all_is_needed_for_its_share():
    groups = adamx.by_path({"scale": {"eps": 1e-3}}, default=lambda **kw: adamx.adamw(LR, **kw))
    assert "eps_share" not in trained(adamx.monitor(groups, every=1), 1)[1]["monitor"]
    assert "signal_to_noise" not in trained(adamx.monitor(adamx.sgd(LR), every=1), 1)[1]["monitor"]


@pytest.mark.parametrize("name", ["adamax", "adamaxw", "adopt"])
def test_slots_that_are_no_averages_of_one_gradient_have_no_ratio(name):
    # AdaMax keeps a magnitude, and ADOPT averages what was divided already
    state = adamx.monitor(getattr(adamx, name)(LR), every=1).init(start())
    assert "grad_norm" in state["monitor"] and "signal_to_noise" not in state["monitor"]


def test_where_the_root_is_not_that_of_nu_the_share_of_eps_is_not_known():
    scheduled = adamx.adamw(LR, b2=optax.constant_schedule(B2))
    for tx in (adamx.amsgrad(LR), scheduled, adamx.adamw(LR, eps=jnp.float32(EPS))):
        state = adamx.monitor(tx, every=1).init(start())
        assert "eps_share" not in state["monitor"] and "signal_to_noise" in state["monitor"]


@pytest.mark.parametrize("every", [0, -1, 1.5, "10"])
def test_every_is_checked(every):
    with pytest.raises(ValueError, match="monitor: every must be a whole number >= 1 or None"):
        adamx.monitor(adamw(), every=every)


def test_groups_are_checked():
    with pytest.raises(TypeError, match="monitor: a pattern must be"):
        adamx.monitor(adamw(), groups=(1,))  # pyright: ignore
    with pytest.raises(ValueError, match="monitor: the pattern 'head' matches no leaf"):
        adamx.monitor(adamw(), groups=("head",)).init(start())
    with pytest.raises(TypeError, match="expects the state that init returned"):
        adamx.statistics(optax.adam(1.0).init(start()))  # pyright: ignore


def test_a_ratio_to_zero_is_nan_and_each_row_has_the_same_names():
    """The rate and the biases are 0 at first: a CSV writer raises at a name that comes later."""
    tx = adamx.monitor(adamx.sgd(optax.linear_schedule(0.0, 0.5, 2)), every=1)
    params: Any = {"w": jnp.ones(3), "b": jnp.zeros(2)}
    state, grads, rows = tx.init(params), jax.tree.map(jnp.ones_like, params), []
    for _ in range(3):
        updates, state = tx.update(grads, state, params)
        params = adamx.apply_updates(params, updates)
        rows.append(adamx.statistics(state))
    assert rows[0].keys() == rows[1].keys() == rows[2].keys()
    ratios = ("step_size/w", "update_to_param/b", "update_to_param/w")
    known = [[not np.isnan(row[name]) for name in ratios] for row in rows]
    assert known == [[False, False, True], [True, False, True], [True, True, True]]


def test_init_does_not_trace_the_statistics(monkeypatch):
    """They were traced for each leaf: 20 s for 4000 leaves."""
    monkeypatch.setattr("adamx.wrappers.monitor.global_norm", None)
    state = adamx.monitor(adamx.adam(0.1), every=1).init({"a": jnp.ones(2), "b": jnp.zeros(0)})
    names = {name: sorted(groups) for name, groups in state["monitor"].items()}
    norms = {name: ["a", "b"] for name in ("grad_norm", "update_norm", "param_norm")}
    means = {name: ["a"] for name in ("update_mean", "signal_to_noise", "eps_share")}
    assert names == norms | means
