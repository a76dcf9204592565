"""Muon: beside Optax's, with kernels of more axes, stacked layers, and over devices."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import mesh_of
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from reference_family import newton_schulz

import adamx

pytestmark = pytest.mark.usefixtures("quick_compiler")

ULP = 2.0**-23
# Five steps take a difference to 480 times its size at most (through_newton_schulz in
# agreement_family.py), and round some ten times each; the norm of what comes out is sqrt(4) or so.
FIVE_STEPS = 2 * 480 * 10 * ULP


def draw(seed: int, **shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    """Numbers of both signs."""
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()
    }


def assert_near(got: Any, wanted: Any, bound: float) -> None:
    """Compare trees leaf by leaf, in units of the leaf's largest element."""

    def check(x: Any, y: Any) -> None:
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=0, atol=bound * np.abs(y).max(initial=0))

    jax.tree.map(check, got, wanted)


SHAPES: dict[str, Any] = {"tall": (6, 4), "wide": (3, 5), "bias": (4,)}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("rms", [None, 0.2])
def test_it_is_optaxs_and_a_run_goes_on_in_the_other_library(rms):
    """With decays whose corrections Optax computes well; `nesterov` is for both kinds of leaves."""
    options: dict[str, Any] = {
        "beta": 0.5, "weight_decay": 0.1, "adam_b1": 0.5, "adam_b2": 0.75, "adam_weight_decay": 0.2,
        "consistent_rms": rms, "adam_learning_rate": 0.3,
    }  # fmt: skip
    known = inspect.signature(optax.contrib.muon).parameters
    if rms and "consistent_rms" not in known:
        pytest.skip("this Optax has no such argument")
    options = {name: value for name, value in options.items() if name in known}
    ours, theirs = adamx.muon_adamw(0.1, **options), optax.contrib.muon(0.1, **options)
    params = draw(0, **SHAPES)
    grads = jax.tree.map(lambda *x: jnp.stack(x), *[draw(t, **SHAPES) for t in range(1, 5)])

    @jax.jit
    def walk() -> Any:
        def run(tx: Any) -> Any:
            def step(state: Any, g: Any) -> Any:
                updates, state = tx.update(g, state, params)
                return state, updates

            return jax.lax.scan(step, tx.init(params), grads)

        return run(ours), run(theirs)

    (mine, a), (its, b) = walk()
    assert_near(a, b, FIVE_STEPS)
    there, back = adamx.from_optax(its, ours, params), adamx.to_optax(mine, theirs, params)
    for x, y in ((there, mine), (back, its)):
        assert jax.tree.structure(x) == jax.tree.structure(y)
        assert_near(x, y, 16 * ULP)


def test_five_steps_make_singular_values_near_one_in_float32_and_bfloat16():
    """Also of tiny and huge updates; zero stays zero, and eps weighs what is far below it."""
    w = draw(0, w=(8, 24))["w"]
    for scale in (1.0, 1e-5, 1e12):
        for dtype, low, high in ((None, 0.68, 1.21), (jnp.bfloat16, 0.6, 1.3)):
            tx = adamx.orthogonalized(dtype=dtype)
            u = np.asarray(tx.update(scale * w, tx.init(w))[0], np.float64)
            values = np.linalg.svd(u, compute_uv=False)
            assert values.min() > low and values.max() < high
    tx = adamx.orthogonalized(eps=0.0)
    assert not tx.update(0 * w, tx.init(w))[0].any()
    tx = adamx.orthogonalized()
    assert jnp.abs(tx.update(1e-15 * w, tx.init(w))[0]).max() < 1e-3


