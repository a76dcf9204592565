"""What every transformation keeps, whatever it computes: one table, one test for each promise."""

import collections
import dataclasses
import functools
import operator
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, draw, mesh_of, spec, thinned
from jax.sharding import NamedSharding, PartitionSpec
from table import TRANSFORMATIONS, every, of_each_kind, of_every_other_kind

import adamx
from adamx.storage import masters

# what is kept does not depend on optimised code, and compiling takes most of the time
pytestmark = pytest.mark.usefixtures("quick_compiler", "promotion_of_foreign_stages")


def every_either_way(first):
    """Every line, compiled or op by op: half of the latter, from this one on, in the fast tier.

    Op by op, each operation is compiled once for all lines, and no line has programs of its own.
    """
    slow = pytest.mark.slow
    fast = set(list(TRANSFORMATIONS)[first::2])
    return pytest.mark.parametrize(
        ("name", "way"),
        [
            pytest.param(name, way, marks=() if way == "op by op" and name in fast else slow)
            for way in ("op by op", "compiled")
            for name in TRANSFORMATIONS
        ],
    )


FLOATING = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64]

Point = collections.namedtuple("Point", "x y")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: jax.Array
    bias: jax.Array | None


def example(dtype=jnp.float32):
    """Return small parameters: always the same, so that each program is compiled once a process."""
    return draw({"w": jnp.zeros((4, 3), dtype), "b": jnp.zeros((), dtype)})


def run(tx, params, steps=3, update=None, seed=1):
    """Take a few steps; return (updates of the last, state)."""
    update = update or tx.update
    state = tx.init(params)
    updates = params
    for step in range(steps):
        updates, state = update(draw(params, seed + step), state, params)
    return updates, state


def run_abstractly(tx, params):
    """Return the shapes of (state, updates, state after a step) without running any of it."""

    def program(params):
        state = tx.init(params)
        return state, *tx.update(params, state, params)

    return jax.eval_shape(program, params)


def emitted(name, params):
    """What the updates of these parameters look like: like them, or wide enough for masters."""
    if not TRANSFORMATIONS[name].masters:
        return params
    return jax.tree.map(lambda p: p.astype(jnp.float32) if p.dtype.itemsize == 2 else p, params)


@of_each_kind
def test_is_an_optax_transformation_and_unpacks_like_one(name):
    tx = TRANSFORMATIONS[name].make()
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    init, update = list[Any](tx)
    state = init(example())
    updates, state = update(example(), state, example(), value=1.0, unknown_extra="ignored")
    assert spec(updates) == spec(example())


@every
@pytest.mark.parametrize("dtype", thinned(FLOATING), ids=lambda d: d.__name__)
def test_keeps_structure_shape_and_dtype(name, dtype):
    tx, params = TRANSFORMATIONS[name].make(), example(dtype)
    if TRANSFORMATIONS[name].packed and dtype == jnp.complex64:
        with pytest.raises(TypeError, match='moments="float32"'):
            tx.init(params)
        return
    before, updates, after = run_abstractly(tx, params)
    assert spec(updates) == spec(emitted(name, params))
    assert spec(after) == spec(before)


@every
def test_says_what_it_keeps(name):
    tx, params = TRANSFORMATIONS[name].make(), example()
    state = tx.init(params)
    assert sorted(state) == sorted(["count", *tx.state_names()])
    trees = [x for x in state if isinstance(state[x], dict) and state[x].keys() == params.keys()]
    assert sorted(trees) == sorted(tx.tree_names())


@of_each_kind
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
def test_keeps_wide_slots_for_16_bit_parameters(name, dtype):
    case = TRANSFORMATIONS[name]
    tx = case.make()
    ours = {k: v for k, v in tx.init(example(dtype)).items() if k not in ("ema", "inner")}
    if case.narrow or case.masters:
        ours = adamx.moments(tx.init(example(dtype)), tx)
    for slot, tree in ours.items():
        for leaf in jax.tree.leaves(tree):
            wide = leaf.dtype in (jnp.float32, jnp.int32)
            assert wide or slot in case.half_slots, (slot, leaf.dtype)


