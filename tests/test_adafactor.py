"""Adafactor where arrays are factored: beside Optax's, in its wrappers, and over devices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, mesh_of
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import adamx

pytestmark = pytest.mark.usefixtures("quick_compiler")

SHAPES = {
    "tall": (6, 4),
    "kernel": (5, 2, 7),
    "ties": (2, 4, 4),
    "small": (3, 8),
    "vector": (6,),
    "scalar": (),
}
STEPS, LEAST = 6, 4
OPTIONS: dict[str, Any] = {
    "min_dim_size_to_factor": LEAST, "momentum": 0.5, "weight_decay_rate": 0.01, "eps": 1e-6
}  # fmt: skip
ULP = 2.0**-23


def draw(seed: int) -> dict[str, jax.Array]:
    """Weights and gradients above 0: nothing cancels."""
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(rng.uniform(0.5, 2, shape), jnp.float32) for n, shape in SHAPES.items()}


def walk(tx: Any, state: Any, steps: Any) -> tuple[Any, Any]:
    """The updates of some steps from fixed weights, and the state."""
    grads = jax.tree.map(lambda *x: jnp.stack(x), *[draw(1 + t) for t in steps])
    params = draw(0)

    def step(state: Any, g: Any) -> Any:
        updates, state = tx.update(g, state, params)
        return state, updates

    state, updates = jax.lax.scan(step, state, grads)
    return updates, state


@pytest.mark.usefixtures("standard_promotion")
def test_arrays_of_all_shapes_are_factored_as_optax_does_and_a_run_goes_on_in_the_other_library():
    """Averages round 7 times a step (test_agreement.py), sums of 35 terms 35 times; roots halve it.

    Three roots of such sums meet in an update, and its average; 20 more come with the step.
    """
    ours, theirs = adamx.adafactor(0.1, **OPTIONS), optax.adafactor(0.1, **OPTIONS)
    half = range(STEPS // 2)

    @jax.jit
    def both() -> Any:
        one = [walk(tx, tx.init(draw(0)), half) for tx in (ours, theirs)]
        return one, [walk(tx, s, range(3, 6)) for tx, (_, s) in zip((ours, theirs), one)]  # noqa: B905

    ((a, mine), (b, its)), ((c, _), (d, _)) = both()
    rtol = (7 * STEPS + 3 * 35 + 20) * ULP
    for got, wanted in ((a, b), (c, d)):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol), got, wanted)
    params = draw(0)
    there, back = adamx.from_optax(its, ours, params), adamx.to_optax(mine, theirs, params)
    for x, y in ((there, mine), (back, its)):
        assert jax.tree.structure(x) == jax.tree.structure(y)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=0), x, y)
    shapes = {n: mine["nu_row"][n] is not None for n in SHAPES}
    assert {n for n, factored in shapes.items() if factored} == {"tall", "kernel", "ties"}
    assert mine["nu_row"]["tall"].shape == (1, 4) and mine["nu_col"]["kernel"].shape == (1, 2, 7)


@pytest.mark.usefixtures("standard_promotion")
def test_it_runs_in_inject_hyperparams():
    """Where the size decides shapes, it has to be known."""
    tx = optax.inject_hyperparams(adamx.adafactor)(0.1, momentum=0.5, weight_decay_rate=0.01)
    plain, params = adamx.adafactor(0.1, momentum=0.5, weight_decay_rate=0.01), draw(0)
    params = {"vector": params["vector"], "wide": jnp.ones((128, 130))}
    grads = jax.tree.map(lambda p: 0.5 * p, params)
    state = jax.jit(tx.init)(params)
    assert state.inner_state["nu"]["wide"] is None
    got, state = jax.jit(tx.update)(grads, state, params)
    # roundings of traced decays and rates
    wanted, _ = plain.update(grads, plain.init(params), params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=16 * ULP), got, wanted)
    assert state.hyperparams.keys() >= {"learning_rate", "decay_rate", "clipping_threshold"}
    given = optax.inject_hyperparams(adamx.adafactor)(0.1, min_dim_size_to_factor=4)
    given = given, given.init(params)
    with pytest.raises(TypeError, match=r"whole number >= 1 that is known.*name it in static_args"):
        jax.jit(given[0].update)(grads, given[1], params)
    static = optax.inject_hyperparams(adamx.adafactor, static_args="min_dim_size_to_factor")
    tx = static(0.1, min_dim_size_to_factor=200)
    _, state = jax.jit(tx.update)(grads, jax.jit(tx.init)(params), params)
    assert state.inner_state["nu_row"]["wide"] is None


def test_rows_and_columns_lie_where_their_parameter_does_and_steps_are_those_of_one_device():
    """A square matrix and a kernel too; the sums over devices are in another order."""
    mesh = mesh_of((2, 2), ("x", "y"))
    where = {"square": P("x", "y"), "kernel": P(None, "x", "y"), "vector": P("y")}
    shapes = {"square": (4, 4), "kernel": (8, 2, 6), "vector": (4,)}
    tx = adamx.adafactor(0.1, 4, momentum=0.5)
    host = {n: np.asarray(1.0 + np.arange(np.prod(s)).reshape(s), "f") for n, s in shapes.items()}
    params = {n: jax.device_put(host[n], NamedSharding(mesh, spec)) for n, spec in where.items()}
    told, state = adamx.state_sharding(tx, params), jax.jit(tx.init)(params)
    specs = {"square": (P("x", None), P(None, "y")), "kernel": (P(None, "x", "y"), P(None, "x"))}
    for name, pair in specs.items():
        for slot, spec in zip(("nu_row", "nu_col"), pair, strict=True):
            there = NamedSharding(mesh, spec)
            for one in (told[slot][name], state[slot][name].sharding):
                assert one.is_equivalent_to(there, len(shapes[name])), (name, slot)
    assert told["nu"]["vector"].spec == P("y")
    many = jax.device_get(jax.jit(tx.update)(params, state, params))
    one = jax.device_get(tx.update(host, tx.init(host), host))
    # sums of at most 96 squares
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2 * 96 * ULP), many, one)


def test_axes_and_size_may_be_chosen_and_bad_ones_are_named():
    def axes(path: str, leaf: Any) -> tuple[int, ...]:
        return (0, 2) if path == "kernel" else ()

    tx, params = adamx.factored_ema_of_squares(0.5, axes=axes), draw(0)
    updates, state = tx.update(params, tx.init(params), params)
    assert state["nu_row"]["kernel"].shape == (5, 2, 1) and state["nu_row"]["tall"] is None
    squares = np.asarray(params["kernel"], float) ** 2 / 2
    row, col = squares.mean(2, keepdims=True), squares.mean(0, keepdims=True)
    wanted = row * col / row.mean(0, keepdims=True)
    np.testing.assert_allclose(updates["kernel"], wanted, rtol=16 * ULP)
    assert_close(updates["tall"], params["tall"] ** 2 / 2)
    for bad in ((0,), (0, 0), (0, 1, 2), "rows"):
        with pytest.raises(ValueError, match=r"factored_ema_of_squares: axes must be the axis of"):
            adamx.factored_ema_of_squares(0.5, axes=bad)  # pyright: ignore
    with pytest.raises(ValueError, match=r"axes of the leaf, got \(0, 2\) for 'scalar' of shape"):
        adamx.factored_ema_of_squares(0.5, axes=(0, 2)).init({"scalar": jnp.ones(())})
    for function in (adamx.adafactor, adamx.factored_ema_of_squares):
        name = function.__name__
        cases: Any = ((0, ValueError), (2.5, TypeError), (True, TypeError), ("4", TypeError))
        for bad, kind in cases:
            with pytest.raises(kind, match=f"^{name}: min_dim_size_to_factor must be a whole"):
                function(0.5, bad)
    with pytest.raises(ValueError, match="adafactor: without momentum there are no moments"):
        adamx.adafactor(0.1, moments="bfloat16")
    with pytest.raises(ValueError, match="power_decay_schedule: exponent must be >= 0, got -1"):
        adamx.power_decay_schedule(-1)


def test_momentum_is_kept_in_two_bytes_near_the_one_in_four():
    """Rounded by 2^-8 at most in each step, which is halved in the next, and averaged in one."""
    params, updates = {"tall": draw(0)["tall"]}, []
    for moments in ("float32", "bfloat16"):
        tx = adamx.adafactor(0.1, 4, momentum=0.5, moments=moments)
        state, out = tx.init(params), params
        for t in range(2):
            out, state = tx.update({"tall": draw(t)["tall"]}, state, params)
        assert {x.dtype for x in jax.tree.leaves(state["mu"])} == {jnp.dtype(moments)}
        updates.append(out)
    assert state["nu_row"]["tall"].dtype == jnp.float32
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2.0**-7), *updates)
    assert updates[0]["tall"].tolist() != updates[1]["tall"].tolist()


def test_small_and_zero_gradients_give_finite_steps():
    """1e-30 is added to squares, whose product would be 0 in float32; all zeros give no step."""
    tx = adamx.adafactor(0.1, 2, multiply_by_parameter_scale=False)
    w = jnp.ones((3, 4))
    for g in (0 * w, 1e-20 * w, w.at[1].set(0)):
        u, _ = tx.update(g, tx.init(w), w)
        assert jnp.isfinite(u).all() and bool((jnp.sign(u) == -jnp.sign(g)).all())
    second = adamx.factored_ema_of_squares(0.5, 2, eps=0.0)
    u, _ = second.update(0 * w, second.init(w))
    assert not u.any()
    u, _ = adamx.scale_by_param_block_rms().update(w, adamx.identity().init(w), 1e30 * w)
    np.testing.assert_array_equal(u, w)  # the mean of the squares overflows