def test_sides_may_be_axes_of_kernels_and_other_axes_are_stacked():
    """A kernel (in, heads, features), its transpose, and layers with an axis in the middle."""
    shapes: dict[str, Any] = {"query": (4, 2, 3), "out": (2, 3, 4), "layers": (3, 2, 5)}
    sides = {"query": (0, (1, 2)), "out": ((0, 1), -1), "layers": (0, 2)}
    g = draw(1, **shapes)
    tx = adamx.chain(
        adamx.orthogonalized(axes=lambda path, leaf: sides[path]),
        adamx.scale_by_shape(axes=lambda path, leaf: sides[path]),
    )
    got = tx.update(g, tx.init(g))[0]
    host = jax.tree.map(lambda x: np.asarray(x, np.float64), g)
    query = newton_schulz(host["query"].reshape(4, 6)).reshape(4, 2, 3) * np.sqrt(6 / 4)
    out = newton_schulz(host["out"].reshape(6, 4)).reshape(2, 3, 4)
    layers = np.stack([newton_schulz(host["layers"][:, i]) for i in range(2)], 1) * np.sqrt(5 / 3)
    assert_near(got, {"query": query, "out": out, "layers": layers}, FIVE_STEPS)
    stacked = adamx.stacked(adamx.muon(0.1, beta=0.0, nesterov=False), {"*": 1})
    g = {"layers": jnp.moveaxis(g["layers"], 1, 0)}
    got = stacked.update(g, stacked.init(g), g)[0]
    assert_near(got["layers"], -0.1 * np.moveaxis(layers, 1, 0), FIVE_STEPS)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_over_devices_the_steps_are_those_of_one(kind):
    """Divided along either side, both, a stacked axis, or two mesh axes at once."""
    mesh = mesh_of((2, 2), ("x", "y"), kind)
    specs = {"a": P("x"), "b": P(None, "y"), "c": P("x", "y"), "d": P(("x", "y")), "e": P("y", "x")}
    shapes = {"a": (4, 6), "b": (4, 6), "c": (6, 4), "d": (4, 3), "e": (2, 4, 3)}
    axes = lambda path, leaf: (leaf.ndim - 2, leaf.ndim - 1)  # noqa: E731
    tx = adamx.muon(0.1, axes=axes, weight_decay=0.1)
    host = {name: draw(i, w=shape)["w"] for i, (name, shape) in enumerate(shapes.items())}
    wanted, kept = tx.update(host, tx.init(host), host)
    where = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    params = jax.device_put(host, where)
    state = jax.jit(tx.init)(params)
    assert all(state["mu"][n].sharding.is_equivalent_to(where[n], host[n].ndim) for n in specs)
    got, state = jax.jit(tx.update)(params, state, params)
    assert_near(jax.device_get(got), wanted, FIVE_STEPS)
    if kind is AxisType.Explicit:
        assert all(got[n].sharding.is_equivalent_to(where[n], host[n].ndim) for n in specs)
    inside = adamx.in_shard_map(tx, specs)
    of_state = {name: specs if name == "mu" else P() for name in kept}
    update = jax.shard_map(
        inside.update, mesh=mesh, in_specs=(specs, of_state, specs), out_specs=(specs, of_state)
    )
    if kind is AxisType.Auto:
        got, _ = jax.jit(update)(params, inside.init(params), params)
        assert_near(jax.device_get(got), wanted, FIVE_STEPS)


def test_where_a_shard_is_not_known_it_says_so():
    mesh = mesh_of((2,), ("x",))
    g, tx = jnp.ones((4, 3)), adamx.orthogonalized()

    def update(tx: Any) -> Any:
        one = lambda g: tx.update(g, tx.init(g))[0]  # noqa: E731
        return jax.eval_shape(jax.shard_map(one, mesh=mesh, in_specs=P("x"), out_specs=P("x")), g)

    with pytest.warns(adamx.ShardWarning, match="over one device's shard"):
        update(tx)
    with pytest.raises(ValueError, match="give the leaf a PartitionSpec in the place"):
        update(adamx.in_shard_map(tx, "x"))