@of_each_kind
@pytest.mark.usefixtures("x64")
def test_float64_stays_float64(name):
    tx, params = TRANSFORMATIONS[name].make(), example(jnp.float64)
    if TRANSFORMATIONS[name].packed:
        with pytest.raises(TypeError, match='moments="float32"'):
            tx.init(params)
        return
    before, updates, after = run_abstractly(tx, params)
    assert spec(updates) == spec(params)
    assert spec(after) == spec(before)
    for slot in tx.tree_names():
        tree = after[slot]
        wanted = jnp.bfloat16 if slot in TRANSFORMATIONS[name].half_slots else jnp.float64
        if slot not in masters.NAMES:
            found = {leaf.dtype for leaf in jax.tree.leaves(tree)}
            assert found == {jnp.dtype(wanted)} or (TRANSFORMATIONS[name].varied and not found)
        else:
            assert not jax.tree.leaves(tree)


@of_each_kind
@pytest.mark.usefixtures("x64")
def test_float32_parameters_stay_float32_with_x64(name):
    tx, params = TRANSFORMATIONS[name].make(), example(jnp.float32)
    before, updates, after = run_abstractly(tx, params)
    assert spec(updates) == spec(params)
    assert spec(after) == spec(before)


@of_every_other_kind(1)
def test_eager_jitted_and_inline_agree(name):
    tx, params = TRANSFORMATIONS[name].make(), example()
    eager, jitted = run(tx, params), run(tx, params, update=jax.jit(tx.update))
    with jax.disable_jit():
        inline = run(tx, params)
    for other in (jitted, inline):
        assert_close(eager, other)


@of_each_kind
def test_second_call_does_not_compile(name, monkeypatch):
    tx, params = TRANSFORMATIONS[name].make(), example()
    traces = []
    original = type(tx).for_tree
    monkeypatch.setattr(
        type(tx), "for_tree", lambda self, tree: (traces.append(1), original(self, tree))[1]
    )
    state = tx.init(params)
    traces.clear()
    _, state = tx.update(params, state, params)
    first = len(traces)
    _, state = tx.update(params, state, params)
    if not TRANSFORMATIONS[name].foreign:  # Optax makes new closures each time
        # built anew but alike: the compiled program serves for it as well
        TRANSFORMATIONS[name].make().update(params, state, params)
    assert len(traces) == first


@of_each_kind
def test_carries_through_scan_and_cond(name):
    tx, params = TRANSFORMATIONS[name].make(), example()

    def body(carry, grads):
        updates, state = tx.update(grads, carry, params)
        return state, updates

    grads = [draw(params, 1 + step) for step in range(3)]
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *grads)
    state, updates = jax.lax.scan(body, tx.init(params), stacked)
    last, plain = run(tx, params)
    last_of_scan = jax.tree.map(lambda u: u[-1], updates)
    assert_close((last_of_scan, state), (last, plain))

    def sometimes(state):
        return jax.lax.cond(True, lambda s: tx.update(grads[0], s, params)[1], lambda s: s, state)

    assert jax.eval_shape(sometimes, state) == jax.eval_shape(lambda s: s, state)