def test_masters_guard_and_clip_stand_around_both_kinds_in_one_state():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), draw(0, **SHAPES))
    inner = adamx.chain(adamx.clip_by_global_norm(1.0), adamx.muon_adamw(0.1, consistent_rms=0.2))
    tx = adamx.skip_nonfinite(adamx.master_weights(inner))
    assert "muon" not in repr(tx) and "is_matrix: chain(" in repr(tx) and "nesterov_ema" in repr(tx)
    step, state = adamx.make_step(tx), tx.init(params)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    alone, kept = adamx.make_step(inner), inner.init(wide)
    bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
    for t in range(1, 4):
        g = jax.tree.map(lambda x: x.astype(jnp.bfloat16), draw(t, **SHAPES))
        params, state = step(params, state, g)
        params, state = step(params, state, bad)
        wide, kept = alone(wide, kept, jax.tree.map(lambda x: x.astype(jnp.float32), g))
    assert_near(adamx.masters(params, state), wide, FIVE_STEPS)
    assert int(state["skipped"]) == 3 and int(state["count"]) == 3
    assert state["nu"]["tall"] is None and state["nu"]["bias"].shape == (4,)
    found = adamx.summary(tx, params)
    assert {leaf.path: leaf.group for leaf in found.leaves} == {
        "bias": "default", "tall": "is_matrix", "wide": "is_matrix"
    }  # fmt: skip
    assert "5 steps X <- 3.4445 X - 4.775 (X X^T) X + 2.0315 (X X^T)^2 X" in str(found)


@pytest.mark.usefixtures("standard_promotion")
def test_it_runs_in_inject_hyperparams():
    tx, plain = optax.inject_hyperparams(adamx.muon_adamw)(0.1), adamx.muon_adamw(0.1)
    params, g = draw(0, **SHAPES), draw(1, **SHAPES)
    got, state = jax.jit(tx.update)(g, jax.jit(tx.init)(params), params)
    assert_near(got, plain.update(g, plain.init(params), params)[0], FIVE_STEPS)
    assert state.hyperparams.keys() >= {"learning_rate", "beta", "adam_b2"}


def test_bad_arguments_are_named():
    cases: Any = [
        ({"ns_steps": 0}, ValueError, "ns_steps must be a whole number >= 1, got 0"),
        ({"ns_steps": 2.5}, TypeError, "ns_steps must be a whole number >= 1, got 2.5"),
        ({"ns_coeffs": (1.0, 2.0)}, ValueError, "ns_coeffs must be three finite numbers, or three"),
        ({"ns_coeffs": ((1.0, 2.0, 3.0),) * 4}, ValueError, ".*three for each of the 5 steps"),
        *(
            ({"ns_coeffs": bad}, ValueError, "ns_coeffs must be three finite numbers")
            for bad in ("dion", 2.0, (), ("a", "b", "c"), (1.0, 2.0, float("nan")), ((1.0,), 2, 3))
        ),
        ({"axes": (0,)}, ValueError, r"axes must be the axes of the rows and those of the columns"),
        ({"axes": "rows"}, ValueError, r"axes must be the axes of the rows and those of the col"),
    ]
    for options, kind, message in cases:
        with pytest.raises(kind, match=f"orthogonalized: {message}"):
            adamx.orthogonalized(**options)
    vector = {"b": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"leaf 'b' has the shape \[3\] and is not a matrix"):
        adamx.muon(0.1).init(vector)
    for tx in (adamx.orthogonalized(), adamx.scale_by_shape()):
        with pytest.raises(ValueError, match=r"leaf 'b' has the shape \[3\] and is not a matrix"):
            tx.update(vector, tx.init(vector))
    with pytest.raises(
        ValueError, match=r"different axes of the leaf, got \(0, \(0, 1\)\) for 'w'"
    ):
        adamx.muon(0.1, axes=(0, (0, 1))).init({"w": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match="predicate 'is_matrix' is true of no leaf"):
        adamx.muon_adamw(0.1).init({"b": jnp.ones(3)})
    own = adamx.orthogonalized(tuple((1.0 + i, 0.0, 0.0) for i in range(3)), 3, 0.0)
    u, _ = own.update(jnp.eye(1), own.init(jnp.eye(1)))
    np.testing.assert_array_equal(u, [[6.0]])