@of_every_other_kind(1)
def test_vmap_over_models_is_a_loop_over_them(name):
    tx = TRANSFORMATIONS[name].make()
    many = [draw(example(), seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *many)

    def two_steps(params):
        updates, state = tx.update(params, tx.init(params), params)
        return tx.update(updates, state, params)

    together = jax.jit(jax.vmap(two_steps))(stacked)
    one = jax.jit(
        two_steps
    )  # in one program too: codes that are rounded at random hang on every bit
    for i, params in enumerate(many):
        alone = one(params)
        assert_close(jax.tree.map(operator.itemgetter(i), together), alone)


@every_either_way(0)
def test_derivative_is_finite_everywhere_also_at_zero(name, way):
    tx, params = TRANSFORMATIONS[name].make(), example()

    def moved(grads):
        updates, _ = tx.update(grads, tx.init(params), params)
        return sum(jnp.sum(u) for u in jax.tree.leaves(updates))

    grads = jax.tree.map(jnp.zeros_like, params)
    if way == "op by op" and not TRANSFORMATIONS[name].foreign:
        grads["b"] = None  # half as long
    with jax.disable_jit(way == "op by op"):
        if TRANSFORMATIONS[name].narrow:
            with pytest.raises(TypeError, match=r'no derivative.*moments="float32"'):
                jax.grad(moved)(grads)
            return
        for leaf in jax.tree.leaves(jax.jit(jax.grad(moved))(grads)):
            assert jnp.isfinite(leaf).all()


TREES: dict[str, Any] = {
    "dict": {},
    "None": None,
    "list": [],
    "scalar": jnp.zeros(()),
    "nested": [jnp.zeros(2), (jnp.zeros(3), None)],
    "namedtuple": Point(jnp.zeros(2), None),
    "dataclass": Layer(jnp.zeros((2, 3)), None),
    "mixed": {
        "layers": [
            Layer(jnp.zeros((2, 3)), jnp.zeros(3)),
            Point(jnp.zeros(0), jnp.zeros((1, 0))),
        ]
    },
    "equinox": eqx.filter(eqx.nn.MLP(2, 1, 3, 1, key=jax.random.key(0)), eqx.is_inexact_array),
}


@pytest.mark.parametrize(
    ("name", "tree"),
    [
        pytest.param(name, tree, marks=() if case.kind and (i + j) % 2 == 0 else pytest.mark.slow)
        for i, (name, case) in enumerate(TRANSFORMATIONS.items())
        for j, tree in enumerate(TREES if case.kind else ("None", "mixed", "equinox"))
    ],
)
def test_takes_any_pytree(name, tree):
    tx = TRANSFORMATIONS[name].make()
    params = draw(TREES[tree])
    before, updates, after = run_abstractly(tx, params)
    assert spec(updates) == spec(params)
    assert spec(after) == spec(before)
    assert set(after) == set(tx.init(example())), "slot names do not depend on the tree"
    for slot in tx.tree_names():
        if slot not in masters.NAMES:
            none = (lambda x: x is None) if TRANSFORMATIONS[name].varied else None
            there, wanted = (jax.tree.structure(x, is_leaf=none) for x in (after[slot], params))
            assert there == wanted


@of_each_kind
def test_takes_python_numbers_and_numpy_arrays(name):
    tx = TRANSFORMATIONS[name].make()
    params = {"w": np.ones((4, 3), np.float32), "b": 0.5}
    updates, state = tx.update(params, tx.init(params), params)
    assert spec(updates) == {"w": ((4, 3), jnp.float32, False), "b": ((), jnp.float32, False)}
    assert spec(state) == spec(tx.init(params))


@of_each_kind
def test_a_leaf_without_update_keeps_its_slots(name):
    tx, params = TRANSFORMATIONS[name].make(), example()
    _, state = tx.update(draw(params, 1), tx.init(params), params)
    grads = draw(params, 2) | {"w": None}
    if name == "chain_foreign":  # optax.ema loses its average there
        with pytest.raises(ValueError, match=r"where a gradient is None.*drops its entry"):
            tx.update(grads, state, params)
        return
    updates, after = tx.update(grads, state, params)
    assert updates["w"] is None
    for slot in tx.tree_names():
        np.testing.assert_array_equal(after[slot]["w"], state[slot]["w"])


@of_every_other_kind(0)
def test_stands_inside_optax(name):
    tx, params = TRANSFORMATIONS[name].make(), example()
    wanted, _ = tx.update(params, tx.init(params), params)
    label = functools.partial(jax.tree.map, lambda _: "all")
    outers = [
        optax.chain(optax.identity(), tx),
        optax.masked(tx, True),
        optax.multi_transform({"all": tx}, label),
        adamx.chain(tx),
        adamx.chain(adamx.named("all", tx)),
    ]
    if not tx.place == "outermost":
        outers.append(adamx.chain(adamx.identity(), adamx.chain(tx)))
    together = jax.jit(lambda p: [outer.update(p, outer.init(p), p)[0] for outer in outers])
    for got in together(params):
        assert_close(got, wanted)


@pytest.mark.parametrize("name", ["adamw_masked", "rmsprop_centered", "sgd_momentum", "named"])
def test_multi_steps_takes_the_mean_gradient(name):
    tx, params = TRANSFORMATIONS[name].make(), example()
    grads = [draw(params, seed) for seed in (1, 2)]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
    wanted, _ = tx.update(mean, tx.init(params), params)
    outer = optax.MultiSteps(tx, 2)
    state = outer.init(params)
    update = jax.jit(outer.update)
    with jax.numpy_dtype_promotion("standard"):
        none, state = update(grads[0], state, params)
        got, state = update(grads[1], state, params)
    assert all(not leaf.any() for leaf in jax.tree.leaves(none))
    # the mean is accumulated in another order: a ULP of the gradient, at most 16 of the update
    # where it is a difference such as u - ema
    assert_close(got, wanted)


@of_each_kind
def test_every_result_takes_the_place_of_an_argument(name):
    """Nothing is at another address in the next step, of which a GPU would have to be told."""
    tx, params = TRANSFORMATIONS[name].make(), example()

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params)
    places = re.findall(r"tf\.aliasing_output = (\d+)", lowered.as_text())
    assert sorted(map(int, places)) == [*range(len(jax.tree.leaves((params, state))))]


@of_each_kind
def test_runs_under_shard_map(name):
    tx = TRANSFORMATIONS[name].make()
    mesh = mesh_of((2,), ("data",))
    params = example()
    state = tx.init(params)
    split = PartitionSpec() if TRANSFORMATIONS[name].whole else PartitionSpec("data")
    specs = jax.tree.map(lambda x: split if jnp.ndim(x) else PartitionSpec(), (params, state))

    update = jax.shard_map(
        lambda g, s, p: tx.update(g, s, p),
        mesh=mesh,
        in_specs=(specs[0], specs[1], specs[0]),
        out_specs=specs,
    )
    got = jax.jit(update)(params, state, params)
    wanted = tx.update(params, state, params)
    assert_close(got, wanted)


@of_each_kind
def test_slots_of_sharded_parameters_are_sharded_alike(name):
    tx = TRANSFORMATIONS[name].make()
    mesh = mesh_of((2,), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    params = jax.device_put(draw({"w": jnp.zeros((4, 3))}), sharding)
    state = tx.init(params)
    slots = [n for n in tx.tree_names() if state[n]["w"] is not None]
    slots = [n for n in slots if state[n]["w"].shape == params["w"].shape]
    for slot in slots:  # made by the compiled init, as those of all parameters on many devices
        assert state[slot]["w"].sharding == sharding
    _, state = jax.jit(tx.update)(params, state, params)
    for slot in slots:
        assert state[slot]["w"].sharding.is_equivalent_to(sharding, 2)


@every_either_way(1)
def test_finite_in_finite_out_for_16_bit_gradients_of_any_value(name, way):
    case = TRANSFORMATIONS[name]
    tx = case.make()
    for dtype in (jnp.bfloat16, *([] if way == "op by op" else [jnp.float16])):
        info = jnp.finfo(dtype)
        # 0.25 of the largest number: what is legitimately larger than its input (the sum of a
        # trace, a square) may overflow the emitted dtype; the largest itself is in test_numerics
        values = [0.0, float(info.smallest_subnormal), 1e-4, 300.0, 0.25 * float(info.max)]
        if case.squares:
            values = values[:3]
        grads = jnp.asarray([s * v for v in values for s in (1, -1)], dtype)
        if case.larger:
            grads = grads / jnp.asarray(16, dtype)
        with jax.disable_jit(way == "op by op"):
            state = tx.init(grads)
            for _ in range(2):
                updates, state = tx.update(grads, state, grads)
                for leaf in jax.tree.leaves((updates, state)):
                    # a recorded norm above 1.8e19 is infinite
                    right = jnp.isfinite(leaf) if leaf.ndim else ~jnp.isnan(leaf)
                    assert right.all(), (dtype, updates, state)


@of_each_kind
@pytest.mark.parametrize("shape", [(2**16, 2**16), (2**31 + 8,)], ids=str)
def test_a_leaf_may_have_more_elements_than_int32_can_count(name, shape):
    tx = TRANSFORMATIONS[name].make()
    like = {
        "w": jax.ShapeDtypeStruct(shape, jnp.float32),
        "b": jax.ShapeDtypeStruct((), jnp.float32),
    }
    state = jax.eval_shape(tx.init, like)
    updates, after = jax.eval_shape(tx.update, like, state, like)
    assert updates["w"].shape == shape and spec(after) == spec(state)
    assert adamx.summary(tx, like).size == like["w"].size + 1
